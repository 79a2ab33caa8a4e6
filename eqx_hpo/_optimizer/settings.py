"""Checks of what all algorithms are made of and start from."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import PyTree

from .._checks import as_int, check_all, check_type
from .._custom_types import Model
from .._explain import uncalled
from .._hyperparameter import check_no_placeholders
from .._problem import Problem
from .._second_order import AbstractSecondOrder


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
    """Names what would make all steps fail. An infinity may be meant, as in a mask."""
    no_nan = lambda values: ~np.isnan(values)
    for path, x in jtu.tree_leaves_with_path(tree):
        if eqx.is_inexact_array(x):
            place = f"{name}{jtu.keystr(path)}"
            check_all(place, jnp.asarray(x), no_nan, "free of NaN to start from")
