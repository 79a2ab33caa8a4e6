"""The two levels of a problem within one step, as pure functions of arrays.

An algorithm sees nothing else. It moves the inner level by `update`, by `advance` (one
update and its pull-back) or by `run` (many updates). It gets the validation loss by
`validate`. All are differentiable in the inner state and in the hyperparameters. The
second-order rule differentiates the training gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray, PyTree

from ._custom_types import (
    Batch,
    FloatScalar,
    Hyperparams,
    InnerOptimiser,
    IntScalar,
    Key,
)
from ._data import AbstractBatches, SameBatch
from ._hyperparameter import at_inner_step, unwrap_values
from ._inner import apply_inner
from ._misc import as_single, holds_half, match_types, tree_zeros
from ._precision import (
    in_half,
    is_mixed,
    loss_scale_of,
    scaled,
    shrink,
    unscaled,
    with_derivative_of,
)
from ._problem import evaluate_train, evaluate_val, Problem
from ._repeat import repeat_step
from ._second_order import AbstractSecondOrder, FiniteDifference, ReverseOverReverse
from ._state import BilevelState, InnerState
from ._traced_loss import trace, TracedLoss


# What a key is folded with, for draws that are independent of each other.
_TRAIN, _VAL, _ALGORITHM = 0, 1, 2

# The pull-back of an inner step: from a cotangent of its `(params, model_state)` to one
# of the hyperparameters.
Pullback = Callable[[tuple[PyTree, PyTree]], Hyperparams]


class Levels(eqx.Module):
    """Holds the inner and the outer level of one call of `step`.

    **Attributes:**

    - `train_loss`, `val_loss`: the two losses, traced as functions of arrays.
    - `inner`, `second_order`: the settings of the algorithm.
    - `train`, `val`: the sources of a batch for each inner step.
    - `position`: the number of inner steps of the run before this call, including those
        of skipped calls.
    - `episode_position`: the number of inner steps of the episode before this call.
    - `key`: a PRNG key, or `None`.
    - `mean`: a function that takes the mean of a pytree over all models that share the
        hyperparameters. Everything that an algorithm puts in `Memory.lasting` must have
        passed through it. For a single model it is the identity.
    - `unroll`: the number of updates in the body of a scan of `run`.
    - `unwrap`: a function that makes unwrapped hyperparameters from `raw` arrays. It
        serves algorithms with `sees_raw`.
    """

    train_loss: TracedLoss
    val_loss: TracedLoss
    inner: InnerOptimiser
    second_order: AbstractSecondOrder
    train: AbstractBatches
    val: AbstractBatches
    position: IntScalar
    episode_position: IntScalar
    key: Key
    mean: Callable[[PyTree], PyTree] = eqx.field(static=True)
    unroll: int = eqx.field(static=True, default=1)
    unwrap: Callable[[PyTree], Hyperparams] = eqx.field(
        static=True, default=unwrap_values
    )

    def update(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[InnerState, tuple[FloatScalar, Any]]:
        r"""Takes one inner step, $\theta_t = \Phi(\theta_{t-1}, \lambda; D_t)$.

        **Arguments:**

        - `state`: $\theta_{t-1}$, with the states of the optimiser and of the model.
        - `hyperparams`: the unwrapped hyperparameters $\lambda$.
        - `index`: the number of the inner step within this call, counted from 0.

        **Returns:** the new inner state, and `(train_loss, aux)` at $\theta_{t-1}$,
        which is not differentiated.
        """
        gradient, model_state, report = self.gradient(state, hyperparams, index)
        return self.apply(gradient, state, hyperparams, model_state, index), report

    def advance(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[InnerState, Pullback, tuple[FloatScalar, Any]]:
        r"""Takes one inner step and keeps the way back to the hyperparameters.

        **Arguments:** those of `update`.

        **Returns:** the new inner state, the pull-back, and `(train_loss, aux)` at
        $\theta_{t-1}$. The pull-back maps $\alpha_t = \partial C_2 / \partial
        (\theta_t, \text{model state})$ to $\alpha_t B_t$, with $\theta_{t-1}$ held
        fixed.
        """
        return with_pullback(
            lambda hyperparams: self.update(state, hyperparams, index), hyperparams
        )

    def gradient(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[PyTree, PyTree, tuple[FloatScalar, Any]]:
        r"""Computes the training gradient $\nabla_\theta C_1(\theta_{t-1}, \lambda;
        D_t)$ of one inner step, differentiable by the second-order rule.

        **Arguments:** those of `update`.

        **Returns:** the gradient, the model's state after the step, and `(train_loss,
        aux)`, which is not differentiated.
        """
        rule, half = self.second_order, in_half(state)
        if half is None:
            return self._differentiate(rule, state, hyperparams, index)
        # The value in half precision, the derivative in single precision.
        scale = loss_scale_of(state)
        value, model_state, report = self._differentiate(
            ReverseOverReverse(), half, hyperparams, index, scale
        )
        at = self._to_differentiate(self.train_loss, state, hyperparams)
        state, hyperparams = shrink(at, scale)
        like, like_state, _ = self._differentiate(
            rule, state, hyperparams, index, scale
        )
        value = jtu.tree_map(lambda x: unscaled(as_single(x), scale), value)
        like_state = jtu.tree_map(lambda x: scaled(x, scale), like_state)
        followed = with_derivative_of((value, model_state), (like, like_state))
        return *followed, report

    def _differentiate(
        self,
        rule: AbstractSecondOrder,
        state: InnerState,
        hyperparams: Hyperparams,
        index: IntScalar,
        scale: FloatScalar | None = None,
    ) -> tuple[PyTree, PyTree, tuple[FloatScalar, Any]]:
        """Computes what `gradient` returns, but for `scale` times the train loss."""
        hyperparams = self._at(hyperparams, index)
        levels = self
        if isinstance(rule, FiniteDifference):
            levels = self.in_single_precision(state, hyperparams)
        # A rule sees three groups: what it differentiates in (`params` and `rest`), all
        # other arrays (`args`), which a custom VJP must get as arguments, and what is
        # no array (`static`), which may stay in the closure.
        rest, fixed = eqx.partition(
            (hyperparams, state.model_state), eqx.is_inexact_array
        )
        args, static = eqx.partition((levels, fixed, index, scale), eqx.is_array)

        def loss(params, rest, args):
            levels, fixed, index, scale = eqx.combine(args, static)
            hyperparams, model_state = eqx.combine(rest, fixed)
            # Drawn in here, a batch is drawn again on the way back and never stored.
            batch, key = levels._draw(levels.train, index, _TRAIN)
            loss, model_state, aux = levels.train_loss(
                params, model_state, hyperparams, batch, key
            )
            carried, fixed = eqx.partition(model_state, eqx.is_inexact_array)
            return scaled(loss, scale), (carried, (fixed, loss, aux))

        differentiated = rule.differentiate(loss)
        grad, carried, (_, report) = differentiated(state.params, rest, args)
        fixed, value, aux = report
        return grad, eqx.combine(carried, fixed), (value, aux)

    def apply(
        self,
        gradient: PyTree,
        state: InnerState,
        hyperparams: Hyperparams,
        model_state: PyTree,
        index: IntScalar,
    ) -> InnerState:
        """Moves the inner state along a training gradient, by the optimiser.

        **Arguments:**

        - `gradient`: the training gradient.
        - `state`, `hyperparams`, `index`: as for `update`.
        - `model_state`: the model's state after the step.
        """
        hyperparams = self._at(hyperparams, index)
        is_first = self.episode_position + index == 0
        params, opt_state = apply_inner(
            self.inner, gradient, state, hyperparams, is_first
        )
        return match_types(InnerState(params, opt_state, model_state), state)

    def run(
        self,
        state: InnerState,
        hyperparams: Hyperparams,
        start: int,
        stop: int,
        recompute: int = 0,
    ) -> tuple[InnerState, tuple[FloatScalar, Any]]:
        """Takes the inner steps from `start` up to `stop - 1` of this call, at least
        one.

        **Arguments:**

        - `state`, `hyperparams`: as for `update`.
        - `start`, `stop`: the range of inner steps, without `stop` itself.
        - `recompute`: how often reverse mode may compute each inner step again, as for
            [`eqx_hpo.Unrolled`][].

        **Returns:** the inner state after these steps, and the report of the last one.
        """
        if stop - start == 1 and recompute == 0:
            return self.update(state, hyperparams, jnp.asarray(start))

        def step(carry):
            state, _, index = carry
            state, report = self.update(state, hyperparams, index)
            return state, report, index + 1

        empty = eqx.filter_eval_shape(
            self.evaluate, state, hyperparams, jnp.asarray(start)
        )
        # The index is carried: an array of them would grow with the steps.
        carry = (state, tree_zeros(empty), jnp.asarray(start))
        state, report, _ = repeat_step(
            step, carry, stop - start, recompute, self.unroll
        )
        return state, report

    def evaluate(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[FloatScalar, Any]:
        """Computes the train loss of an inner step as `(loss, aux)`, without taking the
        step.

        **Arguments:** those of `update`.
        """
        batch, key = self._draw(self.train, index, _TRAIN)
        hyperparams = self._at(hyperparams, index)
        state = in_half(state) or state
        loss, _, aux = self.train_loss(
            state.params, state.model_state, hyperparams, batch, key
        )
        return loss, aux

    def validate(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[FloatScalar, Any]:
        r"""Computes the validation loss $C_2(\theta_t, \lambda)$ as `(loss, aux)`.

        **Arguments:** those of `update`. `state` is the inner state after inner step
        `index`.
        """
        batch, key = self._draw(self.val, index, _VAL)
        hyperparams = self._at(hyperparams, index)
        state, hyperparams = self._to_differentiate(self.val_loss, state, hyperparams)
        return self.val_loss(state.params, state.model_state, hyperparams, batch, key)

    def validation_gradient(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[tuple[FloatScalar, Any], tuple[PyTree, PyTree], Hyperparams]:
        r"""Computes the validation loss with its two partial derivatives.

        **Arguments:** those of `validate`.

        **Returns:** `(loss, aux)`, $\alpha_t = \partial C_2 / \partial (\theta_t,
        \text{model state})$, and $\partial C_2 / \partial \lambda$ at fixed $\theta_t$.
        """

        scale = loss_scale_of(state)

        def loss(x):
            (params, model_state), hyperparams = x
            inner = InnerState(params, state.opt_state, model_state)
            report = self.validate(inner, hyperparams, index)
            return scaled(report[0], scale), report

        x = ((state.params, state.model_state), hyperparams)
        gradients, report = eqx.filter_grad(loss, has_aux=True)(x)
        alpha, direct = jtu.tree_map(lambda x: unscaled(x, scale), gradients)
        return report, alpha, direct

    def direct_gradient(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> Hyperparams:
        r"""Computes $\partial C_1 / \partial \lambda$ of the train loss of an inner
        step at fixed $\theta_t$.

        **Arguments:** those of `evaluate`.

        **Returns:** the gradient. It is at least in single precision if the loss can be
        evaluated so.
        """
        scale, levels = (
            loss_scale_of(state),
            self.in_single_precision(state, hyperparams),
        )
        state, hyperparams = levels._to_differentiate(
            levels.train_loss, state, hyperparams
        )
        if levels.train_loss.single is not None:
            params = jtu.tree_map(as_single, state.params)
            state = dataclasses.replace(state, params=params)

        def loss(hyperparams):
            batch, key = levels._draw(levels.train, index, _TRAIN)
            h = levels._at(hyperparams, index)
            out = levels.train_loss(state.params, state.model_state, h, batch, key)
            return scaled(out[0], scale)

        gradient = eqx.filter_grad(loss)(hyperparams)
        return jtu.tree_map(lambda x: unscaled(x, scale), gradient)

    def _to_differentiate(
        self, loss: TracedLoss, state: InnerState, hyperparams: Hyperparams
    ) -> tuple[InnerState, Hyperparams]:
        """Finds the point at which to differentiate a loss: the masters of a model in
        half precision, or the model if the loss cannot be evaluated at the masters."""
        if loss.single is not None:
            return state, jtu.tree_map(as_single, hyperparams)
        return in_half(state) or state, hyperparams

    def in_single_precision(
        self, state: InnerState, hyperparams: Hyperparams
    ) -> "Levels":
        """Makes levels whose `gradient` also takes parameters and hyperparameters in
        single precision, if these are in half precision.

        **Arguments:** those of `evaluate`.
        """
        if not holds_half((state.params, hyperparams)) or is_mixed(state.opt_state):
            return self
        index = jnp.array(0)
        hyperparams = self._at(hyperparams, index)
        batch, key = eqx.filter_eval_shape(self._draw, self.train, index, _TRAIN)
        traced = self.train_loss.in_single_precision(
            state.params, state.model_state, hyperparams, batch, key
        )
        return dataclasses.replace(self, train_loss=traced)

    def train_batch(self, index: IntScalar) -> Batch:
        """Draws the batch $D_t$ of the train data that inner step `index` uses."""
        return self._draw(self.train, index, _TRAIN)[0]

    def with_batch_drawn(self, index: IntScalar) -> "Levels":
        """Makes levels for inner step `index` alone, with its train batch already
        drawn. Going back through this step then need not draw it again."""
        return dataclasses.replace(self, train=SameBatch(self.train_batch(index)))

    def algorithm_key(self, index: IntScalar) -> PRNGKeyArray:
        """Makes a PRNG key for the algorithm's own random choices at inner step
        `index`. There is one even if `step` was given none."""
        if self.key is None:
            return jr.fold_in(jr.key(_ALGORITHM), self.position + index)
        return jr.fold_in(jr.fold_in(self.key, index), _ALGORITHM)

    def _at(self, hyperparams: Hyperparams, index: IntScalar) -> Hyperparams:
        return at_inner_step(hyperparams, self.episode_position + index)

    def _draw(self, batches: AbstractBatches, index: IntScalar, level: int):
        if self.key is None:
            return batches.draw(index, self.position + index, None), None
        key = jr.fold_in(jr.fold_in(self.key, index), level)
        draw_key, loss_key = jr.split(key)
        return batches.draw(index, self.position + index, draw_key), loss_key


def make_levels(
    problem: Problem,
    inner: InnerOptimiser,
    second_order: AbstractSecondOrder,
    state: BilevelState,
    hyperparams: Hyperparams,
    train: AbstractBatches,
    val: AbstractBatches,
    position: IntScalar,
    key: Key,
    mean: Callable[[PyTree], PyTree],
) -> Levels:
    """Traces the two losses, each once, and makes the levels from them.

    `hyperparams` are unwrapped. `inner` and `second_order` belong to the algorithm.
    """
    params, static = eqx.partition(state.model, eqx.is_inexact_array)
    levels = Levels(
        TracedLoss(problem.train_loss, None, problem.train_loss),  # traced below
        TracedLoss(problem.val_loss, None, problem.val_loss),
        inner,
        second_order,
        train,
        val,
        position,
        state.episode_step,
        key,
        mean,
    )
    index = jnp.array(0)
    hyperparams = levels._at(hyperparams, index)

    def close(evaluate, batches, level):
        fn = lambda params, *args: evaluate(problem, eqx.combine(params, static), *args)
        batch, loss_key = eqx.filter_eval_shape(levels._draw, batches, index, level)
        args = (params, state.model_state, hyperparams, batch, loss_key)
        return trace(fn, args, is_mixed(state.inner_opt_state))

    return dataclasses.replace(
        levels,
        train_loss=close(evaluate_train, train, _TRAIN),
        val_loss=close(evaluate_val, val, _VAL),
    )


def with_pullback(
    reach: Callable[[Hyperparams], tuple[InnerState, Any]], hyperparams: Hyperparams
) -> tuple[InnerState, Pullback, Any]:
    """Differentiates the result of `reach` in the hyperparameters.

    **Returns:** the reached inner state, the pull-back from its `(params, model_state)`
    to the hyperparameters, and the report of the last step.
    """

    def fn(hyperparams):
        end, report = reach(hyperparams)
        return (end.params, end.model_state), (end.opt_state, report)

    reached, vjp, (opt_state, report) = eqx.filter_vjp(fn, hyperparams, has_aux=True)
    params, model_state = reached
    inner = InnerState(params, opt_state, model_state)
    return inner, lambda alpha: vjp(alpha)[0], report
