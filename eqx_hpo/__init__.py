import importlib.metadata

from ._checkpoint import load as load, save as save
from ._data import (
    AbstractBatches as AbstractBatches,
    Minibatch as Minibatch,
    Stacked as Stacked,
)
from ._hyperparameter import (
    AbstractHyperparameter as AbstractHyperparameter,
    Interval as Interval,
    is_hyperparameter as is_hyperparameter,
    partition as partition,
    Positive as Positive,
    Real as Real,
    Simplex as Simplex,
    unwrap as unwrap,
)
from ._levels import Levels as Levels
from ._optimizer import (
    AbstractBilevelOptimizer as AbstractBilevelOptimizer,
    FirstOrder as FirstOrder,
    Greedy as Greedy,
    T1T2 as T1T2,
    Unrolled as Unrolled,
)
from ._problem import Problem as Problem
from ._second_order import (
    AbstractSecondOrder as AbstractSecondOrder,
    FiniteDifference as FiniteDifference,
    ForwardOverReverse as ForwardOverReverse,
    ReverseOverReverse as ReverseOverReverse,
)
from ._solution import History as History, RESULTS as RESULTS, Solution as Solution
from ._state import (
    BilevelState as BilevelState,
    Estimate as Estimate,
    InnerState as InnerState,
    Metrics as Metrics,
)
from ._tune import tune as tune


__version__ = importlib.metadata.version("eqx_hpo")
