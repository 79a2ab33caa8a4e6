"""What is checked before the first step runs, while it is traced."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from .._custom_types import Hyperparams, Model
from .._hyperparameter import is_hyperparameter
from .._levels import Levels
from .._misc import depends_on
from .._second_order import ReverseOverReverse
from .._state import InnerState


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1; got {value!r}.")


def check_model(model: Model) -> None:
    nodes = jtu.tree_leaves_with_path(model, is_leaf=is_hyperparameter)
    for path, node in nodes:
        if is_hyperparameter(node):
            raise ValueError(
                f"`model{jtu.keystr(path)}` is a {type(node).__name__} placeholder. "
                "Split the hyperparameters off first: `hyperparams, model = "
                "eqx_hpo.partition(model)`."
            )
    if not any(eqx.is_inexact_array(node) for _, node in nodes):
        raise ValueError(
            "`model` has no floating-point array to train; its leaves are "
            f"{[type(node).__name__ for _, node in nodes]}."
        )


def warn_if_independent(
    levels: Levels, inner: InnerState, hyperparams: Hyperparams, through_update: bool
) -> None:
    """Warns where the hypergradient is zero whatever the numbers are. Runs while a
    step is traced, so that it speaks once a compilation."""
    arrays, rest = eqx.partition(hyperparams, eqx.is_inexact_array)
    if len(jtu.tree_leaves(arrays)) == 0:
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
    update = lambda x: levels.update(inner, eqx.combine(x, rest), index)[0].params
    if depends_on(val, arrays) or (through_update and depends_on(update, arrays)):
        return
    if through_update:
        reason = "neither the training update nor the validation loss depends on them"
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


@contextlib.contextmanager
def explain_missing_key(
    levels: Levels, inner: InnerState, hyperparams: Hyperparams
) -> Iterator[None]:
    """Turns whatever a random loss raises for `key=None` into one clear error."""
    try:
        yield
    except Exception as e:
        if levels.key is None and _runs_with_a_key(levels, inner, hyperparams):
            raise ValueError(
                "`key` is missing: a loss or a sampler uses randomness. Pass "
                "`key=jax.random.key(...)`, a new one for each call."
            ) from e
        raise


def _runs_with_a_key(levels, inner, hyperparams) -> bool:
    levels = eqx.tree_at(
        lambda x: x.key, levels, jr.key(0), is_leaf=lambda x: x is None
    )
    try:
        report_structure(levels, inner, hyperparams)
    except Exception:
        return False
    return True


def report_structure(
    levels: Levels, inner: InnerState, hyperparams: Hyperparams
) -> tuple[Any, Any]:
    """The `(loss, aux)` of both levels, as shapes and dtypes."""

    def reports():
        index = jnp.array(0)
        train = levels.update(inner, hyperparams, index)[1]
        return train, levels.validate(inner, hyperparams, index)

    return jax.eval_shape(reports)
