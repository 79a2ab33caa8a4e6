"""Makes the new state of a step from an estimate, or keeps the old one if something is
not finite.

The whole new state is checked: parameters, both optimiser states, memory, model state.
Four things keep this cheap.

First, the checks of arrays of one shape are a single reduction, which reads what it
checks and stores nothing. Second, their outcomes are stacked before they are joined.
XLA would otherwise copy a chain of `and`s into each selection, and compile times would
grow with the square of the number of arrays.

Third, a large outer update is computed twice: once inside a branch, where it is checked
and not kept, and once to overwrite the old values. If it were computed once, old and
new values would both stay in memory until the outcome is known. Fourth, only branches
read a large hypergradient, so XLA writes it once, over the arrays it is made of. A
reader elsewhere would compute it again, from arrays that stay in memory until then.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Bool, PyTree

from .._custom_types import FloatScalar, Hyperparams, IntScalar
from .._hyperparameter import partition_raw
from .._jaxpr import holds_primitive
from .._misc import match_types, tree_norm, tree_where
from .._outer import outer_update
from .._precision import back_off
from .._state import BilevelState, Estimate, float_scalar, inner_state, Metrics


# A new array, and the old one or `None`.
_Pairs: TypeAlias = list[tuple[Any, Any]]

# An outer update with one of these is no elementwise pass, and is computed once.
_DEAR = {"while", "scan", "dot_general", "sort", "top_k", "fft", "pure_callback"}
_DEAR |= {"eigh", "qr", "svd", "lu", "cholesky", "triangular_solve"}

_GROUP = 8  # arrays whose checks are one reduction
_LARGE = 2**20  # numbers from which on memory counts for more than time does


def next_state(
    outer: optax.GradientTransformation,
    state: BilevelState,
    hyperparams: Hyperparams,
    estimate: Estimate,
    episode_step: IntScalar,
    has_aux: bool,
) -> BilevelState:
    """Updates the hyperparameters and makes the state after a step. If something is not
    finite, it returns the old state with new values only for `step`, the counts of
    skipped steps, `metrics` and the loss scale.

    **Arguments:**

    - `outer`: the outer optimiser.
    - `state`: the state before the step.
    - `hyperparams`: the hyperparameters of `state`, with the noise of this step.
    - `estimate`: the estimate of the algorithm, with the hypergradient of the `raw`
        arrays.
    - `episode_step`: the `episode_step` of the new state, if all is finite.
    - `has_aux`: whether the losses have an `aux`.
    """
    gradient = estimate.hypergradient
    raw, constants = partition_raw(hyperparams)
    noise, fixed = eqx.partition(constants, eqx.is_array)
    old_noise = eqx.filter(partition_raw(state.hyperparams)[1], eqx.is_array)
    old = (inner_state(state), state.memory)
    new = match_types((estimate.inner, estimate.memory), old)
    is_good, raw, outer_opt_state = _update_outer(
        outer,
        (gradient, estimate.error),
        (raw, state.outer_opt_state),
        [*_pairs(new, old), *_pairs(losses_of(estimate))],
    )
    (inner, memory), noise = tree_where(is_good, (new, noise), (old, old_noise))
    untrained = eqx.filter(state.model, eqx.is_inexact_array, inverse=True)
    step, is_first = state.step + 1, ~is_good & (state.total_skipped == 0)
    return BilevelState(
        model=eqx.combine(inner.params, untrained),
        hyperparams=eqx.combine(raw, noise, fixed),
        inner_opt_state=back_off(inner.opt_state, is_good),
        outer_opt_state=outer_opt_state,
        memory=memory,
        model_state=inner.model_state,
        step=step,
        episode_step=jnp.where(is_good, episode_step, state.episode_step),
        skipped=jnp.where(is_good, 0, state.skipped + 1),
        total_skipped=jnp.where(is_good, state.total_skipped, state.total_skipped + 1),
        first_skipped=jnp.where(is_first, step, state.first_skipped),
        metrics=metrics_of(estimate, has_aux),
    )


def losses_of(estimate: Estimate) -> list[FloatScalar]:
    """Lists the losses of an estimate. A loss that was not taken is left out, since it
    is no reason to skip a step."""
    return [x[0] for x in (estimate.train, estimate.val) if x is not None]


def metrics_of(estimate: Estimate, has_aux: bool) -> Metrics:
    val = (jnp.nan, None) if estimate.val is None else estimate.val
    return Metrics(
        train_loss=float_scalar(estimate.train[0]),
        val_loss=float_scalar(val[0]),
        hypergradient_norm=float_scalar(tree_norm(estimate.hypergradient)),
        aux=(estimate.train[1], val[1]) if has_aux else None,
        diagnostics=estimate.diagnostics,
    )


def _update_outer(
    outer: optax.GradientTransformation,
    given: tuple[PyTree, PyTree],
    old: tuple[PyTree, PyTree],
    pairs: _Pairs,
) -> tuple[Bool[Array, ""], PyTree, PyTree]:
    """Moves the `raw` arrays if `pairs` and the result are finite. `old` holds these
    arrays and the state of the optimiser. `given` holds the hypergradient and its
    standard error.

    **Returns:** whether all numbers were finite, the new arrays, and the new state.
    """
    leaves, treedef = jtu.tree_flatten(old)
    given_leaves = jtu.tree_leaves(given)

    def update(given, old):
        (gradient, error), (raw, opt_state) = given, old
        new = outer_update(outer, gradient, opt_state, raw, error)
        return match_types(new, old)

    # Traced once, even where it is computed twice.
    closed = jax.make_jaxpr(update)(given, old)
    move = lambda given, leaves: jaxpr_as_fun(closed)(*given, *leaves)
    if is_small(leaves) or holds_primitive(closed.jaxpr, _DEAR):
        moved = move(given_leaves, leaves)
        pairs = [*pairs, *_pairs(given[0]), *_pairs(moved, leaves)]
        is_good = _all_finite(lambda pairs: pairs, pairs)
        leaves = tree_where(is_good, moved, leaves)
    else:
        count = len(jtu.tree_leaves(given[0]))
        again = lambda given, leaves: [
            *_pairs(given[:count]),
            *_pairs(move(given, leaves), leaves),
        ]
        is_good = lax.cond(
            _all_finite(lambda pairs: pairs, pairs),
            # The update in this branch is only checked, and not kept.
            lambda *operands: _all_finite(again, *operands),
            lambda *operands: jnp.array(False),
            given_leaves,
            leaves,
        )
        leaves = lax.cond(
            is_good, move, lambda given, leaves: leaves, given_leaves, leaves
        )
    return is_good, *jtu.tree_unflatten(treedef, leaves)


def _pairs(new: PyTree, old: PyTree = None) -> _Pairs:
    leaves = jtu.tree_leaves(new)
    others = [None] * len(leaves) if old is None else jtu.tree_leaves(old)
    return list(zip(leaves, others, strict=True))


def _all_finite(
    make_pairs: Callable[..., _Pairs], *operands: PyTree
) -> Bool[Array, ""]:
    """Tells whether all numbers of the first arrays are finite, or are an infinity that
    the second array has in the same place. Such an infinity may be a mask of the model,
    or the start of a running minimum.

    `make_pairs(*operands)` makes the pairs, and is called again if they are read again:
    only if some number is not finite, a second pass looks for infinities that stay.
    """
    pairs = make_pairs(*operands)
    if is_small([x for x, _ in pairs]):
        return _join(pairs, _reduce_small)
    return lax.cond(
        _join([(x, None) for x, _ in pairs], _reduce),
        lambda *operands: jnp.array(True),
        lambda *operands: _join(make_pairs(*operands), _reduce),
        *operands,
    )


def all_finite(new: PyTree, old: PyTree, others: PyTree) -> Bool[Array, ""]:
    """Tells whether all numbers of `new` and `others` are finite. A number of `new` may
    also be an infinity that `old` has in the same place."""
    return _all_finite(lambda pairs: pairs, [*_pairs(new, old), *_pairs(others)])


def is_small(arrays: list[Any]) -> bool:
    """Tells whether the arrays hold so few numbers that time matters more than
    memory."""
    return sum(jnp.size(x) for x in arrays) < _LARGE


def _join(
    pairs: _Pairs, reduce: Callable[[_Pairs], Bool[Array, ""]]
) -> Bool[Array, ""]:
    groups: dict[Any, _Pairs] = {}
    for x, old in pairs:
        if eqx.is_inexact_array(x) and x.size > 0:
            key = x.shape, jax.typeof(x).sharding
            groups.setdefault(key, []).append((x, old))
    flags = [
        reduce(group[i : i + _GROUP])
        for group in groups.values()
        for i in range(0, len(group), _GROUP)
    ]
    if len(flags) == 0:
        return jnp.array(True)
    # The barriers keep the chain out of what reads its end.
    stacked = lax.optimization_barrier(jnp.stack(flags))
    return lax.optimization_barrier(jnp.all(stacked))


def _is_kept(x: Array, old: Array | None) -> Bool[Array, "..."]:
    finite = jnp.isfinite(x)
    return finite if old is None else finite | (x == old)


def _reduce_small(group: _Pairs) -> Bool[Array, ""]:
    return jnp.all(ft.reduce(jnp.logical_and, [_is_kept(*pair) for pair in group]))


def _reduce(group: _Pairs) -> Bool[Array, ""]:
    """Reduces several operands in one loop. XLA would split the reduction of a single
    operand in two, and store what it reads."""
    flags = [_is_kept(*pair) for pair in group]
    if len(flags) == 1:
        flags.append(~jnp.isnan(group[0][0]))  # all that pass the first pass this
    both: Any = lambda xs, ys: tuple(x & y for x, y in zip(xs, ys))
    true = (jnp.array(True),) * len(flags)
    axes = tuple(range(flags[0].ndim))
    return jnp.all(jnp.stack(lax.reduce(tuple(flags), true, both, axes)))
