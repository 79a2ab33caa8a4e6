"""Defines the interface of all algorithms, and what its four methods promise."""

import abc

import equinox as eqx
import optax
from jaxtyping import PyTree

from .._custom_types import Batch, Hyperparams, InnerOptimiser, Key, Model
from .._data import AbstractBatches
from .._problem import Problem
from .._state import BilevelState


class AbstractBilevelOptimizer(eqx.Module):
    """An algorithm that trains a model and tunes its hyperparameters by gradient. It is
    an immutable collection of settings. Everything that changes is in an
    [`eqx_hpo.BilevelState`][].

    **Attributes:**

    - `problem`: the two losses.
    - `inner`: an `optax.GradientTransformation` that trains the model. To tune its
        settings, such as the learning rate, pass a function that makes it from the
        unwrapped hyperparameters: `inner=lambda h: optax.sgd(h.learning_rate)`.
    - `outer`: an `optax.GradientTransformation` that moves the `raw` arrays of the
        hyperparameters.
    - `inner_steps`: the number of inner steps in a call of `step`.
    - `val_at_each_step`: whether the validation loss is taken after each inner step.
        Otherwise it is taken only after the last one of a call.
    """

    problem: eqx.AbstractVar[Problem]
    inner: eqx.AbstractVar[InnerOptimiser]
    outer: eqx.AbstractVar[optax.GradientTransformation]
    inner_steps: eqx.AbstractVar[int]
    val_at_each_step: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def init(
        self,
        model: Model,
        hyperparams: Hyperparams,
        *,
        train: Batch | AbstractBatches = None,
        val: Batch | AbstractBatches = None,
        model_state: PyTree = None,
        key: Key = None,
    ) -> BilevelState:
        """Makes the state before the first step.

        **Arguments:**

        - `model`: any pytree. Its inexact arrays are trained. All other leaves pass
            through.
        - `hyperparams`: any pytree of placeholders and floating-point arrays. Python
            floats become arrays. The pytree may be empty.
        - `train`, `val`: the data, as for `step`. `init` reads their structure. If both
            are given, it also warns of hyperparameters that get no hypergradient.
            [`eqx_hpo.HyperDistill`][] needs `train`. Losses with `has_aux=True` need
            both: without them `state.metrics.aux` is `None` until the first step, and
            `step` compiles twice.
        - `model_state`: an `eqx.nn.State`, for losses that take and return one.
        - `key`: a PRNG key, if the losses need one.

        **Returns:** an [`eqx_hpo.BilevelState`][].

        **Raises:** a `ValueError` if `model` has nothing to train or still holds
        placeholders, or if a hyperparameter is not floating point.
        """

    @abc.abstractmethod
    def step(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> BilevelState:
        """Trains the model for `inner_steps`, then updates the hyperparameters once. It
        compiles once for a run of any length. A step is skipped if its losses, its
        hypergradient and its new state are not all finite. A skipped step changes only
        `step`, the counts of skipped steps, `metrics`, and the loss scale of
        [`eqx_hpo.mixed_precision`][].

        **Arguments:**

        - `state`: from `init` or an earlier `step`.
        - `train`: the train data. This is a pytree of arrays (one batch, used at every
            inner step), an [`eqx_hpo.Minibatch`][] or an [`eqx_hpo.Stacked`][].
        - `val`: the validation data, in the same forms. They are used after the last
            inner step, or after each one if `val_at_each_step`.
        - `key`: a PRNG key, a new one for each call. It is needed only if a loss or a
            sampler is random.

        **Returns:** a new state. The old one stays valid.

        **Raises:** an `equinox.EquinoxRuntimeError`, with its own text, if an
        `equinox.error_if` inside a loss or a layer fails.
        """

    @abc.abstractmethod
    def compute_hypergradient(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> Hyperparams:
        """Computes the hypergradient that `step` would use. It does not check whether
        this is finite.

        **Arguments:** those of `step`.

        **Returns:** a pytree of the structure of `state.hyperparams`. It holds the
        gradient in place of each `raw` and each plain array, and `None` elsewhere.
        """

    @abc.abstractmethod
    def restart(
        self, state: BilevelState, model: Model, *, model_state: PyTree = None
    ) -> BilevelState:
        """Starts the inner level afresh. It resets the model, the inner optimiser's
        state, the memory of the episode and `episode_step`. Everything else is kept.

        **Arguments:**

        - `state`: the state so far.
        - `model`: the fresh model, of the structure given to `init`.
        - `model_state`: the fresh `eqx.nn.State`. Without it, the present statistics
            are kept.

        **Returns:** a new state.
        """
