"""The inner optimiser: where it starts, and one update by it."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, Bool, PyTree

from ._custom_types import Hyperparams, InnerOptimiser, Model
from ._explain import check_lookahead, explain_optax
from ._jaxpr import dependent_outputs, unchanged_outputs
from ._misc import as_device_arrays, match_dtypes, usual_promotion
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
    return InnerState(params, as_device_arrays(opt_state), model_state)


def inner_transformation(
    inner: InnerOptimiser, hyperparams: Hyperparams
) -> optax.GradientTransformation:
    """Returns the Optax transformation that `inner` is, or makes of the
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
        updates, opt_state = flat_at_zero(update)(opt_state)
    return optax.apply_updates(state.params, updates), opt_state


def _follow_init(
    inner: InnerOptimiser,
    update: Callable[[PyTree], PyTree],
    state: InnerState,
    hyperparams: Hyperparams,
    is_first: Bool[Array, ""],
) -> PyTree:
    """Puts what `inner(hyperparams).init` makes of the hyperparameters into the state
    of the optimiser, so that the update depends on them.

    A number that `update` hands on as it is, such as the learning rate that
    `optax.inject_hyperparams` keeps, is a setting: it is put in at every step. Any
    other, such as the first accumulator of AdaGrad, is where training starts: it is put
    in at the first step of an episode.
    """
    if not is_function(inner):
        return state.opt_state
    arrays, rest = eqx.partition(hyperparams, eqx.is_array)

    def init(arrays):
        made = inner_transformation(inner, eqx.combine(arrays, rest))
        return made.init(state.params)

    depends = dependent_outputs(init, arrays)
    if not any(depends):
        return state.opt_state
    is_setting = unchanged_outputs(lambda x: update(x)[1], state.opt_state)
    leaves, treedef = jtu.tree_flatten(state.opt_state)
    start = jtu.tree_leaves(match_dtypes(init(arrays), state.opt_state))
    for i, x in enumerate(start):
        if depends[i]:
            leaves[i] = x if is_setting[i] else jnp.where(is_first, x, leaves[i])
    return jtu.tree_unflatten(treedef, leaves)


def flat_at_zero(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Makes the derivative of the square roots in a function zero where their argument
    is. Its values stay the same.

    Adam and its kin take the root of an average of squared gradients. Where a weight
    never had a gradient, the slope of that root is infinite while its argument does not
    move, and the chain rule makes 0 * inf = NaN of it, in reverse and in forward mode.
    Clipping by a global norm spreads the NaN over all weights, so a mend after the
    whole update would come too late: it belongs at each root. Functions with a
    derivative rule of their own, and loops, are left as they are.
    """

    @ft.wraps(fn)
    def flattened(*args):
        dynamic, static = eqx.partition(args, eqx.is_array)
        closed, shape = jax.make_jaxpr(
            lambda x: fn(*eqx.combine(x, static)), return_shape=True
        )(dynamic)
        out = _evaluate(closed.jaxpr, closed.consts, jtu.tree_leaves(dynamic))
        return jtu.tree_unflatten(jtu.tree_structure(shape), out)

    return flattened


def _evaluate(jaxpr: Jaxpr, consts: Any, args: Any) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        out = _evaluate_equation(eqn, inputs)
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _evaluate_equation(eqn: Any, inputs: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in _ROOTS:
        return [_ROOTS[name](*inputs)]
    if name in ("jit", "pjit"):
        return _evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs)
    if name == "cond":
        branches = [ft.partial(_evaluate_closed, b) for b in params["branches"]]
        return lax.switch(inputs[0], branches, *inputs[1:])
    # Functions with a rule of their own are passed in other forms by older JAX.
    bound = eqn.primitive.get_bind_params(params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*functions, *inputs, **bound)
    return out if eqn.primitive.multiple_results else [out]


def _evaluate_closed(closed: ClosedJaxpr, *args: Any) -> list[Any]:
    return _evaluate(closed.jaxpr, closed.consts, args)


# By selection and not by a custom rule, which would be traced anew for each weight.
def _sqrt(x: Array) -> Array:
    return jnp.where(x == 0, 0, lax.sqrt(jnp.where(x == 0, 1, x)))


def _rsqrt(x: Array) -> Array:
    return jnp.where(x == 0, jnp.inf, lax.rsqrt(jnp.where(x == 0, 1, x)))


_ROOTS = {"sqrt": _sqrt, "rsqrt": _rsqrt}
