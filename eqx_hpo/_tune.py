"""The driver: `tune` takes a problem from its start to a `Solution`."""

from typing import Any

from jaxtyping import PyTree

from ._callbacks import CallbackArgument
from ._checks import as_count, as_int
from ._custom_types import Batch, Hyperparams, Key, Model
from ._data import AbstractBatches
from ._drive import (
    as_interval,
    check_start,
    CheckpointArgument,
    Companions,
    conduct,
)
from ._feed import make_feeds
from ._monitor import Monitor
from ._optimizer import AbstractBilevelOptimizer
from ._run import Run, start
from ._solution import Solution
from ._state import BilevelState


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
    monitor: Monitor | None = None,
    checkpoint: CheckpointArgument = None,
    checkpoint_every: int = 1000,
    callback: CallbackArgument = None,
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
    - `train`, `val`: the data of the two levels. Each is a pytree of arrays (one batch,
        used at every inner step), an [`eqx_hpo.Minibatch`][], an [`eqx_hpo.Stacked`][],
        or a Python iterator or iterable of batches. Each step takes `inner_steps`
        batches from a train iterator. It takes one batch from a validation iterator, or
        `inner_steps` of them if `algorithm` validates after each inner step. An
        iterable that can be started again, such as a data loader, is started again when
        it ends. A list or a tuple of batches is a pytree and counts as one batch: pass
        `iter(batches)` instead.
    - `steps`: the number of calls of `algorithm.step` to make.
    - `key`: a PRNG key, or `None` if nothing is random. Step number `i` gets
        `jax.random.fold_in(key, i)`.
    - `state`: a state to continue from, instead of the start. With the same `key`, the
        continued run equals an uninterrupted one bit for bit if the data are arrays or
        `Minibatch`. A Python iterator must be advanced to the same position by the
        caller.
    - `restart_every`: the number of steps between two fresh starts of the inner level
        from `model`. By default it never starts afresh.
    - `record_every`: the number of steps between two records of the metrics and the
        hyperparameters. By default there are about a hundred records. The last step is
        always recorded.
    - `monitor`: an [`eqx_hpo.Monitor`][]. It watches a metric on data that nothing is
        tuned on, can stop the run early, and keeps the best state.
    - `checkpoint`: an [`eqx_hpo.Checkpoints`][]. The run is saved as it goes, and when
        it ends for whatever reason. The same call, made again, continues from the last
        save, and `steps` still counts from the start of the first call. The path of a
        file stands for a single checkpoint in that file, which [`eqx_hpo.load`][] reads
        too.
    - `checkpoint_every`: the number of steps between two saves, if `checkpoint` is a
        path.
    - `callback`: a function that is called as `callback(state)` after every
        `record_every` steps. The run stops if it returns a true boolean of Python,
        NumPy or JAX. A list of functions calls them all.
    - `progress`: whether to show the progress. In a terminal or a notebook this is a
        progress bar. Elsewhere, as in the log of a job, it is a line on the standard
        error every half minute.
    - `model_state`: an `eqx.nn.State`, for losses that take and return one.
    - `max_skipped`: the number of consecutive non-finite steps that ends the run.

    **Returns:** an [`eqx_hpo.Solution`][] of the last state, or of the best state if
    there is a `monitor`. Its `result` says how the run ended:

    - `RESULTS.successful`: all steps were made.
    - `RESULTS.patience`: the patience of the monitor ended the run.
    - `RESULTS.interrupted`: Ctrl-C ended the run early, and the solution is that of the
        run so far. After SIGTERM it is `RESULTS.preempted`.
    - `RESULTS.stopped`: the callback asked to stop.
    - `RESULTS.data_exhausted`: an iterator of batches ended.
    - `RESULTS.nonfinite`: too many steps in a row were not finite.
    - `RESULTS.callback_failed`: a callback raised an exception, which is reported as a
        warning.
    - `RESULTS.diverged`: the validation loss ended far above where it began.

    Any other item is the result of a linear solve of the last step that was not
    successful. There is a warning if more than a tenth of the steps were skipped,
    unless the result is `RESULTS.nonfinite`.

    **Raises:** a `ValueError` if `state` does not match `model` and `hyperparams`, or
    if an option is out of range. An `equinox.error_if` inside a loss raises its error
    with its own text. An exception of the metric or of an iterator ends the run. It has
    the solution so far as its attribute `solution`.
    """
    check_start(algorithm, key, state)
    steps = as_count("steps", steps)
    max_skipped = as_count("max_skipped", max_skipped)
    interval = as_interval(record_every, steps)
    if restart_every is not None:
        restart_every = as_int("restart_every", restart_every, 1)
    companions = Companions(
        interval, monitor, checkpoint, checkpoint_every, callback, progress
    )
    feeds = make_feeds(algorithm, train, val)
    state = start(algorithm, model, hyperparams, *feeds, key, state, model_state)
    run = Run(algorithm, *feeds, key, state, interval, max_skipped)
    del state  # the run donates it
    before = []
    if restart_every is not None:
        # Before a step, not after one: the solution holds a trained model.
        before.append((restart_every, lambda: run.restart(model, model_state)))
    return conduct(run, steps, companions, before, True, (algorithm, key))
