"""What a problem is, and plain training at fixed hyperparameters."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax


class Data(NamedTuple):
    """`pool` is what folds are made of, `fixed` is in each train part, `test` is
    touched by nothing but the report. `model` is what training starts from."""

    model: Any
    fixed: Any
    pool: Any
    test: Any


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem. Hyperparameters are a dict of plain arrays without constraints, all in
    logarithms or logits; those of one array are of one kind, a group.

    Either `train_loss(model, h, (fixed, part of the pool), key)`, `inner` and `steps`
    say how a model is trained, or `solve(h, (fixed, part of the pool))` returns it.
    """

    name: str
    make: Callable[[int], Data]
    default: dict[str, np.ndarray]
    low: dict[str, float]
    high: dict[str, float]
    loss: Callable[[Any, Any], jax.Array]  # (model, rows): validation loss
    report: Callable[[Any, Any], jax.Array]  # (model, rows): [error, second figure]
    metric: str  # "error" is compared by ratios, "accuracy" by points
    train_loss: Callable[..., jax.Array] | None = None
    inner: Any = None
    steps: int = 0
    solve: Callable[[Any, Any], Any] | None = None
    axes: tuple[str, ...] | None = None  # the groups that a grid varies; all of them

    @property
    def closed(self) -> bool:
        return self.solve is not None

    @property
    def repeats(self) -> int:
        """How often the data are divided into folds: twice where that is cheap."""
        return 2 if self.closed else 1


def stack(trees) -> Any:
    return jtu.tree_map(lambda *x: jnp.stack([jnp.asarray(a) for a in x]), *trees)


def grid(task: Task, count: int) -> Any:
    """At most `count` points, one value for each group, evenly within the box."""
    axes = task.axes or tuple(task.default)
    first = max(1, math.ceil(count ** (1 / len(axes)))) if len(axes) > 1 else count
    sizes = [first, count // first][: len(axes)]
    ends = lambda k, n: np.linspace(task.low[k], task.high[k], n + 2)[1:-1]
    points = itertools.product(*[ends(k, n) for k, n in zip(axes, sizes)])
    return stack([fill(task, dict(zip(axes, point))) for point in points])


def fill(task: Task, values):
    """The default, with one value in all places of some of the groups."""
    full = lambda k, v: v if k not in values else np.full_like(v, values[k])
    return {k: full(k, v) for k, v in task.default.items()}


def over_seeds(fn: Callable[..., Any], *args: Any) -> Any:
    """Maps a function over the leading axis, one seed at a time."""
    return jax.jit(lambda args: lax.map(lambda x: fn(*x), args))(args)


FOLDS = 5


def split(task: Task, data: Data, key: jax.Array):
    """The folds of a problem, `((fixed, part of the pool), held out)`. Ours and all
    rivals have the same."""
    kept, held = hpo.folds(data.pool, FOLDS, repeats=task.repeats, key=key)
    copy = lambda x: jnp.broadcast_to(x, (FOLDS * task.repeats, *x.shape))
    return (jtu.tree_map(copy, data.fixed), kept), held


def fit(task: Task, model: Any, h: Any, train: Any, key: jax.Array) -> Any:
    """Trains from the start at fixed hyperparameters."""
    return follow(task, model, h, train, key, task.steps)[0]


def follow(
    task: Task,
    model: Any,
    h: Any,
    train: Any,
    key: jax.Array,
    steps: int,
    stop: Any = None,
    watch: Callable[[Any], Any] = lambda params: None,
) -> tuple[Any, Any]:
    """`fit` of so many steps that halts after `stop` of them, and what `watch` says of
    the model after each."""
    if task.solve is not None:
        return task.solve(h, train), None
    assert task.train_loss is not None
    grad = jax.grad(task.train_loss)

    def step(carry, i):
        params, state = carry
        updates, state = task.inner.update(
            grad(params, h, train, jr.fold_in(key, i)), state, params
        )
        moved = (optax.apply_updates(params, updates), state)
        if stop is not None:
            moved = jtu.tree_map(lambda a, b: jnp.where(i < stop, a, b), moved, carry)
        return moved, watch(moved[0])

    start = (model, task.inner.init(model))
    (params, _), out = lax.scan(step, start, jnp.arange(steps))
    return params, out


def fold_losses(task: Task, data: Data, h: Any, train: Any, val: Any, key):
    """The validation losses of the folds: one "training" in all counts of cost."""

    def one(train, val):
        return task.loss(fit(task, data.model, h, train, key), val)

    return jax.vmap(one)(train, val)


def cross_validate(*args):
    """Their mean."""
    return jnp.mean(fold_losses(*args))


def final(task: Task, data: Data, h: Any, key):
    """Trains on all data that are not for the test, and reports on the test."""
    model = fit(task, data.model, h, (data.fixed, data.pool), key)
    return task.report(model, data.test)
