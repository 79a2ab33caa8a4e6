"""What a problem is, and plain training at fixed hyperparameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

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

    @property
    def closed(self) -> bool:
        return self.solve is not None


def folds(data: Any, count: int, *, repeats: int = 1, key: jax.Array):
    """A stand-in for `hpo.folds`: leading axis `count * repeats`; each row is held out
    once a repeat, and what does not divide stays in every train part."""
    rows = len(jtu.tree_leaves(data)[0])
    size = rows // count

    def split(key):
        order = jr.permutation(key, rows)
        held = order[: size * count].reshape(count, size)
        kept = jax.vmap(
            lambda i: jnp.delete(
                order, i * size + jnp.arange(size), assume_unique_indices=True
            )
        )(jnp.arange(count))
        return kept, held

    kept, held = jax.vmap(split)(jr.split(key, repeats))
    take = lambda i: jtu.tree_map(lambda x: x[i.reshape(-1, i.shape[-1])], data)
    return take(kept), take(held)


def split(data: Data, count: int, repeats: int, key: jax.Array):
    """The folds of a problem, `((fixed, part of the pool), held out)`."""
    kept, held = folds(data.pool, count, repeats=repeats, key=key)
    copy = lambda x: jnp.broadcast_to(x, (count * repeats, *x.shape))
    return (jtu.tree_map(copy, data.fixed), kept), held


def fit(task: Task, model: Any, h: Any, train: Any, key: jax.Array, marks=None):
    """Trains from the start at fixed hyperparameters. With `marks`, a function of the
    model, returns also what it says after each step."""
    if task.closed:
        assert task.solve is not None
        return task.solve(h, train)
    assert task.train_loss is not None
    grad = jax.grad(task.train_loss)

    def step(carry, i):
        params, state = carry
        updates, state = task.inner.update(
            grad(params, h, train, jr.fold_in(key, i)), state, params
        )
        params = optax.apply_updates(params, updates)
        return (params, state), None if marks is None else marks(params)

    start = (model, task.inner.init(model))
    (params, _), out = lax.scan(step, start, jnp.arange(task.steps))
    return params if marks is None else (params, out)


def cross_validate(task: Task, data: Data, h: Any, train: Any, val: Any, key):
    """The mean validation loss over the folds: one "training" in all counts of cost."""

    def one(train, val):
        return task.loss(fit(task, data.model, h, train, key), val)

    return jnp.mean(jax.vmap(one)(train, val))


def final(task: Task, data: Data, h: Any, key):
    """Trains on all data that are not for the test, and reports on the test."""
    model = fit(task, data.model, h, (data.fixed, data.pool), key)
    return task.report(model, data.test)
