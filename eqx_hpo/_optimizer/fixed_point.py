"""The implicit hypergradient of the whole update, optimiser included."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import optax
from jax import lax

from .._checks import as_int
from .._custom_types import Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import tree_add
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._state import Estimate, InnerState, Memory
from .drmad import end_cotangent, linearise_update
from .memoryless import AbstractMemoryless


class FixedPoint(AbstractMemoryless):
    r"""Computes the hypergradient at a fixed point of the update map $\Phi$, by the
    first terms of a Neumann series:

    $$\frac{dC_2}{d\lambda} \approx \frac{\partial C_2}{\partial \lambda} + \alpha
    \sum_{j=0}^{J} A^j B, \qquad
    A = \frac{\partial \Phi}{\partial \theta}, \quad
    B = \frac{\partial \Phi}{\partial \lambda}.$$

    Here $\theta$ includes the state of the optimiser. Both derivatives are taken at the
    last of the `inner_steps` updates. So hyperparameters of the optimiser (a learning
    rate, a momentum, a decoupled decay) get a hypergradient as well;
    [`eqx_hpo.Implicit`][] has none for them. In the middle of training, this is the
    hypergradient of the steps to come. At a fixed point, a learning rate that does not
    move this point gets zero, which is right. If the derivatives of the last $J + 1$
    updates replaced those of the last one, the result would be that of
    [`eqx_hpo.Unrolled`][] with a `truncation` of $J + 1$.

    Memory is $O(P + H)$ for any number of terms. A call costs its inner steps, a
    validation gradient, and about two training gradients for each of the $J + 1$
    products.

    ??? cite "Reference"

        Clarke, Oldewage and Hernández-Lobato, *Scalable One-Pass Optimisation of
        High-Dimensional Weight-Update Hyperparameters by Implicit Differentiation*,
        ICLR 2022.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    inner_steps: int = eqx.field(static=True, kw_only=True)
    terms: int = eqx.field(static=True, kw_only=True, default=5)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = False

    def __check_init__(self):
        as_int("terms", self.terms, 0)

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        last = jnp.asarray(self.inner_steps - 1)
        if self.inner_steps > 1:
            inner, _ = levels.run(inner, hyperparams, 0, self.inner_steps - 1)
        # All terms go back through this one step, so its batch is drawn once.
        levels = levels.with_batch_drawn(last)
        inner, pull_back, train = linearise_update(levels, inner, hyperparams, last)
        val, alpha, direct = levels.validation_gradient(inner, hyperparams, last)

        def add_term(carry, _):
            cotangent, total = carry
            cotangent, product = pull_back(cotangent)
            return (cotangent, tree_add(total, product)), None

        carry = (end_cotangent(inner, alpha), direct)
        carry, _ = lax.scan(add_term, carry, length=self.terms, unroll=levels.unroll)
        cotangent, total = carry
        # Outside the scan, since no cotangent is needed after the last product.
        _, product = pull_back(cotangent)
        return Estimate(inner, memory, tree_add(total, product), train, val)


FixedPoint.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractAlgorithm`][],

- `terms`: the number $J$ of products with $A$, at least 0. With 0 the estimate is that
    of [`eqx_hpo.T1T2`][].
"""
