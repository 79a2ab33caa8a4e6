"""Models in half precision whose masters, in single precision, are what training moves.

A state holds the model in half precision, and its masters in the state of the inner
optimiser. Within a step the masters are the parameters (`lift`). The model is their
rounding, and the training gradient is evaluated at it. So algorithms see only single
precision. At the end of the step both go back to their places (`settle`).
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from ._checks import as_int, check_type, shown
from ._custom_types import FloatScalar
from ._misc import as_single, holds_half, tree_where
from ._state import InnerState


_LARGEST = 24  # of the powers of two that scale a loss


class MixedPrecisionState(eqx.Module):
    """The state of [`eqx_hpo.mixed_precision`][].

    - `masters`: single-precision copies of the parameters that are in half precision.
        It is `None` for all other parameters, and within a step.
    - `inner`: the state of the wrapped optimiser.
    - `log2_scale`: the logarithm of the loss scale to base 2, or `None` without
        `float16`.
    - `good_steps`: the number of inner steps with finite gradients since the loss scale
        was last halved or due to be doubled.
    - `dtypes`: the dtype of each parameter that is in half precision.
    """

    masters: PyTree
    inner: PyTree
    log2_scale: Int[Array, ""] | None
    good_steps: Int[Array, ""] | None
    dtypes: tuple[str | None, ...] = eqx.field(static=True)


def mixed_precision(
    inner: optax.GradientTransformation | optax.MultiSteps,
    *,
    loss_scale: float = 2.0**15,
    period: int = 2000,
) -> optax.GradientTransformation:
    """Trains a model in `bfloat16` or `float16`. It wraps an optimiser and keeps a
    master of each parameter in `float32`. It must be the outermost transformation in
    `inner`.

    ```python
    inner = hpo.mixed_precision(optax.adam(1e-3))
    inner = lambda h: hpo.mixed_precision(optax.adam(h.learning_rate))
    ```

    Each inner step evaluates the train loss and its gradient with the model in half
    precision, and moves the masters. The model is their rounding. The derivatives that
    make up a hypergradient are evaluated in `float32` at the masters, and so is the
    validation loss. Parameters in other precisions are trained as usual.

    If parameters are in `float16`, the train loss is multiplied by a scale before its
    gradient is taken, and the gradient is divided by it in `float32`. This keeps small
    gradients from vanishing. An inner step whose gradient is not finite halves the
    scale, and does not change the model or the optimiser.

    **Arguments:**

    - `inner`: any Optax optimiser, such as `optax.adam(1e-3)` or a chain. Its own state
        is in `float32`.
    - `loss_scale`: the starting scale for `float16`, a power of two from 2 to
        2<sup>24</sup>.
    - `period`: the number of inner steps with finite gradients after which the scale is
        doubled.

    **Returns:** an `optax.GradientTransformation`, to be used as `inner` of an
    algorithm. Its state holds the masters in `masters`, the wrapped optimiser's state
    in `inner`, and the logarithm of the scale to base 2 in `log2_scale`.

    **Raises:** a `ValueError` if an argument has the wrong type or is out of range.
    """
    optimiser = _as_transformation(inner)
    first, period = _as_exponent(loss_scale), as_int("period", period, 1)

    def init(params: PyTree) -> Any:
        dtypes = tuple(_half_dtype(x) for x in jtu.tree_leaves(params))
        is_scaled = "float16" in dtypes
        single = jtu.tree_map(as_single, params)
        return MixedPrecisionState(
            masters=_only_half(single, dtypes),
            inner=optimiser.init(single),
            log2_scale=jnp.asarray(first, int) if is_scaled else None,
            good_steps=jnp.zeros((), int) if is_scaled else None,
            dtypes=dtypes,
        )

    def update(updates: PyTree, state: Any, params: PyTree = None) -> Any:
        if params is None:
            raise ValueError(
                "`mixed_precision` needs the parameters: call `update(updates, state, "
                "params)`."
            )
        updates = jtu.tree_map(as_single, updates)
        masters = eqx.combine(state.masters, params)
        moves, state = _update_scaled(optimiser, updates, state, masters, period)
        if not holds_half(params):
            return moves, state
        moved = optax.apply_updates(masters, moves)
        state = dataclasses.replace(state, masters=_only_half(moved, state.dtypes))
        return jtu.tree_map(_difference, moves, moved, params), state

    return optax.GradientTransformation(init, update)


def lift(inner: InnerState) -> InnerState:
    """Replaces the parameters by their masters, if there are any."""
    state = inner.opt_state
    if not isinstance(state, MixedPrecisionState):
        return inner
    params = eqx.combine(state.masters, inner.params)
    masters = jtu.tree_map(lambda _: None, state.masters)
    state = dataclasses.replace(state, masters=masters)
    return dataclasses.replace(inner, params=params, opt_state=state)


def settle(inner: InnerState) -> InnerState:
    """Undoes `lift`. It rounds the parameters and moves their masters back to the
    optimiser's state."""
    half, state = in_half(inner), inner.opt_state
    if half is None:
        return inner
    masters = _only_half(inner.params, state.dtypes)
    state = dataclasses.replace(state, masters=masters)
    return dataclasses.replace(half, opt_state=state)


def in_half(inner: InnerState) -> InnerState | None:
    """Rounds the masters of a lifted state. Returns `None` if nothing is in half
    precision."""
    state = inner.opt_state
    if not is_mixed(state):
        return None
    leaves, treedef = jtu.tree_flatten(inner.params)
    rounded = [
        x if dtype is None else x.astype(dtype)
        for x, dtype in zip(leaves, state.dtypes, strict=True)
    ]
    return dataclasses.replace(inner, params=jtu.tree_unflatten(treedef, rounded))


def loss_scale_of(inner: InnerState) -> FloatScalar | None:
    """Returns the factor of the loss, a power of two, or `None` if there is none."""
    state = inner.opt_state
    if not isinstance(state, MixedPrecisionState) or state.log2_scale is None:
        return None
    return jnp.ldexp(jnp.ones((), jnp.float32), state.log2_scale)


def back_off(opt_state: PyTree, is_good: Bool[Array, ""]) -> PyTree:
    """Halves the loss scale unless `is_good`."""
    if not isinstance(opt_state, MixedPrecisionState) or opt_state.log2_scale is None:
        return opt_state
    lower = jnp.maximum(opt_state.log2_scale - 1, 1)
    log2_scale = jnp.where(is_good, opt_state.log2_scale, lower)
    return dataclasses.replace(opt_state, log2_scale=log2_scale)


def is_mixed(opt_state: PyTree) -> bool:
    """Tells whether an optimiser's state holds masters of a model in half precision."""
    return isinstance(opt_state, MixedPrecisionState) and any(opt_state.dtypes)


def check_outermost(opt_state: PyTree) -> None:
    is_state = lambda x: isinstance(x, MixedPrecisionState)
    leaves = jtu.tree_leaves(opt_state, is_leaf=is_state)
    if not is_state(opt_state) and any(map(is_state, leaves)):
        raise ValueError(
            "`mixed_precision` must stand outermost in `inner`: write "
            "`mixed_precision(optax.chain(...))`."
        )


def with_derivative_of(value: PyTree, like: PyTree) -> PyTree:
    """Returns `value` with the derivative of `like`."""

    def follow(value, like):
        if not eqx.is_inexact_array(value):
            return value
        return _follow(lax.stop_gradient(value), like.astype(value.dtype))

    return jtu.tree_map(follow, value, like)


@jax.custom_jvp
def _follow(value: Array, like: Array) -> Array:
    del like
    return value


@_follow.defjvp
def _(primals, tangents):
    return primals[0], tangents[1]


def scaled(x: Any, scale: FloatScalar | None) -> Any:
    """Multiplies an inexact array by a loss scale, if there is one, at least in single
    precision."""
    if scale is None or not eqx.is_inexact_array(x):
        return x
    x = as_single(x)
    return x * scale.astype(x.dtype)


def unscaled(x: Any, scale: FloatScalar | None) -> Any:
    """Divides by a loss scale, as `scaled` multiplies by it."""
    return scaled(x, None if scale is None else 1 / scale)


def shrink(tree: PyTree, scale: FloatScalar | None) -> PyTree:
    """Divides the derivative with respect to `tree` by a loss scale, if there is one.
    The values do not change."""
    if scale is None:
        return tree
    return with_derivative_of(tree, jtu.tree_map(lambda x: unscaled(x, scale), tree))


def _update_scaled(
    optimiser: optax.GradientTransformation,
    updates: PyTree,
    state: MixedPrecisionState,
    masters: PyTree,
    period: int,
) -> tuple[PyTree, MixedPrecisionState]:
    """Updates the masters, or skips the update if the loss scale was too large."""
    if state.log2_scale is None or state.good_steps is None:
        moves, inner = optimiser.update(updates, state.inner, masters)
        return moves, dataclasses.replace(state, inner=inner)
    # What is not finite at the smallest scale is no matter of the scale.
    skips = ~_all_finite(updates) & (state.log2_scale > 1)
    # Before the update too: a selection behind it alone would pull NaN back.
    updates = tree_where(skips, jtu.tree_map(jnp.zeros_like, updates), updates)
    moves, inner = optimiser.update(updates, state.inner, masters)
    moves = tree_where(skips, jtu.tree_map(jnp.zeros_like, moves), moves)
    grows = state.good_steps + 1 >= period
    larger = jnp.minimum(state.log2_scale + 1, _LARGEST)
    log2_scale = jnp.where(grows, larger, state.log2_scale)
    return moves, dataclasses.replace(
        state,
        inner=tree_where(skips, state.inner, inner),
        log2_scale=jnp.where(skips, state.log2_scale - 1, log2_scale),
        good_steps=jnp.where(skips | grows, 0, state.good_steps + 1),
    )


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    flags = [jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(tree)]
    # The barriers keep a chain of `and`s out of each selection that reads its end.
    stacked = lax.optimization_barrier(jnp.stack(flags))
    return lax.optimization_barrier(jnp.all(stacked))


def _half_dtype(x: Array) -> str | None:
    return x.dtype.name if holds_half(x) else None


def _only_half(tree: PyTree, dtypes: tuple[str | None, ...]) -> PyTree:
    leaves, treedef = jtu.tree_flatten(tree)
    kept = [None if dtype is None else x for x, dtype in zip(leaves, dtypes)]
    return jtu.tree_unflatten(treedef, kept)


def _difference(move: Array, moved: Array, param: Array) -> Array:
    """Computes the update that leads to the rounded master."""
    if not holds_half(param):
        return move
    return as_single(moved.astype(param.dtype)) - as_single(param)


def _as_transformation(inner: Any) -> optax.GradientTransformation:
    if hasattr(inner, "gradient_transformation"):
        inner = inner.gradient_transformation()
    what = (
        "an `optax.GradientTransformation`, made inside `lambda h: "
        "mixed_precision(...)` if it depends on hyperparameters"
    )
    check_type("inner", inner, optax.GradientTransformation, what)
    return inner


def _as_exponent(loss_scale: Any) -> int:
    # No array, which would be traced where `inner` is a function of hyperparameters.
    is_number = isinstance(loss_scale, (int, float, np.number))
    mantissa, exponent = math.frexp(loss_scale) if is_number else (0.0, 0)
    if mantissa != 0.5 or not 1 <= exponent - 1 <= _LARGEST:
        raise ValueError(
            f"`loss_scale` must be a power of two from 2 to 2**{_LARGEST}; got "
            f"{shown(loss_scale)}."
        )
    return exponent - 1
