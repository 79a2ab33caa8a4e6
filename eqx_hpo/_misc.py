"""Tree arithmetic and dtype bookkeeping; nothing here knows about hyperparameters."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree


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
    """The inner product over all leaves."""
    leaves = zip(jtu.tree_leaves(left), jtu.tree_leaves(right), strict=True)
    return ft.reduce(jnp.add, [jnp.vdot(x, y) for x, y in leaves], jnp.zeros(()))


def tree_mix(left: PyTree, right: PyTree, weight: Float[Array, ""]) -> PyTree:
    """`weight * left + (1 - weight) * right`, each leaf in its own dtype."""
    return tree_add(tree_scale(weight, left), tree_scale(1 - weight, right))


def tree_fix(tree: PyTree) -> PyTree:
    """The same tree, not differentiated."""
    return jtu.tree_map(
        lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree
    )


def tree_where(pred: Bool[Array, ""], true: PyTree, false: PyTree) -> PyTree:
    return jtu.tree_map(lambda t, f: jnp.where(pred, t, f), true, false)


def tree_all_finite(tree: PyTree) -> Bool[Array, ""]:
    finite = [jnp.all(jnp.isfinite(x)) for x in jtu.tree_leaves(tree)]
    return ft.reduce(jnp.logical_and, finite, jnp.array(True))


def tree_norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm over all leaves. Scaled by the largest entry first, so that
    it neither overflows nor vanishes when the squares would."""
    leaves = [jnp.abs(x) for x in jtu.tree_leaves(tree) if x.size > 0]
    if len(leaves) == 0:
        return jnp.zeros(())
    dtype = ft.reduce(jnp.promote_types, [x.dtype for x in leaves], jnp.float32)
    leaves = [x.astype(dtype) for x in leaves]
    largest = ft.reduce(jnp.maximum, [jnp.max(x) for x in leaves])
    scale = jnp.where(largest > 0, largest, jnp.ones((), dtype))
    squares = [jnp.sum(jnp.square(x / scale)) for x in leaves]
    return scale * jnp.sqrt(ft.reduce(jnp.add, squares))


def as_device_arrays(tree: PyTree) -> PyTree:
    """NumPy leaves become JAX arrays; array dtypes stop being weak, since a weak dtype
    that hardens in the first step would compile it a second time."""

    def convert(x):
        if is_typed_key(x) or not is_array_or_numpy(x):
            return x
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jnp.asarray(x, dtype=dtype)

    return jtu.tree_map(convert, tree)


def match_dtypes(tree: PyTree, like: PyTree) -> PyTree:
    """Casts the arrays of `tree` to the (strong) dtypes of `like`."""

    def match(x, y):
        same = not eqx.is_array(x) or is_typed_key(x)
        return x if same else lax.convert_element_type(x, y.dtype)

    return jtu.tree_map(match, tree, like)


@jax.custom_batching.custom_vmap
def any_mapped(pred: Bool[Array, ""]) -> Bool[Array, ""]:
    """Under `vmap`, whether `pred` holds anywhere on the mapped axis: a single value,
    with which a `lax.cond` stays a branch and does not become a selection."""
    return pred


@any_mapped.def_vmap
def _(axis_size, in_batched, pred):
    del axis_size, in_batched
    return any_mapped(jnp.any(pred)), False


def depends_on(fn: Callable[[PyTree], PyTree], x: PyTree) -> bool:
    """Whether any output of `fn` has a derivative with respect to `x` that is not
    zero by construction. Traces `fn`; computes nothing."""
    perturbed = []

    @jax.custom_vjp
    def probe(y):
        return y

    def forward(y):
        leaves, treedef = jtu.tree_flatten(y)
        perturbed.extend(leaf.perturbed for leaf in leaves)
        return jtu.tree_unflatten(treedef, [leaf.value for leaf in leaves]), None

    probe.defvjp(forward, lambda _, cotangent: (cotangent,), symbolic_zeros=True)
    jax.eval_shape(lambda x: jax.vjp(lambda x: probe(fn(x)), x)[0], x)
    return any(perturbed)


def holds_convolution(fn: Callable[..., PyTree], *args: PyTree) -> bool:
    """Whether a function of pytrees of arrays computes a convolution somewhere."""
    return "conv_general_dilated" in str(jax.make_jaxpr(fn)(*args))


def check_same_structure(name: str, got: PyTree, expected: PyTree, what: str) -> None:
    """Raises a `ValueError` that names the first array of `got` that differs."""
    got_leaves, got_def = jtu.tree_flatten_with_path(got)
    expected_leaves, expected_def = jtu.tree_flatten_with_path(expected)
    if got_def != expected_def:
        places = [
            {jtu.keystr(path): _spec(x) for path, x in leaves}
            for leaves in (got_leaves, expected_leaves)
        ]
        differing = [
            x for x in [*places[1], *places[0]] if (x in places[0]) != (x in places[1])
        ]
        if len(differing) > 0:
            there = [place.get(differing[0], "nothing") for place in places]
            reason = (
                f": at `{name}{differing[0]}` it has {there[0]} instead of {there[1]}."
            )
        else:
            reason = f".\nGot: {got_def}\nExpected: {expected_def}"
        raise ValueError(f"`{name}` does not have the structure of {what}{reason}")
    for (path, x), (_, y) in zip(got_leaves, expected_leaves):
        if _spec(x) != _spec(y):
            raise ValueError(
                f"`{name}{jtu.keystr(path)}` is {_spec(x)}, but {what} has {_spec(y)} "
                "there."
            )


def _spec(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return type(x).__name__
