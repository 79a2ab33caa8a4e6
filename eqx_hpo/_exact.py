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
from ._data import AbstractBatches, as_batches
from ._discrete import refresh
from ._hyperparameter import partition_raw, unwrap_values
from ._levels import make_levels
from ._optimizer import AbstractAlgorithm
from ._optimizer.tracing import default_unroll
from ._second_order import ReverseOverReverse
from ._state import BilevelState, inner_state


Reference = Literal["unrolled", "differences"]


def exact_hypergradient(
    algorithm: AbstractAlgorithm,
    state: BilevelState,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    key: Key,
    calls: int,
    reference: Reference,
) -> Hyperparams:
    """Differentiates the last validation loss of `calls` calls of `step`, whose inner
    steps all have the hyperparameters of `state`, by reverse mode or by central
    differences. Step `i` draws with `fold_in(key, i)`."""
    raw, _ = partition_raw(state.hyperparams)
    differentiate = _central_differences if reference == "differences" else _by_autodiff
    # The data are arguments: as constants XLA would hold them, and fold them.
    return differentiate(raw, algorithm, state, train, val, key, calls)


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


def _final_loss(raw, algorithm, state, train, val, key, calls) -> Float[Array, ""]:
    inner_steps = algorithm.inner_steps
    steps = calls * inner_steps

    def at(step):
        """Makes the levels, the hyperparameters and the number within the call of a
        step."""
        call = step // inner_steps
        call_key = None if key is None else jr.fold_in(key, call)
        noisy = refresh(state.hyperparams, call_key, call)
        plain = unwrap_values(eqx.combine(raw, partition_raw(noisy)[1]))
        levels = make_levels(
            algorithm.problem,
            algorithm.inner,
            ReverseOverReverse(),
            dataclasses.replace(state, episode_step=call * inner_steps),
            plain,
            as_batches(train, "train", inner_steps),
            as_batches(val, "val", inner_steps),
            call * inner_steps,
            call_key,
            mean=lambda tree: tree,
        )
        return levels, plain, step % inner_steps

    @jax.checkpoint
    def advance(arrays, step):
        levels, hyperparams, index = at(step)
        inner = eqx.combine(arrays, fixed)
        inner, _ = levels.update(inner, hyperparams, index)
        return eqx.filter(inner, eqx.is_array), None

    arrays, fixed = eqx.partition(inner_state(state), eqx.is_array)
    levels, _, _ = at(jnp.array(0))
    unroll = default_unroll(levels, steps)
    arrays, _ = lax.scan(advance, arrays, jnp.arange(steps), unroll=unroll)
    levels, hyperparams, index = at(jnp.asarray(steps - 1))
    return levels.validate(eqx.combine(arrays, fixed), hyperparams, index)[0]
