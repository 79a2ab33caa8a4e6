"""The two levels of a problem within one step, as pure functions of arrays.

An algorithm sees nothing else: it moves the inner level by `update` (or `run`, many
updates) and asks for the validation loss by `validate`. Both are differentiable in the
inner state and in the hyperparameters; `update` by the second-order rule.
"""

import dataclasses
import functools as ft
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PRNGKeyArray, PyTree

from ._custom_types import (
    Batch,
    Checkpoint,
    FloatScalar,
    Hyperparams,
    InnerOptimiser,
    IntScalar,
    Key,
    Model,
)
from ._data import AbstractBatches
from ._inner import apply_inner
from ._misc import depends_on, match_dtypes
from ._problem import evaluate_train, evaluate_val, Problem
from ._second_order import AbstractSecondOrder, drop_dead_cotangents
from ._state import InnerState
from ._tasks import first_batches, first_task


# What a key is folded with, so that all draw independently.
_TRAIN, _VAL, _ALGORITHM = 0, 1, 2


class Levels(eqx.Module):
    """The inner and the outer level of one call of `step`.

    **Attributes:**

    - `problem`, `inner`, `second_order`: those of the optimizer.
    - `frozen`: the model without its inexact arrays.
    - `train`, `val`: a batch for each inner step.
    - `position`: the number of inner steps before this call.
    - `key`: a PRNG key, or `None`.
    - `unroll`: how many updates a scan of `run` holds in its body.
    - `axis`: the name of the mapped axis of tasks, or `None`.
    """

    problem: Problem
    inner: InnerOptimiser
    second_order: AbstractSecondOrder
    frozen: Model
    train: AbstractBatches
    val: AbstractBatches
    position: IntScalar
    key: Key
    unroll: int = eqx.field(static=True)
    axis: str | None = eqx.field(static=True, default=None)

    def update(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[InnerState, tuple[FloatScalar, Any]]:
        r"""One inner step, $\theta_t = \Phi(\theta_{t-1}, \lambda; D_t)$.

        **Arguments:**

        - `state`: $\theta_{t-1}$ with the optimiser's and the model's state.
        - `hyperparams`: $\lambda$, unwrapped.
        - `index`: the number of the inner step within this call, from 0.

        **Returns:** the new inner state, and `(train_loss, aux)` at $\theta_{t-1}$,
        which is not differentiated.
        """
        gradient, model_state, report = self.gradient(state, hyperparams, index)
        if not self.moves_linearly(state, hyperparams):
            gradient = drop_dead_cotangents(gradient)
        return self.apply(gradient, state, hyperparams, model_state), report

    def gradient(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[PyTree, PyTree, tuple[FloatScalar, Any]]:
        r"""The training gradient $\nabla_\theta C_1(\theta_{t-1}, \lambda; D_t)$ of one
        inner step, differentiable by the second-order rule.

        **Arguments:** those of `update`.

        **Returns:** the gradient, the model's state after the step, and `(train_loss,
        aux)`, which is not differentiated.
        """
        rest, fixed = eqx.partition(
            (hyperparams, state.model_state), eqx.is_inexact_array
        )
        args, static = eqx.partition((self, fixed, index), eqx.is_array)

        def loss(params, rest, args):
            levels, fixed, index = eqx.combine(args, static)
            hyperparams, model_state = eqx.combine(rest, fixed)
            batch, key = levels._draw(levels.train, index, _TRAIN)
            model = eqx.combine(params, levels.frozen)
            loss, model_state, aux = evaluate_train(
                levels.problem, model, model_state, hyperparams, batch, key
            )
            carried, fixed = eqx.partition(model_state, eqx.is_inexact_array)
            return loss, (carried, (fixed, aux))

        differentiated = self.second_order.differentiate(loss)
        grad, carried, (value, (fixed, aux)) = differentiated(state.params, rest, args)
        return grad, eqx.combine(carried, fixed), (value, aux)

    def moves_linearly(self, state: InnerState, hyperparams: Hyperparams) -> bool:
        """Whether what the inner optimiser does, to the parameters and to its state, is
        linear in the training gradient, as that of SGD is, momentum or not. Found by
        tracing."""

        def slope(gradient):
            def move(gradient):
                new = apply_inner(self.inner, gradient, state, hyperparams)
                return eqx.filter(new, eqx.is_inexact_array)

            ones = jtu.tree_map(jnp.ones_like, gradient)
            return jax.jvp(move, (gradient,), (ones,))[1]

        try:
            return not depends_on(slope, state.params)
        except Exception:
            # An optimiser that JAX cannot differentiate: linear it is not.
            return False

    def apply(
        self,
        gradient: PyTree,
        state: InnerState,
        hyperparams: Hyperparams,
        model_state: PyTree,
    ) -> InnerState:
        """The inner state after the optimiser has moved it along a training gradient.

        **Arguments:**

        - `gradient`: the training gradient.
        - `state`, `hyperparams`: as those of `update`.
        - `model_state`: the model's state after the step.
        """
        params, opt_state = apply_inner(self.inner, gradient, state, hyperparams)
        return match_dtypes(InnerState(params, opt_state, model_state), state)

    def run(
        self,
        state: InnerState,
        hyperparams: Hyperparams,
        start: int,
        stop: int,
        checkpoint: Checkpoint = None,
    ) -> tuple[InnerState, tuple[FloatScalar, Any]]:
        """The inner steps `start` to `stop` of this call, at least one.

        **Arguments:**

        - `state`, `hyperparams`: as those of `update`.
        - `start`, `stop`: which inner steps.
        - `checkpoint`: what reverse mode keeps of them, as in [`eqx_hpo.Unrolled`][].

        **Returns:** the inner state after them, and the report of the last one.
        """
        if stop - start == 1:
            return self.update(state, hyperparams, jnp.asarray(start))
        # A loop keeps XLA from merging what is computed again with the first time.
        loops = self.unroll < stop - start
        recompute = ft.partial(jax.checkpoint, prevent_cse=not loops)

        def step(carry, index):
            return self.update(carry[0], hyperparams, index), None

        def segment(carry, steps):
            body = step if checkpoint is None else recompute(step)
            return lax.scan(body, carry, steps, unroll=self.unroll)

        carry = (state, self.empty_report(state, hyperparams))
        steps = jnp.arange(start, stop)
        if checkpoint == "nested":
            length = math.isqrt(len(steps))
            whole = len(steps) // length * length
            segments = steps[:whole].reshape(-1, length)
            whole_unroll = 1 if loops else len(segments)
            carry, _ = lax.scan(
                recompute(segment), carry, segments, unroll=whole_unroll
            )
            steps = steps[whole:]
        if len(steps) > 0:
            carry, _ = segment(carry, steps)
        return carry

    def empty_report(
        self, state: InnerState, hyperparams: Hyperparams
    ) -> tuple[FloatScalar, Any]:
        """Zeros in the structure of what `update` reports."""
        report = jax.eval_shape(
            lambda: self.update(state, hyperparams, jnp.array(0))[1]
        )
        return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), report)

    def validate(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[FloatScalar, Any]:
        r"""The validation loss $C_2(\theta_t, \lambda)$ as `(loss, aux)`.

        **Arguments:** as those of `update`, with `state` the one after inner step
        `index`.
        """
        batch, key = self._draw(self.val, index, _VAL)
        model = eqx.combine(state.params, self.frozen)
        return evaluate_val(
            self.problem, model, state.model_state, hyperparams, batch, key
        )

    def validation_gradient(
        self, state: InnerState, hyperparams: Hyperparams, index: IntScalar
    ) -> tuple[tuple[FloatScalar, Any], tuple[PyTree, PyTree], Hyperparams]:
        r"""The validation loss with its two partial derivatives.

        **Returns:** `(loss, aux)`; $\alpha_t = \partial C_2 / \partial (\theta_t,
        \text{model state})$; and $\partial C_2 / \partial \lambda$ at fixed
        $\theta_t$.
        """

        def loss(x):
            (params, model_state), hyperparams = x
            inner = InnerState(params, state.opt_state, model_state)
            return self.validate(inner, hyperparams, index)

        x = ((state.params, state.model_state), hyperparams)
        value, (alpha, direct) = eqx.filter_value_and_grad(loss, has_aux=True)(x)
        return value, alpha, direct

    def train_batch(self, index: IntScalar) -> Batch:
        """The batch $D_t$ of the train data that inner step `index` uses."""
        return self._draw(self.train, index, _TRAIN)[0]

    def algorithm_key(self, index: IntScalar) -> PRNGKeyArray:
        """A PRNG key for the random choices of an algorithm itself at inner step
        `index`. There is one even where `step` was given none."""
        if self.key is None:
            return jr.fold_in(jr.key(_ALGORITHM), self.position + index)
        return jr.fold_in(jr.fold_in(self.key, index), _ALGORITHM)

    def mean_over_tasks(self, tree: PyTree) -> PyTree:
        """The mean over the tasks of a [`eqx_hpo.MetaLearner`][]; without one, the tree
        as it is. What is `lasting` in the memory must have passed through this."""
        return tree if self.axis is None else lax.pmean(tree, self.axis)

    def _draw(self, batches: AbstractBatches, index: IntScalar, level: int):
        if self.key is None:
            return batches.draw(index, self.position + index, None), None
        key = jr.fold_in(jr.fold_in(self.key, index), level)
        draw_key, loss_key = jr.split(key)
        return batches.draw(index, self.position + index, draw_key), loss_key


def first_task_level(
    levels: Levels, inner: InnerState, tasks: int | None
) -> tuple[Levels, InnerState]:
    """The part of the first task; all of it where there is no axis of tasks."""
    levels = dataclasses.replace(
        levels,
        frozen=first_task(levels.frozen, tasks),
        train=first_batches(levels.train, tasks),
        val=first_batches(levels.val, tasks),
    )
    return levels, first_task(inner, tasks)
