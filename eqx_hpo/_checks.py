"""Checks of what users pass in. Each raises a `ValueError` that names the argument."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, PyTree


def check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1; got {value!r}.")


def check_not_negative_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"`{name}` must be an integer of at least 0; got {value!r}.")


def check_type(name: str, value: Any, expected: Any, what: str) -> None:
    if not isinstance(value, expected):
        raise ValueError(f"`{name}` must be {what}; got a {type(value).__name__}.")


def as_share(name: str, value: Any) -> Array:
    """Converts a number from 0 to 1 to a scalar array.

    The result is a leaf, so another value does not compile anew.
    """
    array = _as_scalar(name, value, "a number from 0 to 1")
    if not isinstance(array, Tracer) and not 0 <= float(array) <= 1:
        raise ValueError(f"`{name}` must be a number from 0 to 1; got {value!r}.")
    return array


def as_number(name: str, value: Any, zero: bool = True) -> Array:
    """Converts a finite number above zero to a scalar array; `zero` allows zero too."""
    what = f"a number {'of at least' if zero else 'above'} zero"
    array = _as_scalar(name, value, what)
    if not isinstance(array, Tracer):
        number = float(array)
        if not (number > 0 or zero and number == 0) or number == float("inf"):
            raise ValueError(f"`{name}` must be {what}; got {value!r}.")
    return array


def _as_scalar(name: str, value: Any, what: str) -> Array:
    try:
        array = jnp.asarray(value, jnp.result_type(float))
    except (TypeError, ValueError) as e:
        kind = type(value).__name__
        raise ValueError(f"`{name}` must be {what}; got a {kind}.") from e
    if array.shape != ():
        raise ValueError(
            f"`{name}` must be {what}; got an array of shape {array.shape}."
        )
    return array


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
