"""Where the driver takes its data from: arrays on the device as they are, Python
iterators a batch at a time."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._custom_types import Batch
from ._data import AbstractBatches, numbers_as_arrays, Stacked
from ._misc import as_device_arrays
from ._optimizer import AbstractBilevelOptimizer


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
            self._same = as_device_arrays(numbers_as_arrays(data))
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
            return numbers_as_arrays(first)
        batches = [first] + [self._pull() for _ in range(self._count - 1)]
        self._check_stackable(first)
        try:
            return Stacked(jtu.tree_map(_stack, *batches))
        except ValueError as e:
            raise ValueError(
                f"`{self._name}` gave batches of different shapes or structures within "
                "one step; they must be equal to be stacked. Let the loader drop the "
                "last, incomplete batch."
            ) from e

    def _check_stackable(self, batch: Batch) -> None:
        for path, x in jtu.tree_leaves_with_path(batch):
            if not (hasattr(x, "shape") or isinstance(x, (bool, int, float, complex))):
                raise ValueError(
                    f"`{self._name}{jtu.keystr(path)}` is {x!r}, which cannot be part "
                    "of an array. Leave it out of the batches."
                )

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


def make_feeds(
    algorithm: AbstractBilevelOptimizer, train: Any, val: Any
) -> tuple[Feed, Feed]:
    """Makes the feeds of the two levels, as `tune` describes them."""
    if val is train and is_loader(train):
        warnings.warn(
            "`val` is the same iterator as `train`: each takes batches away from the "
            "other, and the hyperparameters are fitted to the train data. Give a "
            "loader of validation data.",
            stacklevel=3,
        )
    val_count = algorithm.inner_steps if algorithm.val_at_each_step else None
    train_feed = Feed(train, "train", algorithm.inner_steps)
    if val is train and train_feed.is_static:
        val = train_feed.next()  # still the same, which `init` warns of
    return train_feed, Feed(val, "val", val_count)


def is_loader(data: Any) -> bool:
    """Tells whether `data` is a Python iterator or iterable, and no pytree of
    arrays."""
    leaf = jtu.all_leaves([data])
    is_array = hasattr(data, "shape") and hasattr(data, "dtype")
    is_single = is_array or isinstance(data, str)
    return leaf and not is_single and isinstance(data, Iterable)


def _stack(*arrays: Any) -> Any:
    # Arrays that are on a device already stay there.
    on_device = all(isinstance(x, jax.Array) for x in arrays)
    return jnp.stack(arrays) if on_device else np.stack(arrays)
