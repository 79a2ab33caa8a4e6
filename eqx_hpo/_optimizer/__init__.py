from .base import AbstractBilevelOptimizer as AbstractBilevelOptimizer
from .drmad import DrMAD as DrMAD
from .first_order import FirstOrder as FirstOrder
from .greedy import Greedy as Greedy
from .hyperdistill import HyperDistill as HyperDistill
from .t1t2 import T1T2 as T1T2
from .unrolled import Unrolled as Unrolled
