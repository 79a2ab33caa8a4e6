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
    - `monitor`: an [`eqx_hpo.Monitor`][], for a metric on data that nothing is tuned
        on, an early stop, and the best state.
    - `checkpoint`: an [`eqx_hpo.Checkpoints`][]: the run is saved as it goes and when
        it ends for whatever reason, and the same call goes on from there. `steps` then
        counts from its start. The path of a file stands for one checkpoint in that
        file, which [`eqx_hpo.load`][] reads too.
    - `checkpoint_every`: the steps between two saves to the path of a file.
    - `callback`: called as `callback(state)` after every `record_every` steps; the run
        stops if it returns something true, a boolean of Python, NumPy or JAX. A list
        calls several.
    - `progress`: whether to show a progress bar in a terminal or a notebook, and
        elsewhere, as in the log of a job, a line on the standard error every half
        minute.
    - `model_state`: an `eqx.nn.State`, for losses that take and return one.
    - `max_skipped`: end the run after so many non-finite steps in a row.

    **Returns:** a [`eqx_hpo.Solution`][], of the last state, or of the best one with a
    `monitor`, whose patience ends a run with `RESULTS.patience`. Ctrl-C ends it early
    and returns what there is, with `RESULTS.interrupted`, and SIGTERM with
    `RESULTS.preempted`; a run of non-finite steps ends it with `RESULTS.nonfinite`, and
    an exception of a callback with `RESULTS.callback_failed` and a warning. A
    validation loss that ends far above where it began is `RESULTS.diverged`. More than
    a tenth of skipped steps is a warning otherwise.

    **Raises:** a `ValueError` if `state` does not match `model` and `hyperparams`, or
    an option is out of range. The error of an `equinox.error_if` inside a loss comes
    with its own text. An exception of the metric or of an iterator ends the run, and
    has the solution so far as its attribute `solution`.
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
        before.append((restart_every, lambda: run.restart(model, model_state)))
    return conduct(run, steps, companions, before, True, (algorithm, key))
