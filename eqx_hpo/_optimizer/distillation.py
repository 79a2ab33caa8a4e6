"""What HyperDistill is made of: the past of an episode in one point, the product there,
and the scale of that product, fitted to reverse mode."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._custom_types import Batch, FloatScalar, Hyperparams, IntScalar
from .._data import examples, mix_batches, SameBatch
from .._levels import Levels
from .._misc import (
    check_same_structure,
    tree_add,
    tree_dot,
    tree_mix,
    tree_norm,
    tree_scale,
)
from .._state import InnerState
from .drmad import end_cotangent, point_on_line, pull_back
from .unrolled import advance_with_pullback


class Past(eqx.Module):
    """The past of an episode in one point: `weights` is $w^*$, `batch` is $D^*$, and
    `mass` is $S$, the sum of the discounts."""

    weights: PyTree
    batch: Batch
    mass: Float[Array, ""]


def empty_past(params: PyTree, batch: Batch) -> Past:
    """Before the first inner step; `batch` may hold `jax.ShapeDtypeStruct`s."""
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    weights, batch = jtu.tree_map(zeros, (params, examples(batch)))
    return Past(weights, batch, jnp.zeros(()))


def check_past(past: Past, levels: Levels) -> None:
    """Whether `past` can take up the batches that there are."""
    batch = eqx.filter_eval_shape(levels.train_batch, jnp.array(0))
    given = "the train data given to `init(..., train=)`, which `HyperDistill` needs"
    check_same_structure("train", examples(batch), past.batch, given)


def distil(
    levels: Levels,
    past: Past,
    params: PyTree,
    decay: Float[Array, ""],
    index: IntScalar,
) -> Past:
    """Takes up the weights before inner step `index` and its batch, on the way forward:
    what came last counts most (eq. 12)."""
    mass = 1 + decay * past.mass
    return _take_up(levels, past, params, 1 - 1 / mass, mass, index)


def pull_back_at(
    levels: Levels,
    past: Past,
    inner: InnerState,
    hyperparams: Hyperparams,
    index: IntScalar,
) -> Callable[[PyTree], tuple[Hyperparams]]:
    """The pull-back through inner step `index` from its `(params, model_state)` to the
    hyperparameters, with the weights and the batch of `past`."""
    inner = dataclasses.replace(inner, params=past.weights)
    batch = eqx.combine(past.batch, levels.train_batch(index))
    levels = dataclasses.replace(levels, train=SameBatch(batch))
    update = lambda hyperparams: levels.update(inner, hyperparams, index)
    return advance_with_pullback(update, hyperparams)[1]


def fit_scale(
    levels: Levels,
    inner: InnerState,
    hyperparams: Hyperparams,
    past: Past,
    decay: Float[Array, ""],
    horizon: int,
    unroll: int,
) -> tuple[FloatScalar, FloatScalar]:
    r"""The two sums of the least-squares fit $s = \sum_u x_u y_u / \sum_u x_u^2$
    (algorithm 4), with $x_u = \lVert v_u \rVert S_u$ and $y_u = f_u \cdot g_u$.

    Trains for `horizon` steps from `inner`, then walks back on the line: $v_u$ is the
    product at the distilled past of the last $u$ points, of direction $f_u$, and $g_u$
    that of reverse mode through all of them; both are means over the tasks, if there
    are any. `past` is any, for its structure.
    """
    end, _ = levels.run(inner, hyperparams, 0, horizon)
    last = jnp.asarray(horizon - 1)
    _, alpha, _ = levels.validation_gradient(end, hyperparams, last)
    # All that follows is linear in alpha, so the scale does not change, but its
    # squares stay in range where validation has nearly converged.
    norm = levels.mean_over_tasks(tree_norm(alpha))
    alpha = tree_scale(jnp.where(norm > 0, 1 / norm, 0), alpha)

    def back(carry, _):
        index, adjoint, exact, past, xy, xx = carry
        point = point_on_line(inner, end, index, horizon)
        # Through the weights alone (A is their derivative): the state of the optimiser
        # is held fixed, as it is in v.
        cotangent = end_cotangent(end, adjoint)
        cotangent, product = pull_back(levels, point, hyperparams, cotangent, index)
        adjoint = (cotangent.params, cotangent.model_state)
        exact = tree_add(exact, levels.mean_over_tasks(product))
        mass = 1 + decay * past.mass
        past = _take_up(levels, past, point.params, past.mass / mass, mass, index)
        (v,) = pull_back_at(levels, past, point, hyperparams, index)(alpha)
        v = levels.mean_over_tasks(v)
        # The norm of v cancels in the product of the two.
        xy = xy + mass * tree_dot(v, exact)
        xx = xx + (mass * tree_norm(v)) ** 2
        return (index - 1, adjoint, exact, past, xy, xx), None

    zeros = jtu.tree_map(jnp.zeros_like, eqx.filter(hyperparams, eqx.is_inexact_array))
    past = jtu.tree_map(jnp.zeros_like, past)
    sums = (jnp.zeros(()), jnp.zeros(()))
    carry = (last, alpha, zeros, past, *sums)
    (*_, xy, xx), _ = lax.scan(back, carry, length=horizon, unroll=unroll)
    return xy, xx


def _take_up(levels, past, params, keep, mass, index):
    key = levels.algorithm_key(index)
    batch = examples(levels.train_batch(index))
    return Past(
        weights=tree_mix(past.weights, params, keep),
        batch=mix_batches(past.batch, batch, keep, key),
        mass=mass,
    )
