"""Answers questions about a function from its primitives, without running it. Does it
hold a convolution? For which inputs can the derivative be other than zero? Which
outputs depend on the inputs, and which are inputs?"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import PyTree


# Floating point in and out, but with a derivative that is zero everywhere.
_FLAT = {"stop_gradient", "floor", "ceil", "round", "sign", "nextafter"}


def equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yields all equations, including those of inner functions."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner_jaxprs(eqn):
            yield from equations(inner)


def holds_primitive(jaxpr: Jaxpr, names: set[str]) -> bool:
    return any(eqn.primitive.name in names for eqn in equations(jaxpr))


def live_inputs(
    fn: Callable[[PyTree], tuple[PyTree, ...]], x: PyTree
) -> list[list[bool]]:
    """Tells, for each part of what `fn` returns and for each leaf of `x`, whether the
    derivative of the part with respect to the leaf can be other than zero. Traces `fn`
    once; computes nothing.

    Every leaf of `x` is an inexact array, or a `jax.ShapeDtypeStruct` of one.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(x)
    owners = [i for i, part in enumerate(shapes) for _ in jtu.tree_leaves(part)]
    inexact = [_is_inexact(v) for v in closed.jaxpr.outvars]
    of_part = lambda i: [owner == i and x for owner, x in zip(owners, inexact)]
    return [_live_inputs(closed.jaxpr, of_part(i)) for i in range(len(shapes))]


def _live_inputs(jaxpr: Jaxpr, live_outputs: Sequence[bool]) -> list[bool]:
    """Walks from the outputs back to the inputs."""
    live = {
        v
        for v, is_live in zip(jaxpr.outvars, live_outputs)
        if is_live and not isinstance(v, Literal)
    }
    for eqn in reversed(jaxpr.eqns):
        outputs = [v in live for v in eqn.outvars]
        if any(outputs) and eqn.primitive.name not in _FLAT:
            for v, is_live in zip(eqn.invars, _live_operands(eqn, outputs)):
                if is_live and not isinstance(v, Literal) and _is_inexact(v):
                    live.add(v)
    return [v in live for v in jaxpr.invars]


def _live_operands(eqn: JaxprEqn, outputs: list[bool]) -> list[bool]:
    name, params, count = eqn.primitive.name, eqn.params, len(eqn.invars)
    if name == "cond":
        branches = [_live_inputs(b.jaxpr, outputs) for b in params["branches"]]
        return [False, *(any(x) for x in zip(*branches))]
    if name == "scan":
        return _live_through_scan(params, outputs)
    # A rule of its own may have any derivative, and of a loop any output may depend on
    # any input: these count as live.
    if _is_call(eqn) and name not in ("custom_jvp_call", "custom_vjp_call"):
        return _live_inputs(_inner_jaxprs(eqn)[0], outputs)
    return [True] * count


def _live_through_scan(params: dict[str, Any], outputs: list[bool]) -> list[bool]:
    """Finds the live inputs of a scan. A part of the carry is live if any later step
    turns it into a live output."""
    consts, carries = params["num_consts"], params["num_carry"]
    carry, rest = outputs[:carries], outputs[carries:]
    while True:
        inputs = _live_inputs(params["jaxpr"].jaxpr, [*carry, *rest])
        grown = [
            x or y
            for x, y in zip(carry, inputs[consts : consts + carries], strict=True)
        ]
        if grown == carry:
            return [*inputs[:consts], *carry, *inputs[consts + carries :]]
        carry = grown


def read_inputs(
    fn: Callable[[PyTree], tuple[PyTree, ...]], x: PyTree
) -> list[list[bool]]:
    """Tells, for each part of what `fn` returns and for each leaf of `x`, whether the
    part depends on the leaf. Traces `fn` once; computes nothing."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(x)
    count = len(closed.jaxpr.invars)
    union = lambda eqn, inputs: frozenset().union(*(x for x in inputs if x))
    labels = iter(
        _propagate(closed.jaxpr, [frozenset([i]) for i in range(count)], union)
    )
    parts = [[next(labels) for _ in jtu.tree_leaves(part)] for part in shapes]
    read = [frozenset().union(*(x for x in part if x)) for part in parts]
    return [[i in part for i in range(count)] for part in read]


def dependent_outputs(fn: Callable[[PyTree], PyTree], x: PyTree) -> list[bool]:
    """Tells, for each leaf of `fn(x)`, whether it depends on the arrays `x`. Traces
    `fn` once; computes nothing."""
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    depends = lambda eqn, inputs: any(x is not None for x in inputs) or None
    out = _propagate(jaxpr, [True] * len(jaxpr.invars), depends)
    return [x is not None for x in out]


def unchanged_outputs(fn: Callable[[PyTree], PyTree], x: PyTree) -> list[bool]:
    """Tells, for each leaf of `fn(x)`, whether it is the leaf of `x` at the same place,
    up to a conversion of its dtype. `fn(x)` has the structure of `x`, a pytree of
    arrays. Traces `fn` once; computes nothing."""
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr

    def origin(eqn, inputs):
        if eqn.primitive.name in ("select_n", "cond"):
            return _common(inputs[1:])
        return inputs[0] if eqn.primitive.name in _COPIES else None

    out = _propagate(jaxpr, range(len(jaxpr.invars)), origin)
    return [place == i for i, place in enumerate(out)]


_COPIES = {"convert_element_type", "copy", "copy_p"}


def _propagate(
    jaxpr: Jaxpr, labels: Sequence[Any], label: Callable[[JaxprEqn, list[Any]], Any]
) -> list[Any]:
    """Labels the outputs from the labels of the inputs. Constants have the label
    `None`. `label` makes the label of the outputs of an equation from those of its
    inputs."""
    values = dict(zip(jaxpr.invars, labels, strict=True))
    read = lambda v: None if isinstance(v, Literal) else values.get(v)
    for eqn in jaxpr.eqns:
        inputs, inner = [read(v) for v in eqn.invars], _inner_jaxprs(eqn)
        if eqn.primitive.name == "cond":
            branches = [_propagate(x, inputs[1:], label) for x in inner]
            out = [label(eqn, [inputs[0], *x]) for x in zip(*branches)]
        elif _is_call(eqn):
            out = _propagate(inner[0], inputs, label)
        else:
            out = [label(eqn, inputs)] * len(eqn.outvars)
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _is_call(eqn: JaxprEqn) -> bool:
    """Tells whether an equation calls one function with all of its inputs."""
    inner = _inner_jaxprs(eqn)
    is_loop = eqn.primitive.name in ("while", "scan")
    return not is_loop and len(inner) == 1 and len(inner[0].invars) == len(eqn.invars)


def _common(labels: list[Any]) -> Any:
    return labels[0] if all(x == labels[0] for x in labels) else None


def _inner_jaxprs(eqn: JaxprEqn) -> list[Jaxpr]:
    found = []
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, ClosedJaxpr):
                found.append(x.jaxpr)
            elif isinstance(x, Jaxpr):
                found.append(x)
    return found


def _is_inexact(v: Any) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)
