"""The part that algorithms without a memory of their own have in common."""

from jaxtyping import PyTree

from .._custom_types import Hyperparams
from .._state import InnerState
from .base import AbstractBilevelOptimizer


class AbstractMemoryless(AbstractBilevelOptimizer):
    """An algorithm that carries nothing from step to step."""

    def init_memory(self, inner: InnerState, hyperparams: Hyperparams) -> PyTree:
        del inner, hyperparams
        return None

    def restart_memory(self, memory: PyTree, inner: InnerState) -> PyTree:
        del inner
        return memory
