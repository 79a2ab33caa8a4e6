"""Compiled methods, and compiled calls that do not wait for the device.

`eqx.filter_jit` waits for the end of each call, to raise the errors of `eqx.error_if`
with their own text. The driver must not wait, since it prepares the next batch while
the device works. It raises those errors when it has to wait anyway.
"""

import contextlib
import functools as ft
import logging
from collections.abc import Callable, Iterator
from typing import Any, cast, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.tree_util as jtu

from ._data import holds_numbers, numbers_as_arrays
from ._misc import is_array_or_numpy
from ._second_order import explain_no_forward_mode
from ._sharding import inputs_on_mesh, mesh_of, on_mesh, pin, shardings_of
from ._state import BilevelState


P = ParamSpec("P")
T = TypeVar("T")

# JAX refuses some losses only while it lowers a program, after it has traced it.
_LATE = "can't apply forward-mode autodiff (jvp) to a custom_vjp"
_ARRAY = object()  # stands for an array among the static leaves


@jtu.register_static
class _Static:
    """Holds the part of a pytree that is no array. It can be compared and hashed."""

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


class _JitMethod:
    def __init__(self, fn: Callable[..., Any]):
        self._compiled = eqx.filter_jit(fn)
        self._pinned = eqx.filter_jit(_pinned(fn))
        ft.update_wrapper(self, fn)

    def __set_name__(self, owner: type, name: str) -> None:
        # `help` finds the text of a base class for functions alone.
        if self.__doc__ is None:
            inherited = getattr(owner.__mro__[1], name, None)
            self.__doc__ = getattr(inherited, "__doc__", None)

    def __call__(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        compiled, args, kwargs = self._prepare(instance, args, kwargs)
        with explain_no_forward_mode(_LATE):
            return compiled(*args, **kwargs)

    def lower(self, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Lowers a call, as `eqx.filter_jit` does."""
        compiled, args, kwargs = self._prepare(instance, args, kwargs)
        return compiled.lower(*args, **kwargs)

    def _prepare(self, instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Chooses a compiled function, and makes its arguments."""
        if not args:
            kwargs = dict(kwargs)
            args = (kwargs.pop("state", None),)
        # A Python number in the data is no reason to compile anew. The state is left
        # alone: a number in the model is a setting.
        state, data = args[0], (args[1:], kwargs)
        leaves = jtu.tree_leaves(data)
        if holds_numbers(leaves):
            data = numbers_as_arrays(data)
        # A state that lies on a mesh has its counters there.
        leaves.append(getattr(state, "step", None))
        mesh = mesh_of(leaves)
        if mesh is None:
            rest, named = data
            return self._compiled, (instance, state, *rest), named
        state = on_mesh(state, mesh)
        instance, (rest, named) = inputs_on_mesh((instance, data), mesh)
        shardings = shardings_of(state)
        return self._pinned, (shardings, instance, state, *rest), named

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        # A bound method of an `eqx.Module` cannot be hashed, so `jax.jit` would refuse
        # it; this one is a pytree too.
        return self if instance is None else jtu.Partial(self, instance)


def _pinned(fn: Callable[..., Any]) -> Callable[..., Any]:
    def traced(shardings, instance, state, *args, **kwargs):
        out = fn(instance, state, *args, **kwargs)
        return pin(out, shardings) if isinstance(out, BilevelState) else out

    # For profiles and compilation logs. `ft.wraps` would hand on the signature too.
    traced.__name__, traced.__qualname__ = fn.__name__, fn.__qualname__
    return traced


def jit_method(fn: Callable[P, T]) -> Callable[P, T]:
    """Compiles a method of `(state, train, val)` by `eqx.filter_jit`. Users may pass it
    to `jax.jit` too."""
    return cast(Callable[P, T], _JitMethod(fn))


def jit_without_waiting(fn: Callable[..., Any], donate_first: bool) -> Callable:
    """Compiles a function of pytrees. With `donate_first` it may overwrite its first
    argument by its result. On a mesh, the first part of the result has the placement of
    the first argument."""

    def traced(fixed, first, arrays):
        static_first, static, shardings = fixed
        static_out, out = _split(
            fn(_merge(static_first, first), *_merge(static, arrays))
        )
        count = len(shardings)
        return static_out, [*pin(out[:count], list(shardings)), *out[count:]]

    traced.__name__ = fn.__name__  # for profiles and compilation logs
    donated = 1 if donate_first else ()
    compiled = jax.jit(traced, static_argnums=0, donate_argnums=donated)

    @ft.wraps(fn)
    def call(first: Any, *args: Any) -> Any:
        static_first, first = _split(first)
        static, arrays = _split(args)
        mesh, shardings = mesh_of(first), ()
        if mesh is not None:
            first, arrays = on_mesh(first, mesh), inputs_on_mesh(arrays, mesh)
            shardings = tuple(shardings_of(first))
        with explain_no_forward_mode(_LATE):
            out = compiled((static_first, static, shardings), first, arrays)
        return _merge(*out)

    return call


@contextlib.contextmanager
def own_error_text() -> Iterator[None]:
    """Raises the error of an `eqx.error_if` with its own text. JAX alone would raise
    and log an error about a failed callback."""
    logger, quiet = logging.getLogger("jax._src.callback"), logging.Filter()
    quiet.filter = lambda record: "callback failed" not in record.getMessage()
    logger.addFilter(quiet)
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        _, found, text = str(e).partition("_EquinoxRuntimeError: ")
        if not found:
            raise
        message = text.partition("\n\n\n---")[0].strip()
        raise eqx.EquinoxRuntimeError(message) from None
    finally:
        logger.removeFilter(quiet)


def _split(tree: Any) -> tuple[_Static, list[Any]]:
    leaves, treedef = jtu.tree_flatten(tree)
    is_array = [is_array_or_numpy(x) for x in leaves]
    arrays = [x for x, array in zip(leaves, is_array) if array]
    fixed = [_ARRAY if array else x for x, array in zip(leaves, is_array)]
    return _Static(treedef, tuple(fixed)), arrays


def _merge(static: _Static, arrays: list[Any]) -> Any:
    rest = iter(arrays)
    leaves = [next(rest) if x is _ARRAY else x for x in static.leaves]
    return jtu.tree_unflatten(static.treedef, leaves)
