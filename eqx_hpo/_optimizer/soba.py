"""SOBA: the weights, the linear system and the hyperparameters move at once."""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax.core import Tracer
from jaxtyping import Array, Float

from .._checks import as_share
from .._custom_types import Batch, Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import tree_add, tree_mix, tree_scale, tree_zeros
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._state import Estimate, InnerState, Memory
from .base import AbstractAlgorithm
from .hessian import as_covector, as_vector, Point
from .settings import as_scheduled, check_plain_inner, Scheduled, value_at


def _as_averaging(value: Any) -> Array | None:
    share = as_share("averaging", value)
    # The value as it was given: within `jit` its array is traced.
    is_off = not isinstance(value, Tracer) and float(value) == 0
    return None if is_off else share


class SOBA(AbstractAlgorithm):
    r"""Estimates the implicit hypergradient in a single loop. The weights, the solution
    $v$ of a linear system and the hyperparameters all move from the same point
    $(\theta, v, \lambda)$, with one train and one validation batch:

    $$\theta \leftarrow \Phi(\theta, \lambda), \qquad
    v \leftarrow v - \rho \, \Big( H v + \frac{\partial C_2}{\partial \theta} \Big),
    \qquad \frac{dC_2}{d\lambda} \approx \frac{\partial C_2}{\partial \lambda} +
    v^\top \frac{\partial^2 C_1}{\partial \theta \partial \lambda}.$$

    Here $H$ is the Hessian of the train loss in $\theta$. So $v$ tends to
    $-H^{-1} \partial C_2 / \partial \theta$, and the hypergradient to that of
    [`eqx_hpo.Implicit`][]. No step waits for another level to converge. A step costs
    one training gradient with one second-order product, and one validation gradient.
    Memory is $O(P + H)$.

    Both losses are taken at the weights before the update. So `state.metrics.val_loss`
    is the validation loss of the model at the start of the call. As in
    [`eqx_hpo.Implicit`][], the optimiser plays no part: a learning rate or a momentum
    among the hyperparameters is refused. A model's state (`eqx.nn.State`) is held fixed
    in the derivatives. Each episode begins with $v = 0$.

    With `averaging` this is MA-SOBA: the hypergradient of a step is the running average
    $h \leftarrow (1 - a) h + a D$ of the estimates $D$ of all steps so far. It starts
    at zero.

    ??? cite "References"

        Dagréou et al., *A framework for bilevel optimization that enables stochastic
        and global variance reduction algorithms*, NeurIPS 2022 (SOBA, eq. 5 to 7). Chen
        et al., *Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed
        Smoothness Conditions*, JMLR 2024 (MA-SOBA).
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    linear_rate: Scheduled = eqx.field(
        kw_only=True, converter=ft.partial(as_scheduled, "linear_rate")
    )
    averaging: Float[Array, ""] | None = eqx.field(
        kw_only=True, default=0.0, converter=_as_averaging
    )
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    inner_steps: ClassVar[int] = 1
    through: ClassVar[Through] = "gradient"
    sees_raw: ClassVar[bool] = True
    val_at_each_step: ClassVar[bool] = False

    def __check_init__(self):
        check_plain_inner(self.inner)

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del batch
        average = None if self.averaging is None else tree_zeros(hyperparams)
        return Memory(episode=tree_zeros(as_vector(inner.params)), lasting=average)

    def init_diagnostics(self) -> None:
        return None

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        index, v = jnp.zeros((), int), memory.episode
        levels = levels.with_batch_drawn(index)
        plain, to_raw = eqx.filter_vjp(levels.unwrap, hyperparams)
        products, found = Point(levels, inner, index).gradient(plain)
        gradient, model_state, train = found
        val, (alpha, _), direct = levels.validation_gradient(inner, plain, index)
        along, mixed = products(v)
        rate = value_at("linear_rate", self.linear_rate, levels.position)
        residual = tree_add(along, as_covector(alpha))
        v = tree_add(v, tree_scale(-rate, residual))
        (hypergradient,) = to_raw(tree_add(direct, mixed))
        average = memory.lasting
        if self.averaging is not None:
            # The tasks differ by what is new: their spread is that of the estimates.
            mean = levels.mean(hypergradient)
            average = tree_mix(mean, average, self.averaging)
            own = jtu.tree_map(jnp.subtract, hypergradient, mean)
            hypergradient = tree_add(average, own)
        inner = levels.apply(gradient, inner, plain, model_state, index)
        return Estimate(inner, Memory(v, average), hypergradient, train, val)


SOBA.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractAlgorithm`][], of which `inner` must not depend on the
hyperparameters, and without `inner_steps`, which is 1,

- `linear_rate`: the rate $\rho$ of $v$, above zero and below two over the largest
    eigenvalue of $H$. It is a number, or an Optax schedule of the number of the step.
- `averaging`: the weight $a$ of the newest estimate in the running average, from 0 to
    1. With 0 there is no average.
"""
