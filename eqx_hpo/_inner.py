"""The inner optimiser: where it starts, and one update by it."""

from collections.abc import Callable

import equinox as eqx
import optax
from jaxtyping import PyTree

from ._custom_types import Hyperparams, InnerOptimiser, Model
from ._misc import as_device_arrays
from ._state import InnerState
from ._tasks import over_tasks


def start_inner(
    inner: InnerOptimiser,
    tasks: int | None,
    hyperparams: Hyperparams,
    model: Model,
    model_state: PyTree,
) -> InnerState:
    """The inner state in which training starts; `tasks` as in `_tasks`."""
    params = eqx.filter(model, eqx.is_inexact_array)
    opt_state = inner_init(inner, tasks, hyperparams)(params)
    return InnerState(params, as_device_arrays(opt_state), model_state)


def inner_init(
    inner: InnerOptimiser, tasks: int | None, hyperparams: Hyperparams
) -> Callable[[PyTree], PyTree]:
    """The function that makes the state of the inner optimiser, of each task its
    own."""
    return over_tasks(inner_transformation(inner, hyperparams).init, tasks)


def inner_transformation(
    inner: InnerOptimiser, hyperparams: Hyperparams
) -> optax.GradientTransformation:
    """The Optax transformation that `inner` is, or makes of the hyperparameters."""
    if isinstance(inner, optax.GradientTransformation):
        return inner
    transformation = inner(hyperparams)
    if not isinstance(transformation, optax.GradientTransformation):
        raise ValueError(
            "`inner` must be an `optax.GradientTransformation`, or a function from the "
            "unwrapped hyperparameters to one; the function returned a "
            f"{type(transformation).__name__}."
        )
    return transformation


def apply_inner(
    inner: InnerOptimiser, grad: PyTree, state: InnerState, hyperparams: Hyperparams
) -> tuple[PyTree, PyTree]:
    """The parameters and the optimiser's state after an update along `grad`."""
    transformation = inner_transformation(inner, hyperparams)
    try:
        updates, opt_state = transformation.update(grad, state.opt_state, state.params)
    except TypeError as e:
        if "value" not in str(e):
            raise
        raise ValueError(
            "`inner` asks for the value of the loss in its update. Only "
            "transformations of (updates, state, params) can be used here: no line "
            "search and no reduction on a plateau."
        ) from e
    return optax.apply_updates(state.params, updates), opt_state
