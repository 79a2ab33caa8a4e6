"""Implements the four methods of the interface for all algorithms for one model.

A concrete one fills three slots: `estimate` (move the inner level and estimate the
hypergradient), `init_memory` (the memory carried from step to step) and
`init_diagnostics` (the report on the estimate).
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._checks import check_key, check_same_structure
from .._custom_types import Batch, Hyperparams, Key, Model, Through
from .._data import AbstractBatches, as_batches, first_batch
from .._discrete import refresh
from .._hyperparameter import (
    at_inner_step,
    canonical,
    partition_raw,
    unwrap_values,
)
from .._inner import start_inner
from .._jit import jit_method
from .._levels import Levels, make_levels
from .._misc import as_device_arrays
from .._precision import lift, settle
from .._second_order import AbstractSecondOrder
from .._sharding import mesh_of_tree, on_mesh, put_like
from .._state import (
    BilevelState,
    check_state,
    Estimate,
    float_scalar,
    inner_state,
    InnerState,
    Memory,
    Metrics,
)
from .guard import is_small, next_state
from .interface import AbstractBilevelOptimizer
from .recompilation import forget_compilations, warn_of_recompilation
from .settings import check_model, check_settings
from .tracing import (
    check_optimiser_states,
    default_unroll,
    empty_aux,
    explain_failed_losses,
    warn_if_same,
    warn_if_unreached,
)


class AbstractAlgorithm(AbstractBilevelOptimizer):
    """An algorithm for one model. A concrete one fills the three slots below.

    **Attributes:** besides those of [`eqx_hpo.AbstractBilevelOptimizer`][],

    - `second_order`: the rule for derivatives of the training gradient.
    - `unroll`: the number of inner steps in the body of a compiled loop. The default is
        one. On CPUs it is all of them (if they are at most 64) if a loss holds a
        convolution, since convolutions are slow inside loops there.
    - `through`: the derivative of the inner level that the estimate takes. `"update"`
        means that of the optimiser's update, and `"gradient"` that of the training
        gradient. `"differences"` means that it compares values instead. `None` means
        that it takes none. `init` warns of hyperparameters that this derivative does
        not reach.
    - `sees_raw`: whether `init_memory` and `estimate` get the `raw` arrays as
        `hyperparams` and estimate the hypergradient of these. `levels.unwrap` then
        makes unwrapped hyperparameters from them.
    """

    second_order: eqx.AbstractVar[AbstractSecondOrder]
    unroll: eqx.AbstractVar[int | None]
    through: eqx.AbstractClassVar[Through]
    sees_raw: ClassVar[bool] = False

    def __check_init__(self):
        check_settings(self)

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
        - `memory`: the algorithm's memory before the step.

        **Returns:** an [`eqx_hpo.Estimate`][].
        """

    @abc.abstractmethod
    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        """Makes the memory before the first step. At a restart it is called again to
        renew `episode`, with `None` for `batch`. The parts of `episode` that are then
        `None` keep their old values.

        **Arguments:**

        - `inner`: the inner state at the start.
        - `hyperparams`: the unwrapped hyperparameters.
        - `batch`: a train batch. It holds `jax.ShapeDtypeStruct`s in place of arrays,
            unless these lie on a mesh. It is `None` if the batch is always the same, or
            if `init` was given no data.

        **Returns:** an [`eqx_hpo.Memory`][].
        """

    @abc.abstractmethod
    def init_diagnostics(self) -> PyTree:
        """Makes `state.metrics.diagnostics` before the first step, in the structure of
        `Estimate.diagnostics`. Returns `None` if the algorithm reports nothing."""

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
        check_key(key)
        hyperparams = canonical(hyperparams)
        check_model(model, model_state)
        model, model_state = as_device_arrays((model, model_state))
        given = (model, hyperparams, model_state)
        mesh = mesh_of_tree((given, train, val))
        model, hyperparams, model_state = on_mesh(given, mesh)
        plain = unwrap_values(hyperparams)
        first = at_inner_step(plain, jnp.zeros((), int))
        start = start_inner(self.inner, first, model, model_state)
        inner = lift(start)
        batches = as_batches(train, "train", self.inner_steps)
        raw, _ = partition_raw(hyperparams)
        batch = first_batch(batches, key, mesh)
        memory = self.init_memory(inner, raw if self.sees_raw else plain, batch)
        # No two of these share memory, which a caller may donate.
        nans = [float_scalar(jnp.nan) for _ in range(3)]
        diagnostics = as_device_arrays(self.init_diagnostics())
        state = BilevelState(
            model=model,
            hyperparams=hyperparams,
            inner_opt_state=start.opt_state,
            outer_opt_state=as_device_arrays(self.outer.init(raw)),
            memory=as_device_arrays(memory),
            model_state=model_state,
            step=jnp.zeros((), int),
            episode_step=jnp.zeros((), int),
            skipped=jnp.zeros((), int),
            total_skipped=jnp.zeros((), int),
            first_skipped=jnp.zeros((), int),
            metrics=Metrics(nans[0], nans[1], nans[2], None, diagnostics),
        )
        state = on_mesh(state, mesh)
        forget_compilations(self, state)
        if train is None or val is None:
            return state
        tunes = self.through != "values"
        if tunes:
            warn_if_same(train, val)
        elif not self.problem.has_aux:
            return state  # nothing to find out
        levels = levels_of_step(self, state, plain, train, val, key)
        warn_if_unreached(levels, inner, plain, self.through)
        if not self.problem.has_aux:
            return state
        aux = empty_aux(levels, inner, plain)
        metrics = dataclasses.replace(state.metrics, aux=aux)
        return dataclasses.replace(state, metrics=metrics)

    @jit_method
    def step(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> BilevelState:
        check_state("state", state)
        check_key(key)
        hyperparams = refresh(state.hyperparams, key, state.step)
        estimate = raw_estimate(self, state, hyperparams, train, val, key)
        return next_state(
            self.outer,
            state,
            hyperparams,
            estimate,
            state.episode_step + self.inner_steps,
            self.problem.has_aux,
        )

    @jit_method
    def compute_hypergradient(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> Hyperparams:
        check_state("state", state)
        check_key(key)
        hyperparams = refresh(state.hyperparams, key, state.step)
        estimate = raw_estimate(self, state, hyperparams, train, val, key)
        return estimate.hypergradient

    def restart(
        self, state: BilevelState, model: Model, *, model_state: PyTree = None
    ) -> BilevelState:
        check_state("state", state)
        model, given = as_device_arrays((model, model_state))
        check_same_structure("model", model, state.model, "the model of `state`")
        if given is not None:
            what = "the model state of `state`"
            check_same_structure("model_state", given, state.model_state, what)
        model_state = state.model_state if model_state is None else given
        plain, zero = unwrap_values(state.hyperparams), jnp.zeros((), int)
        inner = start_inner(self.inner, at_inner_step(plain, zero), model, model_state)
        seen = partition_raw(state.hyperparams)[0] if self.sees_raw else plain
        fresh = as_device_arrays(self.init_memory(lift(inner), seen, None).episode)
        # What cannot be made without a batch stays as it was.
        episode = jtu.tree_map(
            lambda new, old: old if new is None else new,
            fresh,
            state.memory.episode,
            is_leaf=lambda x: x is None,
        )
        fresh = dataclasses.replace(
            state,
            model=model,
            inner_opt_state=inner.opt_state,
            memory=dataclasses.replace(state.memory, episode=episode),
            model_state=model_state,
            episode_step=zero,
        )
        return put_like(fresh, state)


def raw_estimate(
    algorithm: AbstractAlgorithm,
    state: BilevelState,
    hyperparams: Hyperparams,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    key: Key,
    mean: Callable[[PyTree], PyTree] | None = None,
    unroll: int | None = None,
) -> Estimate:
    """Computes an algorithm's estimate for one model, with the hypergradient of the
    `raw` arrays.

    **Arguments:**

    - `algorithm`, `state`, `train`, `val`, `key`: as for `step`.
    - `hyperparams`: those of `state`, with the noise of this step.
    - `mean`: takes the mean over all models that share the hyperparameters.
    - `unroll`: stands for that of `algorithm`, if given.
    """
    raw, constants = partition_raw(hyperparams)
    to_plain = lambda raw: unwrap_values(eqx.combine(raw, constants))
    if not is_small(jtu.tree_leaves(raw)):
        # Values are computed again on the way back; kept, they would outlast the step.
        to_plain = eqx.filter_checkpoint(to_plain)
    plain, pullback = eqx.filter_vjp(to_plain, raw)
    start = at_inner_step(plain, jnp.zeros((), int))
    warn_of_recompilation(algorithm, state, {"train": train, "val": val})
    check_optimiser_states(state, algorithm.inner, algorithm.outer, start, raw)
    levels = levels_of_step(algorithm, state, plain, train, val, key, mean)
    if unroll is not None:
        levels = dataclasses.replace(levels, unroll=unroll)
    inner = lift(inner_state(state))
    if algorithm.sees_raw:
        levels = dataclasses.replace(levels, unwrap=to_plain)
        estimate = algorithm.estimate(levels, inner, raw, state.memory)
        return dataclasses.replace(estimate, inner=settle(estimate.inner))
    estimate = algorithm.estimate(levels, inner, plain, state.memory)
    (gradient,) = pullback(estimate.hypergradient)
    return dataclasses.replace(
        estimate, inner=settle(estimate.inner), hypergradient=gradient
    )


def levels_of_step(
    algorithm: AbstractAlgorithm,
    state: BilevelState,
    plain: Hyperparams,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    key: Key,
    mean: Callable[[PyTree], PyTree] | None = None,
) -> Levels:
    """Makes the levels of the next call of `step`; arguments as of `raw_estimate`."""

    def make(key):
        return make_levels(
            algorithm.problem,
            algorithm.inner,
            algorithm.second_order,
            state,
            plain,
            as_batches(train, "train", algorithm.inner_steps),
            as_batches(val, "val", algorithm.inner_steps),
            state.step * algorithm.inner_steps,
            key,
            mean or _itself,
        )

    data = {"train": train, "val": val}
    with explain_failed_losses(key, data, retry=make):
        levels = make(key)
    unroll = algorithm.unroll or default_unroll(levels, algorithm.inner_steps)
    return dataclasses.replace(levels, unroll=unroll)


def _itself(tree: PyTree) -> PyTree:
    return tree
