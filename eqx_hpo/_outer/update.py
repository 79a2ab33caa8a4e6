"""The update of the hyperparameters by an Optax transformation."""

import optax
from jaxtyping import PyTree

from .._misc import usual_promotion


def outer_update(
    outer: optax.GradientTransformation,
    gradient: PyTree,
    opt_state: PyTree,
    raw: PyTree,
    error: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """Moves `raw` once.

    The hypergradient is passed on as the extra argument `grad` too, and its standard
    error as `error`. A transformation late in a chain can still see them there.

    **Returns:** the new `raw` and the new state of the optimiser.
    """
    outer = optax.with_extra_args_support(outer)
    with usual_promotion():
        updates, opt_state = outer.update(
            gradient, opt_state, raw, grad=gradient, error=error
        )
    return optax.apply_updates(raw, updates), opt_state
