"""The exact hypergradient of a training of many calls of `step`, as a reference."""

import dataclasses
from typing import Any, Literal

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
from ._optimizer.checks import default_unroll
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
    differentiate = _central_differences if reference == "differences" else _by_autodiff
    # The data are arguments: as constants XLA would hold them, and fold them.
    return differentiate(raw, optimizer, state, train, val, key, calls)


@eqx.filter_jit
def _by_autodiff(raw: Hyperparams, *args: Any) -> Hyperparams:
    return eqx.filter_grad(_final_loss)(raw, *args)


@eqx.filter_jit
def _central_differences(raw: Hyperparams, *args: Any) -> Hyperparams:
    x, unflatten = jfu.ravel_pytree(raw)
    loss = lambda x: _final_loss(unflatten(x), *args)
    steps = jnp.cbrt(jnp.finfo(x.dtype).eps) * jnp.maximum(1, jnp.abs(x))

    def difference(index):
        up, down = (x.at[index].add(sign * steps[index]) for sign in (1, -1))
        return (loss(up) - loss(down)) / (up[index] - down[index])

    return unflatten(lax.map(difference, jnp.arange(x.size)))


def _final_loss(raw, optimizer, state, train, val, key, calls) -> Float[Array, ""]:
    inner_steps = optimizer.inner_steps
    steps = calls * inner_steps

    def at(step):
        """The levels, the hyperparameters and the number within the call of a step."""
        call = step // inner_steps
        call_key = None if key is None else jr.fold_in(key, call)
        noisy = refresh(state.hyperparams, call_key, call)
        plain = unwrap(eqx.combine(raw, partition_raw(noisy)[1]))
        levels = make_levels(optimizer, state.model, train, val, call, call_key)
        levels = dataclasses.replace(levels, second_order=ReverseOverReverse())
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
    unroll = default_unroll(levels, start, hyperparams, steps)
    arrays, _ = lax.scan(advance, arrays, jnp.arange(steps), unroll=unroll)
    levels, hyperparams, index = at(jnp.asarray(steps - 1))
    return levels.validate(eqx.combine(arrays, fixed), hyperparams, index)[0]
