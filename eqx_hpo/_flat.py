"""The derivative of an optimiser's update where the chain rule would give 0 * inf.

One principle covers all cases: an operation passes on no derivative where its slope is
infinite, or its value is not finite.

- Adam and its kin take the root of an average of squared gradients. If a weight never
    had a gradient, the slope of this root is infinite while its argument does not move.
    Then 0 * inf gives NaN, in reverse and in forward mode. Clipping by a global norm
    spreads this NaN over all weights, so a fix after the whole update would come too
    late.
- LAMB and clipping divide by a norm, and select another value if the norm is zero.
    RAdam takes the root of a function of the step that is negative at first, and
    selects another value then. In reverse mode, the zero for the value that was not
    selected meets the infinite slope before it.

A value that is not finite stays as such, and shows in the result unless it is thrown
away.
"""

import functools as ft
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal
from jaxtyping import Array, Bool, PyTree


def flat_at_zero(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Sets the derivatives in a function to zero where they would be infinite. Its
    values stay the same. Functions with a derivative rule of their own, and loops, are
    not changed."""

    @ft.wraps(fn)
    def flattened(*args):
        dynamic, static = eqx.partition(args, eqx.is_array)
        closed, shape = jax.make_jaxpr(
            lambda x: fn(*eqx.combine(x, static)), return_shape=True
        )(dynamic)
        out = _evaluate(closed, _values(jtu.tree_leaves(dynamic)))
        return jtu.tree_unflatten(jtu.tree_structure(shape), [x.array for x in out])

    return flattened


class _Value(NamedTuple):
    """Holds an array, whether it depends on floating-point inputs (and so has a
    derivative), and whether it may be NaN as the root of something that depends only on
    counters."""

    array: Any
    is_moving: bool
    is_suspect: bool = False


def _values(arrays: Iterable[Any]) -> list[_Value]:
    return [_Value(x, jnp.issubdtype(x.dtype, jnp.inexact)) for x in arrays]


def _evaluate(closed: ClosedJaxpr, args: list[_Value]) -> list[_Value]:
    jaxpr = closed.jaxpr
    given = [*_values(closed.consts), *args]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], given, strict=True))
    read = lambda v: _Value(v.val, False) if isinstance(v, Literal) else values[v]
    made_by = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        is_offset = eqn.primitive.name == "div" and _is_offset(made_by, eqn.invars[1])
        out = _evaluate_equation(eqn, [read(v) for v in eqn.invars], is_offset)
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _is_offset(made_by: dict[Any, JaxprEqn], v: Any) -> bool:
    """Tells whether a variable is a sum with a fixed number. The denominators of Adam
    are such sums: they are not zero, and need no selection."""
    if isinstance(v, Literal) or v not in made_by:
        return False
    eqn = made_by[v]
    is_fixed = lambda x: isinstance(x, Literal) and x.val != 0
    return eqn.primitive.name == "add" and any(map(is_fixed, eqn.invars))


def _evaluate_equation(
    eqn: JaxprEqn, inputs: list[_Value], is_offset: bool
) -> list[_Value]:
    name, params = eqn.primitive.name, eqn.params
    if name in ("jit", "pjit"):
        return _evaluate(params["jaxpr"], inputs)
    arrays = [x.array for x in inputs]
    is_moving = any(x.is_moving for x in inputs)
    is_suspect = any(x.is_suspect for x in inputs) and name != "select_n"
    if not is_moving and name in ("sqrt", "rsqrt"):
        is_suspect = True
    bad = _bad_inputs(eqn, inputs, is_offset) if is_moving else {}
    if name == "cond":
        out = _evaluate_cond(params["branches"], arrays)
    elif len(bad) > 0:
        out = [_flattened(eqn, arrays, bad)]
    else:
        out = _bind(eqn, *arrays)
    return [_Value(x, is_moving, is_suspect) for x in out]


def _bad_inputs(
    eqn: JaxprEqn, inputs: list[_Value], is_offset: bool
) -> dict[int, Bool[Array, "..."]]:
    """Finds the inputs in which the slope of an operation may be infinite or NaN, and
    the entries where it is."""
    name, bad = eqn.primitive.name, {}
    if name in ("mul", "div"):
        bad = {i: jnp.isnan(x.array) for i, x in enumerate(inputs) if x.is_suspect}
    if name == "div" and inputs[1].is_moving and not is_offset:
        bad[1] = bad.get(1, False) | (inputs[1].array == 0)
    if name == "pow" and inputs[0].is_moving:
        bad[0] = (inputs[0].array == 0) & (jnp.real(inputs[1].array) < 1)
    is_inverse = name == "integer_pow" and eqn.params["y"] < 0
    if name in ("sqrt", "rsqrt", "cbrt") or is_inverse:
        bad[0] = inputs[0].array == 0
    return bad


def _flattened(
    eqn: JaxprEqn, inputs: list[Any], bad: dict[int, Bool[Array, "..."]]
) -> Any:
    """Evaluates an operation, with a derivative of zero where an input is bad."""
    # By selection and not by a custom rule, which would be traced anew for each weight.
    any_bad = ft.reduce(jnp.logical_or, bad.values())
    good = [jnp.where(bad[i], 1, x) if i in bad else x for i, x in enumerate(inputs)]
    is_root = len(inputs) == 1
    at_bad = [jnp.zeros((), inputs[0].dtype)] if is_root else lax.stop_gradient(inputs)
    return jnp.where(any_bad, _bind(eqn, *at_bad)[0], _bind(eqn, *good)[0])


def _evaluate_cond(branches: Sequence[ClosedJaxpr], inputs: list[Any]) -> list[Any]:
    evaluate = lambda branch, *x: [v.array for v in _evaluate(branch, _values(x))]
    fns = [ft.partial(evaluate, branch) for branch in branches]
    return lax.switch(inputs[0], fns, *inputs[1:])


def _bind(eqn: JaxprEqn, *inputs: Any) -> list[Any]:
    # Functions with a rule of their own are passed in other forms by older JAX.
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*functions, *inputs, **bound)
    return list(out) if eqn.primitive.multiple_results else [out]
