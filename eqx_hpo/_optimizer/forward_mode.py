"""Exact hypergradients, by forward mode along the inner steps."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._custom_types import Batch, Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import tree_add, tree_zeros
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ReverseOverReverse
from .._sharding import whole_like
from .._state import Estimate, InnerState, Memory
from .base import AbstractAlgorithm


class ForwardMode(AbstractAlgorithm):
    r"""Computes, by forward mode, the exact hypergradient of all inner steps since the
    episode began. The state of the optimiser is differentiated too:

    $$Z_t = A_t Z_{t-1} + B_t, \qquad
    \frac{dC_2}{d\lambda} = \frac{\partial C_2}{\partial \lambda} + \alpha_t Z_t, \qquad
    A_t = \frac{\partial \Phi_t}{\partial \theta_{t-1}}, \quad
    B_t = \frac{\partial \Phi_t}{\partial \lambda}.$$

    The derivative $Z_t$ of the inner state is carried from call to call, until
    `restart`. So the horizon has no limit. Memory is $O(PH)$ and does not grow with the
    number of steps. The estimate is exact while the hyperparameters do not change. If
    they move at each call, earlier steps count as if they had been taken with the
    present hyperparameters.

    Use it for few hyperparameters: each of them costs about two training gradients for
    each inner step. It suits long schedules ([`eqx_hpo.Schedule`][]).

    ??? cite "References"

        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter
        Optimization*, ICML 2017 (forward mode). Micaelli and Storkey, *Gradient-based
        Hyperparameter Optimization Over Long Horizons*, NeurIPS 2021 (schedules).
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    inner_steps: int = eqx.field(static=True, kw_only=True, default=1)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    # A gradient without a rule of its own is what JAX can push forward.
    second_order: ClassVar[AbstractSecondOrder] = ReverseOverReverse()
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = False

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del batch
        size = sum(x.size for x in _numbers(hyperparams))
        zeros = lambda x: jnp.broadcast_to(jnp.zeros_like(x), (size, *x.shape))
        tangents = jtu.tree_map(zeros, eqx.filter(inner, eqx.is_inexact_array))
        return Memory(episode=tangents)

    def init_diagnostics(self) -> None:
        return None

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        # The scan carries the last report, and needs its structure beforehand.
        empty = eqx.filter_eval_shape(
            levels.evaluate, inner, hyperparams, jnp.zeros((), int)
        )

        def advance(carry, _):
            inner, tangents, _, index = carry
            update = lambda inner, hyperparams: levels.update(inner, hyperparams, index)
            inner, tangents, report = _push_forward(
                update, inner, hyperparams, tangents
            )
            return (inner, tangents, report, index + 1), None

        # The index is carried: an array of them would grow with the steps.
        carry = (inner, memory.episode, tree_zeros(empty), jnp.zeros((), int))
        (inner, tangents, train, _), _ = lax.scan(
            advance, carry, length=self.inner_steps, unroll=levels.unroll
        )
        last = jnp.asarray(self.inner_steps - 1)
        val, alpha, direct = levels.validation_gradient(inner, hyperparams, last)
        indirect = _contract(alpha, (tangents.params, tangents.model_state))
        total = tree_add(direct, _unravel(indirect, hyperparams))
        return Estimate(inner, Memory(episode=tangents), total, train, val)


ForwardMode.__init__.__doc__ = """**Arguments:** those of
[`eqx_hpo.AbstractAlgorithm`][], without `second_order`.
"""


def _push_forward(update: Any, inner: InnerState, hyperparams: Any, tangents: Any):
    """Updates the inner state and its derivatives. `tangents` has a leading axis over
    the numbers in `hyperparams`."""
    arrays, fixed = eqx.partition(inner, eqx.is_inexact_array)
    numbers, rest = eqx.partition(hyperparams, eqx.is_inexact_array)

    def fn(arrays, numbers):
        new, report = update(eqx.combine(arrays, fixed), eqx.combine(numbers, rest))
        new_arrays, new_fixed = eqx.partition(new, eqx.is_inexact_array)
        return new_arrays, (new_fixed, report)

    def push(tangent, unit):
        return jax.jvp(fn, (arrays, numbers), (tangent, unit), has_aux=True)

    # The new state is the same for all tangents, so only these are mapped.
    arrays, tangents, (fixed, report) = jax.vmap(push, out_axes=(None, 0, None))(
        tangents, _units(hyperparams)
    )
    return eqx.combine(arrays, fixed), tangents, report


def _numbers(hyperparams: Hyperparams) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(hyperparams, eqx.is_inexact_array))


def _units(hyperparams: Hyperparams) -> PyTree:
    """Makes the unit vectors in the space of the hyperparameters, along a leading
    axis."""
    size = sum(x.size for x in _numbers(hyperparams))
    return _unravel(jnp.eye(size), hyperparams)


def _unravel(vector: Float[Array, "... size"], like: Hyperparams) -> Hyperparams:
    """Cuts the last axis into the inexact arrays of `like`."""
    arrays, treedef = jtu.tree_flatten(eqx.filter(like, eqx.is_inexact_array))
    ends = [sum(x.size for x in arrays[: i + 1]) for i in range(len(arrays) - 1)]
    parts = jnp.split(vector, ends, axis=-1)
    batch = vector.shape[:-1]
    shape = lambda part, x: part.reshape(*batch, *x.shape).astype(x.dtype)
    return jtu.tree_unflatten(treedef, [shape(p, x) for p, x in zip(parts, arrays)])


def _contract(alpha: PyTree, tangents: PyTree) -> Float[Array, " size"]:
    """Computes the inner product of a cotangent with each of the tangents."""
    dtype = jnp.result_type(float)

    def dot(a, z):
        # Complex numbers pair by the real part of their product.
        products = jnp.tensordot(z, a, axes=a.ndim, out_sharding=whole_like(a))
        return jnp.real(products).astype(dtype)

    pairs = zip(jtu.tree_leaves(alpha), jtu.tree_leaves(tangents), strict=True)
    return sum((dot(a, z) for a, z in pairs), start=jnp.zeros((), dtype))
