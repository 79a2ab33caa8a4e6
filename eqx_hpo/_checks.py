"""Checks of what users pass in. Each raises a `ValueError` that names the argument.

A function `as_...` returns what it checked, in one form. Traced arrays have no values
yet, so they pass.
"""

import contextlib
import operator
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from ._misc import is_array_or_numpy, is_typed_key, NO_NUMBERS


MOST_STEPS = 2**31 - 1  # that the counters in a state hold

_REAL = "a real number or an array of them"


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """Converts an integer, of NumPy or JAX too, to an `int` of at least `least`."""
    what = "an integer" if least is None else f"an integer of at least {least}"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise ValueError(f"`{name}` must be {what}; got {shown(value)}.")
    return number


def as_count(name: str, value: Any) -> int:
    """Converts a number of steps. A number too large to be counted stands for never."""
    return min(as_int(name, value, 1), MOST_STEPS)


def as_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"`{name}` must be True or False; got {shown(value)}.")
    return bool(value)


def check_type(name: str, value: Any, expected: Any, what: str) -> None:
    if not isinstance(value, expected):
        raise ValueError(f"`{name}` must be {what}; got {shown(value)}.")


def check_one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in options:
        *others, last = map(repr, options)
        what = f"{', '.join(others)} or {last}"
        raise ValueError(f"`{name}` must be {what}; got {shown(value)}.")


def check_function(name: str, value: Any, what: str) -> None:
    if not callable(value):
        raise ValueError(f"`{name}` must be {what}; got {shown(value)}.")


def check_path(name: str, value: Any) -> None:
    what = "the path of a file, as a string or a `pathlib.Path`"
    if not isinstance(value, (str, os.PathLike)) or value == "":
        raise ValueError(f"`{name}` must be {what}; got {shown(value)}.")


def check_key(key: Any) -> None:
    if key is None or is_typed_key(key):
        return
    if not is_array_or_numpy(key) or key.dtype != np.uint32:
        raise ValueError(
            "`key` must be a PRNG key such as `jax.random.key(0)`, or `None` if "
            f"nothing is random; got {shown(key)}."
        )


def as_share(name: str, value: Any) -> Float[Array, ""]:
    """Converts a number from 0 to 1 to a scalar array.

    The result is a leaf, so another value does not compile anew.
    """
    return _as_scalar(name, value, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def as_number(name: str, value: Any, zero: bool = True) -> Float[Array, ""]:
    """Converts a finite number above zero to a scalar array. `zero` allows zero too."""
    what = f"a number {'of at least' if zero else 'above'} zero, and finite"
    valid = lambda x: (x >= 0 if zero else x > 0) and x < float("inf")
    return _as_scalar(name, value, what, valid)


def _as_scalar(
    name: str, value: Any, what: str, valid: Callable[[float], bool]
) -> Float[Array, ""]:
    array = as_real(name, value, what)
    if array.shape != () or not (isinstance(array, Tracer) or valid(float(array))):
        raise ValueError(f"`{name}` must be {what}; got {shown(value)}.")
    return array.astype(jnp.result_type(float))


def as_real(name: str, value: Any, what: str = _REAL) -> Array:
    """Converts at least one integer or floating-point number to an array."""
    traced = any(isinstance(x, Tracer) for x in jtu.tree_leaves(value))
    try:
        # Within `jit` a constant would be traced too, and pass all checks.
        with contextlib.nullcontext() if traced else jax.ensure_compile_time_eval():
            array = None if isinstance(value, str) else jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        array = None
    kinds = (jnp.floating, jnp.integer)
    if array is None or not any(jnp.issubdtype(array.dtype, x) for x in kinds):
        raise ValueError(f"`{name}` must be {what}; got {shown(value)}.")
    if array.size == 0:
        raise ValueError(f"`{name}` must not be empty; its shape is {array.shape}.")
    return array


def as_finite(name: str, value: Any) -> Array:
    array = as_real(name, value)
    check_all(name, array, np.isfinite, "finite")
    return array


def check_all(
    name: str, array: Array, valid: Callable[[np.ndarray], Any], what: str
) -> None:
    """Checks on the host that all entries are `valid`. Nothing is compiled."""
    if isinstance(array, Tracer) or not array.is_fully_addressable:
        return
    values = np.asarray(array)
    if not valid(values).all():
        raise ValueError(f"`{name}` must be {what}; got {values}.")


def check_leaves(name: str, tree: PyTree) -> None:
    """Refuses arrays that JAX cannot use."""
    for path, x in jtu.tree_leaves_with_path(tree):
        problem = _foreign(x)
        if problem is not None:
            raise ValueError(f"`{name}{jtu.keystr(path)}` is {problem}")


def _foreign(x: Any) -> str | None:
    if is_array_or_numpy(x):
        if is_typed_key(x) or x.dtype.kind not in NO_NUMBERS:
            return None
        return (
            f"{shown(x)}, but JAX takes numbers only. Make numbers of them, or leave "
            "them out."
        )
    is_array = hasattr(x, "shape") and (hasattr(x, "dtype") or hasattr(x, "__array__"))
    if not is_array or isinstance(x, jax.ShapeDtypeStruct):
        return None
    return (
        f"{kind(x)}, an array of neither JAX nor NumPy. Convert it first, by its "
        "method `numpy()` or by `numpy.asarray`."
    )


def kind(value: Any) -> str:
    """Names the type of a value, in a sentence."""
    name = type(value).__name__
    if value is None:
        return "None"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def shown(value: Any) -> str:
    """Describes a value in a sentence. Numbers and short text are shown in full."""
    if isinstance(value, (bool, int, float, complex, str, np.number, np.bool_)):
        return repr(value)
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return kind(value)
    if value.shape == () and is_array_or_numpy(value) and not is_typed_key(value):
        return str(value)
    return f"an array of dtype {value.dtype} and shape {value.shape}"


def check_same_structure(name: str, got: PyTree, expected: PyTree, what: str) -> None:
    """Raises a `ValueError` that names the first array of `got` that differs."""
    got_leaves, got_def = jtu.tree_flatten_with_path(got)
    expected_leaves, expected_def = jtu.tree_flatten_with_path(expected)
    if got_def != expected_def:
        places = [
            {jtu.keystr(path): _spec(x) for path, x in leaves}
            for leaves in (got_leaves, expected_leaves)
        ]
        differing = [
            x for x in [*places[1], *places[0]] if (x in places[0]) != (x in places[1])
        ]
        if len(differing) > 0:
            there = [place.get(differing[0], "nothing") for place in places]
            reason = (
                f": at `{name}{differing[0]}` it has {there[0]} instead of {there[1]}."
            )
        else:
            reason = f".\nGot: {got_def}\nExpected: {expected_def}"
        raise ValueError(f"`{name}` does not have the structure of {what}{reason}")
    for (path, x), (_, y) in zip(got_leaves, expected_leaves):
        if _spec(x) != _spec(y):
            raise ValueError(
                f"`{name}{jtu.keystr(path)}` is {_spec(x)}, but {what} has {_spec(y)} "
                "there."
            )


def _spec(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return type(x).__name__
