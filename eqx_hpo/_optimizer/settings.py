"""Checks of the settings that all algorithms have."""

from typing import Any

import optax

from .._checks import check_positive_int, check_type
from .._explain import uncalled
from .._problem import Problem
from .._second_order import AbstractSecondOrder


def check_settings(algorithm: Any) -> None:
    order = f"The order is `{type(algorithm).__name__}(problem, inner, outer)`."
    if not isinstance(algorithm.problem, Problem):
        raise ValueError(
            "`problem` must be an `eqx_hpo.Problem(train_loss, val_loss)`; got a "
            f"{type(algorithm.problem).__name__}. {order}"
        )
    check_positive_int("inner_steps", algorithm.inner_steps)
    if algorithm.unroll is not None:
        check_positive_int("unroll", algorithm.unroll)
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
