"""Non-smooth penalties on hyperparameters, by proximal steps."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int

from .._checks import as_finite, as_int, as_number, as_real, check_all, check_type
from .constrain import as_selector, check_parts, replace_moved, Where


class ProximalState(NamedTuple):
    """Holds the number of updates so far, which a schedule takes."""

    step: Int[Array, ""]


class AbstractPenalty(eqx.Module):
    """A convex function $h$ of an array, which need not be smooth."""

    @abc.abstractmethod
    def value(self, x: Float[Array, "..."]) -> Float[Array, ""]:
        """Computes $h(x)$."""

    @abc.abstractmethod
    def prox(self, x: Float[Array, "..."], step: ArrayLike) -> Float[Array, "..."]:
        r"""Computes the proximal operator, $\arg\min_z h(z) + \frac{1}{2\,\text{step}}
        \lVert z - x \rVert^2$."""


class L1(AbstractPenalty):
    r"""The penalty $s \lVert x \rVert_1$. Its proximal operator is the soft threshold,
    which sets small entries exactly to zero."""

    strength: ArrayLike

    def __check_init__(self):
        _check_strength("strength", self.strength)

    def value(self, x: Float[Array, "..."]) -> Float[Array, ""]:
        return jnp.sum(self.strength * jnp.abs(x))

    def prox(self, x: Float[Array, "..."], step: ArrayLike) -> Float[Array, "..."]:
        return _soft_threshold(x, step * jnp.asarray(self.strength, x.dtype))


L1.__init__.__doc__ = """**Arguments:**

- `strength`: the strength $s$, at least zero. It is a number, or an array that
    broadcasts to $x$.

**Raises:** a `ValueError` if it is below zero or not finite.
"""


class ElasticNet(AbstractPenalty):
    r"""The penalty $s_1 \lVert x \rVert_1 + \frac{s_2}{2} \lVert x \rVert_2^2$."""

    l1: ArrayLike
    l2: ArrayLike

    def __check_init__(self):
        _check_strength("l1", self.l1)
        _check_strength("l2", self.l2)

    def value(self, x: Float[Array, "..."]) -> Float[Array, ""]:
        return jnp.sum(self.l1 * jnp.abs(x) + 0.5 * self.l2 * jnp.square(x))

    def prox(self, x: Float[Array, "..."], step: ArrayLike) -> Float[Array, "..."]:
        shrunk = _soft_threshold(x, step * jnp.asarray(self.l1, x.dtype))
        return shrunk / (1 + step * jnp.asarray(self.l2, x.dtype))


ElasticNet.__init__.__doc__ = """**Arguments:**

- `l1`, `l2`: the strengths $s_1$ and $s_2$, at least zero. They are numbers, or arrays
    that broadcast to $x$.

**Raises:** a `ValueError` if one is below zero or not finite.
"""


class GroupLasso(AbstractPenalty):
    r"""The penalty $s \sum_g \lVert x_g \rVert_2$. A group runs along `axis`, or is the
    whole array if `axis` is `None`. Small groups become exactly zero."""

    strength: ArrayLike
    axis: int | None = eqx.field(
        static=True,
        default=None,
        converter=lambda x: None if x is None else as_int("axis", x),
    )

    def __check_init__(self):
        _check_strength("strength", self.strength)

    def value(self, x: Float[Array, "..."]) -> Float[Array, ""]:
        return jnp.sum(self.strength * jnp.linalg.vector_norm(x, axis=self.axis))

    def prox(self, x: Float[Array, "..."], step: ArrayLike) -> Float[Array, "..."]:
        norm = jnp.linalg.vector_norm(x, axis=self.axis, keepdims=True)
        threshold = step * jnp.asarray(self.strength, x.dtype)
        safe = jnp.where(norm > 0, norm, 1)
        return jnp.where(norm > threshold, x * (1 - threshold / safe), 0)


GroupLasso.__init__.__doc__ = """**Arguments:**

- `strength`: the strength $s$, at least zero.
- `axis`: the axis along which a group runs; `None` for the whole array.

**Raises:** a `ValueError` if `strength` is below zero or not finite.
"""


class Box(AbstractPenalty):
    """A penalty that is zero from `lower` to `upper` and infinite elsewhere. Its
    proximal operator clips."""

    lower: ArrayLike
    upper: ArrayLike

    def __check_init__(self):
        bounds = as_real("lower", self.lower), as_real("upper", self.upper)
        for name, bound in zip(("lower", "upper"), bounds):
            check_all(name, bound, lambda x: ~np.isnan(x), "a number")
        concrete = not any(isinstance(x, Tracer) for x in bounds)
        if concrete and np.any(np.asarray(bounds[0]) > np.asarray(bounds[1])):
            raise ValueError(
                "`Box(lower, upper)` needs `lower` <= `upper`; got "
                f"{self.lower} and {self.upper}."
            )

    def value(self, x: Float[Array, "..."]) -> Float[Array, ""]:
        inside = jnp.all((x >= self.lower) & (x <= self.upper))
        return jnp.where(inside, jnp.zeros((), x.dtype), jnp.inf)

    def prox(self, x: Float[Array, "..."], step: ArrayLike) -> Float[Array, "..."]:
        del step
        return jnp.clip(x, self.lower, self.upper)


Box.__init__.__doc__ = """**Arguments:**

- `lower`, `upper`: the bounds, as numbers or as arrays that broadcast to $x$. An
    infinite bound leaves its side open.

**Raises:** a `ValueError` if a lower bound is above the upper one.
"""


def proximal(
    penalty: AbstractPenalty,
    learning_rate: float | Callable[[Array], Any],
    *,
    where: Where = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a penalty to the objective of the outer level, by a proximal step after
    each update: $\lambda \leftarrow \mathrm{prox}_{\eta h}(\lambda + u)$. Place this
    last in `optax.chain`. With an L1 penalty, hyperparameters that are not worth their
    penalty become exactly zero. A gradient step on the penalty never achieves this.

    ```python
    sparse = hpo.proximal(hpo.L1(0.01), learning_rate=0.1)
    outer = optax.chain(optax.sgd(0.1), sparse)
    ```

    **Arguments:**

    - `penalty`: [`eqx_hpo.L1`][], [`eqx_hpo.ElasticNet`][], [`eqx_hpo.GroupLasso`][],
        [`eqx_hpo.Box`][], or any [`eqx_hpo.AbstractPenalty`][].
    - `learning_rate`: the rate $\eta$, above zero. It is a number, or a function from
        the number of updates so far to a number. For the strength to have its true
        meaning, $\eta$ must be the length of the step that the optimiser before it
        takes along a constant gradient of one. For `optax.sgd` this is its learning
        rate, divided by `1 - momentum` if there is momentum. After Adam, whose steps do
        not grow with the gradient, the strength is relative to the size of the
        gradient.
    - `where`: as for [`eqx_hpo.project`][]. The penalty applies to each array
        separately.

    **Returns:** an `optax.GradientTransformationExtraArgs`.

    **Raises:** a `ValueError` if `learning_rate` is not above zero, or if `where`
    selects a placeholder other than [`eqx_hpo.Real`][].

    ??? cite "Reference"

        Parikh and Boyd, *Proximal Algorithms*, Foundations and Trends in Optimization,
        2014.
    """
    what = "an `eqx_hpo.AbstractPenalty`, such as `eqx_hpo.L1(0.1)`"
    check_type("penalty", penalty, AbstractPenalty, what)
    if not callable(learning_rate):
        as_number("learning_rate", learning_rate, zero=False)
    select = as_selector(where)

    def init(params):
        check_parts(select(params), "proximal")
        return ProximalState(jnp.zeros((), int))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        rate = learning_rate
        rate = rate(state.step) if callable(rate) else rate

        def step(old, moved):
            del old
            prox = lambda x: penalty.prox(x, jnp.asarray(rate, x.dtype))
            return jtu.tree_map(prox, moved)

        updates = replace_moved(step, "proximal", select, updates, params)
        return updates, ProximalState(state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _soft_threshold(x: Array, threshold: ArrayLike) -> Array:
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def _check_strength(name: str, value: Any) -> None:
    array = as_finite(name, value)
    check_all(name, array, lambda x: x >= 0, "a number of at least zero")
