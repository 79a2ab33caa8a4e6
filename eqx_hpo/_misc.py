"""Tree arithmetic and dtype bookkeeping. Nothing here knows about hyperparameters."""

import contextlib
import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ._sharding import reshard_like, whole_like


_FEW = 2**16  # numbers up to which a second pass costs less than a branch


NO_NUMBERS = "OSTUMm"  # the kinds of NumPy's dtypes that JAX does not take


def is_array_or_numpy(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic))


def is_typed_key(x: Any) -> bool:
    return eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def tree_add(left: PyTree, right: PyTree) -> PyTree:
    return jtu.tree_map(jnp.add, left, right)


def tree_scale(scale: Float[Array, ""], tree: PyTree) -> PyTree:
    """Scales each leaf, in its own dtype."""
    return jtu.tree_map(lambda x: scale.astype(x.dtype) * x, tree)


def tree_dot(left: PyTree, right: PyTree) -> Float[Array, ""]:
    """Computes the inner product over all leaves."""
    products = [
        _dot(x, y)
        for x, y in zip(jtu.tree_leaves(left), jtu.tree_leaves(right), strict=True)
    ]
    dtype = _common_dtype(products)
    return sum((x.astype(dtype) for x in products), jnp.zeros((), dtype))


def _dot(x: Array, y: Array) -> Array:
    return jnp.tensordot(jnp.conj(x), y, axes=x.ndim, out_sharding=whole_like(x))


def tree_mix(left: PyTree, right: PyTree, weight: Float[Array, ""]) -> PyTree:
    """Computes `weight * left + (1 - weight) * right`, each leaf in its own dtype."""
    return tree_add(tree_scale(weight, left), tree_scale(1 - weight, right))


def tree_where(pred: Bool[Array, ""], true: PyTree, false: PyTree) -> PyTree:
    return jtu.tree_map(lambda t, f: jnp.where(pred, t, f), true, false)


def tree_zeros(tree: PyTree) -> PyTree:
    """Makes zeros of the shapes of `tree`, whose leaves may be
    `jax.ShapeDtypeStruct`s."""
    return jtu.tree_map(jnp.zeros_like, tree)


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """Computes the Euclidean norm over all leaves, in single precision at least.

    It is finite if all entries are finite, and zero only if all are zero. This holds
    even if their squares overflow or vanish: then all entries are first scaled by the
    largest one.
    """
    leaves = [x for x in jtu.tree_leaves(tree) if x.size > 0]
    if len(leaves) == 0:
        return jnp.zeros(())
    dtype = jnp.finfo(_common_dtype(leaves)).dtype
    # Scalars go through as one array: an operation for each would take long to compile.
    scalars = [jnp.abs(x).astype(dtype) for x in leaves if x.ndim == 0]
    leaves = [x for x in leaves if x.ndim > 0]
    leaves += [jnp.stack(scalars)] if scalars else []

    # XLA would store the absolute values, and a square needs none.
    size = lambda x: jnp.abs(x) if jnp.iscomplexobj(x) else x

    def add_up(leaves, scale):
        squares = [jnp.sum(jnp.square(size(x).astype(dtype) / scale)) for x in leaves]
        return ft.reduce(jnp.add, squares)

    def scaled(leaves, _):
        maxima = [jnp.max(jnp.abs(x)).astype(dtype) for x in leaves]
        largest = ft.reduce(jnp.maximum, maxima)
        scale = jnp.where(largest > 0, largest, 1)
        return scale * jnp.sqrt(add_up(leaves, scale))

    if sum(x.size for x in leaves) < _FEW:
        return scaled(leaves, None)
    squares = add_up(leaves, 1)
    info = jnp.finfo(dtype)
    in_range = (squares > info.tiny / info.eps) & jnp.isfinite(squares)
    direct = lambda _, squares: jnp.sqrt(squares)
    return lax.cond(in_range, direct, scaled, leaves, squares)


def _common_dtype(arrays: list[Array]) -> Any:
    """Finds the widest dtype, at least in single precision. It avoids promotion, which
    a strict setting of JAX forbids."""
    bits = max([32, *[jnp.finfo(x.dtype).bits for x in arrays]])
    if any(jnp.iscomplexobj(x) for x in arrays):
        return jnp.complex64 if bits == 32 else jnp.complex128
    return jnp.float32 if bits == 32 else jnp.float64


def usual_promotion() -> contextlib.AbstractContextManager[None]:
    """Promotes dtypes as usual even under the strict setting of JAX. Several optimisers
    of Optax fail under it (Adam raises a number to the power of a counter)."""
    return jax.numpy_dtype_promotion("standard")


def as_device_arrays(tree: PyTree) -> PyTree:
    """Turns NumPy leaves into JAX arrays, and weak dtypes into strong ones. A weak
    dtype would become strong in the first step, which would then compile twice."""

    def convert(x):
        if is_typed_key(x) or not is_array_or_numpy(x) or x.dtype.kind in NO_NUMBERS:
            return x
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        if isinstance(x, jax.Array) and x.dtype == dtype and not x.weak_type:
            return x
        return jnp.asarray(x, dtype=dtype)

    return jtu.tree_map(convert, tree)


def as_single(x: Any) -> Any:
    """Casts an array in half precision to single precision."""
    return x.astype(jnp.float32) if _is_half(x) else x


def holds_half(tree: PyTree) -> bool:
    """Tells whether an array of `tree` is in half precision."""
    return any(_is_half(x) for x in jtu.tree_leaves(tree))


def _is_half(x: Any) -> bool:
    return eqx.is_inexact_array(x) and jnp.finfo(x.dtype).bits < 32


def match_types(tree: PyTree, like: PyTree) -> PyTree:
    """Casts the arrays of `tree` to the (strong) dtypes of `like`, and along explicit
    axes to its shardings."""

    def match(x, y):
        if not eqx.is_array(x):
            return x
        cast = x if is_typed_key(x) else lax.convert_element_type(x, y.dtype)
        return reshard_like(cast, y)

    return jtu.tree_map(match, tree, like)


@jax.custom_batching.custom_vmap
def any_mapped(pred: Bool[Array, ""]) -> Bool[Array, ""]:
    """Under `vmap`, tells whether `pred` holds anywhere on the mapped axis.

    The answer is a single value, so a `lax.cond` on it stays a branch and does not
    become a selection, which would compute both sides.
    """
    return pred


@any_mapped.def_vmap
def _(axis_size, in_batched, pred):
    del axis_size, in_batched
    return any_mapped(jnp.any(pred)), False
