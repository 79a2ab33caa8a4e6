"""Relaxed discrete hyperparameters. Their placeholders are tuned by gradient as
continuous values, and `discretise` makes them discrete at the end.

The random `noise` and the scheduled `temperature` are constants of the placeholder.
`refresh` renews them once before a step, and everything in the step sees the same
values.
"""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ._checks import as_finite, as_flag, as_int, as_number
from ._custom_types import Hyperparams, IntScalar, Key
from ._hyperparameter import (
    AbstractHyperparameter,
    as_float,
    Interval,
    is_placeholder,
    unwrap,
)


# A number, or a function of the step, as Optax's schedules are.
Temperature: TypeAlias = ArrayLike | Callable[[IntScalar], Any]


class AbstractDiscrete(AbstractHyperparameter):
    """A placeholder for discrete values. It unwraps to a relaxation of them."""

    @abc.abstractmethod
    def discretise(self) -> Float[Array, "..."]:
        """Returns the discrete value, in the shape and dtype of the relaxed one."""


class AbstractRelaxed(AbstractDiscrete):
    """A relaxation with a temperature. At temperature zero it is discrete. It has noise
    on `raw` if it is a random sample."""

    temperature: eqx.AbstractVar[Float[Array, ""]]
    noise: eqx.AbstractVar[Float[Array, "..."] | None]
    schedule: eqx.AbstractVar[Callable[[IntScalar], Any] | None]

    @abc.abstractmethod
    def sample_noise(self, key: PRNGKeyArray) -> Float[Array, "..."]:
        """Draws new noise, of the shape of `raw`."""


class Choice(AbstractRelaxed):
    r"""A choice of one among `n` options. It unwraps to weights that sum to one along
    the last axis,

    $$w = \mathrm{softmax}\Big( \frac{\text{raw} + \text{noise}}{\text{temperature}}
    \Big).$$

    Use the weights to mix the outputs of the options,
    `jnp.tensordot(w, outputs, axes=1)`, or to average their values,
    `w @ jnp.array([16.0, 32.0, 64.0])`. [`eqx_hpo.discretise`][] turns them into a one
    at the largest logit and zeros elsewhere.

    ??? cite "References"

        Liu et al., *DARTS: Differentiable Architecture Search*, ICLR 2019 (softmax).
        Jang et al., *Categorical Reparameterization with Gumbel-Softmax*, ICLR 2017;
        Maddison et al., *The Concrete Distribution*, ICLR 2017 (sampling). Bengio et
        al., arXiv:1308.3432 (straight-through).
    """

    raw: Float[Array, "... n"]
    temperature: Float[Array, ""]
    noise: Float[Array, "... n"] | None
    schedule: Callable[[IntScalar], Any] | None = eqx.field(static=True)
    straight_through: bool = eqx.field(static=True)

    def __init__(
        self,
        logits: ArrayLike,
        *,
        temperature: Temperature = 1.0,
        sample: bool = False,
        straight_through: bool = False,
    ):
        """**Arguments:**

        - `logits`: the starting logits, of shape `(..., n)`, floating point. The number
            `n` of options stands for equal weights.
        - `temperature`: the temperature, above zero. It is a number, or a function from
            the step (counted from 0) to a number, such as a schedule of Optax.
        - `sample`: whether to add Gumbel noise to the logits, with new noise for each
            step. The weights are then a sample of the relaxed categorical distribution.
            This needs the `key` of `step`.
        - `straight_through`: whether the weights are discrete already while training,
            with the derivative of the relaxed ones.

        **Raises:** a `ValueError` if `temperature` is not above zero, a logit is not
        finite, or there are no options.
        """
        if isinstance(logits, (int, np.integer)) and not isinstance(logits, bool):
            logits = jnp.zeros(as_int("Choice(logits)", logits, 1))
        self.raw = as_float("Choice(logits)", logits)
        if self.raw.ndim == 0:
            raise ValueError(
                "`Choice(logits)` needs an axis for the options; got a single number. "
                "Their number alone must be an integer."
            )
        self.temperature, self.schedule = _temperature(temperature, self.raw)
        self.noise = _no_noise(self.raw, sample)
        self.straight_through = as_flag("straight_through", straight_through)

    def unwrap(self) -> Float[Array, "... n"]:
        logits = self.raw if self.noise is None else self.raw + self.noise
        soft = jax.nn.softmax(logits / self.temperature, axis=-1)
        return _straight_through(_one_hot(logits), soft, self.straight_through)

    def discretise(self) -> Float[Array, "... n"]:
        return _one_hot(self.raw)

    def sample_noise(self, key: PRNGKeyArray) -> Float[Array, "... n"]:
        return jr.gumbel(key, self.raw.shape, self.raw.dtype)


class Switch(AbstractRelaxed):
    """A switch that is off or on. It unwraps to a number between 0 and 1,
    `sigmoid((raw + noise) / temperature)`. Multiply what it switches by this number.
    [`eqx_hpo.discretise`][] turns it into 1 if `raw` is above zero, else into 0. It is
    an [`eqx_hpo.Choice`][] with two options."""

    raw: Float[Array, "..."]
    temperature: Float[Array, ""]
    noise: Float[Array, "..."] | None
    schedule: Callable[[IntScalar], Any] | None = eqx.field(static=True)
    straight_through: bool = eqx.field(static=True)

    def __init__(
        self,
        logits: ArrayLike,
        *,
        temperature: Temperature = 1.0,
        sample: bool = False,
        straight_through: bool = False,
    ):
        """**Arguments:**

        - `logits`: the starting logits, of any shape, floating point. A logit above
            zero means on.
        - `temperature`, `sample`, `straight_through`: as for [`eqx_hpo.Choice`][], but
            with logistic noise.

        **Raises:** a `ValueError` if `temperature` is not above zero, or a logit is not
        finite.
        """
        self.raw = as_float("Switch(logits)", logits)
        self.temperature, self.schedule = _temperature(temperature, self.raw)
        self.noise = _no_noise(self.raw, sample)
        self.straight_through = as_flag("straight_through", straight_through)

    def unwrap(self) -> Float[Array, "..."]:
        logits = self.raw if self.noise is None else self.raw + self.noise
        soft = jax.nn.sigmoid(logits / self.temperature)
        hard = (logits > 0).astype(soft.dtype)
        return _straight_through(hard, soft, self.straight_through)

    def discretise(self) -> Float[Array, "..."]:
        return (self.raw > 0).astype(self.raw.dtype)

    def sample_noise(self, key: PRNGKeyArray) -> Float[Array, "..."]:
        return jr.logistic(key, self.raw.shape, self.raw.dtype)


class Integer(AbstractDiscrete):
    """A whole number in a range. It unwraps to a real number between `lower - 0.5` and
    `upper + 0.5`. [`eqx_hpo.discretise`][] rounds it."""

    raw: Float[Array, "..."]
    lower: Float[Array, "..."]
    upper: Float[Array, "..."]
    straight_through: bool = eqx.field(static=True)

    def __init__(
        self,
        value: ArrayLike,
        lower: int,
        upper: int,
        *,
        straight_through: bool = False,
    ):
        """**Arguments:**

        - `value`: the starting value, of any shape, from `lower` to `upper`.
        - `lower`, `upper`: the bounds, both included in the range.
        - `straight_through`: whether the number is rounded already while training, with
            the derivative of the real one.

        **Raises:** a `ValueError` unless `lower <= value <= upper` everywhere.
        """
        value = as_finite("Integer(value)", value)
        if jnp.issubdtype(value.dtype, jnp.integer):
            value = value.astype(jnp.result_type(float))
        lower, upper = as_int("lower", lower), as_int("upper", upper)
        try:
            interval = Interval(value, lower - 0.5, upper + 0.5)
        except ValueError as e:
            raise ValueError(
                "`Integer(value, lower, upper)` needs `lower` <= `value` <= `upper`; "
                f"got `value`={value}, `lower`={lower}, `upper`={upper}."
            ) from e
        self.raw, self.lower, self.upper = interval.raw, interval.lower, interval.upper
        self.straight_through = as_flag("straight_through", straight_through)

    def unwrap(self) -> Float[Array, "..."]:
        soft = self._real()
        return _straight_through(self.discretise(), soft, self.straight_through)

    def discretise(self) -> Float[Array, "..."]:
        # The bounds themselves are reached by rounding of the sigmoid.
        return jnp.clip(jnp.round(self._real()), self.lower + 0.5, self.upper - 0.5)

    def _real(self) -> Float[Array, "..."]:
        share = jax.nn.sigmoid(self.raw)
        return self.lower * (1 - share) + self.upper * share


def discretise(hyperparams: Hyperparams) -> Hyperparams:
    """Replaces each placeholder by its final value. A discrete one becomes a discrete
    value. Any other one is unwrapped, as by [`eqx_hpo.unwrap`][].

    **Arguments:**

    - `hyperparams`: any pytree.

    **Returns:** the same pytree with plain arrays in place of placeholders. They have
    the shapes and dtypes of the unwrapped values, so a loss takes both.
    """
    choose = lambda x: x.discretise() if isinstance(x, AbstractDiscrete) else x
    return unwrap(jtu.tree_map(choose, hyperparams, is_leaf=is_placeholder))


def has_discrete(hyperparams: Hyperparams) -> bool:
    nodes = jtu.tree_leaves(hyperparams, is_leaf=is_placeholder)
    return any(isinstance(x, AbstractDiscrete) for x in nodes)


def refresh(hyperparams: Hyperparams, key: Key, step: IntScalar) -> Hyperparams:
    """Renews noise and temperature. They depend only on the key and the step."""
    nodes, treedef = jtu.tree_flatten(hyperparams, is_leaf=is_placeholder)
    relaxed = [i for i, x in enumerate(nodes) if isinstance(x, AbstractRelaxed)]
    for number, i in enumerate(relaxed):
        node = nodes[i]
        if node.schedule is not None:
            temperature = jnp.asarray(node.schedule(step), node.temperature.dtype)
            node = eqx.tree_at(lambda x: x.temperature, node, temperature)
        if node.noise is not None:
            if key is None:
                raise ValueError(
                    f"`key` is missing: a `{type(node).__name__}(..., sample=True)` "
                    "is random. Pass `key=jax.random.key(...)`."
                )
            # The levels fold their own key with 0 and 1.
            noise_key = jr.fold_in(jr.fold_in(jr.fold_in(key, step), 2), number)
            noise = node.sample_noise(noise_key)
            node = eqx.tree_at(lambda x: x.noise, node, noise)
        nodes[i] = node
    return jtu.tree_unflatten(treedef, nodes)


def without_noise(hyperparams: Hyperparams) -> Hyperparams:
    """Removes the noise of all placeholders, for a report that is not random."""

    def silence(x):
        if not isinstance(x, AbstractRelaxed) or x.noise is None:
            return x
        return eqx.tree_at(lambda x: x.noise, x, jnp.zeros_like(x.noise))

    return jtu.tree_map(silence, hyperparams, is_leaf=is_placeholder)


def _temperature(temperature: Temperature, raw: Array):
    if callable(temperature):
        start = as_number("temperature(0)", temperature(jnp.array(0)), zero=False)
        return start.astype(raw.dtype), temperature
    return as_number("temperature", temperature, zero=False).astype(raw.dtype), None


def _no_noise(raw: Array, sample: bool) -> Array | None:
    return jnp.zeros_like(raw) if as_flag("sample", sample) else None


def _one_hot(logits: Float[Array, "... n"]) -> Float[Array, "... n"]:
    return jax.nn.one_hot(
        jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype
    )


def _straight_through(hard: Array, soft: Array, active: bool) -> Array:
    return hard + (soft - lax.stop_gradient(soft)) if active else soft
