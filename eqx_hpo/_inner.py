"""The inner optimiser: its starting state, and one update by it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, PyTree

from ._custom_types import Hyperparams, InnerOptimiser, Model
from ._explain import check_lookahead, explain_optax
from ._flat import flat_at_zero
from ._jaxpr import dependent_outputs, unchanged_outputs
from ._misc import as_device_arrays, match_types, usual_promotion
from ._precision import check_outermost, in_half, lift
from ._state import InnerState


def start_inner(
    inner: InnerOptimiser, hyperparams: Hyperparams, model: Model, model_state: PyTree
) -> InnerState:
    """Makes the inner state in which training starts."""
    params = eqx.filter(model, eqx.is_inexact_array)
    transformation = inner_transformation(inner, hyperparams)
    with usual_promotion(), explain_optax():
        opt_state = transformation.init(params)
    check_lookahead(opt_state)
    check_outermost(opt_state)
    return InnerState(params, as_device_arrays(opt_state), model_state)


def inner_transformation(
    inner: InnerOptimiser, hyperparams: Hyperparams
) -> optax.GradientTransformation:
    """Returns the Optax transformation that `inner` is, or that it makes from the
    hyperparameters."""
    made: Any = inner
    if is_function(inner):
        with explain_optax():
            made = made(hyperparams)
    if hasattr(made, "gradient_transformation"):
        made = made.gradient_transformation()
    if not isinstance(made, optax.GradientTransformation):
        raise ValueError(
            "`inner` must be an `optax.GradientTransformation`, or a function from the "
            "unwrapped hyperparameters to one; the function returned a "
            f"{type(made).__name__}."
        )
    return made


def is_function(inner: InnerOptimiser) -> bool:
    """Tells whether `inner` is a function of the hyperparameters."""
    # A `GradientTransformation` is a tuple, and `optax.MultiSteps` has no `__call__`.
    return callable(inner)


def apply_inner(
    inner: InnerOptimiser,
    grad: PyTree,
    state: InnerState,
    hyperparams: Hyperparams,
    is_first: Bool[Array, ""],
) -> tuple[PyTree, PyTree]:
    """Computes the parameters and the optimiser's state after an update along `grad`.

    `is_first` tells whether the update is the first one of an episode.
    """
    transformation = inner_transformation(inner, hyperparams)

    def update(opt_state):
        return transformation.update(grad, opt_state, state.params)

    with usual_promotion(), explain_optax():
        opt_state = _follow_init(inner, update, state, hyperparams, is_first)
        updates, new = flat_at_zero(update)(opt_state)
    if jtu.tree_structure(new) != jtu.tree_structure(opt_state):
        raise ValueError(
            "`inner` changes the structure of its state in an update, as "
            "`optax.monitor` does. An inner step must keep it."
        )
    return optax.apply_updates(state.params, updates), new


def _follow_init(
    inner: InnerOptimiser,
    update: Callable[[PyTree], PyTree],
    state: InnerState,
    hyperparams: Hyperparams,
    is_first: Bool[Array, ""],
) -> PyTree:
    """Puts the numbers that `inner(hyperparams).init` makes from the hyperparameters
    into the state of the optimiser. The update then depends on them.

    A number that `update` returns unchanged, such as the learning rate that
    `optax.inject_hyperparams` keeps, is a setting. It is put in at every step. Any
    other number, such as the first accumulator of AdaGrad, belongs to the start of
    training. It is put in at the first step of an episode.
    """
    if not is_function(inner):
        return state.opt_state
    arrays, rest = eqx.partition(hyperparams, eqx.is_array)

    def init(arrays):
        made = inner_transformation(inner, eqx.combine(arrays, rest))
        start = in_half(state) or state
        opt_state = made.init(start.params)
        return lift(dataclasses.replace(start, opt_state=opt_state)).opt_state

    depends = dependent_outputs(init, arrays)
    if not any(depends):
        return state.opt_state
    is_setting = unchanged_outputs(lambda x: update(x)[1], state.opt_state)
    leaves, treedef = jtu.tree_flatten(state.opt_state)
    start = jtu.tree_leaves(match_types(init(arrays), state.opt_state))
    for i, x in enumerate(start):
        if depends[i]:
            leaves[i] = x if is_setting[i] else jnp.where(is_first, x, leaves[i])
    return jtu.tree_unflatten(treedef, leaves)
