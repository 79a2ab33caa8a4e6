"""Computes the exact hypergradient over many calls of `step`, as a reference."""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree, Shaped

from ._custom_types import Batch, Hyperparams, Key
from ._data import AbstractBatches, as_batches
from ._discrete import refresh
from ._hyperparameter import partition_raw, unwrap_values
from ._levels import make_levels
from ._misc import tree_dot, tree_norm, tree_scale
from ._optimizer import AbstractAlgorithm
from ._optimizer.tracing import default_unroll
from ._precision import lift
from ._repeat import repeat_step
from ._second_order import ReverseOverReverse
from ._state import BilevelState, inner_state


Reference = Literal["unrolled", "differences"]
Keys = Shaped[Array, "calls ..."] | None

_LONG = 64  # inner steps above which memory counts for more than a second pass


def call_keys(key: Key, calls: int) -> Keys:
    """Makes the keys of `calls` calls of `step`."""
    if key is None:
        return None
    return jax.vmap(lambda call: jr.fold_in(key, call))(jnp.arange(calls))


def exact_hypergradient(
    algorithm: AbstractAlgorithm,
    state: BilevelState,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    keys: tuple[Keys, Keys],
    calls: int,
    reference: Reference = "unrolled",
) -> Hyperparams:
    """Differentiates the last validation loss of `calls` more calls of `step`, by
    reverse mode or by central differences. All inner steps use the hyperparameters of
    `state`.

    `keys` holds two keys for each call: one for the noise of placeholders, and one for
    everything else."""
    raw, _ = partition_raw(state.hyperparams)
    differentiate = _central_differences if reference == "differences" else _by_autodiff
    # The data are arguments: as constants XLA would hold them, and fold them.
    return differentiate(raw, algorithm, state, train, val, keys, calls)


def cosine(left: PyTree, right: PyTree) -> Float[Array, ""]:
    """Computes the cosine of the angle between two hypergradients of any size. It is
    NaN if one is zero."""
    unit = lambda tree: tree_scale(1 / tree_norm(tree), tree)
    return tree_dot(unit(left), unit(right))


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


def _final_loss(raw, algorithm, state, train, val, keys, calls) -> Float[Array, ""]:
    inner_steps = algorithm.inner_steps
    steps = calls * inner_steps

    def at(step):
        """Makes the levels and the hyperparameters of a step, and its number within the
        call."""
        call = step // inner_steps
        noise_key, key = jtu.tree_map(lambda x: x[call], keys)
        number = state.step + call
        noisy = refresh(state.hyperparams, noise_key, number)
        plain = unwrap_values(eqx.combine(raw, partition_raw(noisy)[1]))
        episode_step = state.episode_step + call * inner_steps
        levels = make_levels(
            algorithm.problem,
            algorithm.inner,
            ReverseOverReverse(),
            dataclasses.replace(state, episode_step=episode_step),
            plain,
            as_batches(train, "train", inner_steps),
            as_batches(val, "val", inner_steps),
            number * inner_steps,
            key,
            mean=lambda tree: tree,
        )
        return levels, plain, step % inner_steps

    def advance(carry):
        arrays, step = carry
        levels, hyperparams, index = at(step)
        inner = eqx.combine(arrays, fixed)
        inner, _ = levels.update(inner, hyperparams, index)
        return eqx.filter(inner, eqx.is_array), step + 1

    arrays, fixed = eqx.partition(lift(inner_state(state)), eqx.is_array)
    first = jnp.zeros((), int)
    unroll = default_unroll(at(first)[0], steps)
    depth = 2 if steps > _LONG else 1
    arrays, _ = repeat_step(advance, (arrays, first), steps, depth, unroll)
    levels, hyperparams, index = at(jnp.asarray(steps - 1))
    return levels.validate(eqx.combine(arrays, fixed), hyperparams, index)[0]
