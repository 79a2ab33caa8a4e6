"""The driver: `tune` takes a problem from its start to a `Solution`."""

import os
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PyTree

from ._checkpoint import save
from ._custom_types import Batch, Hyperparams, Key, Model
from ._data import AbstractBatches
from ._feed import Feed
from ._optimizer import AbstractBilevelOptimizer
from ._optimizer.checks import check_positive_int, check_type
from ._progress import catch_interrupt, ProgressBar
from ._run import Run, start
from ._solution import RESULTS, Solution
from ._state import BilevelState


# A number of steps, and what is done whenever it has passed.
_Event: TypeAlias = tuple[int, Callable[[], Any]]


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
        `inner_steps` batches; of a validation iterator one, or `inner_steps` if
        `optimizer` validates after each inner step. An iterable that can be started
        again, such as a data loader, is. A list or a tuple is a pytree, so one batch:
        pass `iter(batches)`.
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
    - `callback`: called as `callback(state)` after every so many steps as `history`
        says; the run stops if it returns `True`.
    - `model_state`: an `eqx.nn.State`, for losses that take and return one.
    - `max_skipped`: end the run after so many non-finite steps in a row.

    **Returns:** a [`eqx_hpo.Solution`][]. Ctrl-C ends the run early and returns what
    there is, with `RESULTS.interrupted`; a run of non-finite steps ends it with
    `RESULTS.nonfinite`.

    **Raises:** a `ValueError` if `state` does not match `model` and `hyperparams`, or
    an option is out of range.
    """
    check_start(optimizer, key, state)
    options = {"steps": steps, "restart": restart, "history": history}
    options |= {"checkpoint_every": checkpoint_every, "max_skipped": max_skipped}
    for name, value in options.items():
        if value is not None:
            check_positive_int(name, value)
    val_count = optimizer.inner_steps if optimizer.val_at_each_step else 1
    feeds = Feed(train, "train", optimizer.inner_steps), Feed(val, "val", val_count)
    interval = max(1, steps // 100) if history is None else history
    state = start(optimizer, model, hyperparams, *feeds, key, state, model_state)
    run = Run(optimizer, *feeds, key, state, interval, max_skipped)
    before, after = [], []
    if restart is not None:
        before.append((restart, lambda: run.restart(model, model_state)))
    if checkpoint is not None:
        after.append((checkpoint_every, lambda: save(checkpoint, run.state)))
    if callback is not None:
        after.append((interval, lambda: callback(run.state)))
    try:
        with ProgressBar(steps, progress) as bar:
            donate = callback is None  # what it is given must outlive the next step
            result = drive(run, run.step + steps, before, after, bar, donate)
    finally:
        if checkpoint is not None and run.is_alive():
            save(checkpoint, run.state)
    return run.finish(result)


def check_start(optimizer: Any, key: Any, state: Any) -> None:
    what = "an algorithm such as `T1T2`, before `model` and `hyperparams`"
    check_type("optimizer", optimizer, AbstractBilevelOptimizer, what)
    if state is not None:
        what = "a `BilevelState` (that of a `Solution` is `solution.state`)"
        check_type("state", state, BilevelState, what)
    if key is not None:
        arrays = (jax.Array, np.ndarray)
        check_type("key", key, arrays, "a PRNG key such as `jax.random.key(0)`")


def drive(
    run: Run,
    end: int,
    before: list[_Event],
    after: list[_Event],
    bar: ProgressBar,
    donate: bool,
) -> Any:
    """Steps until `end`, or until there is a reason to stop, an item of `RESULTS`."""
    periods = [period for period, _ in (*before, *after)]
    try:
        with catch_interrupt() as interrupted:
            while run.step < end:
                start = run.step
                for action in _due(before, start):
                    action()
                left = [period - start % period for period in periods]
                run.advance(min([end - start, *left]), donate)
                bar.update(run.step - start, run.state)
                if any([action() is True for action in _due(after, run.step)]):
                    return RESULTS.stopped
                if run.has_failed():
                    return RESULTS.nonfinite
                if interrupted():
                    return RESULTS.interrupted
    except StopIteration:
        return RESULTS.data_exhausted
    except KeyboardInterrupt:
        return RESULTS.interrupted
    return RESULTS.successful


def _due(events: list[_Event], step: int) -> list[Callable[[], Any]]:
    return [action for period, action in events if step > 0 and step % period == 0]
