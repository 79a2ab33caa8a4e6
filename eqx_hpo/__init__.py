import importlib.metadata

from ._audit import Audit as Audit, audit as audit
from ._checkpoint import load as load, save as save
from ._checkpoints import Checkpoints as Checkpoints
from ._data import (
    AbstractBatches as AbstractBatches,
    Minibatch as Minibatch,
    Stacked as Stacked,
)
from ._diagnostics import (
    compare_hypergradients as compare_hypergradients,
    Comparison as Comparison,
    ComparisonRow as ComparisonRow,
)
from ._discrete import (
    AbstractDiscrete as AbstractDiscrete,
    Choice as Choice,
    discretise as discretise,
    Integer as Integer,
    Switch as Switch,
)
from ._fit import fit as fit
from ._folds import folds as folds
from ._hyperparameter import (
    AbstractHyperparameter as AbstractHyperparameter,
    Interval as Interval,
    is_hyperparameter as is_hyperparameter,
    partition as partition,
    Positive as Positive,
    Real as Real,
    Schedule as Schedule,
    Simplex as Simplex,
    unwrap as unwrap,
)
from ._levels import Levels as Levels
from ._linear_solver import Neumann as Neumann, Nystrom as Nystrom
from ._meta import MetaLearner as MetaLearner
from ._monitor import Best as Best, Monitor as Monitor, Readings as Readings
from ._optimizer import (
    AbstractAlgorithm as AbstractAlgorithm,
    AbstractBilevelOptimizer as AbstractBilevelOptimizer,
    DrMAD as DrMAD,
    Evolution as Evolution,
    EvolutionReport as EvolutionReport,
    FirstOrder as FirstOrder,
    FixedPoint as FixedPoint,
    ForwardMode as ForwardMode,
    Greedy as Greedy,
    HyperDistill as HyperDistill,
    Implicit as Implicit,
    ImplicitReport as ImplicitReport,
    Penalty as Penalty,
    PenaltyReport as PenaltyReport,
    SOBA as SOBA,
    T1T2 as T1T2,
    Unrolled as Unrolled,
)
from ._outer import (
    AbstractPenalty as AbstractPenalty,
    anchor as anchor,
    Box as Box,
    ElasticNet as ElasticNet,
    gate as gate,
    GroupLasso as GroupLasso,
    L1 as L1,
    mirror as mirror,
    project as project,
    proximal as proximal,
    select_top_k as select_top_k,
)
from ._precision import mixed_precision as mixed_precision
from ._problem import Problem as Problem
from ._search import search as search
from ._second_order import (
    AbstractSecondOrder as AbstractSecondOrder,
    FiniteDifference as FiniteDifference,
    ForwardOverReverse as ForwardOverReverse,
    ReverseOverReverse as ReverseOverReverse,
)
from ._solution import (
    Discretised as Discretised,
    History as History,
    RESULTS as RESULTS,
    Solution as Solution,
)
from ._state import (
    BilevelState as BilevelState,
    Estimate as Estimate,
    InnerState as InnerState,
    Memory as Memory,
    Metrics as Metrics,
    TaskReport as TaskReport,
)
from ._summary import summary as summary
from ._tune import tune as tune
from ._tune_folds import FoldsSolution as FoldsSolution, tune_folds as tune_folds


__version__ = importlib.metadata.version("eqx_hpo")
