"""HyperDistill: an online estimate from one product at a running average of the
past."""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from .._checks import as_int, as_number, as_share
from .._custom_types import Batch, Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import any_mapped, tree_add, tree_scale
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._state import Estimate, InnerState, Memory
from .base import AbstractAlgorithm
from .distillation import check_past, distil, empty_past, fit_scale, pull_back_at


def _as_scale(value: Any) -> Array | None:
    return None if value is None else as_number("scale", value)


class HyperDistill(AbstractAlgorithm):
    r"""Distils the past of an episode into one second-order product for each step:

    $$\frac{dC_2}{d\lambda} \approx \frac{\partial C_2}{\partial \lambda}(\theta_t) +
    s\, S_t\, \alpha_t \frac{\partial \Phi(w^*_t, \lambda; D^*_t)}{\partial \lambda},
    \qquad S_t = \sum_{i=1}^{t} \gamma^{t-i}.$$

    The weights $w^*_t = p_t w^*_{t-1} + (1 - p_t) \theta_{t-1}$, with $p_t = 1 - 1 /
    S_t$, are a running average of the weights before each inner step. The batch $D^*_t$
    keeps a share $p_t$ of its examples and takes the others from $D_t$. So the horizon
    is the whole episode, while memory is only $O(P + H)$ and one batch. A step costs
    two training gradients, a validation gradient and one product.

    The scale $s$ is fitted by least squares to reverse mode over `horizon` inner steps
    from the present model. Reverse mode runs on the straight line between the first and
    the last weights of these steps, as in [`eqx_hpo.DrMAD`][], but the state of the
    inner optimiser is held fixed. The fit is made in the first step, and again once in
    `estimation_period * horizon` inner steps. It costs `horizon` training gradients on
    the way there. On the way back it costs two more, with two products, for each step.
    It uses the batches that `train` gives for so many steps: fresh ones from
    [`eqx_hpo.Minibatch`][], the same one again from plain arrays. A fit that is not
    finite leaves the scale unchanged. If the first fit is not finite, the step is
    skipped.

    Plain arrays are the same batch at every step. So $D^*_t$ is that batch, and the
    state does not hold it. If a loop of your own has a new batch for each call, pass it
    as [`eqx_hpo.Stacked`][], also to `init`. A new example takes the place that it had
    in its batch. A fractional number of examples is rounded up or down at random.
    Arrays without a common leading axis count as a single example.

    An episode begins with `init` and with each `restart`. The scale is kept across
    episodes. Within [`eqx_hpo.MetaLearner`][] it is fitted to the mean over the tasks.

    ??? cite "Reference"

        Lee et al., *Online Hyperparameter Meta-Learning with Hypergradient
        Distillation*, ICLR 2022, eq. 12 and algorithms 3 and 4.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    discount: Float[Array, ""] = eqx.field(
        kw_only=True, default=0.9, converter=ft.partial(as_share, "discount")
    )
    horizon: int = eqx.field(static=True, kw_only=True, default=30)
    estimation_period: int = eqx.field(static=True, kw_only=True, default=5)
    scale: Float[Array, ""] | None = eqx.field(
        kw_only=True, default=None, converter=_as_scale
    )
    inner_steps: int = eqx.field(static=True, kw_only=True, default=1)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = False

    def __check_init__(self):
        as_int("horizon", self.horizon, 1)
        as_int("estimation_period", self.estimation_period, 1)

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del hyperparams
        # NaN stands for unknown: no step can be taken before the scale is fitted.
        scale = jnp.array(jnp.nan) if self.scale is None else None
        return Memory(episode=empty_past(inner.params, batch), lasting=scale)

    def init_diagnostics(self) -> None:
        return None

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        past = memory.episode
        check_past(past, levels)
        fitted = None
        if self.scale is None:
            fitted = self._fit_if_due(levels, inner, hyperparams, memory)
        scale = self.scale if fitted is None else fitted

        def advance(carry, index):
            inner, past = carry
            past = distil(levels, past, inner.params, self.discount, index)
            return (levels.update(inner, hyperparams, index)[0], past), None

        last = self.inner_steps - 1
        if last > 0:
            (inner, past), _ = lax.scan(
                advance, (inner, past), jnp.arange(last), unroll=levels.unroll
            )
        index = jnp.asarray(last)
        past = distil(levels, past, inner.params, self.discount, index)
        pullback = pull_back_at(levels, past, inner, hyperparams, index)
        inner, train = levels.update(inner, hyperparams, index)
        val, alpha, direct = levels.validation_gradient(inner, hyperparams, index)
        assert scale is not None
        # The product is linear in alpha. Scaled itself, it would be held twice.
        alpha = tree_scale(scale * past.mass, alpha)
        hypergradient = tree_add(direct, pullback(alpha))
        return Estimate(inner, Memory(past, fitted), hypergradient, train, val)

    def _fit_if_due(self, levels, inner, hyperparams, memory):
        old = memory.lasting
        # A scale of 0 means that the fit saw no product at all: it is repeated soon.
        period = self.horizon * jnp.where(old == 0, 1, self.estimation_period)
        # A call may step over a multiple of the period.
        due = jnp.isnan(old) | (levels.position % period < self.inner_steps)

        def fit():
            return fit_scale(
                levels,
                inner,
                hyperparams,
                memory.episode,
                self.discount,
                self.horizon,
                levels.unroll,
            )

        skip = lambda: (jnp.zeros(()), jnp.zeros(()))
        xy, xx = lax.cond(any_mapped(due), fit, skip)
        found = due & jnp.isfinite(xy / xx)
        kept = jnp.where(due & jnp.isnan(old) & (xx == 0), 0, old)
        return jnp.where(found, xy / xx, kept)


HyperDistill.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractAlgorithm`][],

- `discount`: the discount $\gamma$ of each earlier inner step, from 0 to 1. With 0 the
    past is only the last step: this is [`eqx_hpo.T1T2`][] up to the scale.
- `horizon`: the number of inner steps to which the scale is fitted. If there are
    episodes, use their length.
- `estimation_period`: the number of times `horizon` inner steps between two fits of the
    scale.
- `scale`: a fixed scale $s$. If `None`, the scale is fitted.
"""
