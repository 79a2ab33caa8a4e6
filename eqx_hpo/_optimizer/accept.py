"""What a step makes of an estimate: a state, the old one unless all is finite."""

import equinox as eqx
import jax.numpy as jnp
import optax

from .._custom_types import Hyperparams
from .._hyperparameter import partition_raw
from .._misc import match_dtypes, tree_all_finite, tree_norm, tree_where
from .._outer import outer_update
from .._state import BilevelState, Estimate, float_scalar, InnerState, Metrics


def accept(
    state: BilevelState,
    estimate: Estimate,
    hyperparams: Hyperparams,
    gradient: Hyperparams,
    outer: optax.GradientTransformation,
    has_aux: bool,
) -> BilevelState:
    """The state after the outer update, if losses, hypergradient and updates are all
    finite; else the old one, with `step`, `skipped` and `metrics` anew.

    **Arguments:**

    - `state`: before the step.
    - `estimate`: what the algorithm made of the inner steps.
    - `hyperparams`: the hyperparameters with the noise of this step.
    - `gradient`: the hypergradient of their raw arrays.
    - `outer`: the outer optimiser.
    - `has_aux`: whether the losses have an `aux`.
    """
    raw, constants = partition_raw(hyperparams)
    raw, outer_opt_state = outer_update(outer, gradient, state.outer_opt_state, raw)

    losses = (estimate.train[0], estimate.val[0])
    norm = tree_norm(gradient)  # finite if all of the gradient is, and only then
    finite = tree_all_finite((losses, norm, estimate.inner.params, raw))
    params, frozen = eqx.partition(state.model, eqx.is_inexact_array)
    old_inner = InnerState(params, state.inner_opt_state, state.model_state)
    arrays, fixed = eqx.partition(state.hyperparams, eqx.is_array)
    old = (old_inner, (arrays, state.outer_opt_state), state.memory)
    arrays = eqx.filter(eqx.combine(raw, constants), eqx.is_array)
    new = (estimate.inner, (arrays, outer_opt_state), estimate.memory)
    inner, (arrays, outer_opt_state), memory = tree_where(
        finite, match_dtypes(new, old), old
    )
    report = [float_scalar(x) for x in (*losses, norm)]
    aux = (estimate.train[1], estimate.val[1]) if has_aux else None
    return BilevelState(
        model=eqx.combine(inner.params, frozen),
        hyperparams=eqx.combine(arrays, fixed),
        inner_opt_state=inner.opt_state,
        outer_opt_state=outer_opt_state,
        memory=memory,
        model_state=inner.model_state,
        step=state.step + 1,
        skipped=jnp.where(finite, 0, state.skipped + 1),
        metrics=Metrics(report[0], report[1], report[2], aux, estimate.diagnostics),
    )
