"""Generalized greedy hypergradients: a discounted sum over the inner steps."""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Float

from .._checks import as_flag, as_share
from .._custom_types import Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import tree_add, tree_scale
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._state import Estimate, InnerState, Memory
from .memoryless import AbstractMemoryless


def _as_optional_momentum(value: Any) -> Array | None:
    return None if value is None else as_share("momentum", value)


class Greedy(AbstractMemoryless):
    r"""Sums the effect of the hyperparameters on the validation loss over the inner
    steps, with a discount for earlier steps:

    $$\frac{dC_2}{d\lambda} \approx \frac{\partial C_2}{\partial \lambda}(\theta_T) +
    \sum_{t=1}^{T} \gamma^{T-t} \alpha_t B_t, \qquad
    \alpha_t = \frac{\partial C_2}{\partial \theta_t}, \quad
    B_t = \frac{\partial \Phi(\theta_{t-1}, \lambda)}{\partial \lambda}.$$

    The sum is carried forward as $S_t = \gamma S_{t-1} + \alpha_t B_t$. So memory is
    $O(P + H)$ for any number of inner steps $T$. Each inner step costs a training
    gradient, a validation gradient and one second-order product. Each inner step has
    its own train and validation batch if the data provide them.

    A discount of zero gives [`eqx_hpo.T1T2`][]. `Greedy` is made for training that
    continues from call to call. If the model is restarted at each call, an early
    $\alpha_t$ may point elsewhere than $\alpha_T$.

    ??? cite "Reference"

        *Generalized Greedy Gradient-Based Hyperparameter Optimization*, submitted to
        ICLR 2025, eq. 6 (and eq. 5 with $A_t = \gamma I$ for `final_gradient=True`).
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    inner_steps: int = eqx.field(static=True, kw_only=True)
    discount: Float[Array, ""] = eqx.field(
        kw_only=True, default=0.9, converter=ft.partial(as_share, "discount")
    )
    momentum: Float[Array, ""] | None = eqx.field(
        kw_only=True, default=None, converter=_as_optional_momentum
    )
    final_gradient: bool = eqx.field(
        static=True,
        kw_only=True,
        default=False,
        converter=ft.partial(as_flag, "final_gradient"),
    )
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = True

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        last = jnp.asarray(self.inner_steps - 1)
        final = None
        if self.final_gradient:
            # Only the last gradient is kept: the sum below takes the steps again.
            end, _ = levels.run(inner, hyperparams, 0, self.inner_steps)
            final = levels.validation_gradient(end, hyperparams, last)

        def advance(carry, index):
            inner, sums = carry
            inner, product, train, val = _step(levels, inner, hyperparams, index, final)
            return (inner, self._accumulate(sums, product)), (train, val)

        carry = (inner, self._empty_sums(hyperparams))
        # The direct term is that of the last step alone, so this one stands apart: in
        # the scan nothing asks for it, and it is not computed.
        if self.inner_steps > 1:
            carry, _ = lax.scan(
                lambda carry, index: (advance(carry, index)[0], None),
                carry,
                jnp.arange(self.inner_steps - 1),
                unroll=levels.unroll,
            )
        (inner, (total, _)), (train, (val, direct)) = advance(carry, last)
        return Estimate(inner, memory, tree_add(direct, total), train, val)

    def _empty_sums(self, hyperparams):
        arrays = eqx.filter(hyperparams, eqx.is_inexact_array)
        zeros = jtu.tree_map(jnp.zeros_like, arrays)
        return zeros, None if self.momentum is None else zeros

    def _accumulate(self, sums, product):
        old, velocity = sums
        total = tree_add(tree_scale(self.discount, old), product)
        if self.momentum is None:
            return total, None
        total = tree_add(total, tree_scale(self.momentum, velocity))
        # The velocity is the last change of the sum.
        return total, jtu.tree_map(jnp.subtract, total, old)


def _step(levels, inner, hyperparams, index, final):
    inner, pullback, train = levels.advance(inner, hyperparams, index)
    if final is None:
        val, alpha, direct = levels.validation_gradient(inner, hyperparams, index)
    else:
        val, alpha, direct = final
    return inner, pullback(alpha), train, (val, direct)


Greedy.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractAlgorithm`][],

- `discount`: the discount $\gamma$ of earlier inner steps, from 0 to 1. It amounts to
    the assumption $A_t = \gamma I$: $\gamma$ says how fast the model forgets where it
    was.
- `momentum`: the momentum $\mu$ of `inner`, from 0 to 1, which the sum then follows.
    With it, $S_t = \gamma S_{t-1} + \mu (S_{t-1} - S_{t-2}) + \alpha_t B_t$, which is
    the recursion of gradient descent with momentum on a loss whose Hessian is a
    multiple of the identity. Use it with `optax.sgd(..., momentum=mu)`, and preferably
    with `final_gradient=True`. "When the greedy sum is right" in the documentation
    derives and measures it.
- `final_gradient`: whether to use $\alpha_T$, the gradient after the last inner step,
    in place of each $\alpha_t$. It is known only at the end, so the inner steps run
    twice. This costs one more training gradient for each inner step, and saves all
    validation gradients but one.
"""
