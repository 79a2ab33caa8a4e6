"""Training without a hypergradient, for `fit` and for black-box searches.

A step is guarded as in any algorithm. `leap` takes many steps at the cost of plain
training: it checks only at the end whether all numbers were finite.
"""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Bool

from .._custom_types import (
    Batch,
    FloatScalar,
    Hyperparams,
    InnerOptimiser,
    IntScalar,
    Key,
    Through,
)
from .._discrete import refresh
from .._hyperparameter import unwrap_values
from .._levels import Levels
from .._misc import any_mapped, match_types, tree_where, tree_zeros
from .._precision import lift, settle
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ReverseOverReverse
from .._state import (
    BilevelState,
    Estimate,
    float_scalar,
    inner_state,
    InnerState,
    Memory,
)
from .base import AbstractAlgorithm, levels_of_step
from .guard import all_finite, losses_of, metrics_of


class PlainTraining(AbstractAlgorithm):
    """Trains the model and leaves the hyperparameters unchanged.

    The validation loss is taken in each call of `step` whose number differs from `due`
    by a multiple of `validate_every`. If `last` is given, it is also taken in call
    number `last`, and in each call until one was taken. In between, the last one that
    was taken is reported again. With `validate_every=None` none is taken.

    `state.memory.lasting` holds this loss, and whether it was taken.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation = optax.set_to_zero()
    due: IntScalar = eqx.field(kw_only=True, default=0, converter=jnp.asarray)
    last: IntScalar | None = eqx.field(kw_only=True, default=None)
    inner_steps: int = eqx.field(static=True, kw_only=True, default=1)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    validate_every: int | None = eqx.field(static=True, kw_only=True, default=1)
    second_order: ClassVar[AbstractSecondOrder] = ReverseOverReverse()  # never used
    through: ClassVar[Through] = "values"
    val_at_each_step: ClassVar[bool] = False

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del inner, hyperparams, batch
        return Memory(lasting=(float_scalar(0.0), jnp.array(False)))

    def init_diagnostics(self) -> None:
        return None

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        inner, train = levels.run(inner, hyperparams, 0, self.inner_steps)
        gradient = tree_zeros(eqx.filter(hyperparams, eqx.is_inexact_array))
        val, memory = self._validate(levels, inner, hyperparams, memory)
        return Estimate(inner, memory, gradient, train, val)

    def leap(
        self, state: BilevelState, count: IntScalar, train: Any, val: Any, key: Key
    ) -> tuple[BilevelState, Bool[Array, ""]]:
        """Takes the next `count` steps of a run with the key `key`. It checks only at
        the end whether all numbers are finite. The validation loss is taken there, if
        at all.

        **Returns:** the state after the steps and `True`, or the given state and
        `False`.
        """
        step, hyperparams = state.step, state.hyperparams
        plain = unwrap_values(hyperparams)
        key_of = lambda here: None if key is None else jr.fold_in(key, here)
        levels = levels_of_step(self, state, plain, train, val, key_of(step))

        def at(number):
            here = step + number
            step_key = key_of(here)
            return refresh(hyperparams, step_key, here), dataclasses.replace(
                levels,
                position=here * self.inner_steps,
                episode_position=state.episode_step + number * self.inner_steps,
                key=step_key,
            )

        def move(number, inner):
            hyperparams, levels = at(number)
            return levels.run(inner, unwrap_values(hyperparams), 0, self.inner_steps)

        def body(number, inner):
            return match_types(move(number, inner)[0], inner)

        # The report of the last step alone is of use: the others are not computed.
        old = lift(inner_state(state))
        inner, report = move(count - 1, lax.fori_loop(0, count - 1, body, old))
        inner = match_types(inner, old)
        hyperparams, levels = at(count - 1)
        plain = unwrap_values(hyperparams)
        val_report, memory = self._validate(levels, inner, plain, state.memory)
        estimate = Estimate(inner, memory, None, report, val_report)
        is_good = all_finite(inner, old, losses_of(estimate))
        inner = settle(inner)
        untrained = eqx.filter(state.model, eqx.is_inexact_array, inverse=True)
        new = dataclasses.replace(
            state,
            model=eqx.combine(inner.params, untrained),
            hyperparams=hyperparams,
            inner_opt_state=inner.opt_state,
            memory=memory,
            model_state=inner.model_state,
            step=step + count,
            episode_step=state.episode_step + count * self.inner_steps,
            skipped=jnp.zeros_like(state.skipped),
            metrics=metrics_of(estimate, self.problem.has_aux),
        )
        arrays, static = eqx.partition(new, eqx.is_array)
        kept = tree_where(is_good, arrays, eqx.filter(state, eqx.is_array))
        return eqx.combine(kept, static), is_good

    def _validate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> tuple[tuple[FloatScalar, Any] | None, Memory]:
        if self.validate_every is None:
            return None, memory
        index = jnp.asarray(self.inner_steps - 1)
        validate = lambda: levels.validate(inner, hyperparams, index)
        _, no_aux = tree_zeros(jax.eval_shape(validate))
        number = levels.position // self.inner_steps + 1
        before, was_taken = memory.lasting
        is_due = (number - self.due) % self.validate_every == 0
        if self.last is not None:
            is_due |= ~was_taken | (number == self.last)

        def take():
            loss, aux = validate()
            return float_scalar(loss), aux

        # Mapped, it is still a branch: trainings side by side are due together.
        val = lax.cond(any_mapped(is_due), take, lambda: (before, no_aux))
        return val, Memory(lasting=(val[0], was_taken | is_due))
