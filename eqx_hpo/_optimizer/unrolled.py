"""Exact hypergradients, by reverse mode through the inner steps."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import optax

from .._checks import as_int
from .._custom_types import Hyperparams, InnerOptimiser, Through
from .._levels import Levels, with_pullback
from .._misc import tree_add
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._state import Estimate, InnerState, Memory
from .memoryless import AbstractMemoryless


class Unrolled(AbstractMemoryless):
    r"""Computes, by reverse mode, the exact hypergradient of the last `inner_steps`
    steps. The state of the optimiser is differentiated too:

    $$\frac{dC_2}{d\lambda} = \frac{\partial C_2}{\partial \lambda} + \alpha_K
    \sum_{t} \Big( \prod_{s>t} A_s \Big) B_t, \qquad
    A_t = \frac{\partial \Phi_t}{\partial \theta_{t-1}}, \quad
    B_t = \frac{\partial \Phi_t}{\partial \lambda}.$$

    It is the reference for all other algorithms. Memory grows with the number $K$ of
    differentiated steps: as $O(PK)$, or as $O(P\, d K^{1/d})$ with `recompute=d`.

    ??? cite "References"

        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter
        Optimization*, ICML 2017 (reverse mode). Shaban et al., *Truncated
        Back-propagation for Bilevel Optimization*, AISTATS 2019 (truncation). Chen et
        al., *Training Deep Nets with Sublinear Memory Cost*, 2016 (recomputation).
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    inner_steps: int = eqx.field(static=True, kw_only=True)
    truncation: int | None = eqx.field(static=True, kw_only=True, default=None)
    recompute: int = eqx.field(static=True, kw_only=True, default=0)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = False

    def __check_init__(self):
        as_int("recompute", self.recompute, 0)
        if self.truncation is not None:
            as_int("truncation", self.truncation, 1)
            if self.truncation > self.inner_steps:
                raise ValueError(
                    f"`truncation` must be at most `inner_steps`={self.inner_steps}; "
                    f"got {self.truncation}."
                )

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        differentiated = self.truncation or self.inner_steps
        start = self.inner_steps - differentiated
        if start > 0:
            inner, _ = levels.run(inner, hyperparams, 0, start)
        before, stop = inner, self.inner_steps
        inner, pullback, train = with_pullback(
            lambda h: levels.run(before, h, start, stop, self.recompute), hyperparams
        )
        last = jnp.asarray(stop - 1)
        val, alpha, direct = levels.validation_gradient(inner, hyperparams, last)
        return Estimate(inner, memory, tree_add(direct, pullback(alpha)), train, val)


Unrolled.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractAlgorithm`][],

- `truncation`: the number of last inner steps to differentiate. By default it is all of
    them. The steps before them are treated as independent of the hyperparameters.
- `recompute`: how often each inner step may be computed again on the way back. With $d$
    recomputations, about $d K^{1/d}$ inner states are held. 0 stores everything that
    the way back needs. 1 stores the inner state before each step. 2 stores about
    $2 \sqrt{K}$ states. With 5, a trajectory of 100,000 steps needs 50 states. Batches
    are never stored: they are drawn again.
"""
