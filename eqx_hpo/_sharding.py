"""Arrays over many devices: a step must return a state with the shardings it came with.

Left alone, XLA places the results of a call where it finds best. The next call, which
gets them, would then compile anew. So the arrays of a state that lie on a mesh are
pinned to their places, and the others are copied to all of its devices first. Along
explicit axes the sharding is part of a type, and `match_types` keeps it.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree


T = TypeVar("T")


def mesh_of(leaves: Iterable[Any]) -> Any:
    """Finds the mesh of the first array that lies on several devices, or `None`. Traced
    arrays do not show where they lie."""
    for x in leaves:
        sharding = getattr(x, "sharding", None)
        if type(sharding) is NamedSharding and _is_spread(sharding):
            return sharding.mesh
    return None


def mesh_of_tree(tree: PyTree) -> Mesh | None:
    return mesh_of(jtu.tree_leaves(tree))


def on_mesh(tree: T, mesh: Mesh | None) -> T:
    """Copies the arrays of `tree` that lie on one device to all devices of `mesh`."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, jax.P())

    def put(x):
        if not isinstance(x, jax.Array) or isinstance(x, Tracer):
            return x
        is_spread = len(x.sharding.device_set) > 1
        return x if is_spread and not _is_long(x) else _copy(x, whole)

    return jtu.tree_map(put, tree)


def _copy(x: jax.Array, sharding: Any) -> jax.Array:
    if sharding.is_fully_addressable or not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    # Several processes, each of which has the same array. `device_put` would compare
    # them, and refuses NaN.
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _copy(jr.key_data(x), sharding)
        return jr.wrap_key_data(data, impl=jr.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])


def _is_long(x: jax.Array) -> bool:
    """Tells whether an array that is whole on each device would compile anew, because a
    compiled call would return it with another sharding."""
    sharding: Any = x.sharding
    if type(sharding) is not NamedSharding or sharding.mesh.explicit_axes:
        return False
    return sharding.is_fully_replicated and len(sharding.spec) > 0


def inputs_on_mesh(tree: T, mesh: Mesh) -> T:
    """Makes the arguments beside the state fit for a compiled call. In one process they
    already are. With several processes, JAX does not take an array of one process as
    part of a global one."""
    return on_mesh(tree, mesh) if mesh.is_multi_process else tree


def fetch(tree: T) -> T:
    """Copies arrays to the host as a whole, even if they are split over the devices of
    several processes."""
    mesh = mesh_of_tree(tree)
    if mesh is not None and mesh.is_multi_process:
        whole = NamedSharding(mesh, jax.P())
        tree = jax.jit(lambda tree: tree, out_shardings=whole)(tree)
    return jax.device_get(tree)


def put_like(tree: T, like: T) -> T:
    """Places the arrays of `tree` like those of `like`, if these lie on a mesh."""

    def put(x, y):
        is_there = mesh_of([y]) is None or isinstance(x, Tracer)
        return x if is_there else _copy(x, y.sharding)

    return jtu.tree_map(put, tree, like)


def shardings_of(tree: PyTree) -> PyTree:
    """Finds the sharding of each array that lies on a mesh and whose type does not hold
    it. Other leaves become `None`."""

    def of(x):
        mesh = mesh_of([x])
        return None if mesh is None or mesh.explicit_axes else x.sharding

    return jtu.tree_map(of, tree)


def pin(tree: T, shardings: PyTree) -> T:
    """Asks the compiler to place the arrays of `tree` as `shardings` says. Where that
    is `None`, the leaf may be anything."""

    def put(sharding, part):
        if sharding is None:
            return part
        return lax.with_sharding_constraint(part, sharding)

    return jtu.tree_map(put, shardings, tree, is_leaf=lambda x: x is None)


def whole_like(x: Any) -> NamedSharding | None:
    """Makes the sharding of a result that is whole on each device of the mesh of `x`.
    Operations along explicit axes need to be told it."""
    mesh = jax.typeof(x).sharding.mesh
    is_typed = not mesh.empty and len(mesh.explicit_axes) > 0
    return NamedSharding(mesh, jax.P()) if is_typed else None


def made_whole(x: Any) -> Any:
    """Copies a traced array that lies along explicit axes to each device."""
    whole = whole_like(x)
    return x if whole is None else jax.sharding.reshard(x, whole)


def reshard_like(x: Any, like: Any) -> Any:
    """Gives a traced array the sharding of another, if the sharding is part of its
    type."""
    sharding = jax.typeof(like).sharding
    if whole_like(like) is None or jax.typeof(x).sharding == sharding:
        return x
    return jax.sharding.reshard(x, sharding)


def _is_spread(sharding: NamedSharding) -> bool:
    return isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1
