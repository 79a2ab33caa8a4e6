"""T1-T2: the hypergradient through the last inner step alone."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import optax

from .._custom_types import Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import tree_add
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._state import Estimate, InnerState, Memory
from .memoryless import AbstractMemoryless


class T1T2(AbstractMemoryless):
    r"""Alternates training and tuning, and differentiates only the last inner step:

    $$\frac{dC_2}{d\lambda} \approx \frac{\partial C_2}{\partial \lambda} +
    \alpha_T B_T, \qquad
    \alpha_T = \frac{\partial C_2(\theta_T, \lambda)}{\partial \theta_T}, \quad
    B_T = \frac{\partial \Phi(\theta_{T-1}, \lambda)}{\partial \lambda}.$$

    Here $\theta_{T-1}$ is held fixed. This is the cheapest estimate that sees how the
    hyperparameters act on training. Memory is $O(P + H)$, and a step costs about one
    training and one validation gradient. The short horizon makes it biased: a learning
    rate, for instance, comes out too small.

    With `second_order=FiniteDifference()` this is the rule of DARTS.

    ??? cite "References"

        Luketina et al., *Scalable Gradient-Based Tuning of Continuous Regularization
        Hyperparameters*, ICML 2016. Liu et al., *DARTS: Differentiable Architecture
        Search*, ICLR 2019.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    inner_steps: int = eqx.field(static=True, kw_only=True, default=1)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = False

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        if self.inner_steps > 1:
            inner, _ = levels.run(inner, hyperparams, 0, self.inner_steps - 1)
        last = jnp.asarray(self.inner_steps - 1)
        inner, pullback, train = levels.advance(inner, hyperparams, last)
        val, alpha, direct = levels.validation_gradient(inner, hyperparams, last)
        return Estimate(inner, memory, tree_add(direct, pullback(alpha)), train, val)


T1T2.__init__.__doc__ = """**Arguments:** those of [`eqx_hpo.AbstractAlgorithm`][]. All
`inner_steps` but the last are plain training steps, between two updates of the
hyperparameters.
"""
