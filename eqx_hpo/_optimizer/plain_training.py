"""Training alone, without a hypergradient, for black-box searches."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax

from .._custom_types import Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import tree_zeros
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ReverseOverReverse
from .._state import Estimate, InnerState, Memory
from .memoryless import AbstractMemoryless


class PlainTraining(AbstractMemoryless):
    """Leaves the hyperparameters as they are. The validation loss is taken in every
    call of `step` whose number is a multiple of `validate_every`; else it is zero.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation = optax.set_to_zero()
    inner_steps: int = eqx.field(static=True, kw_only=True, default=1)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    validate_every: int = eqx.field(static=True, kw_only=True, default=1)
    second_order: ClassVar[AbstractSecondOrder] = ReverseOverReverse()  # never used
    through: ClassVar[Through] = "values"
    val_at_each_step: ClassVar[bool] = False

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        inner, train = levels.run(inner, hyperparams, 0, self.inner_steps)
        last = jnp.asarray(self.inner_steps - 1)
        validate = lambda: levels.validate(inner, hyperparams, last)
        zeros = tree_zeros(jax.eval_shape(validate))
        number = levels.position // self.inner_steps + 1
        val = lax.cond(number % self.validate_every == 0, validate, lambda: zeros)
        arrays = eqx.filter(hyperparams, eqx.is_inexact_array)
        return Estimate(inner, memory, tree_zeros(arrays), train, val)
