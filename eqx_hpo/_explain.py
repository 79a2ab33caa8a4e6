"""Raises clear errors if `inner` is something that Optax or this package cannot use."""

import contextlib
import functools as ft
import re
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import optax


@contextlib.contextmanager
def explain_optax() -> Iterator[None]:
    """Turns what Optax raises when `inner` is made, started or updated into an error
    that says how to mend it, if the reason is known."""
    try:
        yield
    except Exception as e:
        reason = _schedule(e) or _labels(e) or _extra_arguments(e)
        if reason is None:
            raise
        raise ValueError(reason) from e


def check_lookahead(opt_state: Any) -> None:
    is_lookahead = lambda x: isinstance(x, optax.LookaheadState)
    if any(is_lookahead(x) for x in jtu.tree_leaves(opt_state, is_leaf=is_lookahead)):
        raise ValueError(
            "`inner` holds `optax.lookahead`, which trains two copies of the weights "
            "as `optax.LookaheadParams`. The model here is one copy: take `lookahead` "
            "out of `inner`."
        )


def uncalled(fn: Any) -> str | None:
    """Returns the name of `fn` if it is a function of Optax, and otherwise `None`."""
    while isinstance(fn, ft.partial):
        fn = fn.func
    module = getattr(fn, "__module__", None) or ""
    if not callable(fn) or module.partition(".")[0] != "optax":
        return None
    name = getattr(fn, "__name__", type(fn).__name__)
    is_contrib = hasattr(optax.contrib, name) and not hasattr(optax, name)
    return f"optax.contrib.{name}" if is_contrib else f"optax.{name}"


def _schedule(e: Exception) -> str | None:
    frames = _frames_of_optax(e)
    if not (isinstance(e, jax.errors.ConcretizationTypeError) and frames):
        return None
    name = frames[0].f_code.co_name
    return (
        f"`inner` gives a hyperparameter to `optax.{name}`, which tests its value in "
        "Python and so takes only plain numbers. Write a schedule as a function of "
        "the step of your own: `lambda step: h.peak * shape(step)`, with `shape = "
        f"optax.{name}(...)` of plain numbers, say with a peak of 1."
    )


def _labels(e: Exception) -> str | None:
    labels = [f.f_locals.get("param_labels") for f in _frames_of_optax(e)]
    found = [type(x).__name__ for x in labels if isinstance(x, eqx.Module)]
    if len(found) == 0:
        return None
    return (
        "`inner` holds `optax.multi_transform` with labels in the form of a model "
        f"(`{found[0]}`). A model can be called, so Optax takes it for a function from "
        "the weights to the labels. Give it one: `lambda _: labels`, with `labels` of "
        "the structure of `eqx.filter(model, eqx.is_inexact_array)`."
    )


def _extra_arguments(e: Exception) -> str | None:
    text = str(e)
    if isinstance(e, TypeError) and "required keyword-only argument" in text:
        names = re.findall(r"'(\w+)'", text)
    else:
        names = re.findall(r"^(\w+) must be provided", text)
    if len(names) == 0 or not isinstance(e, (TypeError, ValueError)):
        return None
    return (
        "`inner` asks for the value of the loss, or for the loss itself, in its update "
        f"({', '.join(f'`{x}`' for x in names)}). Only transformations of (updates, "
        "state, params) can be used here: no line search and no reduction on a plateau."
    )


def _frames_of_optax(e: Exception) -> list[FrameType]:
    frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
    of_optax = lambda f: f.f_globals.get("__name__", "").startswith("optax.")
    return [f for f in frames if of_optax(f)]
