"""The driver: `tune` takes a problem from its start to a `Solution`.

The run is cut into calls of one compiled function. With data on the device a call is a
loop of many steps; with batches from the host, or with convolutions on a CPU, it is one
step. Between two calls the host drains the history, draws the progress bar, saves, and
looks for reasons to stop.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import PyTree

from ._checkpoint import save
from ._custom_types import Batch, Hyperparams, Key, Model
from ._data import AbstractBatches
from ._feed import Feed
from ._hyperparameter import unwrap
from ._jit import filter_jit, filter_jit_donating_first
from ._misc import check_same_structure
from ._optimizer import AbstractBilevelOptimizer
from ._optimizer.checks import check_positive_int
from ._progress import catch_interrupt, ProgressBar
from ._solution import as_history, Record, record, RESULTS, Solution
from ._state import BilevelState


_CALL_SECONDS = 0.1  # what a call of many steps should take
_HISTORY_NUMBERS = 2**20  # on the device, before the host drains them
_HISTORY_ROWS = 256


def tune(
    optimizer: AbstractBilevelOptimizer,
    model: Model,
    hyperparams: Hyperparams,
    train: Batch | AbstractBatches | Any,
    val: Batch | AbstractBatches | Any,
    *,
    steps: int,
    key: Key,
    state: BilevelState | None = None,
    restart: int | None = None,
    progress: bool = True,
    history: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    callback: Callable[[BilevelState], Any] | None = None,
    model_state: PyTree = None,
    max_skipped: int = 20,
) -> Solution:
    """Trains a model and tunes its hyperparameters.

    ```python
    solution = hpo.tune(
        optimizer, model, hyperparams, train, val, steps=1000, key=key
    )
    print(solution.values, solution.message)
    ```

    **Arguments:**

    - `optimizer`: the algorithm, any [`eqx_hpo.AbstractBilevelOptimizer`][].
    - `model`: the starting model.
    - `hyperparams`: the starting hyperparameters.
    - `train`, `val`: the data of the two levels: a pytree of arrays (one batch, used at
        every inner step), [`eqx_hpo.Minibatch`][], [`eqx_hpo.Stacked`][], or a Python
        iterator or iterable of batches. Of a train iterator each step takes
        `inner_steps` batches, of a validation iterator one. An iterable that can be
        started again, such as a data loader, is.
    - `steps`: the number of calls of `optimizer.step` to make.
    - `key`: a PRNG key, or `None` if nothing is random. Step number `i` gets
        `jax.random.fold_in(key, i)`.
    - `state`: a state to go on from, instead of the start. Going on with the same
        `key` gives what an uninterrupted run gives, bit for bit, if the data are
        arrays or `Minibatch`; a Python iterator must be put in its place by the user.
    - `restart`: start the inner level afresh, from `model`, after every so many steps.
    - `progress`: whether to show a progress bar. None is shown where the standard error
        is not a terminal.
    - `history`: record the metrics and the hyperparameters after every so many steps;
        by default about a hundred times. The last step is always recorded.
    - `checkpoint`: a file to save the state to ([`eqx_hpo.save`][]), after every
        `checkpoint_every` steps and when the run ends for whatever reason.
    - `checkpoint_every`: see `checkpoint`.
    - `callback`: called as `callback(state)` whenever the history is recorded; the run
        stops if it returns `True`.
    - `model_state`: an `eqx.nn.State`, for losses that take and return one.
    - `max_skipped`: end the run after so many non-finite steps in a row.

    **Returns:** a [`eqx_hpo.Solution`][]. Ctrl-C ends the run early and returns what
    there is, with `RESULTS.interrupted`; a run of non-finite steps ends it with
    `RESULTS.nonfinite`.

    **Raises:** a `ValueError` if `state` does not match `model` and `hyperparams`, or
    an option is out of range.
    """
    for name, value in [
        ("steps", steps),
        ("restart", restart),
        ("history", history),
        ("checkpoint_every", checkpoint_every),
        ("max_skipped", max_skipped),
    ]:
        if value is not None:
            check_positive_int(name, value)
    train_feed = Feed(train, "train", optimizer.inner_steps)
    val_feed = Feed(val, "val", 1)
    run = _Run(optimizer, train_feed, val_feed, key, steps, history, max_skipped)
    run.start(model, hyperparams, model_state, state)

    periods = [restart] if restart is not None else []
    if checkpoint is not None:
        periods.append(checkpoint_every)
    if callback is not None:
        periods.append(run.interval)

    result = RESULTS.successful
    with catch_interrupt() as interrupted, ProgressBar(steps, progress) as bar:
        try:
            while run.step < run.end:
                if restart is not None and _is_due(run.step, restart):
                    run.state = optimizer.restart(
                        run.state, model, model_state=model_state
                    )
                before = run.step
                left = [period - run.step % period for period in periods]
                run.advance(min([run.end - run.step, *left]), donate=callback is None)
                bar.update(run.step - before, run.state)
                if checkpoint is not None and _is_due(run.step, checkpoint_every):
                    save(checkpoint, run.state)
                if callback is not None and _is_due(run.step, run.interval):
                    if callback(run.state) is True:
                        result = RESULTS.stopped
                if run.skipped >= max_skipped:
                    result = RESULTS.nonfinite
                if interrupted():
                    result = RESULTS.interrupted
                if result != RESULTS.successful:
                    break
        except StopIteration:
            result = RESULTS.data_exhausted
        except KeyboardInterrupt:
            result = RESULTS.interrupted
        finally:
            if checkpoint is not None and run.is_alive():
                save(checkpoint, run.state)
    return run.finish(result)


class _Run:
    """The state and the history of a run, as they are replaced call by call."""

    def __init__(self, optimizer, train, val, key, steps, history, max_skipped):
        self.interval = max(1, steps // 100) if history is None else history
        self._optimizer = optimizer
        self._train = train
        self._val = val
        self._key = key
        self._steps = steps
        self._max_skipped = np.int32(max_skipped)
        self._history: list[Record] = []
        self._chunk = 1

    def start(self, model, hyperparams, model_state, state) -> None:
        """Makes the state, or checks the one given and copies it: it will be donated."""
        optimizer = self._optimizer
        data = {}
        if self._train.is_static and self._val.is_static:
            data = {"train": self._train.next(), "val": self._val.next()}
        fresh = optimizer.init(
            model, hyperparams, **data, model_state=model_state, key=self._key
        )
        if state is None:
            state = fresh
        else:
            aux = fresh.metrics.aux if state.metrics.aux is None else state.metrics.aux
            state = eqx.tree_at(
                lambda s: s.metrics.aux, state, aux, is_leaf=lambda x: x is None
            )
            check_same_structure("state", state, fresh, "the state of a fresh start")
        self.state = jtu.tree_map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, state)
        self.step = int(state.step)
        self.end = self.step + self._steps
        self.skipped = int(state.skipped)
        if self.skipped >= self._max_skipped:
            self.skipped = 0
            self.state = eqx.tree_at(lambda s: s.skipped, self.state, jnp.array(0))
        self._status = None
        self._loops = self._can_loop()

        row = jax.eval_shape(record, eqx.filter(self.state, eqx.is_array))
        numbers = sum(x.size for x in jtu.tree_leaves(row))
        capacity = max(1, min(_HISTORY_ROWS, _HISTORY_NUMBERS // numbers))
        empty = lambda x: jnp.zeros((capacity, *x.shape), x.dtype)
        self._rows = jtu.tree_map(empty, row)
        self._capacity = capacity
        self._drained = self.step // self.interval

    def advance(self, limit: int, donate: bool) -> None:
        """Takes at most `limit` steps."""
        room = (self._drained + self._capacity) * self.interval - self.step
        limit = min(limit, room, self._chunk if self._loops else 1)
        train, val = self._train.next(), self._val.next()
        call = _advance_donating if donate else _advance_keeping
        start = time.monotonic()
        self.state, self._rows, status = call(
            (self.state, self._rows),
            self._optimizer,
            train,
            val,
            self._key,
            np.int32(limit),
            np.int32(self.interval),
            np.int32(self._drained),
            self._max_skipped,
            self._loops,
        )
        if self._loops:
            self.step, self.skipped = jax.device_get(status).tolist()
            seconds = time.monotonic() - start
            if seconds < _CALL_SECONDS / 2:
                self._chunk *= 2
            elif seconds > _CALL_SECONDS * 2 and self._chunk > 1:
                self._chunk //= 2
        else:
            # Waits for the step before, so that one is always under way.
            if self._status is not None:
                self.skipped = int(jax.device_get(self._status)[1])
            self._status = status
            self.step += 1
        if self.step // self.interval - self._drained == self._capacity:
            self._drain()

    def is_alive(self) -> bool:
        """Whether the state was not lost to a call that failed after donating it."""
        arrays = jtu.tree_leaves(eqx.filter(self.state, eqx.is_array))
        return not any(x.is_deleted() for x in arrays)

    def finish(self, result: RESULTS) -> Solution:
        self._drain()
        last = jtu.tree_map(lambda x: np.asarray(x)[None], record(self.state))
        if len(self._history) == 0 or self._history[-1].step[-1] != last.step[0]:
            self._history.append(last)
        step, skipped = int(self.state.step), int(self.state.skipped)
        if result == RESULTS.successful and skipped >= self._max_skipped:
            result = RESULTS.nonfinite
        return Solution(
            model=self.state.model,
            hyperparams=self.state.hyperparams,
            values=unwrap(self.state.hyperparams),
            history=as_history(self._history),
            result=result,
            state=self.state,
            message=_message(result, self.state, step, skipped),
        )

    def _drain(self) -> None:
        count = self.step // self.interval - self._drained
        if count > 0:
            rows = jax.device_get(self._rows)
            self._history.append(jtu.tree_map(lambda x: x[:count].copy(), rows))
            self._drained += count

    def _can_loop(self) -> bool:
        if not (self._train.is_static and self._val.is_static):
            return False
        if jax.default_backend() != "cpu":
            return True
        # Workaround for https://github.com/jax-ml/jax/issues/12868: convolutions in a
        # loop run many times slower on CPUs.
        arrays, static = eqx.partition(
            (self._optimizer, self.state, self._train.next(), self._val.next()),
            eqx.is_array,
        )

        def step(arrays, key):
            optimizer, state, train, val = eqx.combine(arrays, static)
            state = optimizer.step(state, train, val, key=key)
            return eqx.filter(state, eqx.is_array)

        jaxpr = jax.make_jaxpr(step)(arrays, self._key)
        return "conv_general_dilated" not in str(jaxpr)


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


def _is_due(step: int, period: int) -> bool:
    return step > 0 and step % period == 0


def _message(result: RESULTS, state: BilevelState, step: int, skipped: int) -> str:
    text = "Finished" if result == RESULTS.successful else RESULTS[result]
    where = f"{text} Steps taken: {step}."
    if result == RESULTS.successful:
        where = f"Finished after step {step}."
    if skipped > 0:
        metrics = state.metrics
        where += (
            f" Not finite since step {step - skipped + 1}: train loss "
            f"{float(metrics.train_loss)}, validation loss {float(metrics.val_loss)}, "
            f"hypergradient norm {float(metrics.hypergradient_norm)}."
        )
    return where
