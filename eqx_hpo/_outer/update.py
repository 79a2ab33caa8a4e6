"""Updates the hyperparameters by an Optax transformation."""

import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._checks import check_same_structure
from .._misc import usual_promotion


def outer_update(
    outer: optax.GradientTransformation,
    gradient: PyTree,
    opt_state: PyTree,
    raw: PyTree,
    error: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """Moves `raw` once.

    The hypergradient is also passed as the extra argument `grad`, and its standard
    error as `error`. So a transformation late in a chain can still see them.

    **Returns:** the new `raw` and the new state of the optimiser.
    """
    outer = optax.with_extra_args_support(outer)
    with usual_promotion():
        updates, opt_state = outer.update(
            gradient, opt_state, raw, grad=gradient, error=error
        )
    return optax.apply_updates(raw, updates), opt_state


def beside_updates(name: str, extra: PyTree, updates: PyTree) -> PyTree:
    """Selects the part of an extra argument that belongs to the updates. `optax.masked`
    and `optax.partition` hide some of these."""
    is_hidden = lambda x: isinstance(x, optax.MaskedNode)
    hidden = jtu.tree_map(is_hidden, updates, is_leaf=is_hidden)
    if any(jtu.tree_leaves(hidden)):
        take = lambda hides, x: optax.MaskedNode() if hides else x
        extra = jtu.tree_map(take, hidden, extra)
    check_same_structure(name, extra, updates, "the updates")
    return extra
