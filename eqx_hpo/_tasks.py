"""The state of many tasks, taken apart: rows, of which each task has its own, and what
the tasks share. `MetaLearner` maps over the rows."""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from ._custom_types import Hyperparams
from ._data import AbstractBatches, Stacked
from ._misc import as_single
from ._state import BilevelState, check_state, InnerState, TaskReport


T = TypeVar("T")


class Start(eqx.Module):
    """Where the tasks start from: `inner` is the inner state of a single one, without
    the optimiser's; `known` tells whether an episode has begun."""

    inner: InnerState
    known: Bool[Array, ""]


def check_own_state(state: Any) -> None:
    check_state("state", state)
    episode = state.memory.episode
    if not (isinstance(episode, tuple) and len(episode) == 2):
        raise ValueError(
            "`state` is not that of a `MetaLearner`. Make it by `init` of the same one."
        )


def rows_of(state: BilevelState) -> tuple[PyTree, ...]:
    """Takes out the parts of a state that each task has its own of."""
    return (
        state.model,
        state.inner_opt_state,
        state.memory.episode,
        state.model_state,
        state.metrics.aux,
        state.metrics.diagnostics,
    )


def with_rows(state: BilevelState, rows: tuple[PyTree, ...]) -> BilevelState:
    model, opt_state, episode, model_state, aux, diagnostics = rows
    metrics = dataclasses.replace(state.metrics, aux=aux, diagnostics=diagnostics)
    return dataclasses.replace(
        state,
        model=model,
        inner_opt_state=opt_state,
        memory=dataclasses.replace(state.memory, episode=episode),
        model_state=model_state,
        metrics=metrics,
    )


def with_shared(
    rows: BilevelState, shared: tuple[Start | None, Hyperparams]
) -> BilevelState:
    """Adds what tasks share: the start of an episode, and the standard error."""
    start, error = shared
    memory = dataclasses.replace(rows.memory, episode=(start, rows.memory.episode))
    report = TaskReport(error, rows.metrics.diagnostics)
    metrics = dataclasses.replace(rows.metrics, diagnostics=report)
    return dataclasses.replace(rows, memory=memory, metrics=metrics)


def without_shared(
    state: BilevelState,
) -> tuple[tuple[Start | None, Hyperparams], BilevelState]:
    (start, episode), report = state.memory.episode, state.metrics.diagnostics
    memory = dataclasses.replace(state.memory, episode=episode)
    metrics = dataclasses.replace(state.metrics, diagnostics=report.tasks)
    rows = dataclasses.replace(state, memory=memory, metrics=metrics)
    return (start, report.standard_error), rows


def standard_error(x: Float[Array, "tasks ..."]) -> Float[Array, "..."]:
    """Computes the standard error of the mean. From the first task: differences of
    values that are nearly equal are exact, their mean is not."""
    wide = as_single(x)
    deviations = jnp.std(wide - wide[0], axis=0, ddof=1)
    return (deviations / x.shape[0] ** 0.5).astype(x.dtype)


def first_row(tree: T, axis: int = 0) -> T:
    take = lambda x: x[(slice(None),) * axis + (0,)]
    return jtu.tree_map(lambda x: take(x) if eqx.is_array(x) else x, tree)


def task_axis(batches: AbstractBatches) -> int:
    """Finds the axis of the tasks in the arrays of `train` or `val`."""
    return 1 if isinstance(batches, Stacked) else 0
