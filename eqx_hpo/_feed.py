"""Where the driver takes its data from: arrays on the device as they are, Python
iterators a batch at a time."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._custom_types import Batch
from ._data import AbstractBatches, Stacked
from ._misc import as_device_arrays


class Feed:
    """The data of one level, for one call of `step` after another.

    `is_static` tells whether every call gets the same object. From an iterator a call
    takes `count` batches as one `Stacked`, or a single plain batch if that is `None`.
    """

    def __init__(self, data: Any, name: str, count: int | None):
        self._name = name
        self._count = count
        self._loader: Iterable[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._same: Any = None
        self._peeked: list[Any] = []
        self.is_static = not is_loader(data)
        if self.is_static:
            self._same = as_device_arrays(data)
        else:
            self._loader = data

    def peek(self) -> Batch | AbstractBatches:
        """Returns what `next` will give, or `None` at the end of the data."""
        if len(self._peeked) == 0:
            try:
                self._peeked.append(self.next())
            except StopIteration:
                return None
        return self._peeked[0]

    def next(self) -> Batch | AbstractBatches:
        """Returns the data for one call of `step`.

        **Raises:** `StopIteration` when an iterator that cannot be started again ends.
        """
        if self.is_static:
            return self._same
        if len(self._peeked) > 0:
            return self._peeked.pop()
        first = self._pull()
        if isinstance(first, AbstractBatches) or self._count is None:
            return first
        batches = [first] + [self._pull() for _ in range(self._count - 1)]
        try:
            return Stacked(jtu.tree_map(_stack, *batches))
        except ValueError as e:
            raise ValueError(
                f"`{self._name}` gave batches of different shapes or structures within "
                "one step; they must be equal to be stacked. Let the loader drop the "
                "last, incomplete batch."
            ) from e

    def _pull(self) -> Any:
        assert self._loader is not None
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            return next(self._iterator)
        except StopIteration:
            fresh = iter(self._loader)
            if fresh is self._iterator:
                raise
            self._iterator = fresh
        try:
            return next(fresh)
        except StopIteration:
            raise ValueError(f"`{self._name}` is empty: it gave no batch.") from None


def is_loader(data: Any) -> bool:
    """Tells whether `data` is a Python iterator or iterable, and no pytree of
    arrays."""
    leaf = jtu.all_leaves([data])
    is_array = hasattr(data, "shape") and hasattr(data, "dtype")
    return leaf and not is_array and isinstance(data, Iterable)


def _stack(*arrays: Any) -> Any:
    # Arrays that are on a device already stay there.
    on_device = all(isinstance(x, jax.Array) for x in arrays)
    return jnp.stack(arrays) if on_device else np.stack(arrays)
