"""Exact hypergradients, by forward mode along the inner steps."""

import dataclasses
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
from .._misc import tree_add, tree_fix
from .._problem import Problem
from .._second_order import (
    AbstractSecondOrder,
    ForwardOverReverse,
    ReverseOverReverse,
    square_underflows,
)
from .._state import Estimate, InnerState, Memory
from .._windows import at_step
from .base import AbstractBilevelOptimizer
from .checks import check_positive_int


class ForwardMode(AbstractBilevelOptimizer):
    r"""The exact hypergradient of all inner steps since the episode began, optimiser
    state included, by forward mode:

    $$Z_t = A_t Z_{t-1} + B_t, \qquad
    \frac{dC_2}{d\lambda} = \frac{\partial C_2}{\partial \lambda} + \alpha_t Z_t, \qquad
    A_t = \frac{\partial \Phi_t}{\partial \theta_{t-1}}, \quad
    B_t = \frac{\partial \Phi_t}{\partial \lambda}.$$

    The derivative $Z_t$ of the inner state is carried from call to call, until
    `restart`. So the horizon has no limit, and memory, $O(PH)$, does not grow with the
    number of steps; nor does any approximation come in, as long as the hyperparameters
    stay where they are. Where they move at each call, the steps before count as if they
    had been taken with the present hyperparameters.

    For few hyperparameters: each costs about two training gradients for each inner
    step. With `sharing`, hyperparameters follow a schedule.

    ??? cite "References"

        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter
        Optimization*, ICML 2017 (forward mode). Micaelli and Storkey, *Gradient-based
        Hyperparameter Optimization Over Long Horizons*, NeurIPS 2021 (sharing).
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    inner_steps: int = eqx.field(static=True, kw_only=True, default=1)
    sharing: int | None = eqx.field(static=True, kw_only=True, default=None)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = False
    tasks: ClassVar[None] = None

    def __check_init__(self):
        if self.sharing is not None:
            check_positive_int("sharing", self.sharing)

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del batch
        size = sum(x.size for x in _numbers(hyperparams))
        zeros = lambda x: jnp.zeros((size, *x.shape), x.dtype)
        tangents = jtu.tree_map(zeros, eqx.filter(inner, eqx.is_inexact_array))
        return Memory(episode=(tangents, jnp.zeros((), int)))

    def init_diagnostics(self) -> None:
        return None

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        tangents, elapsed = memory.episode
        levels = dataclasses.replace(levels, second_order=ReverseOverReverse())
        at = lambda hyperparams, step: at_step(hyperparams, self.sharing, step)
        report = levels.empty_report(inner, at(hyperparams, elapsed))

        def advance(carry, _):
            inner, tangents, _, index = carry
            update = lambda inner, hyperparams: _update(
                levels, inner, at(hyperparams, elapsed + index), index
            )
            inner, tangents, report = _push_forward(
                update, inner, hyperparams, tangents
            )
            return (inner, tangents, report, index + 1), None

        # The index is carried: an array of them would grow with the steps.
        carry = (inner, tangents, report, jnp.zeros((), int))
        (inner, tangents, report, _), _ = lax.scan(
            advance, carry, length=self.inner_steps, unroll=levels.unroll
        )
        last = jnp.asarray(self.inner_steps - 1)
        present, pullback = eqx.filter_vjp(lambda x: at(x, elapsed + last), hyperparams)
        val, alpha, direct = levels.validation_gradient(inner, present, last)
        (direct,) = pullback(direct)
        indirect = _contract(alpha, (tangents.params, tangents.model_state))
        total = tree_add(direct, _unravel(indirect, hyperparams))
        memory = Memory(episode=(tangents, elapsed + self.inner_steps))
        return Estimate(inner, memory, total, report, val)


ForwardMode.__init__.__doc__ = """**Arguments:** those of
[`eqx_hpo.AbstractBilevelOptimizer`][]; `second_order` is not used. And

- `sharing`: how many inner steps in a row use the same hyperparameters, if these are a
    schedule. Then each array in `hyperparams` has a leading axis over the windows, and
    the losses and `inner` get the hyperparameters of the window that the step is in,
    without that axis. Steps after the last window go on with its values, and the
    validation loss gets those of the last step. Starts anew at each `restart`.
"""


def _update(levels: Levels, inner: InnerState, hyperparams: Hyperparams, index: Any):
    """`levels.update`, for forward mode.

    Where all training gradients of a parameter were zero, Adam's square root has an
    infinite slope, and the chain rule gives 0 * inf = NaN though the parameter does not
    move. Its derivative is then that with the gradient held fixed.
    """
    gradient, model_state, report = levels.gradient(inner, hyperparams, index)
    if levels.moves_linearly(inner, hyperparams):
        return levels.apply(gradient, inner, hyperparams, model_state), report
    fixed_gradient = tree_fix(gradient)
    slopes = _slopes(levels, fixed_gradient, inner, hyperparams, model_state)
    dead = jtu.tree_map(
        lambda g, s: square_underflows(g) & ~jnp.isfinite(s), fixed_gradient, slopes
    )
    choose = lambda x, y: jtu.tree_map(jnp.where, dead, x, y)
    alive = choose(fixed_gradient, gradient)
    new = levels.apply(alive, inner, hyperparams, model_state)
    held = dataclasses.replace(inner, opt_state=tree_fix(inner.opt_state))
    still = levels.apply(fixed_gradient, held, hyperparams, model_state)
    params = choose(still.params, new.params)
    return dataclasses.replace(new, params=params), report


def _slopes(levels, gradient, inner, hyperparams, model_state) -> PyTree:
    """How the parameters move with the training gradient, all of it at once."""
    inner, hyperparams = tree_fix((inner, hyperparams))
    move = lambda x: levels.apply(x, inner, hyperparams, model_state).params
    ones = jtu.tree_map(jnp.ones_like, gradient)
    return jax.jvp(move, (gradient,), (ones,))[1]


def _push_forward(update: Any, inner: InnerState, hyperparams: Any, tangents: Any):
    """An update of the inner state, and of its derivatives: `tangents` has a leading
    axis over the numbers in `hyperparams`."""
    arrays, fixed = eqx.partition(inner, eqx.is_inexact_array)
    numbers, rest = eqx.partition(hyperparams, eqx.is_inexact_array)

    def fn(arrays, numbers):
        new, report = update(eqx.combine(arrays, fixed), eqx.combine(numbers, rest))
        new_arrays, new_fixed = eqx.partition(new, eqx.is_inexact_array)
        return new_arrays, (new_fixed, report)

    def push(tangent, unit):
        return jax.jvp(fn, (arrays, numbers), (tangent, unit), has_aux=True)

    arrays, tangents, (fixed, report) = jax.vmap(push, out_axes=(None, 0, None))(
        tangents, _units(hyperparams)
    )
    return eqx.combine(arrays, fixed), tangents, report


def _numbers(hyperparams: Hyperparams) -> list[Array]:
    return jtu.tree_leaves(eqx.filter(hyperparams, eqx.is_inexact_array))


def _units(hyperparams: Hyperparams) -> PyTree:
    """The unit vectors of the space of the hyperparameters, on a leading axis."""
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
    """The inner product of a cotangent with each of the tangents."""
    dtype = jnp.result_type(float)

    def dot(a, z):
        return (z.reshape(len(z), a.size) @ a.reshape(a.size)).astype(dtype)

    pairs = zip(jtu.tree_leaves(alpha), jtu.tree_leaves(tangents), strict=True)
    return sum((dot(a, z) for a, z in pairs), start=jnp.zeros((), dtype))
