"""Runs an algorithm as calls of one compiled function.

With data on the device, a call is a loop of many steps. With batches from the host, or
with convolutions on a CPU, a call is one step. The device writes the rows of the
history, and the host drains them when their block is full.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._advance import (
    advance_donating,
    advance_keeping,
    Inputs,
    leap_donating,
    leap_keeping,
)
from ._checks import check_same_structure
from ._custom_types import Hyperparams, Key, Model
from ._data import AbstractBatches, as_batches
from ._discrete import has_discrete, without_noise
from ._feed import Feed
from ._hyperparameter import unwrap
from ._jaxpr import holds_primitive
from ._meta import discretised_over_tasks, MetaLearner
from ._misc import is_array_or_numpy
from ._monitor import Watcher
from ._optimizer import AbstractBilevelOptimizer, failed_solve, PlainTraining
from ._processes import agree
from ._rows import Rows
from ._sharding import fetch, mesh_of_tree, on_mesh
from ._solution import (
    as_history,
    compare_discretised,
    Course,
    describe,
    Discretised,
    has_diverged,
    History,
    record,
    RESULTS,
    Solution,
    start_course,
)
from ._state import BilevelState


_CALL_SECONDS = 0.1  # what a call of many steps should take
_LEAP_SECONDS = 2.0  # likewise, where each call has a cost of its own
_HISTORY_NUMBERS = 2**20  # in a block of the history
_HISTORY_ROWS = 256


class Run:
    """Holds the state and the history of a run, which each call replaces.

    `step` and `skipped` are copies of the counters of `state` on the host. If a call is
    one step, `skipped` lags one step behind.
    """

    def __init__(
        self,
        algorithm: AbstractBilevelOptimizer,
        train: Feed,
        val: Feed,
        key: Key,
        state: BilevelState,
        interval: int,
        max_skipped: int,
    ):
        if int(state.skipped) >= max_skipped:
            # The caller goes on from a run that ended so: it gets another chance.
            state = dataclasses.replace(state, skipped=jnp.zeros((), int))
        self.state = state
        self.began = self.step = int(state.step)
        self.skipped = int(state.skipped)
        self._skipped_before = int(state.total_skipped)
        self._algorithm, self._key = algorithm, key
        self._train, self._val = train, val
        self._last_val: AbstractBatches | None = None
        self._max_skipped = max_skipped
        self._recorder = _Recorder(state, interval)
        self.rows = self._recorder.rows_so_far
        self.course = start_course()
        self._pace = _Pace(_can_loop(algorithm, state, train, val, key))
        self._leaps = self._pace.loops and isinstance(algorithm, PlainTraining)
        self._status: Any = None  # of the last call, where it is not yet known

    def go_on(
        self, state: BilevelState, course: Course, positions: dict[str, Any]
    ) -> None:
        """Continues from a later state of the same run, whose history is in `rows`."""
        self.state, self.course = state, course
        self.step, self.skipped = int(state.step), int(state.skipped)
        self._recorder.go_on(self.step)
        self._train.go_to(positions["train"])
        self._val.go_to(positions["val"])

    def positions(self) -> dict[str, Any]:
        """Returns the positions of the data after the last step, for JSON."""
        return {"train": self._train.position(), "val": self._val.position()}

    def check_positions(self) -> None:
        """Raises a `ValueError` if the position of a loader cannot be written."""
        self._train.check_position()
        self._val.check_position()

    def record_rows(self) -> None:
        """Copies the rows of the history so far from the device to the host."""
        self._recorder.drain(self.step)

    def restart(self, model: Model, model_state: PyTree) -> None:
        """Starts the inner level afresh."""
        fresh = self._algorithm.restart(self.state, model, model_state=model_state)
        self.state = own_copy(fresh, (model, model_state))

    def advance(self, limit: int, donate: bool) -> None:
        """Takes at most `limit` steps."""
        limit = min(limit, self._recorder.room(self.step), self._pace.steps)
        inputs = self._inputs(limit)
        begun, start = self.step, time.monotonic()
        if self._leaps:
            status = self._call(leap_donating if donate else leap_keeping, inputs)
            self.step, self.skipped = jax.device_get(status).tolist()
            # From the first step that is not finite on, each step is looked at.
            self._leaps = self.step == begun + limit
        if self.step == begun:
            status = self._call(advance_donating if donate else advance_keeping, inputs)
            self._take_in(status)
        self._train.commit()
        self._val.commit()
        if self._pace.loops:
            goal = _LEAP_SECONDS if self._leaps else _CALL_SECONDS
            self._pace.adapt(time.monotonic() - start, limit, goal)
        self._recorder.drain_if_full(self.step)

    def _inputs(self, limit: int) -> Inputs:
        train, val = self._train.next(), self._val.next()
        self._last_val = as_batches(val, "val", None)
        number = jnp.result_type(int).type  # as that of `state.step`
        return Inputs(
            algorithm=self._algorithm,
            train=train,
            val=val,
            key=self._key,
            limit=number(limit),
            interval=number(self._recorder.interval),
            drained=number(self._recorder.drained),
            max_skipped=number(self._max_skipped),
            loops=self._pace.loops,
        )

    def _call(self, call: Callable[..., Any], inputs: Inputs) -> Any:
        carry = (self.state, self._recorder.rows, self.course)
        (self.state, self._recorder.rows, self.course), status = call(carry, inputs)
        return status

    def _take_in(self, status: Any) -> None:
        if self._pace.loops:
            self.step, self.skipped = jax.device_get(status).tolist()
            return
        # Waits for the step before this one: one is always under way.
        if self._status is not None:
            self.skipped = int(jax.device_get(self._status)[1])
        self._status = status
        self.step += 1

    def has_failed(self) -> bool:
        """Tells whether too many steps in a row were skipped."""
        if self._status is not None and self.skipped + 1 >= self._max_skipped:
            # The step under way may be the last one: it is waited for.
            self.skipped = int(jax.device_get(self._status)[1])
        return self.skipped >= self._max_skipped

    def has_begun(self) -> bool:
        """Tells whether the run has taken a step."""
        return self.step > self.began

    def share_skipped(self) -> float:
        """Returns the share of the steps of this run that were skipped."""
        skipped = int(self.state.total_skipped) - self._skipped_before
        return skipped / max(1, self.step - self.began)

    def is_alive(self) -> bool:
        """Tells whether the state still exists. A call that fails after donating it
        loses it."""
        arrays = jtu.tree_leaves(eqx.filter(self.state, eqx.is_array))
        return not any(x.is_deleted() for x in arrays)

    def finish(self, result: Any, watcher: Watcher | None = None) -> Solution:
        """Builds the `Solution` of the run so far. It holds the best state if a monitor
        saw one, and otherwise the last state."""
        history = self._recorder.finish(self.state, self.step, watcher)
        self.skipped = int(self.state.skipped)
        solve = failed_solve(self.state.metrics.diagnostics)
        if result == RESULTS.successful:
            result = self._outcome(solve)
        # The next step draws its noise anew anyhow.
        hyperparams = without_noise(self.state.hyperparams)
        self.state = dataclasses.replace(self.state, hyperparams=hyperparams)
        best = None if watcher is None else watcher.best
        chosen = self.state if best is None else best.state
        hyperparams = without_noise(chosen.hyperparams)
        discretised = self._discretise(chosen)
        message = describe(result, self.state, self.course, solve, discretised)
        if watcher is not None:
            message += watcher.describe()
        return Solution(
            model=chosen.model,
            hyperparams=hyperparams,
            values=unwrap(hyperparams),
            history=history,
            result=cast(RESULTS, result),
            state=self.state,
            message=message,
            best=best,
            discretised=discretised,
        )

    def _outcome(self, solve: tuple[Any, str] | None) -> Any:
        """Finds the result of a run that took all its steps."""
        if self.has_failed():
            return RESULTS.nonfinite
        if solve is not None:
            return solve[0]
        if has_diverged(self.course, self.state):
            return RESULTS.diverged
        return RESULTS.successful

    def _discretise(self, state: BilevelState) -> Discretised | None:
        algorithm, val = self._algorithm, self._last_val
        if not has_discrete(state.hyperparams):
            return None
        if val is None:  # no step was made: the run was finished already
            peeked = self._val.peek()
            if peeked is None:
                return None
            val = as_batches(peeked, "val", None)
        if isinstance(algorithm, PlainTraining) and algorithm.validate_every is None:
            return None
        key = None if self._key is None else jr.fold_in(self._key, self.step)
        if isinstance(algorithm, MetaLearner):
            return discretised_over_tasks(algorithm, state, val, key)
        return compare_discretised(algorithm.problem, state, val, key)


class _Pace:
    """Chooses the number of steps of a call. It is one, or as many as fill a short
    time. Between calls, the host checks for Ctrl-C and moves the progress bar."""

    def __init__(self, loops: bool):
        self.loops = loops
        self.steps = 1

    def adapt(self, seconds: float, taken: int, goal: float) -> None:
        # Only where the pace was what bounded the call: else it would grow for ever.
        if seconds < goal / 2 and taken == self.steps:
            self.steps *= 2
        elif seconds > goal * 2 and self.steps > 1:
            self.steps //= 2
        self.steps = agree(self.steps)


class _Recorder:
    """Holds the history: a block of rows on the device, and the rows drained to the
    host.

    `drained` counts the multiples of `interval` up to the last drained row, so row
    `step // interval - 1 - drained` of the block belongs to `step`.
    """

    def __init__(self, state: BilevelState, interval: int):
        row = eqx.filter_eval_shape(record, eqx.filter(state, eqx.is_array))
        numbers = sum(x.size for x in jtu.tree_leaves(row))
        self.interval = interval
        self.drained = int(state.step) // interval
        self._capacity = max(1, min(_HISTORY_ROWS, _HISTORY_NUMBERS // numbers))
        empty = lambda x: jnp.zeros((self._capacity, *x.shape), x.dtype)
        self.rows = jtu.tree_map(empty, row)
        self.rows_so_far = Rows(row)

    def go_on(self, step: int) -> None:
        """Continues after `step`. The rows up to it are there already."""
        self.drained = step // self.interval

    def room(self, step: int) -> int:
        """Counts the steps that fit before the block must be drained."""
        return (self.drained + self._capacity) * self.interval - step

    def drain_if_full(self, step: int) -> None:
        if step // self.interval - self.drained == self._capacity:
            self.drain(step)

    def finish(
        self, state: BilevelState, step: int, watcher: Watcher | None
    ) -> History:
        """Joins all rows, including that of the last step, with the readings of a
        monitor."""
        self.drain(step)
        rows = self.rows_so_far.load()
        last = jtu.tree_map(lambda x: np.asarray(x)[None], fetch(record(state)))
        is_there = len(rows.step) > 0 and rows.step[-1] == last.step[0]
        readings = None if watcher is None else watcher.readings()
        return as_history([rows] if is_there else [rows, last], readings)

    def drain(self, step: int) -> None:
        """Moves the rows from the device to the host."""
        count = step // self.interval - self.drained
        if count > 0:
            rows = fetch(self.rows)
            self.rows_so_far.append(jtu.tree_map(lambda x: x[:count], rows))
            self.drained += count


def start(
    algorithm: AbstractBilevelOptimizer,
    model: Model,
    hyperparams: Hyperparams,
    train: Feed,
    val: Feed,
    key: Key,
    state: BilevelState | None,
    model_state: PyTree,
) -> BilevelState:
    """Makes the state that a run may donate. It is a fresh state, or a copy of the
    given one if this has the right structure."""

    def init(model, hyperparams, model_state, train, val):
        return algorithm.init(
            model, hyperparams, train=train, val=val, model_state=model_state, key=key
        )

    args = (model, hyperparams, model_state, train.peek(), val.peek())
    if state is None:
        return own_copy(init(*args), args)
    given = on_mesh(state, mesh_of_tree(args))
    # Only its structure is asked for: nothing is held beside the state given.
    fresh = eqx.filter_eval_shape(init, *args)
    if given.metrics.aux is None and fresh.metrics.aux is not None:
        zeros = lambda x: jnp.zeros(x.shape, x.dtype)
        aux = jtu.tree_map(zeros, fresh.metrics.aux)
        given = dataclasses.replace(
            given, metrics=dataclasses.replace(given.metrics, aux=aux)
        )
    trains_only = isinstance(algorithm, PlainTraining)
    what = "the state of a fresh start" + (" of `fit`" if trains_only else "")
    check_same_structure("state", given, fresh, what)
    return own_copy(given, state)


def own_copy(state: BilevelState, theirs: PyTree) -> BilevelState:
    """Copies the arrays that a state shares with `theirs`, or holds twice, since the
    run will donate them. All other arrays belong to the run already."""
    seen = {_buffer(x) for x in jtu.tree_leaves(theirs) if is_array_or_numpy(x)}

    def copy(x):
        if not eqx.is_array(x):
            return x
        if _buffer(x) in seen:
            return jnp.copy(x)
        seen.add(_buffer(x))
        return x

    return jtu.tree_map(copy, state)


def _buffer(x: Any) -> Any:
    """Identifies the memory of an array. A NumPy array and a JAX array made from it may
    share theirs."""
    if isinstance(x, np.ndarray):
        return x.ctypes.data
    try:
        return x.addressable_data(0).unsafe_buffer_pointer()
    except Exception:
        return id(x)  # no memory of its own: a PRNG key, or an array of other processes


def _can_loop(algorithm, state, train: Feed, val: Feed, key: Key) -> bool:
    if not (train.is_static and val.is_static):
        return False
    if jax.default_backend() != "cpu":
        return True
    # Workaround for https://github.com/jax-ml/jax/issues/12868: convolutions in a loop
    # run many times slower on CPUs.
    args = (algorithm, state, train.next(), val.next(), key)
    arrays, static = eqx.partition(args, is_array_or_numpy)

    def step(arrays):
        algorithm, state, train, val, key = eqx.combine(arrays, static)
        return eqx.filter(algorithm.step(state, train, val, key=key), eqx.is_array)

    jaxpr = jax.make_jaxpr(step)(arrays).jaxpr
    return not holds_primitive(jaxpr, {"conv_general_dilated"})
