"""Feeds data to the driver: arrays on the device unchanged, and Python iterators one
batch at a time."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from . import _loader_state
from ._custom_types import Batch
from ._data import AbstractBatches, numbers_as_arrays, Stacked
from ._misc import as_device_arrays
from ._optimizer import AbstractBilevelOptimizer


class Feed:
    """Feeds the data of one level to one call of `step` after another.

    `is_static` tells whether every call gets the same object. From an iterator, a call
    takes `count` batches as one `Stacked`, or a single plain batch if `count` is
    `None`.

    The position of a feed is the position that the loader reports, and the number of
    batches used since. If the loader reports none, the batches are counted from the
    start.
    """

    def __init__(self, data: Any, name: str, count: int | None):
        self._name = name
        self._count = count
        self._loader: Iterable[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._same: Any = None
        self._peeked: list[Any] = []
        self._pulled = self._used = 0  # batches
        self._said: Any = None  # by the loader, when `_said_at` batches were used
        self._said_at = 0
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

    def commit(self) -> None:
        """Notes that a step has used the last data of `next`."""
        self._used = self._pulled

    def check_position(self) -> None:
        """Refuses a loader whose position cannot be written, before a save needs it."""
        teller = self._teller()
        if teller is not None:
            _loader_state.get_state(self._name, teller)

    def position(self) -> dict[str, Any] | None:
        """Returns the position after the last step in a form for JSON, or `None` for
        arrays."""
        if self.is_static:
            return None
        teller = self._teller()
        # What was taken for a step that was never made must come again.
        if teller is not None and self._pulled == self._used:
            self._said = _loader_state.get_state(self._name, teller)
            self._said_at = self._used
        return {"loader": self._said, "skip": self._used - self._said_at}

    def go_to(self, position: dict[str, Any] | None) -> None:
        """Moves to a position that a feed of the same data had."""
        if self.is_static or position is None:
            return
        self._said, skip = position["loader"], position["skip"]
        if self._said is not None:
            self._restore(self._said)
        if skip > 0:
            self._peeked.clear()
        try:
            while self._pulled < skip:
                self._pull()
        except StopIteration:
            raise ValueError(
                f"`{self._name}` ended after {self._pulled} batches; the run that the "
                f"checkpoint is of had taken {skip}."
            ) from None
        self._used = skip

    def _restore(self, said: Any) -> None:
        self._peeked.clear()
        self._pulled, self._iterator = 0, None
        if not _loader_state.has_state(self._loader):
            assert self._loader is not None
            self._iterator = iter(self._loader)
        teller = self._teller()
        if teller is None:
            raise ValueError(
                f"`{self._name}` does not tell its position any more, as it did in the "
                "run that the checkpoint is of."
            )
        _loader_state.set_state(teller, said)

    def _teller(self) -> Any:
        """Finds the object that reports the position: the loader, or else its
        iterator."""
        for x in (self._loader, self._iterator):
            if _loader_state.has_state(x):
                return x
        return None

    def _check_stackable(self, batch: Batch) -> None:
        for path, x in jtu.tree_leaves_with_path(batch):
            if not (hasattr(x, "shape") or isinstance(x, (bool, int, float, complex))):
                raise ValueError(
                    f"`{self._name}{jtu.keystr(path)}` is {x!r}, which cannot be part "
                    "of an array. Leave it out of the batches."
                )

    def _pull(self) -> Any:
        batch = self._pull_uncounted()
        self._pulled += 1
        return batch

    def _pull_uncounted(self) -> Any:
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
    """Tells whether `data` is a Python iterator or iterable, and not a pytree of
    arrays."""
    leaf = jtu.all_leaves([data])
    is_array = hasattr(data, "shape") and hasattr(data, "dtype")
    is_single = is_array or isinstance(data, str)
    return leaf and not is_single and isinstance(data, Iterable)


def _stack(*arrays: Any) -> Any:
    # Arrays that are on a device already stay there.
    on_device = all(isinstance(x, jax.Array) for x in arrays)
    return jnp.stack(arrays) if on_device else np.stack(arrays)
