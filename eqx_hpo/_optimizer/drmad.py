"""Reverse mode along the straight line from the first to the last weights. The
trajectory is never stored."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import PyTree

from .._custom_types import (
    FloatScalar,
    Hyperparams,
    InnerOptimiser,
    IntScalar,
    Through,
)
from .._levels import Levels
from .._misc import tree_add, tree_zeros
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._state import Estimate, InnerState, Memory
from .memoryless import AbstractMemoryless


class DrMAD(AbstractMemoryless):
    r"""Runs reverse mode through `inner_steps` steps, as [`eqx_hpo.Unrolled`][] does,
    but at points of the line

    $$\hat\theta_t = \Big(1 - \frac{t}{K}\Big) \theta_0 + \frac{t}{K} \theta_K$$

    in place of the weights $\theta_t$ of the training. Only the first and the last
    inner state are held. So memory is $O(P + H)$ for any number of steps. The states of
    the optimiser and of the model are also taken on the line. Their counters, flags and
    keys are the exception: these are stored for each step.

    Each inner step costs a training gradient on the way there. On the way back it costs
    another one, with a second-order product. The estimate is exact if training moves
    straight ahead at a constant pace, or if the second derivatives of the train loss
    are constant.

    ??? cite "Reference"

        Fu et al., *DrMAD: Distilling Reverse-Mode Automatic Differentiation for
        Optimizing Hyperparameters of Deep Neural Networks*, IJCAI 2016.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    inner_steps: int = eqx.field(static=True, kw_only=True)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = False

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        steps = self.inner_steps
        end, point, train = run_on_line(levels, inner, hyperparams, steps)
        last = jnp.asarray(steps - 1)
        val, alpha, direct = levels.validation_gradient(end, hyperparams, last)

        def back(carry, _):
            index, cotangent, total = carry
            cotangent, product = pull_back(
                levels, point(index), hyperparams, cotangent, index
            )
            return (index - 1, cotangent, tree_add(total, product)), None

        # The index is carried: an array of them would grow with the steps.
        carry = (last, end_cotangent(end, alpha), direct)
        (_, _, total), _ = lax.scan(back, carry, length=steps, unroll=levels.unroll)
        return Estimate(end, memory, total, train, val)


DrMAD.__init__.__doc__ = """**Arguments:** those of
[`eqx_hpo.AbstractAlgorithm`][].
"""


def run_on_line(
    levels: Levels, first: InnerState, hyperparams: Hyperparams, steps: int
) -> tuple[InnerState, Callable[[IntScalar], InnerState], tuple[FloatScalar, Any]]:
    """Takes the inner steps 0 to `steps - 1` of this call.

    **Returns:** the inner state after these steps, a function from the index of a step
    to the point on the line before it, and the report of the last step.
    """

    def step(carry, _):
        state, _, index = carry
        # What is no real number (a counter that starts over, a flag, a key) has no
        # place on a line.
        discrete = eqx.filter(state, eqx.is_inexact_array, inverse=True)
        state, report = levels.update(state, hyperparams, index)
        return (state, report, index + 1), discrete

    zero = jnp.zeros((), int)
    # The scan carries the last report, and needs its structure beforehand.
    empty = eqx.filter_eval_shape(levels.evaluate, first, hyperparams, zero)
    carry = (first, tree_zeros(empty), zero)
    (last, report, _), discrete = lax.scan(
        step, carry, length=steps, unroll=levels.unroll
    )
    start, end = eqx.filter((first, last), eqx.is_inexact_array)

    def point(index):
        def interpolate(x, y):
            share = (index / steps).astype(x.dtype)
            return (1 - share) * x + share * y

        at_index = lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False)
        line = jtu.tree_map(interpolate, start, end)
        return eqx.combine(line, jtu.tree_map(at_index, discrete))

    return last, point, report


def end_cotangent(end: InnerState, alpha: tuple[PyTree, PyTree]) -> InnerState:
    """Makes the cotangent of the last inner state. The validation loss depends on the
    weights and on the model's state, but not on the optimiser's state."""
    params, model_state = alpha
    opt_state = eqx.filter(end.opt_state, eqx.is_inexact_array)
    return InnerState(params, jtu.tree_map(jnp.zeros_like, opt_state), model_state)


def pull_back(
    levels: Levels,
    inner: InnerState,
    hyperparams: Hyperparams,
    cotangent: InnerState,
    index: IntScalar,
) -> tuple[InnerState, Hyperparams]:
    """Computes the products $a A_t$ and $a B_t$ for a cotangent $a$ of the inner state
    after step `index`. The two derivatives of this step are taken at `inner`."""
    _, pullback, _ = linearise_update(levels, inner, hyperparams, index)
    return pullback(cotangent)


def linearise_update(
    levels: Levels, inner: InnerState, hyperparams: Hyperparams, index: IntScalar
) -> tuple[
    InnerState,
    Callable[[InnerState], tuple[InnerState, Hyperparams]],
    tuple[FloatScalar, Any],
]:
    """Takes inner step `index` from `inner`.

    **Returns:** the new inner state, a function from a cotangent $a$ of it to $a A_t$
    and $a B_t$, and the report of the step.
    """
    arrays, rest = eqx.partition(inner, eqx.is_inexact_array)

    def update(arrays, hyperparams):
        new, report = levels.update(eqx.combine(arrays, rest), hyperparams, index)
        moved, fixed = eqx.partition(new, eqx.is_inexact_array)
        return moved, (fixed, report)

    moved, pullback, (fixed, report) = eqx.filter_vjp(
        update, arrays, hyperparams, has_aux=True
    )
    return eqx.combine(moved, fixed), pullback, report
