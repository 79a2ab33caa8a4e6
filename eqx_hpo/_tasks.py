"""The task axis of `MetaLearner`: the leading axis of what each task has its own of.

`tasks` is the number of tasks, or `None` where there is no such axis.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Shaped

from ._custom_types import Key
from ._data import AbstractBatches, Stacked


T = TypeVar("T")

AXIS = "tasks"  # by which a mapped function can speak of the axis


def replicate(tree: T, tasks: int | None) -> T:
    """One for each task."""
    if tasks is None:
        return tree
    copy = lambda x: jnp.broadcast_to(x, (tasks, *jnp.shape(x)))
    return jtu.tree_map(lambda x: copy(x) if eqx.is_array(x) else x, tree)


def first_task(tree: T, tasks: int | None) -> T:
    """That of the first task."""
    if tasks is None:
        return tree
    return jtu.tree_map(lambda x: x[0] if eqx.is_array(x) else x, tree)


def over_tasks(fn: Callable[..., Any], tasks: int | None) -> Callable[..., Any]:
    """Maps a function of what each task has its own of."""
    return fn if tasks is None else eqx.filter_vmap(fn)


def task_axis(batches: AbstractBatches) -> int:
    """The axis of the tasks in the arrays of `train` or `val`."""
    return 1 if isinstance(batches, Stacked) else 0


def task_keys(key: Key, tasks: int) -> Shaped[Array, "tasks ..."] | None:
    """A key for each task; of a single task, the key itself."""
    if key is None or tasks == 1:
        return None if key is None else key[None]
    return jr.split(key, tasks)


def first_batches(batches: AbstractBatches, tasks: int | None) -> AbstractBatches:
    """What the first task draws its batches from."""
    if tasks is None:
        return batches
    axis = task_axis(batches)
    take = lambda x: jnp.take(x, 0, axis=axis) if eqx.is_array(x) else x
    return jtu.tree_map(take, batches)


def check_task_axis(name: str, batches: AbstractBatches, tasks: int) -> None:
    axis = task_axis(batches)
    for path, x in jtu.tree_leaves_with_path(eqx.filter(batches, eqx.is_array_like)):
        shape = jnp.shape(x)
        if len(shape) <= axis or shape[axis] != tasks:
            raise ValueError(
                f"`{name}` must have an axis for the {tasks} tasks, number {axis}, in "
                f"each of its arrays; got the shape {shape} at "
                f"`{name}{jtu.keystr(path)}`."
            )
