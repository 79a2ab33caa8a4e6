"""The hypergradient of a penalised problem, from two copies of the model and first
derivatives."""

import functools as ft
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Float

from .._checks import as_int
from .._custom_types import (
    Batch,
    FloatScalar,
    Hyperparams,
    InnerOptimiser,
    IntScalar,
    Through,
)
from .._hyperparameter import at_inner_step
from .._levels import Levels
from .._misc import as_single, match_types, tree_add, tree_norm, tree_scale, tree_where
from .._problem import Problem
from .._repeat import repeat_step
from .._second_order import AbstractSecondOrder, ReverseOverReverse
from .._state import Estimate, float_scalar, InnerState, Memory
from .base import AbstractAlgorithm
from .settings import as_scheduled, check_plain_inner, Scheduled, value_at


class PenaltyReport(eqx.Module):
    r"""Reports the bias of [`eqx_hpo.Penalty`][]. It is found in
    `state.metrics.diagnostics`. Both numbers are infinite while there is no estimate.

    **Attributes:**

    - `bias`: an estimate of the distance between the hypergradient and that of an
        infinite strength. It is a Euclidean norm over the unwrapped hyperparameters.
    - `relative_bias`: the bias divided by the norm of the hypergradient.
    """

    bias: Float[Array, ""]
    relative_bias: Float[Array, ""]


class Penalty(AbstractAlgorithm):
    r"""Estimates the hypergradient from two copies of the model, without second
    derivatives:

    $$y \approx \arg\min_\theta \; C_1 + \frac{C_2}{s}, \qquad
    z \approx \arg\min_\theta \; C_1, \qquad
    \frac{dC_2}{d\lambda} \approx \frac{\partial C_2}{\partial \lambda}(y) + s \Big(
    \frac{\partial C_1}{\partial \lambda}(y) - \frac{\partial C_1}{\partial
    \lambda}(z) \Big).$$

    In a call, each copy takes `inner_steps` steps with an `inner` of its own. The
    strength $s$ balances two errors. At the minima the bias falls as $1/s$. But the two
    derivatives differ only by an amount of order $1/s$, so rounding errors and
    incomplete convergence are multiplied by $s$. Usually the strength grows with the
    step, by a schedule.

    `state.model` is $z$, the model trained on the train loss alone. Memory is
    $O(P + H)$. An inner step costs three training gradients. A call also costs the
    derivatives in $\lambda$. Nothing is differentiated twice, so it works with custom
    kernels, quantised layers and straight-through estimators. It needs convergence, as
    [`eqx_hpo.Implicit`][] does. As there, a learning rate or a momentum among the
    hyperparameters is refused.

    With `bias_every` it estimates its bias now and then, as an
    [`eqx_hpo.PenaltyReport`][]. A third copy continues from $y$ at half the strength.
    If the bias falls as $1/s$, the hypergradient of this copy is as far from the first
    one as the first one is from the true one.

    ??? cite "References"

        Kwon et al., *A Fully First-Order Method for Stochastic Bilevel Optimization*,
        ICML 2023 (F2SA). Shen and Chen, *On Penalty-based Bilevel Gradient Descent
        Method*, ICML 2023 (V-PBGD).
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    strength: Scheduled = eqx.field(
        kw_only=True, converter=ft.partial(as_scheduled, "strength")
    )
    inner_steps: int = eqx.field(static=True, kw_only=True, default=1)
    bias_every: int | None = eqx.field(static=True, kw_only=True, default=None)
    bias_steps: int = eqx.field(static=True, kw_only=True, default=100)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    second_order: ClassVar[AbstractSecondOrder] = ReverseOverReverse()  # never used
    through: ClassVar[Through] = "gradient"
    val_at_each_step: ClassVar[bool] = True

    def __check_init__(self):
        check_plain_inner(self.inner)
        as_int("bias_steps", self.bias_steps, 1)
        if self.bias_every is not None:
            as_int("bias_every", self.bias_every, 1)

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del hyperparams, batch
        copy = lambda x: jnp.array(x) if eqx.is_array(x) else x
        # Below zero, not infinite: a new infinity is no state to go on from.
        unknown = jtu.tree_map(lambda x: -jnp.ones_like(x), self.init_diagnostics())
        return Memory(episode=(jtu.tree_map(copy, inner), unknown))

    def init_diagnostics(self) -> PenaltyReport | None:
        if self.bias_every is None:
            return None
        return PenaltyReport(float_scalar(jnp.inf), float_scalar(jnp.inf))

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        number = levels.position // self.inner_steps
        strength = value_at("strength", self.strength, number)
        penalised, report = memory.episode
        last = jnp.asarray(self.inner_steps - 1)
        inner, train = levels.run(inner, hyperparams, 0, self.inner_steps)
        penalised = _train_penalised(
            levels, penalised, hyperparams, strength, self.inner_steps
        )
        at = lambda state, strength: _hypergradient(
            levels, state, inner, hyperparams, strength, last
        )
        hypergradient = at(penalised, strength)
        if self.bias_every is not None:

            def look():
                # The copy goes on at the entry of a `Schedule` that is looked at.
                present = at_inner_step(hyperparams, levels.episode_position + last)
                half = _train_penalised(
                    levels, penalised, present, strength / 2, self.bias_steps
                )
                new = _compare(hypergradient, at(half, strength / 2))
                return tree_where(jnp.isfinite(new.relative_bias), new, report)

            is_due = (number + 1) % self.bias_every == 0
            report = lax.cond(is_due, look, lambda: report)
        return Estimate(
            inner=inner,
            memory=Memory(episode=(penalised, report)),
            hypergradient=match_types(
                hypergradient, eqx.filter(hyperparams, eqx.is_inexact_array)
            ),
            train=train,
            val=levels.validate(inner, hyperparams, last),
            diagnostics=jtu.tree_map(lambda x: jnp.where(x < 0, jnp.inf, x), report),
        )


Penalty.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractAlgorithm`][], of which `inner` must not depend on the
hyperparameters, and without `second_order`,

- `strength`: the strength $s$ of the penalty, above zero. It is a number, or an Optax
    schedule of the number of the step.
- `bias_every`: the number of calls of `step` between two estimates of the bias. With
    `None` the bias is never estimated.
- `bias_steps`: the number of inner steps that the third copy takes for an estimate, at
    two training gradients each. If these are too few to converge, the bias is
    underestimated. They draw batches of their own from [`eqx_hpo.Minibatch`][], and see
    the last batch of [`eqx_hpo.Stacked`][] again and again.
"""


def _train_penalised(
    levels: Levels,
    state: InnerState,
    hyperparams: Hyperparams,
    strength: FloatScalar,
    steps: int,
) -> InnerState:
    """Takes inner steps along the gradient of $C_1 + C_2 / s$. This has the scale of
    the gradient of $C_1$, so one learning rate serves both copies at any strength."""

    def step(carry):
        state, index = carry
        gradient, model_state, _ = levels.gradient(state, hyperparams, index)
        _, (alpha, _), _ = levels.validation_gradient(state, hyperparams, index)
        gradient = tree_add(gradient, tree_scale(1 / strength, alpha))
        moved = levels.apply(gradient, state, hyperparams, model_state, index)
        return moved, index + 1

    carry = (state, jnp.zeros((), int))
    state, _ = (
        step(carry) if steps == 1 else repeat_step(step, carry, steps, 0, levels.unroll)
    )
    return state


def _hypergradient(
    levels: Levels,
    penalised: InnerState,
    plain: InnerState,
    hyperparams: Hyperparams,
    strength: FloatScalar,
    index: IntScalar,
) -> Hyperparams:
    _, _, direct = levels.validation_gradient(penalised, hyperparams, index)
    here = levels.direct_gradient(penalised, hyperparams, index)
    there = levels.direct_gradient(plain, hyperparams, index)
    difference = jtu.tree_map(jnp.subtract, here, there)
    return jtu.tree_map(
        lambda x, y: as_single(x) + y,
        direct,
        tree_scale(strength, difference),
    )


def _compare(full: Hyperparams, half: Hyperparams) -> PenaltyReport:
    bias = tree_norm(jtu.tree_map(jnp.subtract, half, full))
    return PenaltyReport(float_scalar(bias), float_scalar(bias / tree_norm(full)))
