"""Plain training at fixed hyperparameters, with the driver of `tune`."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from ._callbacks import CallbackArgument
from ._checks import as_count, MOST_STEPS
from ._custom_types import Batch, Hyperparams, Key, Model
from ._data import AbstractBatches
from ._drive import (
    as_interval,
    check_start,
    CheckpointArgument,
    Companions,
    conduct,
)
from ._feed import Feed
from ._meta import MetaLearner
from ._monitor import Monitor
from ._optimizer import AbstractBilevelOptimizer, PlainTraining
from ._problem import Problem
from ._run import Run, start
from ._solution import Solution
from ._state import BilevelState


def fit(
    algorithm: AbstractBilevelOptimizer,
    model: Model,
    hyperparams: Hyperparams,
    train: Batch | AbstractBatches | Any,
    *,
    steps: int,
    key: Key,
    val: Batch | AbstractBatches | Any = None,
    state: BilevelState | None = None,
    record_every: int | None = None,
    monitor: Monitor | None = None,
    checkpoint: CheckpointArgument = None,
    checkpoint_every: int = 1000,
    callback: CallbackArgument = None,
    progress: bool = True,
    model_state: PyTree = None,
    max_skipped: int = 20,
) -> Solution:
    """Trains a model at fixed hyperparameters, at the cost of plain training. Use it to
    train once more on all data with the values that [`eqx_hpo.tune`][] found, or for a
    comparison.

    ```python
    tuned = hpo.tune(algorithm, model, hyperparams, train, val, steps=1000, key=key)
    final = hpo.fit(algorithm, model, tuned.values, everything, steps=1000, key=key)
    ```

    **Arguments:**

    - `algorithm`: any [`eqx_hpo.AbstractBilevelOptimizer`][]. `fit` uses its problem,
        `inner` and `inner_steps`, so `steps` stands for as many inner steps as in
        `tune`. With an [`eqx_hpo.MetaLearner`][], `fit` trains a single model.
    - `model`: the starting model.
    - `hyperparams`: the fixed hyperparameters, as placeholders or as plain values such
        as `solution.values`. An [`eqx_hpo.Schedule`][] must be a placeholder, since its
        plain values do not say which step uses which entry.
    - `train`: the data to train on, as for `tune`.
    - `steps`: the number of steps, of `inner_steps` training steps each.
    - `key`: a PRNG key, or `None` if nothing is random. The train loss gets the same
        batches and keys as in `tune` with this key.
    - `val`: the data for the validation loss, as for `tune`. The loss is taken after
        the first step, at the recorded steps and after the last step. In between,
        `state.metrics` holds the one that was taken last, and zeros for its `aux`.
        Without data the loss is NaN.
    - `state`: the `state` of an earlier `fit` to continue from.
    - `record_every`, `monitor`, `checkpoint`, `checkpoint_every`: as for `tune`.
    - `callback`, `progress`, `model_state`, `max_skipped`: as for `tune`.

    **Returns:** an [`eqx_hpo.Solution`][], as `tune` does.

    **Raises:** what `tune` raises.
    """
    check_start(algorithm, key, state)
    steps = as_count("steps", steps)
    max_skipped = as_count("max_skipped", max_skipped)
    interval = as_interval(record_every, steps)
    companions = Companions(
        interval, monitor, checkpoint, checkpoint_every, callback, progress
    )
    done = 0 if state is None else int(state.step)
    validate_every = None if val is None else interval
    trainer = _make_trainer(algorithm, validate_every, min(done + steps, MOST_STEPS))
    # Data for a loss that looks at nothing.
    whole = () if val is None else val
    feeds = Feed(train, "train", trainer.inner_steps), Feed(whole, "val", None)
    state = start(trainer, model, hyperparams, *feeds, key, state, model_state)
    run = Run(trainer, *feeds, key, state, interval, max_skipped)
    del state  # the run donates it
    return conduct(run, steps, companions, [], False, (trainer, key))


def _make_trainer(
    algorithm: AbstractBilevelOptimizer, validate_every: int | None, last: int
) -> PlainTraining:
    """Makes the algorithm that trains one model as `algorithm` does, and validates
    it."""
    single = algorithm.algorithm if isinstance(algorithm, MetaLearner) else algorithm
    problem = single.problem
    if validate_every is None:
        nothing = _no_loss_with_aux if problem.has_aux else _no_loss
        problem = Problem(problem.train_loss, nothing, problem.has_aux)
    return PlainTraining(
        problem,
        single.inner,
        last=jnp.asarray(last),
        inner_steps=single.inner_steps,
        unroll=getattr(single, "unroll", None),
        validate_every=validate_every,
    )


def _no_loss(*args: Any) -> Any:
    del args
    return jnp.zeros(())


def _no_loss_with_aux(*args: Any) -> Any:
    return _no_loss(*args), None
