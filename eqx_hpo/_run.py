"""A run of a bilevel optimizer, cut into calls of one compiled function.

With data on the device a call is a loop of many steps; with batches from the host, or
with convolutions on a CPU, it is one step. Records of the history are written on the
device and drained by the host when their block is full.
"""

import dataclasses
import time
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import PyTree

from ._custom_types import Hyperparams, Key, Model
from ._data import as_batches
from ._discrete import has_discrete, without_noise
from ._feed import Feed
from ._hyperparameter import unwrap
from ._jit import filter_jit, filter_jit_donating_first
from ._misc import check_same_structure, holds_convolution
from ._optimizer import AbstractBilevelOptimizer, failed_solve
from ._solution import (
    as_history,
    compare_discretised,
    describe,
    Discretised,
    Record,
    record,
    RESULTS,
    Solution,
)
from ._state import BilevelState


_CALL_SECONDS = 0.1  # what a call of many steps should take
_HISTORY_NUMBERS = 2**20  # in a block of the history
_HISTORY_ROWS = 256


class Run:
    """The state and the history of a run, as they are replaced call by call.

    `step` and `skipped` are those of `state`, on the host; `skipped` lags a step behind
    where a call is one step.
    """

    def __init__(
        self,
        optimizer: AbstractBilevelOptimizer,
        train: Feed,
        val: Feed,
        key: Key,
        state: BilevelState,
        interval: int,
        max_skipped: int,
    ):
        self.state = copy_state(state)  # since it will be donated
        self.step = int(state.step)
        self.skipped = int(state.skipped)
        if self.skipped >= max_skipped:
            self.skipped = 0
            self.state = eqx.tree_at(
                lambda s: s.skipped, self.state, jnp.zeros((), int)
            )
        self._optimizer = optimizer
        self._train = train
        self._val = val
        self._key = key
        self._interval = interval
        self._max_skipped = max_skipped
        self._loops = _can_loop(optimizer, self.state, train, val, key)
        self._chunk = 1
        self._status: Any = None
        self._last_val: list[Any] = []  # none before the first step
        self._history: list[Record] = []
        self._drained = self.step // interval
        self._rows, self._capacity = _empty_rows(self.state)

    def restart(
        self, model: Model, model_state: PyTree, hyperparams: Hyperparams | None = None
    ) -> None:
        """Starts the inner level afresh, with other hyperparameters if given."""
        state = self.state
        if hyperparams is not None:
            state = dataclasses.replace(state, hyperparams=hyperparams)
        state = self._optimizer.restart(state, model, model_state=model_state)
        self.state = copy_state(state)  # of `model`, which is the user's

    def advance(self, limit: int, donate: bool) -> None:
        """Takes at most `limit` steps."""
        room = (self._drained + self._capacity) * self._interval - self.step
        limit = min(limit, room, self._chunk if self._loops else 1)
        train, val = self._train.next(), self._val.next()
        self._last_val = [val]
        call = _advance_donating if donate else _advance_keeping
        start = time.monotonic()
        self.state, self._rows, status = call(
            (self.state, self._rows),
            self._optimizer,
            train,
            val,
            self._key,
            np.int32(limit),
            np.int32(self._interval),
            np.int32(self._drained),
            np.int32(self._max_skipped),
            self._loops,
        )
        if self._loops:
            self.step, self.skipped = jax.device_get(status).tolist()
            seconds = time.monotonic() - start
            # Only where the chunk was what bounded the call: else it grows for ever.
            if seconds < _CALL_SECONDS / 2 and limit == self._chunk:
                self._chunk *= 2
            elif seconds > _CALL_SECONDS * 2 and self._chunk > 1:
                self._chunk //= 2
        else:
            # Waits for the step before, so that one is always under way.
            if self._status is not None:
                self.skipped = int(jax.device_get(self._status)[1])
            self._status = status
            self.step += 1
        if self.step // self._interval - self._drained == self._capacity:
            self._drain()

    def has_failed(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.skipped >= self._max_skipped

    def is_alive(self) -> bool:
        """Whether the state was not lost to a call that failed after donating it."""
        arrays = jtu.tree_leaves(eqx.filter(self.state, eqx.is_array))
        return not any(x.is_deleted() for x in arrays)

    def finish(self, result: Any) -> Solution:
        """Joins what there is, with an item of `RESULTS`."""
        self._drain()
        last = jtu.tree_map(lambda x: np.asarray(x)[None], record(self.state))
        if len(self._history) == 0 or self._history[-1].step[-1] != last.step[0]:
            self._history.append(last)
        step, skipped = int(self.state.step), int(self.state.skipped)
        self.skipped = skipped
        if result == RESULTS.successful and self.has_failed():
            result = RESULTS.nonfinite
        solve = failed_solve(self.state.metrics.diagnostics)
        if result == RESULTS.successful and solve is not None:
            result = solve
        # The next step draws its noise anew anyhow.
        hyperparams = without_noise(self.state.hyperparams)
        self.state = eqx.tree_at(lambda s: s.hyperparams, self.state, hyperparams)
        discretised = self._discretise()
        return Solution(
            model=self.state.model,
            hyperparams=hyperparams,
            values=unwrap(hyperparams),
            history=as_history(self._history),
            result=cast(RESULTS, result),
            state=self.state,
            message=describe(result, self.state, step, skipped, discretised),
            discretised=discretised,
        )

    def _discretise(self) -> Discretised | None:
        if not has_discrete(self.state.hyperparams) or len(self._last_val) == 0:
            return None
        key = self._key if self._key is None else jr.fold_in(self._key, self.step)
        val = as_batches(self._last_val[0], "val", self._optimizer.inner_steps)
        return compare_discretised(self._optimizer.problem, self.state, val, key)

    def _drain(self) -> None:
        count = self.step // self._interval - self._drained
        if count > 0:
            rows = jax.device_get(self._rows)
            self._history.append(jtu.tree_map(lambda x: x[:count].copy(), rows))
            self._drained += count


def start(
    optimizer: AbstractBilevelOptimizer,
    model: Model,
    hyperparams: Hyperparams,
    train: Feed,
    val: Feed,
    key: Key,
    state: BilevelState | None,
    model_state: PyTree,
) -> BilevelState:
    """The state of a fresh start, or the one given if it has that structure."""
    fresh = optimizer.init(
        model,
        hyperparams,
        train=train.peek(),
        val=val.peek(),
        model_state=model_state,
        key=key,
    )
    if state is None:
        return fresh
    given = state
    if given.metrics.aux is None:
        is_none = lambda x: x is None
        aux = fresh.metrics.aux
        given = eqx.tree_at(lambda s: s.metrics.aux, given, aux, is_leaf=is_none)
    check_same_structure("state", given, fresh, "the state of a fresh start")
    return given


def _empty_rows(state: BilevelState) -> tuple[Record, int]:
    row = jax.eval_shape(record, eqx.filter(state, eqx.is_array))
    numbers = sum(x.size for x in jtu.tree_leaves(row))
    capacity = max(1, min(_HISTORY_ROWS, _HISTORY_NUMBERS // numbers))
    empty = lambda x: jnp.zeros((capacity, *x.shape), x.dtype)
    return jtu.tree_map(empty, row), capacity


def _can_loop(optimizer, state, train, val, key) -> bool:
    if not (train.is_static and val.is_static):
        return False
    if jax.default_backend() != "cpu":
        return True
    # Workaround for https://github.com/jax-ml/jax/issues/12868: convolutions in a loop
    # run many times slower on CPUs.
    args = (optimizer, state, train.next(), val.next())
    arrays, static = eqx.partition(args, eqx.is_array)

    def step(arrays, key):
        optimizer, state, train, val = eqx.combine(arrays, static)
        return eqx.filter(optimizer.step(state, train, val, key=key), eqx.is_array)

    return not holds_convolution(step, arrays, key)


def _advance(
    carry, optimizer, train, val, key, limit, interval, drained, max_skipped, loop
):
    """Takes `limit` steps, or one; writes a row of the history where one is due."""
    state, rows = carry
    arrays, static = eqx.partition(state, eqx.is_array)

    def body(carry):
        count, arrays, rows = carry
        state = eqx.combine(arrays, static)
        step_key = None if key is None else jr.fold_in(key, state.step)
        state = optimizer.step(state, train, val, key=step_key)
        number = state.step // interval - 1 - drained

        def write(rows):
            put = lambda block, x: block.at[number].set(x)
            return jtu.tree_map(put, rows, record(state))

        rows = lax.cond(state.step % interval == 0, write, lambda rows: rows, rows)
        return count + 1, eqx.filter(state, eqx.is_array), rows

    def proceed(carry):
        count, arrays, _ = carry
        return (count < limit) & (arrays.skipped < max_skipped)

    carry = (jnp.array(0), arrays, rows)
    _, arrays, rows = lax.while_loop(proceed, body, carry) if loop else body(carry)
    status = jnp.stack([arrays.step, arrays.skipped])
    return eqx.combine(arrays, static), rows, status


_advance_keeping = filter_jit(_advance)
_advance_donating = filter_jit_donating_first(_advance)


def copy_state(state: BilevelState) -> BilevelState:
    """The same state in other buffers, which outlives the donation of these."""
    return jtu.tree_map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, state)
