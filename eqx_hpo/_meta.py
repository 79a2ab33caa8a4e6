"""Learning across tasks that share hyperparameters, and possibly an initialisation.

`MetaLearner` gives each task a row of its own in the arrays of a state, and maps the
estimate of the wrapped algorithm over the rows. The algorithm sees one task at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from ._checks import as_int, as_share, check_key, check_type
from ._custom_types import Batch, Hyperparams, InnerOptimiser, Key, Model
from ._data import AbstractBatches, as_batches
from ._discrete import refresh
from ._exact import exact_hypergradient, Keys
from ._hyperparameter import partition_raw
from ._jit import jit_method
from ._misc import as_device_arrays, match_types
from ._optimizer import (
    AbstractAlgorithm,
    AbstractBilevelOptimizer,
    next_state,
    raw_estimate,
    warn_if_same,
)
from ._problem import Problem
from ._sharding import put_like
from ._solution import compare_discretised, Discretised
from ._state import BilevelState, Estimate, inner_state, Memory, TaskReport
from ._tasks import (
    as_row,
    check_own_state,
    first_row,
    mean_and_error,
    mean_over_tasks,
    rows_of,
    split_like,
    split_rows,
    Start,
    task_axis,
    with_rows,
    with_shared,
    without_shared,
)


class MetaLearner(AbstractBilevelOptimizer):
    r"""Runs an algorithm on many tasks at once. The tasks share the hyperparameters. If
    there are episodes, they also share the weights from which they start.

    Each task has its own weights, inner optimiser state and batches. `state.model`,
    `train` and `val` have a leading axis for the tasks. The hypergradient is the mean
    over the tasks. `state.metrics.diagnostics` holds its standard error, as a
    [`eqx_hpo.TaskReport`][]. The tasks may be the folds of one data set (see
    [`eqx_hpo.folds`][]).

    The losses are written for a single task. `init` and `restart` take a single model
    too. To make an [`eqx_hpo.Minibatch`][] for each task, use
    `eqx.filter_vmap(lambda x: hpo.Minibatch(x, 8))(data)`. In [`eqx_hpo.Stacked`][] the
    axis of the tasks comes after that of the inner steps.

    ```python
    algorithm = hpo.MetaLearner(
        hpo.HyperDistill(problem, inner, outer, horizon=30), tasks=10, horizon=30
    )
    state = algorithm.init(model, hyperparams, train=train, val=val)
    ```

    Without a `horizon`, the tasks keep training from step to step. With one, an episode
    takes `horizon` inner steps from the shared initialisation $\phi$. The
    hyperparameters are updated after each `inner_steps` of them. At the start of the
    step after an episode, Reptile moves the initialisation towards the mean of the
    trained weights, $\phi \leftarrow \phi - \eta (\phi - \bar\theta_T)$. All tasks then
    start there anew, with a fresh inner optimiser and a fresh memory of the episode.
    The outer optimiser keeps its state. The caller passes new tasks once an episode,
    and can tell when from `state.step`, which counts the calls.

    The axis of the tasks can be sharded over devices.

    ??? cite "References"

        Lee et al., *Online Hyperparameter Meta-Learning with Hypergradient
        Distillation*, ICLR 2022, algorithm 3. Nichol et al., *On First-Order
        Meta-Learning Algorithms*, 2018 (Reptile).
    """

    algorithm: AbstractAlgorithm
    reptile: Float[Array, ""]
    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    tasks: int = eqx.field(static=True)
    horizon: int | None = eqx.field(static=True)
    inner_steps: int = eqx.field(static=True)
    val_at_each_step: bool = eqx.field(static=True)

    def __init__(
        self,
        algorithm: AbstractBilevelOptimizer,
        tasks: int,
        *,
        horizon: int | None = None,
        reptile: float | Float[Array, ""] | None = None,
    ):
        r"""**Arguments:**

        - `algorithm`: the algorithm that each task runs, with its losses and its
            optimisers.
        - `tasks`: the number of tasks.
        - `horizon`: the number of inner steps in an episode, a multiple of the
            `inner_steps` of `algorithm`. If it equals `inner_steps`, the
            hyperparameters move once an episode. `None` means that there are no
            episodes.
        - `reptile`: the rate $\eta$ at which the initialisation moves, from 0 to 1. It
            needs a `horizon`. With 0 or `None`, all episodes start from the model given
            to `init`. This is better where tasks share little but the hyperparameters,
            for example when their classes come in random order.
        """
        what = "an algorithm for one model, such as `T1T2`"
        check_type("algorithm", algorithm, AbstractAlgorithm, what)
        assert isinstance(algorithm, AbstractAlgorithm)
        if horizon is None and reptile is not None:
            raise ValueError(
                "`reptile` moves the start of episodes, and there are none without a "
                "`horizon`. Give a `horizon` too, or leave `reptile` out."
            )
        if horizon is not None:
            horizon = as_int("horizon", horizon, 1)
            if horizon % algorithm.inner_steps != 0:
                raise ValueError(
                    "`horizon` must be a multiple of the inner steps in a call of "
                    f"`step`, {algorithm.inner_steps}; got {horizon}."
                )
        self.algorithm = algorithm
        self.tasks = as_int("tasks", tasks, 1)
        self.horizon = horizon
        self.reptile = as_share("reptile", 0.0 if reptile is None else reptile)
        self.problem = algorithm.problem
        self.inner = algorithm.inner
        self.outer = algorithm.outer
        self.inner_steps = algorithm.inner_steps
        self.val_at_each_step = algorithm.val_at_each_step

    def initialisation(self, state: BilevelState) -> Model:
        r"""Returns the shared initialisation $\phi$ as a single model. If the next step
        starts an episode, this is the model from which it starts. Otherwise it is the
        model from which the present episode started.

        **Arguments:**

        - `state`: from `init` or `step`.

        **Raises:** a `ValueError` if there are no episodes.
        """
        if self.horizon is None:
            raise ValueError(
                "There is no shared initialisation without episodes: give "
                "`MetaLearner` a `horizon`."
            )
        check_own_state(state)
        start, _ = self._next_start(state)
        untrained = eqx.filter(state.model, eqx.is_inexact_array, inverse=True)
        return eqx.combine(start.inner.params, first_row(untrained))

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
        check_key(key)
        warn_if_same(train, val)
        first = [self._first_task(*x) for x in (("train", train), ("val", val))]
        single = self.algorithm.init(
            model,
            hyperparams,
            train=first[0],
            val=first[1],
            model_state=model_state,
            key=key,
        )
        start = None
        if self.horizon is not None:
            inner = dataclasses.replace(inner_state(single), opt_state=None)
            start = Start(jtu.tree_map(jnp.zeros_like, inner), jnp.array(False))
        copy = lambda x: jnp.broadcast_to(x, (self.tasks, *x.shape))
        rows = jtu.tree_map(
            lambda x: copy(x) if eqx.is_array(x) else x, rows_of(single)
        )
        if train is not None:
            rows = split_rows(rows, as_batches(train, "train", None))
        error = None
        if self.tasks > 1:
            raw, _ = partition_raw(single.hyperparams)
            error = jtu.tree_map(lambda x: jnp.full_like(x, jnp.nan), raw)
        return with_shared(with_rows(single, rows), (start, error))

    @jit_method
    def step(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> BilevelState:
        check_own_state(state)
        check_key(key)
        started = self._start_episode_if_due(state)
        hyperparams = refresh(state.hyperparams, key, state.step)
        return next_state(
            self.outer,
            state,
            hyperparams,
            self._mean_estimate(started, hyperparams, train, val, key),
            started.episode_step + self.inner_steps,
            self.problem.has_aux,
        )

    @jit_method
    def compute_hypergradient(
        self,
        state: BilevelState,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        *,
        key: Key = None,
    ) -> Hyperparams:
        check_own_state(state)
        check_key(key)
        state = self._start_episode_if_due(state)
        hyperparams = refresh(state.hyperparams, key, state.step)
        estimate = self._mean_estimate(state, hyperparams, train, val, key)
        return estimate.hypergradient

    def restart(
        self, state: BilevelState, model: Model, *, model_state: PyTree = None
    ) -> BilevelState:
        check_own_state(state)
        (start, error), rows = without_shared(state)
        if start is not None:
            start = jtu.tree_map(jnp.zeros_like, start)
        rows = self._restart_rows(rows, model, model_state)
        return put_like(with_shared(rows, (start, error)), state)

    def _first_task(self, name: str, data: Batch | AbstractBatches):
        """Selects the first task's part of `train` or `val`."""
        if data is None:
            return None
        batches = as_batches(data, name, self.inner_steps)
        self._check_task_axis(name, batches)
        return first_row(as_device_arrays(data), task_axis(batches))

    def _check_task_axis(self, name: str, batches: AbstractBatches) -> None:
        axis = task_axis(batches)
        arrays = eqx.filter(batches, eqx.is_array_like)
        for path, x in jtu.tree_leaves_with_path(arrays):
            shape = jnp.shape(x)
            if len(shape) <= axis or shape[axis] != self.tasks:
                raise ValueError(
                    f"`{name}` must have an axis for the {self.tasks} tasks, number "
                    f"{axis}, in each of its arrays; got the shape {shape} at "
                    f"`{name}{jtu.keystr(path)}`."
                )

    def _next_start(self, state: BilevelState) -> tuple[Start, Bool[Array, ""]]:
        """Finds the start of the present episode, and whether a new episode begins now.
        If one has just ended, Reptile has moved the start."""
        assert self.horizon is not None
        start, _ = state.memory.episode
        trained = dataclasses.replace(inner_state(state), opt_state=None)
        due = state.step * self.inner_steps % self.horizon == 0

        def move(old, new):
            # In the first episode of all, the start is the model given to `init`, whose
            # rows are still equal then.
            first = first_row(new)
            if not eqx.is_inexact_array(new):
                return jnp.where(start.known, old, first)
            moved = old - self.reptile.astype(old.dtype) * (old - jnp.mean(new, axis=0))
            return jnp.where(start.known, jnp.where(due, moved, old), first)

        now = jtu.tree_map(move, start.inner, trained)
        return Start(now, jnp.array(True)), start.known & due

    def _start_episode_if_due(self, state: BilevelState) -> BilevelState:
        if self.horizon is None:
            return state
        start, restarts = self._next_start(state)
        (_, error), rows = without_shared(state)
        arrays, static = eqx.partition(rows, eqx.is_array)

        def restart():
            untrained = eqx.filter(state.model, eqx.is_inexact_array, inverse=True)
            model = eqx.combine(start.inner.params, first_row(untrained))
            fresh = self._restart_rows(rows, model, start.inner.model_state)
            return match_types(eqx.filter(fresh, eqx.is_array), arrays)

        arrays = lax.cond(restarts, restart, lambda: arrays)
        return with_shared(eqx.combine(arrays, static), (start, error))

    def _restart_rows(
        self, state: BilevelState, model: Model, model_state: PyTree
    ) -> BilevelState:
        """Restarts each task. `state` must not hold the parts that the tasks share."""

        def restart(row):
            single = with_rows(state, row)
            fresh = self.algorithm.restart(single, model, model_state=model_state)
            return rows_of(fresh), None

        rows, _ = self._over_tasks(restart, (0,))(rows_of(state))
        zero = jnp.zeros_like(state.episode_step)
        return dataclasses.replace(with_rows(state, rows), episode_step=zero)

    def _mean_estimate(
        self,
        state: BilevelState,
        hyperparams: Hyperparams,
        train: Batch | AbstractBatches,
        val: Batch | AbstractBatches,
        key: Key,
    ) -> Estimate:
        """Computes the estimate of each task, and the mean of their hypergradients."""
        batches = as_batches(train, "train", None), as_batches(val, "val", None)
        for name, x in zip(("train", "val"), batches):
            self._check_task_axis(name, x)
        (start, _), state = without_shared(state)
        keys = split_like(self._task_keys(key), batches[0])

        def estimate(row, train, val, key):
            single = with_rows(state, row)
            shared = lambda tree: jtu.tree_map(mean_over_tasks, tree)
            x = raw_estimate(
                self.algorithm, single, hyperparams, train, val, key, shared
            )
            of_task = (x.inner, x.memory.episode, x.train, x.val, x.diagnostics)
            return (of_task, x.hypergradient), x.memory.lasting

        data_axes = [task_axis(x) for x in batches]
        mapped = self._over_tasks(estimate, (0, *data_axes, 0))
        (of_tasks, hypergradients), lasting = mapped(rows_of(state), *batches, keys)
        inner, episode, train_report, val_report, diagnostics = of_tasks
        mean = lambda tree: jtu.tree_map(lambda x: jnp.mean(x, axis=0), tree)
        hypergradient, error = mean_and_error(hypergradients, self.tasks)
        return Estimate(
            inner=inner,
            memory=Memory((start, episode), lasting),
            hypergradient=hypergradient,
            train=(mean(train_report[0]), train_report[1]),
            val=(mean(val_report[0]), val_report[1]),
            diagnostics=TaskReport(error, diagnostics),
            error=error,
        )

    def _over_tasks(self, fn: Callable[..., Any], axes: tuple[int, ...]) -> Any:
        """Maps a function over the tasks. The function returns `(own, shared)`: a part
        that each task has for itself, and a part that is the same for all. `axes` are
        the axes of the tasks in its arguments."""
        if self.tasks > 1:
            in_axes = tuple(eqx.if_array(axis) for axis in axes)
            out_axes = (eqx.if_array(0), None)
            return eqx.filter_vmap(fn, in_axes=in_axes, out_axes=out_axes)

        def single(*args):
            # Not mapped, which would round products otherwise.
            firsts = [first_row(x, axis) for x, axis in zip(args, axes)]
            own, shared = fn(*firsts)
            return as_row(own), shared

        return single

    def _task_keys(self, key: Key) -> Shaped[Array, "tasks ..."] | None:
        """Makes a key for each task. A single task gets the key itself."""
        if key is None:
            return None
        return key[None] if self.tasks == 1 else jr.split(key, self.tasks)


def exact_over_tasks(
    learner: MetaLearner,
    state: BilevelState,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    keys: Keys,
    calls: int,
) -> Hyperparams:
    """Computes the mean over tasks of the exact hypergradient of `calls` calls of
    `step`. No episode ends within them."""
    _, state = without_shared(learner._start_episode_if_due(state))
    own = None if keys is None else jax.vmap(learner._task_keys)(keys)

    def exact(row, train, val, own):
        plain, single = learner.algorithm, with_rows(state, row)
        found = exact_hypergradient(plain, single, train, val, (keys, own), calls)
        return found, None

    batches = as_batches(train, "train", None), as_batches(val, "val", None)
    axes = (0, *[task_axis(x) for x in batches], 1)
    mapped = learner._over_tasks(exact, axes)
    hypergradients, _ = mapped(rows_of(state), *batches, own)
    return mean_and_error(hypergradients, learner.tasks)[0]


def discretised_over_tasks(
    learner: MetaLearner, state: BilevelState, val: AbstractBatches, key: Key
) -> Discretised:
    """Computes the mean over tasks of the losses with relaxed and with discrete
    hyperparameters."""
    _, state = without_shared(state)

    def compare(row, val, key):
        single = with_rows(state, row)
        found = compare_discretised(learner.problem, single, val, key)
        return (found.val_loss, found.relaxed_val_loss), found.values

    mapped = learner._over_tasks(compare, (0, task_axis(val), 0))
    losses, values = mapped(rows_of(state), val, learner._task_keys(key))
    return Discretised(values, *[jnp.mean(x) for x in losses])
