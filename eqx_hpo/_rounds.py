"""Runs the trainings of a black-box search. The trials of a round run side by side, as
one `Run`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._checks import MOST_STEPS
from ._custom_types import Hyperparams, Key, Model
from ._drive import drive
from ._feed import Feed
from ._hyperparameter import partition_raw
from ._optimizer import for_each, ParallelTraining, PlainTraining
from ._progress import ProgressBar
from ._run import own_copy, Run, start
from ._solution import record, Solution
from ._state import BilevelState, Memory


class Report(eqx.Module):
    """Holds the results of the trials of a round, with a leading axis."""

    has_failed: Bool[Any, " trials"]
    val_loss: Float[Any, " trials"]
    train_loss: Float[Any, " trials"]
    skipped: Int[Any, " trials"]


class Rounds:
    """Holds the run that all trials share, with its compiled code and its data.

    - `fresh`: the state from which each trial starts, with the lower ends of the
        ranges.
    """

    def __init__(
        self,
        trainer: PlainTraining,
        model: Model,
        low: Hyperparams,
        train: Feed,
        val: Feed,
        key: Key,
        model_state: PyTree,
        parallel: int,
        bar: ProgressBar,
        asked: Callable[[], Any],
    ):
        self._algorithm = ParallelTraining(trainer, key)
        args = (model, low, train, val, key, None, model_state)
        state = start(self._algorithm, *args)
        self.fresh = _take(state.memory.episode, np.array(0))
        self._run = Run(
            self._algorithm, train, val, None, state, MOST_STEPS, MOST_STEPS
        )
        self._parallel, self._bar, self._asked = parallel, bar, asked
        self._steps_of_each = trainer.validate_every

    def begin(self, raw: PyTree[np.ndarray], numbers: list[int]) -> None:
        """Starts a round. If it has fewer trials than places, copies of the last trial
        fill the other places."""
        left = self._parallel - len(numbers)
        pad = lambda x: np.concatenate([x, np.repeat(x[-1:], left, axis=0)])
        starts = pad(np.array(numbers) * self._steps_of_each)
        # The round before is given up first: no two are held at a time.
        self._put(None, 0)
        state, raw = self._run.state, jtu.tree_map(pad, raw)
        begun = _begin(self._algorithm, state, self.fresh, raw, starts)
        self._run.state = own_copy(begun, (self.fresh, state))
        self._taken = 0

    def advance(self, step: int) -> Any:
        """Trains all trials of the round up to that step, and takes the validation
        loss. Returns an item of `RESULTS`."""
        self._put(self._rows(), step)
        end = self._run.step + step - self._taken
        self._taken = step
        tick = lambda: self._bar.update(self._run.step, self._run.state)
        return drive(self._run, end, [], [], tick, self._asked, donate=True)

    def report(self) -> Report:
        return jax.device_get(_report(self._rows()))

    def state(self, row: int) -> BilevelState:
        """Copies the state of a trial."""
        return _take(self._rows(), np.array(row))

    def keep(self, rows: list[int], size: int) -> None:
        """Continues with some trials of the round, in a program that holds `size`
        trials."""
        padded = [*rows, *rows[-1:] * (size - len(rows))]
        self._put(_take(self._rows(), np.array(padded)), 0)

    def finish(self, result: Any) -> Solution:
        """Builds a `Solution` from the parts of the run, not of a trial."""
        self._put(None, 0)
        return self._run.finish(result)

    def _rows(self) -> BilevelState:
        return self._run.state.memory.episode

    def _put(self, rows: BilevelState | None, due: int) -> None:
        memory = Memory(episode=rows, lasting=jnp.asarray(due, int))
        self._run.state = dataclasses.replace(self._run.state, memory=memory)


@eqx.filter_jit
def _begin(
    algorithm: ParallelTraining,
    state: BilevelState,
    fresh: BilevelState,
    raw: PyTree[Array],
    starts: Int[Any, " trials"],
) -> BilevelState:
    constants = partition_raw(fresh.hyperparams)[1]

    def one(raw_and_start):
        raw, start = raw_and_start
        hyperparams = eqx.combine(raw, constants)
        return dataclasses.replace(fresh, hyperparams=hyperparams, step=start)

    starts = starts.astype(fresh.step.dtype)
    memory = dataclasses.replace(state.memory, episode=for_each(one, (raw, starts)))
    state = dataclasses.replace(state, memory=memory)
    return algorithm.restart(state, fresh.model, model_state=fresh.model_state)


@eqx.filter_jit
def _report(rows: BilevelState) -> Report:
    metrics = rows.metrics
    return Report(
        rows.skipped > 0, metrics.val_loss, metrics.train_loss, rows.total_skipped
    )


@eqx.filter_jit
def _take(rows: BilevelState, numbers: Int[Any, "..."]) -> BilevelState:
    """Copies the state of one trial, or the rows of several."""
    return jtu.tree_map(lambda x: x[numbers] if eqx.is_array(x) else x, rows)


@eqx.filter_jit
def recorded(fresh: BilevelState, raw: PyTree[Array]) -> Hyperparams:
    """Unwraps the hyperparameters of many trials, in the form that a history
    records."""
    constants = partition_raw(fresh.hyperparams)[1]

    def one(raw):
        hyperparams = eqx.combine(raw, constants)
        return record(dataclasses.replace(fresh, hyperparams=hyperparams)).hyperparams

    return eqx.filter_vmap(one)(raw)
