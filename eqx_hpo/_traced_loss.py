"""A loss as a function of arrays, traced once for each precision in which it is
evaluated."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._custom_types import Hyperparams
from ._misc import as_device_arrays, as_single, holds_half


class TracedLoss(eqx.Module):
    """Holds a loss as a function of arrays. It is traced in the precision of the model,
    and by `in_single_precision` also in single precision."""

    traced: Callable[..., Any]
    single: Callable[..., Any] | None
    original: Callable[..., Any]

    def __call__(self, params: PyTree, *args: Any) -> Any:
        is_traced = self.single is None or holds_half((params, args[1]))
        traced = self.traced if is_traced else self.single
        out = traced(params, *args)  # pyright: ignore[reportOptionalCall]
        # What depends on nothing comes as an array of NumPy or as a literal of JAX.
        return as_device_arrays(jtu.tree_map(_from_literal, out))

    def in_single_precision(
        self, params: PyTree, model_state: PyTree, hyperparams: Hyperparams, *rest: Any
    ) -> "TracedLoss":
        """Traces the loss for parameters and hyperparameters that are cast to single
        precision, and casts the other arguments. A loss that cannot be evaluated so is
        not changed."""
        params, hyperparams = jtu.tree_map(as_single, (params, hyperparams))
        args = (params, model_state, hyperparams, *rest)
        cast = lambda *args: self.original(*jtu.tree_map(as_single, args))
        try:
            single = eqx.filter_closure_convert(cast, *args)
        except Exception:
            return self
        return dataclasses.replace(self, single=single)


def trace(
    loss: Callable[..., Any], args: tuple[Any, ...], is_mixed: bool
) -> TracedLoss:
    """Traces a loss for `args`. With `is_mixed`, it is also traced in single precision,
    with a warning if this fails."""
    traced = TracedLoss(eqx.filter_closure_convert(loss, *args), None, loss)
    if not is_mixed:
        return traced
    traced = traced.in_single_precision(*args)
    if traced.single is None:
        warnings.warn(
            "A loss cannot be evaluated in float32, as where it casts to a fixed "
            "dtype, so its derivatives stay in half precision. Cast to the dtype of "
            "the weights in place of that: `x.astype(weight.dtype)`.",
            stacklevel=2,
        )
    return traced


def _from_literal(x: Any) -> Any:
    dtype = getattr(x, "dtype", None)
    is_literal = isinstance(x, (int, float, complex)) and dtype is not None
    return jnp.asarray(x, dtype) if is_literal else x
