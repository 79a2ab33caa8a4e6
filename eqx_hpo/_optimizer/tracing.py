"""Finds out, checks and warns while a problem is traced, before anything runs."""

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
from jax.extend.core import Jaxpr

from .._checks import check_same_structure
from .._custom_types import Hyperparams, InnerOptimiser, Key, Through
from .._inner import inner_transformation
from .._jaxpr import holds_primitive, live_inputs, read_inputs
from .._levels import Levels
from .._misc import tree_zeros
from .._second_order import ReverseOverReverse
from .._state import BilevelState, InnerState


_LARGEST_UNROLL = 64  # inner steps; more compile for too long


def check_optimiser_states(
    state: BilevelState,
    inner: InnerOptimiser,
    outer: optax.GradientTransformation,
    hyperparams: Hyperparams,
    raw: Any,
) -> None:
    """Checks that the optimisers' states fit this model, these hyperparameters
    (unwrapped, and as `raw`) and these optimisers."""
    params = eqx.filter(state.model, eqx.is_inexact_array)
    init = inner_transformation(inner, hyperparams).init
    same = "(make a state by `init` of the same algorithm)"
    check_same_structure(
        "state.inner_opt_state",
        state.inner_opt_state,
        eqx.filter_eval_shape(init, params),
        f"the inner optimiser for `state.model` {same}",
    )
    check_same_structure(
        "state.outer_opt_state",
        state.outer_opt_state,
        jax.eval_shape(outer.init, raw),
        f"the outer optimiser for `state.hyperparams` {same}",
    )


def default_unroll(levels: Levels, steps: int) -> int:
    """Chooses how many of `steps` inner steps a compiled loop holds in its body. The
    choice is one, or all of them on a CPU if a loss holds a convolution, which runs
    many times slower inside a loop there
    (https://github.com/jax-ml/jax/issues/12868)."""
    if jax.default_backend() != "cpu" or not 1 < steps <= _LARGEST_UNROLL:
        return 1
    return steps if hold_convolution(levels) else 1


def hold_convolution(levels: Levels) -> bool:
    """Tells whether one of the two losses holds a convolution."""
    leaves = jtu.tree_leaves((levels.train_loss, levels.val_loss))
    jaxprs = [x for x in leaves if isinstance(x, Jaxpr)]
    return any(holds_primitive(x, {"conv_general_dilated"}) for x in jaxprs)


def warn_if_unreached(
    levels: Levels,
    inner: InnerState,
    hyperparams: Hyperparams,
    through: Through,
) -> None:
    """Warns of hyperparameter arrays whose hypergradient is zero for any numbers, and
    names them. Warns also if the two losses seem to be swapped."""
    arrays, rest = eqx.partition(hyperparams, eqx.is_inexact_array)
    paths = [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(arrays)]
    if len(paths) == 0 or through == "values":
        return
    index = jnp.array(0)

    def reached(arrays):
        # The custom VJP of a rule hides what the gradient depends on.
        plain = _with_plain_rule(levels)
        full = eqx.combine(arrays, rest)
        val, _ = plain.validate(inner, full, index)
        if through is None:
            return (val,)
        if through == "gradient":
            return val, plain.gradient(inner, full, index)[0]
        return val, plain.update(inner, full, index)[0].params

    try:
        looks = read_inputs if through == "differences" else live_inputs
        in_parts = looks(reached, arrays)
    except Exception:
        # A loss that JAX cannot differentiate twice: this cannot tell.
        return
    dead = [path for path, *live in zip(paths, *in_parts) if not any(live)]
    if len(dead) > 0:
        _warn_of_dead(dead, through)
    elif through is not None and not any(in_parts[1]):
        warnings.warn(
            f"{_training(through).capitalize()} depends on no hyperparameter, only the "
            "validation loss does. Are the two losses of the `Problem` swapped?",
            stacklevel=3,
        )


def warn_if_same(train: Any, val: Any) -> None:
    """Warns if the two levels have the very same arrays."""
    arrays = [
        [x for x in jtu.tree_leaves(data) if eqx.is_array(x) and x.size > 1]
        for data in (train, val)
    ]
    if len(arrays[0]) == 0 or len(arrays[0]) != len(arrays[1]):
        return
    if all(x is y for x, y in zip(*arrays)):
        warnings.warn(
            "`val` is the same as `train`: hyperparameters fitted to the train data "
            "learn to overfit. Hold some data out for `val`.",
            stacklevel=3,
        )


def _warn_of_dead(dead: list[str], through: Through) -> None:
    names = ", ".join(f"`hyperparams{path}`" for path in dead[:10])
    names += f" and {len(dead) - 10} more" if len(dead) > 10 else ""
    if through is None:
        reason = (
            "The validation loss does not depend on them, and this algorithm looks at "
            "nothing else"
        )
    else:
        reason = f"Neither {_training(through)} nor the validation loss depends on them"
    warnings.warn(
        f"These hyperparameters get a hypergradient of zero: {names}. {reason}. "
        "Use them in a loss without `stop_gradient`, or in `inner=lambda h: ...`, or "
        "take them out of `hyperparams`.",
        stacklevel=2,
    )


def _training(through: Through) -> str:
    return f"the training {'update' if through == 'differences' else through}"


def _with_plain_rule(levels: Levels) -> Levels:
    is_rule = lambda x: x is levels.second_order
    return eqx.tree_at(
        lambda x: x.second_order, levels, ReverseOverReverse(), is_leaf=is_rule
    )


@contextlib.contextmanager
def explain_failed_losses(
    key: Key, data: dict[str, Any], retry: Callable[[Key], Any]
) -> Iterator[None]:
    """Turns what a loss or a sampler raises into one clear error if a mistake of the
    caller explains it. The key may be missing: then `retry`, which does the same with a
    key, does not raise. Or the `data`, given by name, are missing or are a list of
    batches."""
    try:
        yield
    except Exception as e:
        if key is None and _succeeds(lambda: retry(jr.key(0))):
            raise ValueError(
                "`key` is missing: a loss or a sampler uses randomness. Pass "
                "`key=jax.random.key(...)`, a new one for each call."
            ) from e
        for name, x in data.items():
            mistake = _mistake_in_data(name, x)
            if mistake is not None:
                raise ValueError(f"{mistake} (The loss raised: {e})") from e
        raise


def _succeeds(fn: Callable[[], Any]) -> bool:
    try:
        fn()
    except Exception:
        return False
    return True


def _mistake_in_data(name: str, data: Any) -> str | None:
    if data is None:
        return f"`{name}` is `None`, and the loss fails with that. Pass its data."
    if not isinstance(data, (list, tuple)) or jtu.all_leaves(data):
        return None
    if len({jtu.tree_structure(x) for x in data}) > 1:
        return None
    return (
        f"`{name}` is a {type(data).__name__} of {len(data)} equal parts, which stands "
        "for a single batch. If the parts are batches, pass `iter(...)` of them to "
        "`tune`, or `eqx_hpo.Stacked` of their stacked arrays to `step`."
    )


def empty_aux(levels: Levels, inner: InnerState, hyperparams: Hyperparams) -> Any:
    """Makes zeros in the structure of the two losses' `aux`."""
    index = jnp.array(0)

    def aux():
        train = levels.evaluate(inner, hyperparams, index)
        return train[1], levels.validate(inner, hyperparams, index)[1]

    return tree_zeros(jax.eval_shape(aux))
