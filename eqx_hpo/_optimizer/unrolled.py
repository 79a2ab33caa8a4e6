"""Exact hypergradients, by reverse mode through the inner steps."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._custom_types import Checkpoint, Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import tree_add
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._state import Estimate, InnerState, Memory
from .checks import check_positive_int
from .memoryless import AbstractMemoryless


class Unrolled(AbstractMemoryless):
    r"""The exact hypergradient of the last `inner_steps` steps, optimiser state
    included, by reverse mode:

    $$\frac{dC_2}{d\lambda} = \frac{\partial C_2}{\partial \lambda} + \alpha_K
    \sum_{t} \Big( \prod_{s>t} A_s \Big) B_t, \qquad
    A_t = \frac{\partial \Phi_t}{\partial \theta_{t-1}}, \quad
    B_t = \frac{\partial \Phi_t}{\partial \lambda}.$$

    What all other algorithms are measured against. Memory grows with the number of
    steps that are differentiated: $O(PK)$.

    ??? cite "References"

        Franceschi et al., *Forward and Reverse Gradient-Based Hyperparameter
        Optimization*, ICML 2017 (reverse mode). Shaban et al., *Truncated
        Back-propagation for Bilevel Optimization*, AISTATS 2019 (truncation).
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    inner_steps: int = eqx.field(static=True, kw_only=True)
    truncation: int | None = eqx.field(static=True, kw_only=True, default=None)
    checkpoint: Checkpoint = eqx.field(static=True, kw_only=True, default=None)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "update"
    val_at_each_step: ClassVar[bool] = False

    def __check_init__(self):
        if self.checkpoint not in (None, "step", "nested"):
            raise ValueError(
                "`checkpoint` must be `None`, 'step' or 'nested'; got "
                f"{self.checkpoint!r}."
            )
        if self.truncation is not None:
            check_positive_int("truncation", self.truncation)
            if self.truncation > self.inner_steps:
                raise ValueError(
                    f"`truncation` must be at most `inner_steps`={self.inner_steps}; "
                    f"got {self.truncation}."
                )

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        differentiated = self.truncation or self.inner_steps
        start = self.inner_steps - differentiated
        if start > 0:
            inner, _ = levels.run(inner, hyperparams, 0, start)
        steps = (start, self.inner_steps)
        return backpropagate(levels, inner, hyperparams, steps, memory, self.checkpoint)


Unrolled.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractBilevelOptimizer`][],

- `truncation`: how many of the last inner steps are differentiated; all by default.
    The steps before them are taken as if they did not depend on the hyperparameters.
- `checkpoint`: what is kept of the inner steps for the way back. `None`: all that the
    way back needs. `'step'`: the inner state before each step; the rest is computed
    again. `'nested'`: the inner state before each of $\sqrt K$ segments, whose steps
    are taken again; memory $O(P \sqrt K)$, for one more training gradient for each
    step. Batches are drawn again in any case, never stored.
"""


def backpropagate(
    levels: Levels,
    inner: InnerState,
    hyperparams: Hyperparams,
    steps: tuple[int, int],
    memory: Memory,
    checkpoint: Checkpoint = None,
) -> Estimate:
    """The inner steps from the first to (without) the second of `steps`, and the
    validation loss after them, differentiated in the hyperparameters, with the inner
    state before them fixed."""
    trajectory = lambda hyperparams: levels.run(inner, hyperparams, *steps, checkpoint)
    inner, pullback, train = advance_with_pullback(trajectory, hyperparams)
    val, alpha, direct = levels.validation_gradient(
        inner, hyperparams, jnp.asarray(steps[1] - 1)
    )
    (indirect,) = pullback(alpha)
    return Estimate(inner, memory, tree_add(direct, indirect), train, val)


def advance_with_pullback(
    advance: Callable[[Hyperparams], tuple[InnerState, Any]], hyperparams: Hyperparams
) -> tuple[InnerState, Callable[[PyTree], tuple[Hyperparams]], Any]:
    """Advances the inner level.

    **Returns:** the inner state that is reached, the pull-back from its `(params,
    model_state)` to the hyperparameters, and the report of the last step.
    """

    def reach(hyperparams):
        end, train = advance(hyperparams)
        return (end.params, end.model_state), (end.opt_state, train)

    reached, pullback, (opt_state, train) = eqx.filter_vjp(
        reach, hyperparams, has_aux=True
    )
    params, model_state = reached
    return InnerState(params, opt_state, model_state), pullback, train
