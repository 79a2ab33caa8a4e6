"""Splits the state of many tasks into rows, one for each task, and the parts that the
tasks share. `MetaLearner` maps over the rows."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ._custom_types import Hyperparams
from ._data import AbstractBatches, Stacked
from ._misc import as_single
from ._sharding import mesh_of, whole_like
from ._state import BilevelState, check_state, InnerState, TaskReport


T = TypeVar("T")

_FEW = 2**10  # numbers up to which a loop is not worth its compilation


class Start(eqx.Module):
    """Holds the start of the tasks. `inner` is the inner state of a single task without
    the optimiser's state. `known` tells whether an episode has begun."""

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
    """Selects the parts of a state that belong to single tasks."""
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


def split_rows(rows: T, batches: AbstractBatches) -> T:
    """Puts the row of each task on the devices of its data."""
    axis = task_axis(batches)
    arrays = [x for x in jtu.tree_leaves(batches) if mesh_of([x]) is not None]
    specs = [x.sharding.spec for x in arrays]
    names = specs[0][axis] if specs and len(specs[0]) > axis else None
    if names is None:
        return rows

    def split(x):
        if not eqx.is_array(x) or mesh_of([x]) is None:
            return x
        spec = jax.P(names, *x.sharding.spec[1:])
        return jax.device_put(x, jax.NamedSharding(x.sharding.mesh, spec))

    return jtu.tree_map(split, rows)


def split_like(keys: T, batches: AbstractBatches) -> T:
    """Gives the traced keys of the tasks the sharding of the task axis in the data, if
    the sharding is part of a type."""
    x = jtu.tree_leaves(batches)[0]
    whole = whole_like(x)
    if keys is None or whole is None:
        return keys
    spec = jax.P(jax.typeof(x).sharding.spec[task_axis(batches)])
    return jax.sharding.reshard(keys, jax.NamedSharding(whole.mesh, spec))


def with_shared(
    rows: BilevelState, shared: tuple[Start | None, Hyperparams]
) -> BilevelState:
    """Adds the parts that tasks share: the start of an episode, and the standard
    error."""
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


def mean_and_error(tree: PyTree, tasks: int) -> tuple[PyTree, PyTree]:
    """Computes the mean over tasks, and its standard error if there are several
    tasks."""
    if tasks == 1:
        return first_row(tree), None
    leaves, treedef = jtu.tree_flatten(tree)
    pairs = [_mean_and_error(x) for x in leaves]
    mean, error = ([pair[i] for pair in pairs] for i in (0, 1))
    return treedef.unflatten(mean), treedef.unflatten(error)


@jax.custom_batching.custom_vmap
def mean_over_tasks(x: Array) -> Array:
    """Under `vmap`, takes the mean over the mapped axis. (`lax.pmean` fails along
    explicit axes.)"""
    return x


@mean_over_tasks.def_vmap
def _(axis_size, in_batched, x):
    del axis_size
    return jnp.mean(x, axis=0) if in_batched[0] else x, False


def _mean_and_error(x: Float[Array, "tasks ..."]) -> tuple[Array, Array]:
    # From the first task on: differences of nearly equal values are exact.
    count, first = len(x), as_single(first_row(x))
    mean = _add_up(lambda row: as_single(row) - first, x) / count
    squares = _add_up(lambda row: (as_single(row) - first - mean) ** 2, x)
    error = jnp.sqrt(squares / (count * (count - 1)))
    return (first + mean).astype(x.dtype), error.astype(x.dtype)


def _add_up(fn: Callable[[Array], Array], x: Float[Array, "tasks ..."]) -> Array:
    """Adds up the elementwise `fn` over all tasks. On CPUs, XLA reduces a leading axis
    tens of times more slowly than it adds the rows. On a mesh, the rows may be on
    different devices."""

    def by_rows(x):
        add = lambda i, total: total + fn(x[i])
        start = jnp.zeros_like(as_single(x[0]))
        return lax.fori_loop(0, len(x), add, start, unroll=min(len(x), 8))

    at_once = lambda x: jnp.sum(fn(x), axis=0)
    if x.size < _FEW * len(x) or not jax.typeof(x).sharding.mesh.empty:
        return at_once(x)
    return lax.platform_dependent(x, cpu=by_rows, default=at_once)


def first_row(tree: T, axis: int = 0) -> T:
    def take(x):
        before, whole = (slice(None),) * axis, whole_like(x)
        if whole is None:
            return x[*before, 0]
        spec = list(jax.typeof(x).sharding.spec)
        spec[axis] = None
        sharding = jax.NamedSharding(whole.mesh, jax.P(*spec))
        # JAX takes no slice of a split axis, but it gathers from one.
        firsts = x.at[*before, jnp.zeros(1, int)].get(out_sharding=sharding)
        return jnp.squeeze(firsts, axis)

    return jtu.tree_map(lambda x: take(x) if eqx.is_array(x) else x, tree)


def as_row(tree: T) -> T:
    """Adds an axis of length one to each array."""
    return jtu.tree_map(lambda x: x[None] if eqx.is_array(x) else x, tree)


def task_axis(batches: AbstractBatches) -> int:
    """Finds the axis of the tasks in the arrays of `train` or `val`."""
    return 1 if isinstance(batches, Stacked) else 0
