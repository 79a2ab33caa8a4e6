"""The driver: `tune` takes a problem from its start to a `Solution`."""

import os
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import PyTree

from ._checkpoint import save
from ._checks import (
    as_flag,
    as_int,
    check_function,
    check_key,
    check_path,
    check_type,
)
from ._custom_types import Batch, Hyperparams, Key, Model
from ._data import AbstractBatches
from ._feed import make_feeds
from ._jit import own_error_text
from ._optimizer import AbstractBilevelOptimizer
from ._progress import catch_interrupt, ProgressBar
from ._run import Run, start
from ._solution import describe_skipped, RESULTS, Solution
from ._state import BilevelState, check_state


_MANY_SKIPPED = 0.1  # the share of skipped steps from which on there is a warning


# A number of steps, and what is done whenever it has passed.
_Event: TypeAlias = tuple[int, Callable[[], Any]]


def tune(
    algorithm: AbstractBilevelOptimizer,
    model: Model,
    hyperparams: Hyperparams,
    train: Batch | AbstractBatches | Any,
    val: Batch | AbstractBatches | Any,
    *,
    steps: int,
    key: Key,
    state: BilevelState | None = None,
    restart_every: int | None = None,
    record_every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    callback: Callable[[BilevelState], Any] | None = None,
    progress: bool = True,
    model_state: PyTree = None,
    max_skipped: int = 20,
) -> Solution:
    """Trains a model and tunes its hyperparameters.

    ```python
    solution = hpo.tune(
        algorithm, model, hyperparams, train, val, steps=1000, key=key
    )
    print(solution.values, solution.message)
    ```

    **Arguments:**

    - `algorithm`: any [`eqx_hpo.AbstractBilevelOptimizer`][].
    - `model`: the starting model.
    - `hyperparams`: the starting hyperparameters.
    - `train`, `val`: the data of the two levels: a pytree of arrays (one batch, used at
        every inner step), [`eqx_hpo.Minibatch`][], [`eqx_hpo.Stacked`][], or a Python
        iterator or iterable of batches. Each step takes `inner_steps` batches of a
        train iterator, and of a validation iterator one, or `inner_steps` if
        `algorithm` validates after each inner step. An iterable that can be started
        again, such as a data loader, is. A list or a tuple is a pytree, so one batch:
        pass `iter(batches)`.
    - `steps`: the number of calls of `algorithm.step` to make.
    - `key`: a PRNG key, or `None` if nothing is random. Step number `i` gets
        `jax.random.fold_in(key, i)`.
    - `state`: a state to go on from, instead of the start. Going on with the same
        `key` gives what an uninterrupted run gives, bit for bit, if the data are
        arrays or `Minibatch`; a Python iterator must be advanced to the same position
        by the caller.
    - `restart_every`: start the inner level afresh, from `model`, after every so many
        steps.
    - `record_every`: record the metrics and the hyperparameters after every so many
        steps; by default about a hundred times. The last step is always recorded.
    - `checkpoint`: a file to save the state to ([`eqx_hpo.save`][]), after every
        `checkpoint_every` steps and when the run ends for whatever reason.
    - `checkpoint_every`: see `checkpoint`.
    - `callback`: called as `callback(state)` after every `record_every` steps; the run
        stops if it returns something true, a boolean of Python, NumPy or JAX.
    - `progress`: whether to show a progress bar in a terminal or a notebook, and
        elsewhere, as in the log of a job, a line on the standard error every half
        minute.
    - `model_state`: an `eqx.nn.State`, for losses that take and return one.
    - `max_skipped`: end the run after so many non-finite steps in a row.

    **Returns:** a [`eqx_hpo.Solution`][]. Ctrl-C ends the run early and returns what
    there is, with `RESULTS.interrupted`; a run of non-finite steps ends it with
    `RESULTS.nonfinite`. A validation loss that ends far above where it began is
    `RESULTS.diverged`. More than a tenth of skipped steps is a warning otherwise.

    **Raises:** a `ValueError` if `state` does not match `model` and `hyperparams`, or
    an option is out of range. The error of an `equinox.error_if` inside a loss comes
    with its own text. An exception of the callback or of an iterator ends the run, and
    has the solution so far as its attribute `solution`.
    """
    check_start(algorithm, key, state)
    steps = as_int("steps", steps, 1)
    max_skipped = as_int("max_skipped", max_skipped, 1)
    checkpoint_every = as_int("checkpoint_every", checkpoint_every, 1)
    interval, progress = max(1, steps // 100), as_flag("progress", progress)
    if record_every is not None:
        interval = as_int("record_every", record_every, 1)
    if restart_every is not None:
        restart_every = as_int("restart_every", restart_every, 1)
    if checkpoint is not None:
        check_path("checkpoint", checkpoint)
    if callback is not None:
        check_function("callback", callback, "a function of the state, or `None`")
    feeds = make_feeds(algorithm, train, val)
    state = start(algorithm, model, hyperparams, *feeds, key, state, model_state)
    run = Run(algorithm, *feeds, key, state, interval, max_skipped)
    del state  # the run donates it
    before, after = [], []
    if restart_every is not None:
        before.append((restart_every, lambda: run.restart(model, model_state)))
    if checkpoint is not None:
        after.append((checkpoint_every, lambda: save(checkpoint, run.state)))
    if callback is not None:
        after.append((interval, lambda: asks_to_stop(callback, run.state)))
    try:
        with ProgressBar(steps, progress) as bar:
            # A callback may keep its state: no later step may overwrite it.
            donate = callback is None
            result = drive(run, run.step + steps, before, after, bar, donate)
    except Exception as e:
        if run.has_begun() and run.is_alive():
            attach_solution(e, lambda: run.finish(RESULTS.failed))
        raise
    finally:
        if checkpoint is not None and run.is_alive():
            save(checkpoint, run.state)
    with own_error_text():
        solution = run.finish(result)
    _warn_of_skipped(run, solution)
    return solution


def _warn_of_skipped(run: Run, solution: Solution) -> None:
    has_said_so = solution.result == RESULTS.nonfinite
    if run.share_skipped() > _MANY_SKIPPED and not has_said_so:
        warnings.warn(describe_skipped(solution.state).strip(), stacklevel=3)


def asks_to_stop(callback: Callable[[BilevelState], Any], state: BilevelState) -> bool:
    """Calls the callback of a driver."""
    answer = callback(state)
    if answer is None:
        return False
    try:
        return bool(answer)
    except Exception as e:
        raise ValueError(
            "`callback` must return a boolean, or `None`; got a "
            f"{type(answer).__name__}."
        ) from e


def attach_solution(error: Exception, make: Callable[[], Solution]) -> None:
    """Saves what was learned before `error`."""
    try:
        solution = make()
    except Exception:
        return  # of the same cause
    error.solution = solution  # pyright: ignore[reportAttributeAccessIssue]
    error.add_note(
        f"The solution up to step {int(solution.state.step)} is the attribute "
        "`solution` of this exception."
    )


def check_start(algorithm: Any, key: Any, state: Any) -> None:
    what = "an algorithm such as `T1T2`, before `model` and `hyperparams`"
    check_type("algorithm", algorithm, AbstractBilevelOptimizer, what)
    if state is not None:
        check_state("state", state)
    check_key(key)


def drive(
    run: Run,
    end: int,
    before: list[_Event],
    after: list[_Event],
    bar: ProgressBar,
    donate: bool,
) -> Any:
    """Steps until `end`, or until there is a reason to stop; returns an item of
    `RESULTS`."""
    periods = [period for period, _ in (*before, *after)]
    try:
        with own_error_text(), catch_interrupt() as interrupted:
            while run.step < end:
                start = run.step
                for action in _due(before, start):
                    action()
                left = [period - start % period for period in periods]
                try:
                    run.advance(min([end - start, *left]), donate)
                except StopIteration:
                    return RESULTS.data_exhausted
                bar.update(run.step - start, run.state)
                if any([action() is True for action in _due(after, run.step)]):
                    return RESULTS.stopped
                if run.has_failed():
                    return RESULTS.nonfinite
                if interrupted():
                    return RESULTS.interrupted
    except KeyboardInterrupt:
        return RESULTS.interrupted
    return RESULTS.successful


def _due(events: list[_Event], step: int) -> list[Callable[[], Any]]:
    return [action for period, action in events if step > 0 and step % period == 0]
