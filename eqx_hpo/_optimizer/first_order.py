"""The baseline: only the direct derivative of the validation loss."""

import warnings
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import optax

from .._custom_types import Hyperparams, InnerOptimiser, Through
from .._inner import is_function
from .._levels import Levels
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ReverseOverReverse
from .._state import Estimate, InnerState, Memory
from .memoryless import AbstractMemoryless


class FirstOrder(AbstractMemoryless):
    r"""Computes the direct derivative of the validation loss. It ignores how the model
    responds to the hyperparameters:

    $$\frac{dC_2}{d\lambda} \approx \frac{\partial C_2(\theta_T, \lambda)}{\partial
    \lambda}.$$

    This suits hyperparameters that appear in the validation loss and act on it mostly
    directly, such as architecture weights. Hyperparameters that act only through
    training (weight decay, a learning rate, sample weights) get a hypergradient of
    zero.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    inner_steps: int = eqx.field(static=True, kw_only=True, default=1)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    second_order: ClassVar[AbstractSecondOrder] = ReverseOverReverse()  # never used
    through: ClassVar[Through] = None
    val_at_each_step: ClassVar[bool] = False

    def __check_init__(self):
        if is_function(self.inner):
            warnings.warn(
                "`FirstOrder` sees only the direct term of the hypergradient: the "
                "hyperparameters that `inner` uses (a learning rate, a momentum) get "
                "nothing from the update of the model. Use `T1T2` to tune them.",
                stacklevel=2,
            )

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        inner, train = levels.run(inner, hyperparams, 0, self.inner_steps)
        last = jnp.asarray(self.inner_steps - 1)
        val, _, direct = levels.validation_gradient(inner, hyperparams, last)
        return Estimate(inner, memory, direct, train, val)


FirstOrder.__init__.__doc__ = """**Arguments:** those of
[`eqx_hpo.AbstractAlgorithm`][], without `second_order`.
"""
