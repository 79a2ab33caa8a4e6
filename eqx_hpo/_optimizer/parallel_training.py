"""Runs many trainings side by side, for black-box searches."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from .._custom_types import (
    Batch,
    Hyperparams,
    InnerOptimiser,
    Key,
    Model,
)
from .._data import AbstractBatches
from .._jit import jit_method
from .._problem import Problem
from .._state import BilevelState, Memory
from .._tasks import as_row, first_row
from .interface import AbstractBilevelOptimizer
from .plain_training import PlainTraining


class ParallelTraining(AbstractBilevelOptimizer):
    """Runs many trials side by side as one algorithm. Each trial has its own
    hyperparameters and step counter. So it has the keys and the batches that it would
    have alone.

    `state.memory.episode` holds the states of the trials, with a leading axis.
    `state.memory.lasting` holds the step of a trial at which the validation loss is
    due. `step` ignores the key of the run: each trial folds `key` with its own step.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    inner_steps: int = eqx.field(static=True)
    trainer: PlainTraining
    key: Key
    val_at_each_step: ClassVar[bool] = False

    def __init__(self, trainer: PlainTraining, key: Key):
        self.problem, self.inner = trainer.problem, trainer.inner
        self.outer, self.inner_steps = trainer.outer, trainer.inner_steps
        self.trainer, self.key = trainer, key

    def init(
        self,
        model: Model,
        hyperparams: Hyperparams,
        *,
        train: Batch | AbstractBatches = None,
        val: Batch | AbstractBatches = None,
        model_state: PyTree = None,
        key: Key = None,
    ) -> BilevelState:
        """Makes the state of a single training."""
        row = self.trainer.init(
            model, hyperparams, train=train, val=val, model_state=model_state, key=key
        )
        return dataclasses.replace(
            row,
            model=None,
            hyperparams=None,
            inner_opt_state=None,
            outer_opt_state=None,
            model_state=None,
            memory=Memory(episode=as_row(row), lasting=jnp.zeros((), int)),
            metrics=dataclasses.replace(row.metrics, aux=None),
        )

    @jit_method
    def step(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> BilevelState:
        del key
        due = state.memory.lasting
        trainer = eqx.tree_at(lambda x: x.due, self.trainer, due)

        def step(row):
            key = None if self.key is None else jr.fold_in(self.key, row.step)
            return trainer.step(row, train, val, key=key)

        rows = for_each(step, state.memory.episode)
        lowest = jnp.nanmin(rows.metrics.train_loss)
        return dataclasses.replace(
            state,
            memory=Memory(episode=rows, lasting=due),
            step=state.step + 1,
            metrics=dataclasses.replace(state.metrics, train_loss=lowest),
        )

    def compute_hypergradient(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> Hyperparams:
        compute = self.trainer.compute_hypergradient
        one = lambda row: compute(row, train, val, key=key)
        return for_each(one, state.memory.episode)

    def restart(
        self, state: BilevelState, model: Model, *, model_state: PyTree = None
    ) -> BilevelState:
        one = lambda row: self.trainer.restart(row, model, model_state=model_state)
        rows = for_each(one, state.memory.episode)
        memory = dataclasses.replace(state.memory, episode=rows)
        return dataclasses.replace(state, memory=memory)


def for_each(fn: Callable[[Any], PyTree], rows: PyTree) -> PyTree:
    """Maps over the leading axis of all arrays. A single row is passed to `fn` without
    `vmap`, which would turn products and convolutions into other operations."""
    count = jtu.tree_leaves(eqx.filter(rows, eqx.is_array))[0].shape[0]
    if count > 1:
        return eqx.filter_vmap(fn)(rows)
    return as_row(fn(first_row(rows)))
