"""The parts of HyperDistill: the past of an episode as one point, the product at this
point, and its scale, which is fitted to reverse mode."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._checks import check_same_structure
from .._custom_types import Batch, FloatScalar, Hyperparams, IntScalar
from .._data import examples, mix_batches, SameBatch
from .._levels import Levels, Pullback
from .._misc import (
    tree_add,
    tree_dot,
    tree_mix,
    tree_norm,
    tree_scale,
    tree_zeros,
)
from .._state import float_scalar, InnerState
from .drmad import end_cotangent, pull_back, run_on_line


class Past(eqx.Module):
    """Holds the past of an episode as one point. `weights` is $w^*$, `batch` is $D^*$
    (`None` if the batch is always the same), and `mass` is $S$, the sum of the
    discounts."""

    weights: PyTree
    batch: Batch
    mass: Float[Array, ""]


def empty_past(params: PyTree, batch: Batch) -> Past:
    """Makes the past before the first inner step. `batch` may hold
    `jax.ShapeDtypeStruct`s."""
    batch = None if batch is None else tree_zeros(examples(batch))
    return Past(tree_zeros(params), batch, jnp.zeros(()))


def check_past(past: Past, levels: Levels) -> None:
    """Checks that `past` can take up the batches of the data."""
    if past.batch is None and isinstance(levels.train, SameBatch):
        return
    batch = eqx.filter_eval_shape(levels.train_batch, jnp.array(0))
    given = "the train data given to `init(..., train=)`, which `HyperDistill` needs"
    check_same_structure("train", examples(batch), past.batch, given)


def distil(
    levels: Levels,
    past: Past,
    params: PyTree,
    discount: Float[Array, ""],
    index: IntScalar,
) -> Past:
    """Takes up the weights before inner step `index` and its batch, on the way forward.
    The latest ones count most (eq. 12)."""
    mass = 1 + discount * past.mass
    return _take_up(levels, past, params, 1 - 1 / mass, mass, index)


def pull_back_at(
    levels: Levels,
    past: Past,
    inner: InnerState,
    hyperparams: Hyperparams,
    index: IntScalar,
) -> Pullback:
    """Makes the pull-back through inner step `index` from its `(params, model_state)`
    to the hyperparameters, with the weights and the batch of `past`."""
    inner = dataclasses.replace(inner, params=past.weights)
    if past.batch is not None:
        batch = eqx.combine(past.batch, levels.train_batch(index))
        levels = dataclasses.replace(levels, train=SameBatch(batch))
    return levels.advance(inner, hyperparams, index)[1]


def fit_scale(
    levels: Levels,
    inner: InnerState,
    hyperparams: Hyperparams,
    past: Past,
    discount: Float[Array, ""],
    horizon: int,
    unroll: int,
) -> tuple[FloatScalar, FloatScalar]:
    r"""Computes the two sums of the least-squares fit $s = \sum_u x_u y_u / \sum_u
    x_u^2$ (algorithm 4), with $x_u = \lVert v_u \rVert S_u$ and $y_u = f_u \cdot g_u$.

    Trains for `horizon` steps from `inner`, then walks back on the line. $v_u$ is the
    product at the distilled past of the last $u$ points, and $f_u$ is its direction.
    $g_u$ is the product of reverse mode through all of these points. Both are means
    over all models that share the hyperparameters. Only the structure of `past` is
    used.
    """
    end, point_at, _ = run_on_line(levels, inner, hyperparams, horizon)
    last = jnp.asarray(horizon - 1)
    _, alpha, _ = levels.validation_gradient(end, hyperparams, last)
    # All that follows is linear in alpha, so a factor on it does not change the scale.
    # This one keeps the squares in range where validation has nearly converged.
    norm = levels.mean(tree_norm(alpha))
    alpha = tree_scale(jnp.where(norm > 0, 1 / norm, 0), alpha)

    def back(carry, _):
        index, adjoint, exact, past, xy, xx = carry
        point = point_at(index)
        # Through the weights alone (A is their derivative): the state of the optimiser
        # is held fixed, as it is in v.
        cotangent = end_cotangent(end, adjoint)
        cotangent, product = pull_back(levels, point, hyperparams, cotangent, index)
        adjoint = (cotangent.params, cotangent.model_state)
        exact = tree_add(exact, levels.mean(product))
        mass = 1 + discount * past.mass
        past = _take_up(levels, past, point.params, past.mass / mass, mass, index)
        v = pull_back_at(levels, past, point, hyperparams, index)(alpha)
        v = levels.mean(v)
        # The norm of v cancels in the product of the two.
        xy = xy + mass * float_scalar(tree_dot(v, exact))
        xx = xx + (mass * float_scalar(tree_norm(v))) ** 2
        return (index - 1, adjoint, exact, past, xy, xx), None

    zeros = jtu.tree_map(jnp.zeros_like, eqx.filter(hyperparams, eqx.is_inexact_array))
    past = jtu.tree_map(jnp.zeros_like, past)
    sums = (jnp.zeros(()), jnp.zeros(()))
    carry = (last, alpha, zeros, past, *sums)
    (*_, xy, xx), _ = lax.scan(back, carry, length=horizon, unroll=unroll)
    return xy, xx


def _take_up(levels, past, params, keep, mass, index):
    batch = past.batch
    if batch is not None:
        new, key = examples(levels.train_batch(index)), levels.algorithm_key(index)
        batch = mix_batches(batch, new, keep, key)
    return Past(tree_mix(past.weights, params, keep), batch, mass)
