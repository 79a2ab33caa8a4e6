"""The part that algorithms without a memory of their own have in common."""

from typing import ClassVar

from .._custom_types import Batch, Hyperparams
from .._state import InnerState, Memory
from .base import AbstractBilevelOptimizer


class AbstractMemoryless(AbstractBilevelOptimizer):
    """An algorithm that carries nothing from step to step."""

    tasks: ClassVar[None] = None
    sharing: ClassVar[None] = None

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del inner, hyperparams, batch
        return Memory()

    def init_diagnostics(self) -> None:
        return None
