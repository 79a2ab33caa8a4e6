"""Fills the slots of algorithms that have no memory of their own."""

from .._custom_types import Batch, Hyperparams
from .._state import InnerState, Memory
from .base import AbstractAlgorithm


class AbstractMemoryless(AbstractAlgorithm):
    """An algorithm that carries nothing from step to step and reports nothing."""

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del inner, hyperparams, batch
        return Memory()

    def init_diagnostics(self) -> None:
        return None
