"""Hyperparameters that change in the course of an episode, shared by windows of steps.

Each of their arrays has a leading axis over the windows, and inner step `t` of the
episode uses entry `t // sharing`. `sharing` is `None` where there is no such axis.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from ._custom_types import Hyperparams, IntScalar


def at_step(
    hyperparams: Hyperparams, sharing: int | None, step: IntScalar
) -> Hyperparams:
    """The hyperparameters that inner step `step` of an episode uses; those of the last
    window for all steps after it."""
    if sharing is None:
        return hyperparams
    _check_windows(hyperparams)
    take = lambda x: lax.dynamic_index_in_dim(x, step // sharing, keepdims=False)
    return jtu.tree_map(lambda x: take(x) if eqx.is_array(x) else x, hyperparams)


def at_start(hyperparams: Hyperparams, sharing: int | None) -> Hyperparams:
    """The hyperparameters of the first window."""
    return at_step(hyperparams, sharing, jnp.array(0))


def _check_windows(hyperparams: Hyperparams) -> None:
    arrays = jtu.tree_leaves(eqx.filter(hyperparams, eqx.is_array))
    lengths = {x.shape[:1] for x in arrays}
    if len(lengths) > 1 or () in lengths:
        raise ValueError(
            "With `sharing`, all arrays in `hyperparams` need the same leading axis, "
            f"over the windows of steps; got shapes {[x.shape for x in arrays]}."
        )
