from .base import (
    AbstractAlgorithm as AbstractAlgorithm,
    raw_estimate as raw_estimate,
)
from .drmad import DrMAD as DrMAD
from .evolution import Evolution as Evolution, EvolutionReport as EvolutionReport
from .first_order import FirstOrder as FirstOrder
from .fixed_point import FixedPoint as FixedPoint
from .forward_mode import ForwardMode as ForwardMode
from .greedy import Greedy as Greedy
from .guard import next_state as next_state
from .hyperdistill import HyperDistill as HyperDistill
from .implicit import (
    failed_solve as failed_solve,
    Implicit as Implicit,
    ImplicitReport as ImplicitReport,
)
from .interface import AbstractBilevelOptimizer as AbstractBilevelOptimizer
from .parallel_training import (
    for_each as for_each,
    ParallelTraining as ParallelTraining,
)
from .penalty import Penalty as Penalty, PenaltyReport as PenaltyReport
from .plain_training import PlainTraining as PlainTraining
from .soba import SOBA as SOBA
from .t1t2 import T1T2 as T1T2
from .tracing import warn_if_same as warn_if_same
from .unrolled import Unrolled as Unrolled
