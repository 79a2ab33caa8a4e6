"""Constraints on the values that the outer optimiser moves, by projection and by mirror
steps on a simplex."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from .._checks import check_function
from .._hyperparameter import is_placeholder, Real


# A function of the hyperparameters that returns one part of them, or a tuple of parts.
Where = Callable[[PyTree], Any] | None


def project(
    projection: Callable[..., PyTree], *args: Any, where: Where = None
) -> optax.GradientTransformationExtraArgs:
    """Projects the hyperparameters onto a set after each update. Place this last in
    `optax.chain`. The hyperparameters are then feasible whatever comes before.

    ```python
    simplex = hpo.project(optax.projections.projection_simplex)
    box = hpo.project(optax.projections.projection_box, 0.0, 1.0)
    outer = optax.chain(optax.sgd(0.1, momentum=0.9), box)
    ```

    **Arguments:**

    - `projection`: any of `optax.projections` (`projection_box`,
        `projection_non_negative`, `projection_simplex`, `projection_l2_ball`,
        `projection_l2_sphere`, ...), or a function of a tree of arrays that returns its
        projection. Those of Optax treat all arrays of the tree together as one vector.
    - `args`: the further arguments of `projection`, such as bounds or a radius.
    - `where`: selects what to project. It is a function of the hyperparameters that
        returns a part of them, or a tuple of parts to be projected one by one. By
        default all of them are projected together. The selected parts may only hold
        [`eqx_hpo.Real`][] and plain arrays. In other placeholders the optimiser does
        not move the value itself.

    **Returns:** an `optax.GradientTransformationExtraArgs`.

    **Raises:** a `ValueError` if `where` selects another placeholder.
    """
    what = "a function of a tree of arrays, such as those of `optax.projections`"
    check_function("projection", projection, what)

    def step(old, moved):
        del old
        if projection is not optax.projections.projection_box:
            return projection(moved, *args)
        # As it stands its scalar bounds fit a single array only.
        is_tree = lambda b: jtu.tree_structure(b) == jtu.tree_structure(moved)
        spread = lambda b: b if is_tree(b) else jtu.tree_map(lambda _: b, moved)
        return projection(moved, *map(spread, args))

    return update_by(step, "project", where)


def mirror(where: Where = None) -> optax.GradientTransformationExtraArgs:
    r"""Turns each update $u$ of weights $w$ on a simplex into a mirror step
    (exponentiated gradient),

    $$w_i \leftarrow \frac{w_i e^{u_i}}{\sum_j w_j e^{u_j}}$$

    along the last axis. Place this last in `optax.chain`. Unlike
    [`eqx_hpo.project`][]`(optax.projections.projection_simplex)`, it moves along the
    simplex at every point. A weight becomes zero only by underflow, and then stays
    zero.

    **Arguments:**

    - `where`: as for [`eqx_hpo.project`][]. Each selected array must start with
        non-negative entries that sum to one along its last axis.

    **Returns:** an `optax.GradientTransformationExtraArgs`.

    **Raises:** a `ValueError` from `init` if an array does not start on a simplex.

    ??? cite "Reference"

        Kivinen and Warmuth, *Exponentiated Gradient versus Gradient Descent for Linear
        Predictors*, Information and Computation, 1997.
    """

    def step(old, moved):
        tilt = lambda w, m: jax.nn.softmax(jnp.log(w) + (m - w), axis=-1)
        return jtu.tree_map(tilt, old, moved)

    return update_by(step, "mirror", where, _check_simplex)


def update_by(
    step: Callable[[PyTree, PyTree], PyTree],
    name: str,
    where: Where,
    check: Callable[[PyTree], None] = lambda part: None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that replaces the point to which an update leads by
    `step(old, new)`."""
    select = as_selector(where)

    def init(params):
        check_parts(select(params), name)
        check(select(params))
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        return replace_moved(step, name, select, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def replace_moved(
    step: Callable[[PyTree, PyTree], PyTree],
    name: str,
    select: Callable[[PyTree], list[Any]],
    updates: PyTree,
    params: PyTree | None,
) -> PyTree:
    """Changes the updates of the selected parts, which then lead to
    `step(old, new)`."""
    if params is None:
        raise ValueError(
            f"`{name}` needs the parameters: call `update(updates, state, params)`."
        )
    moved = optax.apply_updates(params, updates)

    def change(old, moved):
        return jtu.tree_map(_change, old, moved, step(old, moved))

    pairs = zip(select(params), select(moved), strict=True)
    return eqx.tree_at(select, updates, [change(x, y) for x, y in pairs])


def _change(old: Array, moved: Array, end: Array) -> Array:
    """Computes a number which, added to `old`, rounds to `end`. If there is none, the
    sum is the nearest number that is not on the side of `end` where `moved` is."""
    change = end - old
    change = change + (end - (old + change))
    reached = old + change
    outside = jnp.where(moved > end, reached > end, (moved < end) & (reached < end))
    towards = jnp.where(moved > end, -jnp.inf, jnp.inf).astype(change.dtype)
    return jnp.where(outside, jnp.nextafter(change, towards), change)


def as_selector(where: Where) -> Callable[[PyTree], list[Any]]:
    """Makes a function that returns the parts of a tree that `where` selects. If
    `where` is `None`, it returns the whole tree as one part."""
    if where is not None:
        check_function("where", where, "a function of the hyperparameters, or `None`")

    def select(tree):
        # The whole may be a tuple too, and is still one part.
        parts = (tree,) if where is None else where(tree)
        return list(parts) if type(parts) is tuple else [parts]

    return select


def check_parts(parts: list[Any], name: str) -> None:
    flatten = lambda x: jtu.tree_leaves_with_path(x, is_leaf=is_placeholder)
    for path, node in [leaf for part in parts for leaf in flatten(part)]:
        if is_placeholder(node) and not isinstance(node, Real):
            raise ValueError(
                f"`{name}` acts on `Real` and on plain arrays, but "
                f"`{jtu.keystr(path) or 'where'}` is of class {type(node).__name__}: "
                "the optimiser moves its `raw`, not its value. Use `where` to leave it "
                "out."
            )


def _check_simplex(parts: PyTree[Float[Array, "... n"]]) -> None:
    for x in jtu.tree_leaves(parts):
        if isinstance(x, Tracer) or not hasattr(x, "shape"):
            continue
        values = np.asarray(x, np.float64)
        tolerance = float(jnp.finfo(x.dtype).eps) ** 0.5
        if (
            values.ndim == 0
            or np.any(values < 0)
            or np.any(np.abs(values.sum(-1) - 1) > tolerance)
        ):
            raise ValueError(
                "`mirror` needs weights that are not below zero and sum to one on the "
                f"last axis; got {values}."
            )
