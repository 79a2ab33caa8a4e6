"""What is checked before the first step runs, while it is traced."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from .._custom_types import Batch, Hyperparams, Model, Through
from .._hyperparameter import is_hyperparameter
from .._levels import Levels
from .._misc import check_same_structure, depends_on, holds_convolution
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ReverseOverReverse
from .._state import BilevelState, InnerState


_LARGEST_UNROLL = 64  # inner steps; more compile for too long


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1; got {value!r}.")


def check_not_negative_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"`{name}` must be an integer of at least 0; got {value!r}.")


def as_share(name: str, value: Any) -> Array:
    """A number from 0 to 1 as a scalar array, so that another value compiles nothing
    anew."""
    array = jnp.asarray(value, jnp.result_type(float))
    message = f"`{name}` must be a number from 0 to 1"
    if array.shape != ():
        raise ValueError(f"{message}; got an array of shape {array.shape}.")
    if not isinstance(array, Tracer) and not 0 <= float(array) <= 1:
        raise ValueError(f"{message}; got {value!r}.")
    return array


def as_number(name: str, value: Any, zero: bool = True) -> Array:
    """A number above zero, or zero if that is allowed, as a scalar array."""
    array = jnp.asarray(value, jnp.result_type(float))
    message = f"`{name}` must be a number {'of at least' if zero else 'above'} zero"
    if array.shape != ():
        raise ValueError(f"{message}; got an array of shape {array.shape}.")
    if not isinstance(array, Tracer):
        number = float(array)
        if not (number > 0 or zero and number == 0) or number == float("inf"):
            raise ValueError(f"{message}; got {value!r}.")
    return array


def check_settings(optimizer: Any) -> None:
    """Of an algorithm, those that all have."""
    problem, rule = optimizer.problem, optimizer.second_order
    check_type(
        "problem", problem, Problem, "an `eqx_hpo.Problem(train_loss, val_loss)`"
    )
    check_positive_int("inner_steps", optimizer.inner_steps)
    if optimizer.unroll is not None:
        check_positive_int("unroll", optimizer.unroll)
    expected = "an `optax.GradientTransformation`"
    check_type("outer", optimizer.outer, optax.GradientTransformation, expected)
    check_type(
        "second_order", rule, AbstractSecondOrder, "a rule, as `FiniteDifference()`"
    )
    inner = optimizer.inner
    if not (callable(inner) or isinstance(inner, optax.GradientTransformation)):
        expected += ", or a function from hyperparameters to one"
        raise ValueError(f"`inner` must be {expected}; got a {type(inner).__name__}.")


def check_type(name: str, value: Any, expected: Any, what: str) -> None:
    if not isinstance(value, expected):
        raise ValueError(f"`{name}` must be {what}; got a {type(value).__name__}.")


def check_state(
    state: BilevelState,
    inner_init: Callable[[PyTree], PyTree],
    outer: optax.GradientTransformation,
    raw: PyTree,
) -> None:
    """Whether the optimisers' states are those of this model, these hyperparameters
    and these optimisers."""
    params = eqx.filter(state.model, eqx.is_inexact_array)
    same = "(make a state by `init` of the same optimizer)"
    check_same_structure(
        "state.inner_opt_state",
        state.inner_opt_state,
        eqx.filter_eval_shape(inner_init, params),
        f"the inner optimiser for `state.model` {same}",
    )
    check_same_structure(
        "state.outer_opt_state",
        state.outer_opt_state,
        jax.eval_shape(outer.init, raw),
        f"the outer optimiser for `state.hyperparams` {same}",
    )


def check_model(model: Model) -> None:
    nodes = jtu.tree_leaves_with_path(model, is_leaf=is_hyperparameter)
    for path, node in nodes:
        if is_hyperparameter(node):
            raise ValueError(
                f"`model{jtu.keystr(path)}` is a {type(node).__name__} placeholder. "
                "Split the hyperparameters off first: `hyperparams, model = "
                "eqx_hpo.partition(model)`. (Or are `model` and `hyperparams` in the "
                "wrong order?)"
            )
    if not any(eqx.is_inexact_array(node) for _, node in nodes):
        raise ValueError(
            "`model` has no floating-point array to train; its leaves are "
            f"{[type(node).__name__ for _, node in nodes]}."
        )


def warn_if_independent(
    levels: Levels, inner: InnerState, hyperparams: Hyperparams, through: Through
) -> None:
    """Warns where the hypergradient is zero whatever the numbers are. Runs while a
    step is traced, so that it speaks once a compilation."""
    arrays, rest = eqx.partition(hyperparams, eqx.is_inexact_array)
    if len(jtu.tree_leaves(arrays)) == 0 or through == "values":
        return
    # A rule with a custom VJP hides what it depends on; this one does not.
    levels = eqx.tree_at(
        lambda x: x.second_order,
        levels,
        ReverseOverReverse(),
        is_leaf=lambda x: x is levels.second_order,
    )
    index = jnp.array(0)
    val = lambda x: levels.validate(inner, eqx.combine(x, rest), index)[0]
    of_gradient = lambda x: levels.gradient(inner, eqx.combine(x, rest), index)[0]
    of_update = lambda x: levels.update(inner, eqx.combine(x, rest), index)[0].params
    response = {"gradient": of_gradient, "update": of_update, None: lambda x: None}
    try:
        if depends_on(val, arrays) or depends_on(response[through], arrays):
            return
    except Exception:
        # A loss that JAX cannot differentiate twice: this cannot tell.
        return
    if through is not None:
        reason = (
            f"neither the training {through} nor the validation loss depends on them"
        )
    else:
        reason = (
            "the validation loss does not depend on them, and this algorithm looks at "
            "nothing else"
        )
    warnings.warn(
        f"The hyperparameters get a hypergradient of zero: {reason}. Use "
        "`hyperparams` in a loss without `stop_gradient`, or in "
        "`inner=lambda h: ...`.",
        stacklevel=2,
    )


def default_unroll(
    levels: Levels, inner: InnerState, hyperparams: Hyperparams, steps: int
) -> int:
    """How many of `steps` inner steps a compiled loop should hold in its body: one,
    but all of them on a CPU if a loss holds a convolution, which runs many times slower
    inside a loop there (https://github.com/jax-ml/jax/issues/12868)."""
    if jax.default_backend() != "cpu" or not 1 < steps <= _LARGEST_UNROLL:
        return 1
    arrays, static = eqx.partition((levels, inner, hyperparams), eqx.is_array)

    def reports(arrays):
        return _reports(*eqx.combine(arrays, static))

    return steps if holds_convolution(reports, arrays) else 1


@contextlib.contextmanager
def explain_missing_key(
    levels: Levels, inner: InnerState, hyperparams: Hyperparams
) -> Iterator[None]:
    """Turns whatever a random loss raises for `key=None` into one clear error."""
    try:
        yield
    except Exception as e:
        runs = lambda levels: _runs(levels, inner, hyperparams)
        if levels.key is None and not runs(levels) and runs(_with_a_key(levels)):
            raise ValueError(
                "`key` is missing: a loss or a sampler uses randomness. Pass "
                "`key=jax.random.key(...)`, a new one for each call."
            ) from e
        raise


def _runs(levels, inner, hyperparams) -> bool:
    try:
        jax.eval_shape(lambda: _reports(levels, inner, hyperparams))
    except Exception:
        return False
    return True


def empty_aux(levels: Levels, inner: InnerState, hyperparams: Hyperparams) -> Any:
    """The `aux` of both losses, filled with zeros; `None` if there is none, or if there
    are no data to find it with."""
    given = [len(jtu.tree_leaves(x)) > 0 for x in (levels.train, levels.val)]
    if not (levels.problem.has_aux and all(given)):
        return None
    with explain_missing_key(levels, inner, hyperparams):
        (_, train_aux), (_, val_aux) = jax.eval_shape(
            lambda: _reports(levels, inner, hyperparams)
        )
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    return jtu.tree_map(zeros, (train_aux, val_aux))


def train_batch_shapes(levels: Levels) -> Batch:
    """A train batch, with `jax.ShapeDtypeStruct`s in place of arrays."""
    return eqx.filter_eval_shape(_with_a_key(levels).train_batch, jnp.array(0))


def _with_a_key(levels):
    key = jr.key(0) if levels.key is None else levels.key
    return eqx.tree_at(lambda x: x.key, levels, key, is_leaf=lambda x: x is None)


def _reports(levels, inner, hyperparams):
    index = jnp.array(0)
    train = levels.update(inner, hyperparams, index)[1]
    return train, levels.validate(inner, hyperparams, index)
