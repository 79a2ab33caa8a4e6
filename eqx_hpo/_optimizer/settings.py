"""Checks the settings of algorithms, and what they start from."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import as_int, as_number, check_all, check_type, shown
from .._custom_types import FloatScalar, InnerOptimiser, IntScalar, Model
from .._explain import uncalled
from .._hyperparameter import check_no_placeholders
from .._inner import is_function
from .._problem import Problem
from .._second_order import AbstractSecondOrder


# A number, or an Optax schedule of the number of the step.
Scheduled: TypeAlias = Float[Array, ""] | Callable[[Any], Any]


def as_scheduled(name: str, value: Any) -> Scheduled:
    """Converts a number above zero to a scalar array. A schedule is returned
    unchanged."""
    # `optax.linear_schedule` itself is no schedule, only what it returns.
    name_in_optax = getattr(value, "__name__", "")
    if callable(value) and getattr(optax, name_in_optax, None) is not value:
        return value
    return as_number(name, value, zero=False)


def value_at(name: str, value: Scheduled, step: IntScalar) -> FloatScalar:
    """Returns the value of a number or a schedule at a step."""
    if not callable(value):
        return value
    now = jnp.asarray(value(step))
    if jnp.issubdtype(now.dtype, jnp.integer):
        now = now.astype(jnp.result_type(float))
    if now.shape != () or not jnp.issubdtype(now.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` must be a number, or a function from the number of the step to "
            f"one; the function returned {shown(now)}."
        )
    return now


def check_plain_inner(inner: InnerOptimiser) -> None:
    """Refuses an optimiser that depends on hyperparameters."""
    if is_function(inner):
        raise ValueError(
            "`inner` must be an `optax.GradientTransformation` here, not a "
            "function of the hyperparameters: a minimum of the train loss is the "
            "same whatever optimiser found it, so a learning rate or a momentum "
            "has no implicit hypergradient. Tune them by `FixedPoint`, `Unrolled` or "
            "`ForwardMode`."
        )


def check_settings(algorithm: Any) -> None:
    order = f"The order is `{type(algorithm).__name__}(problem, inner, outer)`."
    if not isinstance(algorithm.problem, Problem):
        raise ValueError(
            "`problem` must be an `eqx_hpo.Problem(train_loss, val_loss)`; got a "
            f"{type(algorithm.problem).__name__}. {order}"
        )
    as_int("inner_steps", algorithm.inner_steps, 1)
    if algorithm.unroll is not None:
        as_int("unroll", algorithm.unroll, 1)
    _check_outer(algorithm.outer, order)
    rule = algorithm.second_order
    what = "a rule, such as `FiniteDifference()`"
    check_type("second_order", rule, AbstractSecondOrder, what)
    _check_inner(algorithm.inner, order)


def _check_outer(outer: Any, order: str) -> None:
    if isinstance(outer, optax.GradientTransformation):
        return
    name = uncalled(outer)
    if name is not None:
        mend = f"Call it, as `{name}(1e-2)`."
    elif isinstance(outer, optax.MultiSteps):
        mend = "Pass its `.gradient_transformation()`."
    elif callable(outer):
        mend = f"Only `inner` may be a function of the hyperparameters. {order}"
    else:
        mend = order
    raise ValueError(
        "`outer` must be an `optax.GradientTransformation`; got "
        f"{_shown(outer, name)}. {mend}"
    )


def _check_inner(inner: Any, order: str) -> None:
    if isinstance(inner, (optax.GradientTransformation, optax.MultiSteps)):
        return
    name, mend = uncalled(inner), order
    if name is not None:
        mend = f"Call it, as `{name}(1e-3)`, or as `lambda h: {name}(h.rate)`."
    elif callable(inner):
        return
    raise ValueError(
        "`inner` must be an `optax.GradientTransformation`, or a function from "
        f"hyperparameters to one; got {_shown(inner, name)}. {mend}"
    )


def _shown(got: Any, name: str | None) -> str:
    return f"a {type(got).__name__}" if name is None else f"the function `{name}`"


def check_model(model: Model, model_state: PyTree) -> None:
    check_no_placeholders(model)
    arrays = [x for x in jtu.tree_leaves(model) if eqx.is_inexact_array(x)]
    if sum(x.size for x in arrays) == 0:
        kinds = [type(x).__name__ for x in jtu.tree_leaves(model)]
        raise ValueError(
            f"`model` has no floating-point array to train; its leaves are {kinds}."
        )
    _check_no_nan("model", model)
    _check_no_nan("model_state", model_state)


def _check_no_nan(name: str, tree: PyTree) -> None:
    """Refuses NaN, which would make all steps fail. An infinity may be meant, as in a
    mask."""
    no_nan = lambda values: ~np.isnan(values)
    for path, x in jtu.tree_leaves_with_path(tree):
        if eqx.is_inexact_array(x):
            place = f"{name}{jtu.keystr(path)}"
            check_all(place, jnp.asarray(x), no_nan, "free of NaN to start from")
