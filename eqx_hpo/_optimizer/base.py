"""The interface of every algorithm: `init`, `step`, `compute_hypergradient`, `restart`.

They are implemented once, here. An algorithm fills three slots: `estimate` (move the
inner level and estimate the hypergradient), `init_memory` (what it carries from step to
step) and `init_diagnostics` (what it reports).
"""

import abc
import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._custom_types import (
    Batch,
    Hyperparams,
    InnerOptimiser,
    IntScalar,
    Key,
    Model,
    Through,
)
from .._data import AbstractBatches, as_batches
from .._discrete import refresh
from .._hyperparameter import canonical, partition_raw, unwrap
from .._inner import inner_init, start_inner
from .._jit import filter_jit
from .._levels import first_task_level, Levels
from .._misc import as_device_arrays, check_same_structure
from .._problem import Problem
from .._second_order import AbstractSecondOrder
from .._state import (
    BilevelState,
    Estimate,
    float_scalar,
    InnerState,
    Memory,
    Metrics,
)
from .._tasks import replicate
from .._windows import at_start
from . import checks
from .accept import accept


class AbstractBilevelOptimizer(eqx.Module):
    """An algorithm that trains a model and tunes its hyperparameters by gradient: an
    immutable collection of settings. What changes is in [`eqx_hpo.BilevelState`][].

    **Attributes:**

    - `problem`: the two losses.
    - `inner`: an `optax.GradientTransformation` that trains the model, or a function
        from the unwrapped hyperparameters to one, for learning rates and the like:
        `inner=lambda h: optax.sgd(h.learning_rate)`.
    - `outer`: an `optax.GradientTransformation` on the `raw` arrays of the
        hyperparameters.
    - `second_order`: the rule for derivatives of the training gradient.
    - `inner_steps`: the number of inner steps in a call of `step`.
    - `unroll`: how many inner steps a compiled loop holds in its body. By default one,
        or on CPUs all (of at most 64) if a loss holds a convolution: loops slow it.
    """

    problem: eqx.AbstractVar[Problem]
    inner: eqx.AbstractVar[InnerOptimiser]
    outer: eqx.AbstractVar[optax.GradientTransformation]
    second_order: eqx.AbstractVar[AbstractSecondOrder]
    inner_steps: eqx.AbstractVar[int]
    unroll: eqx.AbstractVar[int | None]
    # What of the inner level the estimate differentiates.
    through: eqx.AbstractVar[Through]
    # Whether the validation loss is taken after each inner step, or after the last.
    val_at_each_step: eqx.AbstractVar[bool]
    # How many tasks the models and the data are for, or `None`: no task axis.
    tasks: eqx.AbstractVar[int | None]
    # How many inner steps share an entry of the hyperparameters, or `None`: no windows.
    sharing: eqx.AbstractVar[int | None]

    def __check_init__(self):
        checks.check_settings(self)

    @abc.abstractmethod
    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        """What the algorithm carries before the first step. Its `episode` is all zeros.

        **Arguments:**

        - `inner`: the inner state at the start.
        - `hyperparams`: the unwrapped hyperparameters.
        - `batch`: a train batch, with `jax.ShapeDtypeStruct`s in place of arrays, or
            `None` where `init` was given none.
        """

    @abc.abstractmethod
    def init_diagnostics(self) -> PyTree:
        """What `state.metrics.diagnostics` holds before the first step, of the
        structure that `Estimate.diagnostics` has; `None` for none."""

    @abc.abstractmethod
    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        """Moves the inner level by `inner_steps` and estimates the hypergradient.

        **Arguments:**

        - `levels`: the two levels, with the data and the key of this step.
        - `inner`: the inner state before the step.
        - `hyperparams`: the unwrapped hyperparameters.
        - `memory`: the algorithm's own.
        """

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
        """The state before the first step.

        **Arguments:**

        - `model`: any pytree. Its inexact arrays are trained, all other leaves pass
            through.
        - `hyperparams`: any pytree of placeholders and floating-point arrays. Python
            floats become arrays. May be empty.
        - `train`, `val`: the data, as for `step`, to find their structure.
            [`eqx_hpo.HyperDistill`][] needs `train`. Losses with `has_aux=True` need
            both, or `state.metrics.aux` is `None` until the first step, and `step`
            compiles twice.
        - `model_state`: an `eqx.nn.State`, for losses that take and return one.
        - `key`: a PRNG key, where the losses need one.

        **Raises:** a `ValueError` if `model` has nothing to train or still holds
        placeholders, or if a hyperparameter is not floating point.
        """
        hyperparams = canonical(hyperparams)
        checks.check_model(model)
        model, model_state = replicate(
            as_device_arrays((model, model_state)), self.tasks
        )
        plain = unwrap(hyperparams)
        start = at_start(plain, self.sharing)
        inner = start_inner(self.inner, self.tasks, start, model, model_state)
        levels = make_levels(self, model, train, val, jnp.array(0), key)
        levels, first = first_task_level(levels, inner, self.tasks)
        aux = checks.empty_aux(levels, first, start)
        batch = checks.train_batch_shapes(levels)
        nan = float_scalar(jnp.nan)
        reports = replicate(
            (aux, as_device_arrays(self.init_diagnostics())), self.tasks
        )
        return BilevelState(
            model=model,
            hyperparams=hyperparams,
            inner_opt_state=inner.opt_state,
            outer_opt_state=as_device_arrays(
                self.outer.init(partition_raw(hyperparams)[0])
            ),
            memory=as_device_arrays(self.init_memory(first, plain, batch)),
            model_state=model_state,
            step=jnp.zeros((), int),
            skipped=jnp.zeros((), int),
            metrics=Metrics(nan, nan, nan, *reports),
        )

    @filter_jit
    def step(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> BilevelState:
        """Trains the model for `inner_steps`, then updates the hyperparameters once.
        Compiled once for a run of any length. A step whose losses, hypergradient or
        updates are not all finite changes only `step`, `skipped` and `metrics`.

        **Arguments:**

        - `state`: from `init` or an earlier `step`.
        - `train`: the train data: a pytree of arrays (one batch, used at every inner
            step), [`eqx_hpo.Minibatch`][] or [`eqx_hpo.Stacked`][].
        - `val`: the validation data, likewise. Used at the last inner step.
        - `key`: a PRNG key, a new one for each call; needed only where a loss or a
            sampler is random.

        **Returns:** a new state; the old one stays valid.
        """
        estimate, gradient, hyperparams = self._estimate(state, train, val, key)
        return accept(
            state, estimate, hyperparams, gradient, self.outer, self.problem.has_aux
        )

    @filter_jit
    def compute_hypergradient(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> Hyperparams:
        """The hypergradient that `step` would use, with the same arguments as those of
        `step`. Not checked for being finite.

        **Returns:** a pytree of the structure of `state.hyperparams`, with the gradient
        in place of each `raw` and each plain array, and `None` elsewhere.
        """
        return self._estimate(state, train, val, key)[1]

    def restart(
        self, state: BilevelState, model: Model, *, model_state: PyTree = None
    ) -> BilevelState:
        """Starts the inner level afresh: the model, the inner optimiser's state and the
        memory of the episode. All else lives on.

        **Arguments:**

        - `state`: the state so far.
        - `model`: the fresh model, of the structure given to `init`.
        - `model_state`: the fresh `eqx.nn.State`; without it the statistics so far
            are kept.

        **Returns:** a new state.
        """
        model = replicate(as_device_arrays(model), self.tasks)
        check_same_structure("model", model, state.model, "the model of `state`")
        given = replicate(as_device_arrays(model_state), self.tasks)
        model_state = state.model_state if model_state is None else given
        plain = at_start(unwrap(state.hyperparams), self.sharing)
        inner = start_inner(self.inner, self.tasks, plain, model, model_state)
        episode = jtu.tree_map(jnp.zeros_like, state.memory.episode)
        return eqx.tree_at(
            lambda s: (s.model, s.inner_opt_state, s.memory.episode, s.model_state),
            state,
            (model, inner.opt_state, episode, inner.model_state),
            is_leaf=lambda x: x is None,
        )

    def _estimate(self, state, train, val, key):
        levels = make_levels(self, state.model, train, val, state.step, key)
        hyperparams = refresh(state.hyperparams, key, state.step)
        raw, constants = partition_raw(hyperparams)
        to_plain = lambda raw: unwrap(eqx.combine(raw, constants))
        plain, pullback = eqx.filter_vjp(to_plain, raw)
        inner = InnerState(
            eqx.filter(state.model, eqx.is_inexact_array),
            state.inner_opt_state,
            state.model_state,
        )
        start = at_start(plain, self.sharing)
        init = inner_init(self.inner, self.tasks, start)
        checks.check_state(state, init, self.outer, raw)
        one_task = first_task_level(levels, inner, self.tasks)
        with checks.explain_missing_key(*one_task, start):
            unroll = self.unroll or checks.default_unroll(
                *one_task, start, self.inner_steps
            )
            levels = dataclasses.replace(levels, unroll=unroll)
            estimate = self.estimate(levels, inner, plain, state.memory)
        checks.warn_if_independent(*one_task, start, self.through)
        (gradient,) = pullback(estimate.hypergradient)
        return estimate, gradient, hyperparams


def make_levels(
    optimizer: AbstractBilevelOptimizer,
    model: Model,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    step: IntScalar,
    key: Key,
) -> Levels:
    """The two levels of call number `step`."""
    return Levels(
        problem=optimizer.problem,
        inner=optimizer.inner,
        second_order=optimizer.second_order,
        frozen=eqx.filter(model, eqx.is_inexact_array, inverse=True),
        train=as_batches(train, "train", optimizer.inner_steps),
        val=as_batches(val, "val", optimizer.inner_steps),
        position=step * optimizer.inner_steps,
        key=key,
        unroll=optimizer.unroll or 1,
    )
