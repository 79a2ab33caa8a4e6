"""The compiled functions that a run calls. They take one step or many, and write the
rows of the history that belong to them."""

from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool

from ._custom_types import IntScalar
from ._jit import jit_without_waiting
from ._misc import match_types, tree_where
from ._optimizer import AbstractBilevelOptimizer, PlainTraining
from ._sharding import made_whole
from ._solution import Course, follow, Record, record
from ._state import BilevelState


# A state, a block of the history, and the course of the run.
Carry: TypeAlias = tuple[BilevelState, Record, Course]


class Inputs(eqx.Module):
    """Holds what the calls read and do not change."""

    algorithm: AbstractBilevelOptimizer
    train: Any
    val: Any
    key: Any
    limit: Any
    interval: Any
    drained: Any
    max_skipped: Any
    loops: bool = eqx.field(static=True)


def _advance(carry: Carry, inputs: Inputs):
    """Takes `limit` steps, or one. Returns the carry and `[step, skipped]`."""
    state, rows, course = carry
    arrays, static = eqx.partition(state, eqx.is_array)

    def body(carry):
        count, *old = carry
        arrays, rows, course = old
        state = eqx.combine(arrays, static)
        key = None if inputs.key is None else jr.fold_in(inputs.key, state.step)
        state = inputs.algorithm.step(state, inputs.train, inputs.val, key=key)
        rows = _write_if_due(rows, state, inputs, jnp.array(True))
        new = [eqx.filter(state, eqx.is_array), rows, follow(course, state)]
        return count + 1, *match_types(new, old)

    def proceed(carry):
        count, arrays, _, _ = carry
        return (count < inputs.limit) & (arrays.skipped < inputs.max_skipped)

    start = (jnp.array(0), arrays, rows, course)
    end = lax.while_loop(proceed, body, start) if inputs.loops else body(start)
    _, arrays, rows, course = end
    status = jnp.stack([arrays.step, arrays.skipped])
    return (eqx.combine(arrays, static), rows, course), status


def _leap(carry: Carry, inputs: Inputs):
    """Takes `limit` steps of plain training, in stretches up to the next record. It
    stops before the first stretch with numbers that are not finite."""
    state, rows, course = carry
    arrays, static = eqx.partition(state, eqx.is_array)
    trainer = inputs.algorithm
    assert isinstance(trainer, PlainTraining)

    def body(carry):
        count, _, old = carry
        arrays, rows, course = old
        state = eqx.combine(arrays, static)
        to_record = inputs.interval - state.step % inputs.interval
        number = jnp.minimum(inputs.limit - count, to_record)
        state, is_good = trainer.leap(
            state, number, inputs.train, inputs.val, inputs.key
        )
        rows = _write_if_due(rows, state, inputs, is_good)
        course = tree_where(is_good, follow(course, state), course)
        new = (eqx.filter(state, eqx.is_array), rows, course)
        return count + number, is_good, match_types(new, old)

    def proceed(carry):
        count, is_good, _ = carry
        return (count < inputs.limit) & is_good

    start = (jnp.zeros_like(inputs.limit), jnp.array(True), (arrays, rows, course))
    _, _, (arrays, rows, course) = lax.while_loop(proceed, body, start)
    status = jnp.stack([arrays.step, arrays.skipped])
    return (eqx.combine(arrays, static), rows, course), status


def _write_if_due(
    rows: Record, state: BilevelState, inputs: Inputs, is_good: Bool[Array, ""]
) -> Record:
    number: IntScalar = state.step // inputs.interval - 1 - inputs.drained

    def write(rows):
        put = lambda block, x: block.at[number].set(made_whole(x))
        return jtu.tree_map(put, rows, record(state))

    is_due = is_good & (state.step % inputs.interval == 0)
    return lax.cond(is_due, write, lambda rows: rows, rows)


advance_keeping = jit_without_waiting(_advance, donate_first=False)
advance_donating = jit_without_waiting(_advance, donate_first=True)
leap_keeping = jit_without_waiting(_leap, donate_first=False)
leap_donating = jit_without_waiting(_leap, donate_first=True)
