"""Hyperparameters: placeholders for constrained values, and how they are split off.

A placeholder holds an unconstrained array `raw`, which the outer optimiser moves, and
unwraps to the constrained value that the losses see. Everything else in it (bounds) is
constant.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import paramax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ._custom_types import Hyperparams, Model
from ._misc import as_device_arrays, is_array_or_numpy


class AbstractHyperparameter(paramax.AbstractUnwrappable[Array]):
    """A placeholder for one hyperparameter array.

    A new constraint is a subclass with a field `raw` and a method `unwrap`.
    """

    raw: eqx.AbstractVar[Float[Array, "..."]]

    @abc.abstractmethod
    def unwrap(self) -> Float[Array, "..."]:
        """The constrained value, of the shape of `raw`."""


class Real(AbstractHyperparameter):
    """A hyperparameter without a constraint: unwraps to `raw` itself.

    Its use is to mark an array inside a model as a hyperparameter, so that
    [`eqx_hpo.partition`][] finds it.
    """

    raw: Float[Array, "..."]

    def __init__(self, value: ArrayLike):
        """**Arguments:**

        - `value`: the starting value, of any shape. Floating point.
        """
        self.raw = as_float(value, "Real")

    def unwrap(self) -> Float[Array, "..."]:
        return self.raw


class Positive(AbstractHyperparameter):
    """A hyperparameter above zero: unwraps to `exp(raw)`.

    The right choice for everything that is tuned by its order of magnitude: weight
    decay, noise levels, learning rates, length scales.
    """

    raw: Float[Array, "..."]

    def __init__(self, value: ArrayLike):
        """**Arguments:**

        - `value`: the starting value, of any shape. Floating point, above zero.

        **Raises:** a `ValueError` if an entry is not above zero.
        """
        value = as_float(value, "Positive")
        value = _require(value, value > 0, "`Positive(value)` needs `value` > 0")
        self.raw = jnp.log(value)

    def unwrap(self) -> Float[Array, "..."]:
        return jnp.exp(self.raw)


class Interval(AbstractHyperparameter):
    """A hyperparameter between two bounds: unwraps to
    `lower + (upper - lower) * sigmoid(raw)`. The bounds are constants."""

    raw: Float[Array, "..."]
    lower: Float[Array, "..."]
    upper: Float[Array, "..."]

    def __init__(self, value: ArrayLike, lower: ArrayLike, upper: ArrayLike):
        """**Arguments:**

        - `value`: the starting value, of any shape. Floating point.
        - `lower`: the lower bound, broadcastable to `value`.
        - `upper`: the upper bound, broadcastable to `value`.

        **Raises:** a `ValueError` unless `lower < value < upper` everywhere. A value
        on a bound has no finite `raw` and no gradient.
        """
        value = as_float(value, "Interval")
        self.lower = jnp.asarray(lower, value.dtype)
        self.upper = jnp.asarray(upper, value.dtype)
        inside = (value > self.lower) & (value < self.upper)
        message = "`Interval(value, lower, upper)` needs `lower` < `value` < `upper`"
        value = _require(value, inside, message, lower=self.lower, upper=self.upper)
        self.raw = jnp.log(value - self.lower) - jnp.log(self.upper - value)

    def unwrap(self) -> Float[Array, "..."]:
        share = jax.nn.sigmoid(self.raw)
        return self.lower * (1 - share) + self.upper * share


class Simplex(AbstractHyperparameter):
    """Non-negative weights that sum to one along the last axis: unwraps to
    `softmax(raw)`."""

    raw: Float[Array, "... n"]

    def __init__(self, value: ArrayLike):
        """**Arguments:**

        - `value`: the starting weights, of shape `(..., n)`. Floating point.

        **Raises:** a `ValueError` unless all entries are above zero and sum to one
        along the last axis, to the square root of the machine precision.
        """
        value = as_float(value, "Simplex")
        if value.ndim == 0:
            raise ValueError("`Simplex(value)` needs at least one axis; got a scalar.")
        total = jnp.sum(value, axis=-1, keepdims=True)
        tolerance = float(jnp.finfo(value.dtype).eps) ** 0.5
        valid = (value > 0) & (jnp.abs(total - 1) <= tolerance)
        message = "`Simplex(value)` needs entries > 0 that sum to one on the last axis"
        self.raw = jnp.log(_require(value, valid, message))

    def unwrap(self) -> Float[Array, "... n"]:
        return jax.nn.softmax(self.raw, axis=-1)


def is_hyperparameter(x: Any) -> bool:
    """Whether `x` is a placeholder: [`eqx_hpo.Real`][], [`eqx_hpo.Positive`][],
    [`eqx_hpo.Interval`][], [`eqx_hpo.Simplex`][] or a user's own.

    **Arguments:**

    - `x`: any object. Use it as `is_leaf=` too, so that a tree map stops there.

    **Returns:** a `bool`.
    """
    return isinstance(x, AbstractHyperparameter)


def partition(
    model: Model, filter_spec: Any = is_hyperparameter
) -> tuple[Hyperparams, Model]:
    """Splits a model into its hyperparameters and the rest, as `eqx.partition` does.

    ```python
    hyperparams, model = hpo.partition(model)
    ```

    The loss puts them together again by `eqx.combine(model, hyperparams)`.

    **Arguments:**

    - `model`: any pytree.
    - `filter_spec`: what to split off: a function of a leaf, for which a placeholder
        is a leaf, or a pytree of booleans that is a prefix of `model`. By default all
        placeholders. With another function the placeholders are split off as well.

    **Returns:** `(hyperparams, rest)`, both of the structure of `model`, with `None`
    in place of what the other one holds.
    """
    # An Equinox model is callable too: a tree of booleans in its form is no function.
    if callable(filter_spec) and jtu.all_leaves([filter_spec]):
        selects = filter_spec
        filter_spec = lambda x: is_hyperparameter(x) or selects(x)
    return eqx.partition(model, filter_spec, is_leaf=is_hyperparameter)


def unwrap(hyperparams: Hyperparams) -> Hyperparams:
    """Replaces each placeholder by its constrained value; see `paramax.unwrap`.

    **Arguments:**

    - `hyperparams`: any pytree.

    **Returns:** the same pytree with plain arrays in place of placeholders.
    """
    return paramax.unwrap(hyperparams)


def partition_raw(hyperparams: Hyperparams) -> tuple[PyTree, PyTree]:
    """Splits hyperparameters into what the outer optimiser moves (`raw` of each
    placeholder and all other inexact arrays) and the constants."""
    return eqx.partition(hyperparams, _raw_spec(hyperparams))


def canonical(hyperparams: Hyperparams) -> Hyperparams:
    """Turns Python and NumPy floats into arrays and refuses what has no gradient."""

    def convert(path, x):
        if isinstance(x, float):
            return jnp.asarray(x, jnp.result_type(float))
        wrong, shown = isinstance(x, (bool, int, str)), repr(x)
        if is_array_or_numpy(x):
            wrong = not jnp.issubdtype(x.dtype, jnp.floating)
            shown = f"{x.dtype}{list(x.shape)}"
        if wrong:
            raise ValueError(
                f"`hyperparams{jtu.keystr(path)}` is {shown}, but a hyperparameter "
                "must be floating point to have a gradient. Make it a float, or take "
                "it out of `hyperparams`."
            )
        return x

    return as_device_arrays(jtu.tree_map_with_path(convert, hyperparams))


def _raw_spec(hyperparams: Hyperparams) -> PyTree[bool]:
    constant = lambda x: isinstance(x, paramax.NonTrainable)

    def spec(x):
        if is_hyperparameter(x):
            nothing = jtu.tree_map(lambda _: False, x)
            return eqx.tree_at(lambda p: p.raw, nothing, True)
        return not constant(x) and eqx.is_inexact_array(x)

    is_leaf = lambda x: is_hyperparameter(x) or constant(x)
    return jtu.tree_map(spec, hyperparams, is_leaf=is_leaf)


def as_float(value: ArrayLike, name: str) -> Float[Array, "..."]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    dtype = jnp.result_type(float) if isinstance(value, float) else None
    array = jnp.asarray(value, dtype)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"`{name}(value)` must be floating point; got dtype {array.dtype}. Make it "
            "a float."
        )
    return array


def _require(
    value: Array, valid: Bool[Array, "..."], message: str, **bounds: Array
) -> Array:
    if isinstance(valid, Tracer):
        return eqx.error_if(value, ~valid, message + ".")
    if not np.all(valid):
        got = "".join(f", `{name}`={np.asarray(x)}" for name, x in bounds.items())
        raise ValueError(f"{message}; got `value`={np.asarray(value)}{got}.")
    return value
