"""What ours is compared with. Each rival may train as often as ours does, counted in
"trainings": one training on each fold. The last training, on all data, is extra for
all. Functions return hyperparameters with a leading axis over the seeds.

- `shared`: one value for each group, by cross-validation over a grid.
- `random_trials`, `tpe_trials`: all hyperparameters in a box, by the same folds.
- `early`: the number of training steps at the default values, by the same folds.
- `reference`: one value for each group that is the best on the *tests* of other seeds,
  which costs more trainings than anybody else has, and needs those tests.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax

from .task import (
    cross_validate,
    Data,
    final,
    follow,
    grid,
    over_seeds,
    split,
    stack,
    Task,
)


LONGEST = 2  # trainings that early stopping may take


def keys(seeds) -> jax.Array:
    return jnp.stack([jr.key(seed) for seed in seeds])


def default(task: Task, count: int):
    return stack([task.default] * count)


def losses(task: Task, data: Data, points, key):
    """Those of cross-validation at some points."""
    train, val = split(task, data, key)
    return lax.map(lambda h: cross_validate(task, data, h, train, val, key), points)


def best(points, values):
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    return jtu.tree_map(lambda x: x[jnp.argmin(values)], points)


def shared(task: Task, datas: Data, ks, budget: int):
    points = grid(task, budget)
    choose = lambda data, key: best(points, losses(task, data, points, key))
    return over_seeds(choose, datas, ks)


def _uniform(task: Task, rng):
    draw = lambda k, v: rng.uniform(task.low[k], task.high[k], np.shape(v))
    return {k: draw(k, v).astype(v.dtype) for k, v in task.default.items()}


def random_trials(task: Task, datas: Data, ks, seeds, budget: int):
    """Points, and their losses, for each seed and trial."""
    rngs = [np.random.default_rng([seed, 1]) for seed in seeds]
    points = stack([stack([_uniform(task, r) for _ in range(budget)]) for r in rngs])
    evaluate = lambda data, key, points: losses(task, data, points, key)
    return points, over_seeds(evaluate, datas, ks, points)


def tpe_trials(task: Task, datas: Data, ks, seeds, budget: int):
    """The same of Optuna's sampler, which knows the losses of all trials before."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        f"{k} {i}": optuna.distributions.FloatDistribution(task.low[k], task.high[k])
        for k, v in task.default.items()
        for i in range(v.size)
    }
    sampler = lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True)
    studies = [optuna.create_study(sampler=sampler(seed)) for seed in seeds]

    def place(params):
        of = lambda k, v: [params[f"{k} {i}"] for i in range(v.size)]
        return {
            k: np.reshape(of(k, v), v.shape).astype(v.dtype)
            for k, v in task.default.items()
        }

    def evaluate(data, key, h):
        return losses(task, data, jtu.tree_map(lambda x: x[None], h), key)[0]

    run = jax.jit(lambda *args: lax.map(lambda x: evaluate(*x), args))
    points, values = [], []
    for _ in range(budget):
        trials = [study.ask(space) for study in studies]
        points.append(stack([place(trial.params) for trial in trials]))
        values.append(run(datas, ks, points[-1]))
        for study, trial, value in zip(studies, trials, values[-1]):
            study.tell(trial, float(value) if jnp.isfinite(value) else 1e9)
    swap = lambda x: jnp.swapaxes(x, 0, 1)
    return jtu.tree_map(swap, (stack(points), jnp.stack(values)))


def best_of(trials, count: int | None = None) -> Any:
    """The best of the first `count` trials of each seed."""
    return jax.vmap(best)(*jtu.tree_map(lambda x: x[:, :count], trials))


def early(task: Task, datas: Data, ks):
    """Reports on the test, after the number of steps that is best on the folds."""
    steps = LONGEST * task.steps
    h = jtu.tree_map(jnp.asarray, task.default)

    def one(data, key):
        def curve(train, val):
            watch = lambda params: task.loss(params, val)
            return follow(task, data.model, h, train, key, steps, watch=watch)[1]

        curves: Any = jax.vmap(curve)(*split(task, data, key))
        stop = 1 + jnp.argmin(jnp.mean(curves, axis=0))
        whole = (data.fixed, data.pool)
        model, _ = follow(task, data.model, h, whole, key, steps, stop)
        return task.report(model, data.test)

    return over_seeds(one, datas, ks)


def reference(task: Task, datas: Data, ks, count: int):
    points = grid(task, count)

    def one(data, key):
        return lax.map(lambda h: final(task, data, h, key)[0], points)

    figures = jnp.mean(over_seeds(one, datas, ks), axis=0)
    return best(points, figures if task.metric == "error" else -figures)
