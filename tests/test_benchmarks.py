"""What the benchmarks count, as far as it is exact: flops and compilations. And the
parts of the comparison at equal cost: folds, gradients, early stopping, the best."""

import pathlib
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from .benchmarks import flops, overhead
from .benchmarks.generalisation import (
    overfitting,
    problems,
    recipe,
    rivals,
    task as tasks,
)


# Exact rules, finite differences.
LIMITS = {
    "weight decay": (1.03, 1.03),
    "sample weights": (1.30, 1.50),
    "input noise": (1.75, 1.90),
}


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="older XLA counts one percent more"
)
def test_flops_of_a_step():
    """Over those of one training and one validation gradient."""
    rules = [hpo.ForwardOverReverse(), hpo.FiniteDifference()]
    with jax.enable_x64(False):
        model = eqx.nn.MLP(784, 10, 256, 2, key=jr.key(0))
        got = list(flops.ratios(model, rules))
    assert len(got) == 6
    for name, rule, ratio, _ in got:
        assert 1 < ratio <= LIMITS[name][rules.index(rule)], (name, rule)


def test_many_short_episodes_compile_once():
    _, compilations = overhead.episodes()
    assert compilations == 1


def _kernel_task(features: int):
    return tasks.Task(
        name="kernel",
        make=lambda seed: tasks.Data((), (), (), ()),
        default={"log length": np.zeros(features), "log ridge": np.array(-2.0)},
        low={"log length": -3.0, "log ridge": -9.0},
        high={"log length": 3.0, "log ridge": 2.0},
        loss=problems._kernel_loss,
        report=lambda model, rows: jnp.zeros(2),
        metric="error",
        solve=problems._kernel_ridge,
    )


@pytest.mark.slow
def test_hypergradient_through_a_solve_is_that_of_cross_validation():
    with jax.enable_x64(True):
        task = _kernel_task(3)
        x = jr.normal(jr.key(0), (40, 3))
        pool = (x, jnp.sin(x[:, 0]) + 0.1 * x[:, 1] ** 2)
        data = tasks.Data((), (), pool, ())
        train, val = tasks.split(task, data, jr.key(1))
        ours = recipe.algorithm(task, recipe.SETTINGS["first"], 0.0)
        h = {"log length": jnp.array([0.1, -0.3, 0.5]), "log ridge": jnp.array(-2.0)}
        state = ours.init(jnp.zeros(()), h, train=jnp.zeros(10))
        got: Any = ours.compute_hypergradient(state, jnp.zeros(10), (train, val))

        @jax.jit
        def value(length):
            at = h | {"log length": length}
            return tasks.cross_validate(task, data, at, train, val, None)

        for i in range(3):
            step = 1e-5 * jnp.eye(3)[i]
            above, below = value(h["log length"] + step), value(h["log length"] - step)
            difference = (above - below) / 2e-5
            np.testing.assert_allclose(got["log length"][i], difference, rtol=1e-6)


def test_training_that_halts_early():
    task = tasks.Task(
        name="line",
        make=lambda seed: tasks.Data((), (), (), ()),
        default={"shift": np.zeros(1)},
        low={"shift": -1.0},
        high={"shift": 1.0},
        loss=lambda params, rows: jnp.sum(params),
        report=lambda params, rows: jnp.zeros(2),
        metric="error",
        train_loss=lambda params, h, train, key: 0.5 * jnp.sum(params**2),
        inner=optax.sgd(0.5),
        steps=4,
    )
    start = jnp.ones(1)
    args = (start, {}, None, jr.key(0))
    params, seen = tasks.follow(task, *args, 6, 3, lambda params: params[0])
    assert seen is not None
    assert params[0] == 0.5**3  # in binary without rounding
    assert list(seen) == [0.5, 0.25, 0.125, 0.125, 0.125, 0.125]
    assert tasks.fit(task, *args)[0] == 0.5**4


def test_grid_and_best_of():
    task = _kernel_task(2)
    points = rivals.grid(task, 9)
    assert points["log length"].shape == (9, 2)
    assert len(np.unique(points["log ridge"])) == 3
    values = jnp.array([[3.0, jnp.nan, 1.0, 0.0], [2.0, 1.0, 5.0, 0.0]])
    trials = ({"x": jnp.arange(8).reshape(2, 4)}, values)
    assert list(rivals.best_of(trials, 3)["x"]) == [2, 5]
    assert list(rivals.best_of(trials)["x"]) == [3, 7]


@pytest.mark.slow
def test_course_of_overfitting_begins_at_the_default(monkeypatch):
    """The first update of Adam is its rate, where the hypergradient is well above the
    `eps` of Adam."""
    monkeypatch.setattr(overfitting, "MARKS", (1,))
    with jax.enable_x64(False):
        x, y = jr.normal(jr.key(0), (50, 100)), jr.randint(jr.key(1), (50,), 0, 10)
        zeros = [(jnp.zeros((100, 10)), jnp.zeros(10))]
        data = tasks.Data(zeros, (), (x, y), (x, y))
        task = overfitting.make_task(pathlib.Path())
        for count in (1, overfitting.FOLDS):
            path, losses = overfitting.tune(task, count, 1.0, data, jr.key(2))
            moved = np.abs(path["log decay"][0] - task.default["log decay"])
            assert losses.shape == (1,) and 0 < losses[0] < 10
            assert np.max(moved) < 0.1001 and np.median(moved) > 0.09
