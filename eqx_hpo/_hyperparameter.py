"""Hyperparameters: placeholders for constrained values, and how they are split off.

A placeholder holds an unconstrained array `raw`, which the outer optimiser moves, and
unwraps to the constrained value that the losses see. Everything else in it (bounds) is
constant. A `Schedule` holds a placeholder, or an array, with an entry for each window
of inner steps.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import paramax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ._checks import as_finite, as_int, check_all, check_leaves, shown
from ._custom_types import Hyperparams, IntScalar, Model
from ._misc import as_device_arrays, is_array_or_numpy


class AbstractHyperparameter(paramax.AbstractUnwrappable[Array]):
    """A placeholder for one hyperparameter array.

    To add a constraint of your own, write a subclass with a field `raw` and a method
    `unwrap`.
    """

    raw: eqx.AbstractVar[Float[Array, "..."]]

    @abc.abstractmethod
    def unwrap(self) -> Float[Array, "..."]:
        """Returns the constrained value, of the shape of `raw`."""


class Real(AbstractHyperparameter):
    """A hyperparameter without a constraint. It unwraps to `raw` itself.

    Wrap an array of a model in it to mark the array as a hyperparameter.
    [`eqx_hpo.partition`][] then finds it.
    """

    raw: Float[Array, "..."]

    def __init__(self, value: ArrayLike):
        """**Arguments:**

        - `value`: the starting value, of any shape. Floating point.

        **Raises:** a `ValueError` if an entry is not finite.
        """
        self.raw = as_float("Real(value)", value)

    def unwrap(self) -> Float[Array, "..."]:
        return self.raw


class Positive(AbstractHyperparameter):
    """A hyperparameter above zero. It unwraps to `exp(raw)`.

    Use it where the order of magnitude matters: for weight decay, noise levels,
    learning rates and length scales.
    """

    raw: Float[Array, "..."]

    def __init__(self, value: ArrayLike):
        """**Arguments:**

        - `value`: the starting value, of any shape. Floating point, above zero.

        **Raises:** a `ValueError` unless all entries are above zero and finite.
        """
        value = as_float("Positive(value)", value)
        value = _require(value, value > 0, "`Positive(value)` needs `value` > 0")
        self.raw = jnp.log(value)

    def unwrap(self) -> Float[Array, "..."]:
        return jnp.exp(self.raw)


class Interval(AbstractHyperparameter):
    """A hyperparameter between two bounds. It unwraps to
    `lower + (upper - lower) * sigmoid(raw)`. The bounds are constants."""

    raw: Float[Array, "..."]
    lower: Float[Array, "..."]
    upper: Float[Array, "..."]

    def __init__(self, value: ArrayLike, lower: ArrayLike, upper: ArrayLike):
        """**Arguments:**

        - `value`: the starting value, of any shape. Floating point.
        - `lower`: the lower bound, broadcastable to `value`.
        - `upper`: the upper bound, broadcastable to `value`.

        **Raises:** a `ValueError` unless `lower < value < upper` everywhere and all
        three are finite. A value on a bound has no finite `raw` and no gradient.
        """
        value = as_float("Interval(value)", value)
        self.lower = _as_bound("lower", lower, value)
        self.upper = _as_bound("upper", upper, value)
        inside = (value > self.lower) & (value < self.upper)
        message = "`Interval(value, lower, upper)` needs `lower` < `value` < `upper`"
        value = _require(value, inside, message, lower=self.lower, upper=self.upper)
        self.raw = jnp.log(value - self.lower) - jnp.log(self.upper - value)

    def unwrap(self) -> Float[Array, "..."]:
        share = jax.nn.sigmoid(self.raw)
        return self.lower * (1 - share) + self.upper * share


class Simplex(AbstractHyperparameter):
    """Non-negative weights that sum to one along the last axis. They unwrap to
    `softmax(raw)`."""

    raw: Float[Array, "... n"]

    def __init__(self, value: ArrayLike):
        """**Arguments:**

        - `value`: the starting weights, of shape `(..., n)`. Floating point.

        **Raises:** a `ValueError` unless all entries are above zero and sum to one
        along the last axis. The tolerance is the square root of the machine precision.
        """
        value = as_float("Simplex(value)", value)
        if value.ndim == 0:
            raise ValueError("`Simplex(value)` needs at least one axis; got a scalar.")
        total = jnp.sum(value, axis=-1, keepdims=True)
        tolerance = float(jnp.finfo(value.dtype).eps) ** 0.5
        valid = (value > 0) & (jnp.abs(total - 1) <= tolerance)
        message = "`Simplex(value)` needs entries > 0 that sum to one on the last axis"
        self.raw = jnp.log(_require(value, valid, message))

    def unwrap(self) -> Float[Array, "... n"]:
        return jax.nn.softmax(self.raw, axis=-1)


class Schedule(paramax.AbstractUnwrappable[Array]):
    r"""A hyperparameter that changes in the course of an episode. Inner step $t$ uses
    entry `t // every` of `value`. All steps after the last window use the last entry.
    The losses and `inner` see only this entry, without the leading axis. The validation
    loss sees the entry of the last inner step.

    ```python
    rate = hpo.Schedule(hpo.Positive(jnp.full(10, 0.1)), every=50)
    ```

    An episode begins with `init` and with each `restart`. An algorithm moves the
    entries of the windows that its hypergradient reaches. [`eqx_hpo.ForwardMode`][]
    moves all windows of the episode so far, [`eqx_hpo.Unrolled`][] moves those of its
    inner steps, and [`eqx_hpo.T1T2`][] moves the present one.

    ??? cite "Reference"

        Micaelli and Storkey, *Gradient-based Hyperparameter Optimization Over Long
        Horizons*, NeurIPS 2021 (hyperparameters shared by windows of steps).
    """

    value: AbstractHyperparameter | Float[Array, "windows ..."]
    every: int = eqx.field(static=True)

    def __init__(self, value: AbstractHyperparameter | ArrayLike, every: int):
        """**Arguments:**

        - `value`: a placeholder or a plain array, floating point, whose leading axis
            runs over the windows.
        - `every`: the number of consecutive inner steps that share an entry.

        **Raises:** a `ValueError` if `value` has no leading axis, or if `every` is not
        a positive integer.
        """
        if not isinstance(value, AbstractHyperparameter):
            value = as_float("Schedule(value)", value)
        shape = (
            value.raw.shape
            if isinstance(value, AbstractHyperparameter)
            else value.shape
        )
        axes = 2 if isinstance(value, Simplex) else 1
        if len(shape) < axes or shape[0] == 0:
            raise ValueError(
                "`Schedule(value, every)` needs a `value` with a leading axis over the "
                f"windows; got shape {shape}."
            )
        self.value = value
        self.every = as_int("every", every, 1)

    def unwrap(self) -> Float[Array, "windows ..."]:
        # By now `value` is a plain array: `paramax.unwrap` starts from within.
        return self.value  # pyright: ignore[reportReturnType]


def is_hyperparameter(x: Any) -> bool:
    """Tells whether `x` is a placeholder. Placeholders are [`eqx_hpo.Real`][],
    [`eqx_hpo.Positive`][], [`eqx_hpo.Interval`][], [`eqx_hpo.Simplex`][], the discrete
    ones, [`eqx_hpo.Schedule`][] and those that users define.

    **Arguments:**

    - `x`: any object. The function can also be passed as `is_leaf=`, to stop a tree map
        at placeholders.

    **Returns:** a `bool`.
    """
    return isinstance(x, (AbstractHyperparameter, Schedule))


def is_placeholder(x: Any) -> bool:
    """Tells whether `x` holds a `raw`. A tree map that stops here goes through a
    `Schedule` to the placeholder within."""
    return isinstance(x, AbstractHyperparameter)


def partition(
    model: Model, filter_spec: Any = is_hyperparameter
) -> tuple[Hyperparams, Model]:
    """Splits a model into its hyperparameters and the rest, as `eqx.partition` does.

    ```python
    hyperparams, model = hpo.partition(model)
    ```

    The loss puts the two together again by `eqx.combine(model, hyperparams)`.

    **Arguments:**

    - `model`: any pytree.
    - `filter_spec`: selects what to split off. It is a function of a leaf, for which a
        placeholder is a leaf, or a pytree of booleans that is a prefix of `model`. By
        default it selects all placeholders. A function of your own selects further
        leaves: the placeholders are split off in any case.

    **Returns:** `(hyperparams, rest)`. Both have the structure of `model`, with `None`
    where the other one holds a leaf.
    """
    # A tree of booleans in the form of an Equinox model is callable, but no function.
    if callable(filter_spec) and jtu.all_leaves([filter_spec]):
        selects = filter_spec
        filter_spec = lambda x: is_hyperparameter(x) or selects(x)
    else:
        _check_spec(filter_spec, model)
    return eqx.partition(model, filter_spec, is_leaf=is_hyperparameter)


def _check_spec(filter_spec: Any, model: Model) -> None:
    leaves = jtu.tree_leaves(filter_spec)
    valid = all(isinstance(x, bool) or callable(x) for x in leaves)
    try:
        jtu.tree_map(lambda *_: None, filter_spec, model)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            "`filter_spec` must be a function of a leaf, or a pytree of booleans that "
            f"is a prefix of `model`; got {shown(filter_spec)}."
        )


def unwrap(hyperparams: Hyperparams) -> Hyperparams:
    """Replaces each placeholder by its constrained value, as `paramax.unwrap` does.

    **Arguments:**

    - `hyperparams`: any pytree.

    **Returns:** the same pytree with plain arrays in place of placeholders.
    """
    return paramax.unwrap(hyperparams)


def unwrap_values(hyperparams: Hyperparams) -> Hyperparams:
    """Unwraps all placeholders except schedules. These stay as nodes and hold plain
    arrays."""
    is_leaf = lambda x: (
        isinstance(x, paramax.AbstractUnwrappable) and not isinstance(x, Schedule)
    )
    return jtu.tree_map(
        lambda x: paramax.unwrap(x) if is_leaf(x) else x, hyperparams, is_leaf=is_leaf
    )


def at_inner_step(hyperparams: Hyperparams, step: IntScalar) -> Hyperparams:
    """Replaces each schedule by the entry that inner step `step` of an episode uses."""

    def resolve(x):
        if not isinstance(x, Schedule):
            return x
        # An index behind the last entry stands for the last entry.
        return lax.dynamic_index_in_dim(x.value, step // x.every, keepdims=False)

    is_leaf = lambda x: isinstance(x, Schedule)
    return jtu.tree_map(resolve, hyperparams, is_leaf=is_leaf)


def partition_raw(hyperparams: Hyperparams) -> tuple[PyTree, PyTree]:
    """Splits hyperparameters into what the outer optimiser moves (`raw` of each
    placeholder and all other inexact arrays) and the constants."""
    return eqx.partition(hyperparams, _raw_spec(hyperparams))


def canonical(hyperparams: Hyperparams, name: str = "hyperparams") -> Hyperparams:
    """Turns Python and NumPy floats into arrays. Refuses leaves that have no gradient,
    and starting values that are not finite."""

    def convert(path, x):
        if isinstance(x, float):
            return jnp.asarray(x, jnp.result_type(float))
        wrong, shown = isinstance(x, (bool, int, complex, str)), repr(x)
        if is_array_or_numpy(x):
            wrong = not jnp.issubdtype(x.dtype, jnp.floating)
            shown = f"{x.dtype}{list(x.shape)}"
        if wrong:
            raise ValueError(
                f"`{name}{jtu.keystr(path)}` is {shown}, but a hyperparameter must be "
                "floating point to have a gradient. Make it a float, or take it out of "
                f"`{name}`."
            )
        return x

    check_leaves(name, hyperparams)
    converted = as_device_arrays(jtu.tree_map_with_path(convert, hyperparams))
    raw, _ = partition_raw(converted)
    for path, x in jtu.tree_leaves_with_path(raw):
        check_all(f"{name}{jtu.keystr(path)}", x, np.isfinite, "finite")
    return converted


def check_no_placeholders(model: Model) -> None:
    nodes = jtu.tree_leaves_with_path(model, is_leaf=is_hyperparameter)
    for path, node in nodes:
        if is_hyperparameter(node):
            raise ValueError(
                f"`model{jtu.keystr(path)}` is a {type(node).__name__} placeholder. "
                "Split the hyperparameters off first: `hyperparams, model = "
                "eqx_hpo.partition(model)`. (Or are `model` and `hyperparams` in the "
                "wrong order?)"
            )


def _raw_spec(hyperparams: Hyperparams) -> PyTree[bool]:
    constant = lambda x: isinstance(x, paramax.NonTrainable)

    def spec(x):
        if is_placeholder(x):
            nothing = jtu.tree_map(lambda _: False, x)
            return eqx.tree_at(lambda p: p.raw, nothing, True)
        return not constant(x) and eqx.is_inexact_array(x)

    is_leaf = lambda x: is_placeholder(x) or constant(x)
    return jtu.tree_map(spec, hyperparams, is_leaf=is_leaf)


def as_float(name: str, value: Any) -> Float[Array, "..."]:
    """Converts finite numbers to a floating-point array. An array of integers is
    refused, since any dtype for it would be a guess."""
    array = as_finite(name, float(value) if _is_whole(value) else value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` must be floating point; got dtype {array.dtype}. Make it a "
            "float."
        )
    dtype = jnp.result_type(float) if isinstance(value, float) else array.dtype
    return jnp.asarray(array, dtype)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _as_bound(name: str, bound: Any, value: Array) -> Array:
    array = as_finite(name, bound)
    try:
        fits = np.broadcast_shapes(array.shape, value.shape) == value.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` must broadcast to `value`, which has the shape {value.shape}; "
            f"its own is {array.shape}."
        )
    return array.astype(value.dtype)


def _require(
    value: Array, valid: Bool[Array, "..."], message: str, **bounds: Array
) -> Array:
    if isinstance(valid, Tracer):
        return eqx.error_if(value, ~valid, message + ".")
    if not np.all(valid):
        got = "".join(f", `{name}`={np.asarray(x)}" for name, x in bounds.items())
        raise ValueError(f"{message}; got `value`={np.asarray(value)}{got}.")
    return value
