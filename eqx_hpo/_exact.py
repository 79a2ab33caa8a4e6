"""The exact hypergradient of a training of many calls of `step`, as a reference."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float

from ._custom_types import Batch, Hyperparams, Key
from ._data import AbstractBatches
from ._discrete import refresh
from ._hyperparameter import partition_raw, unwrap
from ._optimizer import AbstractBilevelOptimizer, make_levels
from ._optimizer.checks import loops_slowly
from ._second_order import ReverseOverReverse
from ._state import BilevelState, InnerState
from ._windows import at_step


Reference = Literal["unrolled", "differences"]


def exact_hypergradient(
    optimizer: AbstractBilevelOptimizer,
    state: BilevelState,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    key: Key,
    calls: int,
    reference: Reference,
) -> Hyperparams:
    """The derivative of the last validation loss of `calls` calls of `step`, whose
    inner steps all have the hyperparameters of `state`, by reverse mode or by central
    differences. Step `i` draws with `fold_in(key, i)`."""
    raw, _ = partition_raw(state.hyperparams)
    loss = lambda raw: _final_loss(optimizer, state, train, val, key, calls, raw)
    if reference == "unrolled":
        return eqx.filter_jit(eqx.filter_grad(loss))(raw)
    flat, unflatten = jfu.ravel_pytree(raw)
    flat_loss = lambda flat: loss(unflatten(flat))
    return unflatten(eqx.filter_jit(_central_differences)(flat_loss, flat))


def _central_differences(fn, x: Float[Array, " size"]) -> Float[Array, " size"]:
    steps = jnp.cbrt(jnp.finfo(x.dtype).eps) * jnp.maximum(1, jnp.abs(x))

    def difference(index):
        up, down = (x.at[index].add(sign * steps[index]) for sign in (1, -1))
        return (fn(up) - fn(down)) / (up[index] - down[index])

    return lax.map(difference, jnp.arange(x.size))


def _final_loss(optimizer, state, train, val, key, calls, raw) -> Float[Array, ""]:
    inner_steps = optimizer.inner_steps
    steps = calls * inner_steps

    def at_call(call):
        call_key = None if key is None else jr.fold_in(key, call)
        noisy = refresh(state.hyperparams, call_key, call)
        plain = unwrap(eqx.combine(raw, partition_raw(noisy)[1]))
        levels = make_levels(optimizer, state.model, train, val, call, call_key)
        return dataclasses.replace(levels, second_order=ReverseOverReverse()), plain

    def at(step):
        """The levels, the hyperparameters and the number within the call of a step."""
        levels, plain = at_call(step // inner_steps)
        return levels, at_step(plain, optimizer.sharing, step), step % inner_steps

    @jax.checkpoint
    def advance(arrays, step):
        levels, hyperparams, index = at(step)
        inner = eqx.combine(arrays, fixed)
        inner, _ = levels.update(inner, hyperparams, index)
        return eqx.filter(inner, eqx.is_array), None

    params = eqx.filter(state.model, eqx.is_inexact_array)
    start = InnerState(params, state.inner_opt_state, state.model_state)
    arrays, fixed = eqx.partition(start, eqx.is_array)
    levels, hyperparams, _ = at(jnp.array(0))
    unroll = steps if loops_slowly(levels, start, hyperparams) else 1
    arrays, _ = lax.scan(advance, arrays, jnp.arange(steps), unroll=unroll)
    levels, hyperparams, index = at(jnp.asarray(steps - 1))
    return levels.validate(eqx.combine(arrays, fixed), hyperparams, index)[0]
