"""Learning across tasks: hyperparameters and an initialisation that tasks share."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ._custom_types import Batch, Hyperparams, InnerOptimiser, Model, Through
from ._inner import inner_init
from ._levels import Levels
from ._misc import match_dtypes
from ._optimizer import AbstractBilevelOptimizer
from ._optimizer.checks import as_share, check_positive_int
from ._problem import Problem
from ._second_order import AbstractSecondOrder
from ._state import BilevelState, Estimate, InnerState, Memory
from ._tasks import (
    AXIS,
    check_task_axis,
    first_batches,
    first_task,
    replicate,
    task_axis,
    task_keys,
)
from ._windows import at_start


class _Start(eqx.Module):
    """Where the tasks start from: `inner` is the inner state of a single one, without
    the optimiser's; `known` tells whether an episode has begun."""

    inner: InnerState
    known: Bool[Array, ""]


class MetaLearner(AbstractBilevelOptimizer):
    r"""Runs an algorithm on many tasks at once, which share the hyperparameters and
    where they start from.

    Each task has its own weights, inner optimiser state and batches, with a leading
    axis for the tasks in `state.model`, in `train` and in `val`. The hypergradient is
    the mean over the tasks. The loss is that of a single task, and so is the model
    that `init` and `restart` take: the initialisation. A task has its own
    [`eqx_hpo.Minibatch`][] by `eqx.filter_vmap(lambda x: hpo.Minibatch(x, 8))(data)`;
    in [`eqx_hpo.Stacked`][] the axis of the tasks comes after that of the inner steps.

    ```python
    optimizer = hpo.MetaLearner(
        hpo.HyperDistill(problem, inner, outer, horizon=30), tasks=10, horizon=30
    )
    state = optimizer.init(model, hyperparams, train=train, val=val)
    ```

    An episode takes `horizon` inner steps from the shared initialisation $\phi$, with
    an update of the hyperparameters after each `inner_steps` of them. When the next
    step begins, Reptile moves the initialisation towards the mean of the trained
    weights, $\phi \leftarrow \phi - \eta (\phi - \bar\theta_T)$, and all tasks start
    there anew, the inner optimiser and the memory of the episode included. New tasks
    are for the caller to give, once an episode: `state.step` counts the calls. The
    outer optimiser goes on.

    The axis of the tasks may be sharded over devices.

    ??? cite "References"

        Lee et al., *Online Hyperparameter Meta-Learning with Hypergradient
        Distillation*, ICLR 2022, algorithm 3. Nichol et al., *On First-Order
        Meta-Learning Algorithms*, 2018 (Reptile).
    """

    optimizer: AbstractBilevelOptimizer
    tasks: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)
    reptile: Float[Array, ""]
    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder
    inner_steps: int = eqx.field(static=True)
    unroll: int | None = eqx.field(static=True)
    sharing: int | None = eqx.field(static=True)
    through: Through = eqx.field(static=True)
    val_at_each_step: bool = eqx.field(static=True)

    def __init__(
        self,
        optimizer: AbstractBilevelOptimizer,
        tasks: int,
        *,
        horizon: int,
        reptile: float | Float[Array, ""] | None = 1.0,
    ):
        r"""**Arguments:**

        - `optimizer`: the algorithm that each task runs, with its losses and its
            optimisers.
        - `tasks`: the number of tasks.
        - `horizon`: the number of inner steps in an episode, a multiple of the
            `inner_steps` of `optimizer`. With the same number of `inner_steps` the
            hyperparameters move once an episode.
        - `reptile`: the rate $\eta$ of the initialisation, from 0 to 1. With 0 or
            `None` all episodes start from the model given to `init`: better where
            tasks have little in common but the hyperparameters, as classes in random
            order.
        """
        check_positive_int("tasks", tasks)
        check_positive_int("horizon", horizon)
        if optimizer.tasks is not None:
            raise ValueError("`optimizer` is a `MetaLearner` already.")
        if horizon % optimizer.inner_steps != 0:
            raise ValueError(
                "`horizon` must be a multiple of the inner steps in a call of `step`, "
                f"{optimizer.inner_steps}; got {horizon}."
            )
        self.optimizer = optimizer
        self.tasks = tasks
        self.horizon = horizon
        self.reptile = as_share("reptile", 0.0 if reptile is None else reptile)
        self.problem = optimizer.problem
        self.inner = optimizer.inner
        self.outer = optimizer.outer
        self.second_order = optimizer.second_order
        self.inner_steps = optimizer.inner_steps
        self.unroll = optimizer.unroll
        self.sharing = optimizer.sharing
        self.through = optimizer.through
        self.val_at_each_step = optimizer.val_at_each_step

    def initialisation(self, state: BilevelState) -> Model:
        r"""The shared initialisation $\phi$ of a state: a single model, the one from
        which the next step starts if it starts an episode, and else the one from which
        this episode started.

        **Arguments:**

        - `state`: from `init` or `step`.
        """
        trained = InnerState(
            eqx.filter(state.model, eqx.is_inexact_array), None, state.model_state
        )
        due = state.step * self.inner_steps % self.horizon == 0
        start, _ = self._start(state.memory.episode[0], trained, due)
        frozen = eqx.filter(state.model, eqx.is_inexact_array, inverse=True)
        return eqx.combine(start.inner.params, first_task(frozen, self.tasks))

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        memory = self.optimizer.init_memory(inner, hyperparams, batch)
        start = dataclasses.replace(inner, opt_state=None)
        start = jtu.tree_map(jnp.zeros_like, _Start(start, jnp.array(False)))
        episode = (start, replicate(memory.episode, self.tasks))
        return Memory(episode=episode, lasting=memory.lasting)

    def init_diagnostics(self) -> PyTree:
        return self.optimizer.init_diagnostics()

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        check_task_axis("train", levels.train, self.tasks)
        check_task_axis("val", levels.val, self.tasks)
        start, past = memory.episode
        due = levels.position % self.horizon == 0
        start, restarts = self._start(start, inner, due)

        def restart():
            params, model_state = replicate(
                (start.inner.params, start.inner.model_state), self.tasks
            )
            first = at_start(hyperparams, self.sharing)
            opt_state = inner_init(self.inner, self.tasks, first)(params)
            fresh = match_dtypes(InnerState(params, opt_state, model_state), inner)
            return fresh, jtu.tree_map(jnp.zeros_like, past)

        inner, past = lax.cond(restarts, restart, lambda: (inner, past))
        memory = Memory(past, memory.lasting)
        estimate = self._mean_estimate(levels, inner, hyperparams, memory)
        memory = Memory((start, estimate.memory.episode), estimate.memory.lasting)
        return dataclasses.replace(estimate, memory=memory)

    def _start(self, start, inner, due):
        """Where this episode starts from, and whether it does so right now."""
        trained = dataclasses.replace(inner, opt_state=None)
        known = start.known

        def move(old, new):
            if not eqx.is_inexact_array(new):
                return jnp.where(known, old, new[0])
            moved = old - self.reptile.astype(old.dtype) * (old - jnp.mean(new, axis=0))
            return jnp.where(known, jnp.where(due, moved, old), new[0])

        now = jtu.tree_map(move, start.inner, trained)
        return _Start(now, jnp.array(True)), known & due

    def _mean_estimate(self, levels, inner, hyperparams, memory):
        def estimate(task, train, val, axis: str | None = AXIS):
            frozen, key, inner, episode = task
            of_task = dataclasses.replace(
                levels, frozen=frozen, train=train, val=val, key=key, axis=axis
            )
            x = self.optimizer.estimate(
                of_task, inner, hyperparams, Memory(episode, memory.lasting)
            )
            (train_loss, train_aux), (val_loss, val_aux) = x.train, x.val
            means = of_task.mean_over_tasks((x.hypergradient, train_loss, val_loss))
            own = (x.inner, x.memory.episode, train_aux, val_aux, x.diagnostics)
            return own, (x.memory.lasting, means)

        keys = task_keys(levels.key, self.tasks)
        task = (levels.frozen, keys, inner, memory.episode)
        if self.tasks == 1:
            # Nothing is mapped: it would change the rounding.
            batches = (first_batches(x, 1) for x in (levels.train, levels.val))
            own, shared = estimate(first_task(task, 1), *batches, axis=None)
            own = replicate(own, 1)
        else:
            axes = [eqx.if_array(task_axis(x)) for x in (levels.train, levels.val)]
            own, shared = eqx.filter_vmap(
                estimate,
                in_axes=(eqx.if_array(0), *axes),
                out_axes=(eqx.if_array(0), None),
                axis_name=AXIS,
            )(task, levels.train, levels.val)
        inner, episode, train_aux, val_aux, diagnostics = own
        lasting, (hypergradient, train_loss, val_loss) = shared
        return Estimate(
            inner=inner,
            memory=Memory(episode, lasting),
            hypergradient=hypergradient,
            train=(train_loss, train_aux),
            val=(val_loss, val_aux),
            diagnostics=diagnostics,
        )
