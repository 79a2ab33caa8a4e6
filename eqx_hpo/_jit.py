"""`eqx.filter_jit` with a shorter way to a compiled function.

Arrays are traced, everything else is static, by equality. `eqx.filter_jit` does more
(ahead-of-time lowering, runtime errors, devices) and costs, for a small problem, more
than the step itself.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, cast, ParamSpec, TypeVar

import jax
import jax.tree_util as jtu

from ._misc import is_array_or_numpy


P = ParamSpec("P")
T = TypeVar("T")

_ARRAY = object()  # stands for an array among the static leaves


@jtu.register_static
class _Static:
    """What of a pytree is not an array, to be compared and hashed."""

    __slots__ = ("treedef", "leaves")

    def __init__(self, treedef: Any, leaves: tuple[Any, ...]):
        self.treedef = treedef
        self.leaves = leaves

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Static)
            and self.treedef == other.treedef
            and self.leaves == other.leaves
        )

    def __hash__(self) -> int:
        return hash((self.treedef, self.leaves))


class _Jitted:
    def __init__(self, fn: Callable[..., Any]):
        def traced(static, arrays):
            args, kwargs = _merge(static, arrays)
            return _split(fn(*args, **kwargs))

        traced.__name__ = fn.__name__  # what profiles and compilation logs show
        self._compiled = jax.jit(traced, static_argnums=0)
        ft.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _merge(*self._compiled(*_split((args, kwargs))))

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        # A pytree, as the bound methods of an `eqx.Module`, but ten times as fast.
        return self if instance is None else jtu.Partial(self, instance)  # pyright: ignore


def filter_jit(fn: Callable[P, T]) -> Callable[P, T]:
    """Compiles a function, or a method, of any pytrees."""
    return cast(Callable[P, T], _Jitted(fn))


def filter_jit_donating_first(fn: Callable[..., T]) -> Callable[..., T]:
    """Compiles a function that may write its result over its first argument."""

    def traced(static_first, static, first, arrays):
        args, kwargs = _merge(static, arrays)
        return _split(fn(_merge(static_first, first), *args, **kwargs))

    traced.__name__ = fn.__name__
    compiled = jax.jit(traced, static_argnums=(0, 1), donate_argnums=2)

    @ft.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> T:
        static_first, first = _split(args[0])
        static, arrays = _split((args[1:], kwargs))
        return _merge(*compiled(static_first, static, first, arrays))

    return call


def _split(tree: Any) -> tuple[_Static, list[Any]]:
    leaves, treedef = jtu.tree_flatten(tree)
    is_array = [is_array_or_numpy(x) for x in leaves]
    arrays = [x for x, array in zip(leaves, is_array) if array]
    fixed = [_ARRAY if array else x for x, array in zip(leaves, is_array)]
    return _Static(treedef, tuple(fixed)), arrays


def _merge(static: _Static, arrays: list[Any]) -> Any:
    if len(arrays) == len(static.leaves):
        return jtu.tree_unflatten(static.treedef, arrays)
    rest = iter(arrays)
    leaves = [next(rest) if x is _ARRAY else x for x in static.leaves]
    return jtu.tree_unflatten(static.treedef, leaves)
