"""What the benchmarks count, as far as it is exact: flops and compilations. The parts
of the comparison at equal cost: folds, gradients, early stopping, the best. And what
the published experiments stand on."""

import pathlib
import subprocess
import sys
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from docs.experiments.generalisation import (
    overfitting,
    problems,
    recipe,
    rivals,
    task as tasks,
)
from docs.experiments.published import cleaning, regression, unbiased
from jax import lax

from .benchmarks import flops, overhead
from .benchmarks.solvers import (
    by_hand,
    figure,
    problems as bilevel,
    runs,
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


@pytest.fixture
def whole(monkeypatch):
    """A problem and its draw, in double precision, with all data in each batch."""
    problem = bilevel.quadratics(n=32, size=4)
    monkeypatch.setattr(by_hand, "take", lambda data, key: data)
    monkeypatch.setattr(hpo, "Minibatch", lambda data, size: data)
    with jax.enable_x64(True):
        draw = problem.make(3, False)
        to_double = lambda x: jnp.asarray(x, jnp.float64)
        yield problem, jtu.tree_map(to_double, draw)


def _run(make, problem, draw, rates, updates):
    carry, step, read = make(problem, draw, by_hand.Rates(*rates))
    update = lambda carry, t: (step(carry, t, jr.key(0)), None)
    end = jax.jit(lambda carry: lax.scan(update, carry, jnp.arange(updates))[0])
    return read(end(carry))


def test_gradient_of_the_value_of_quadratics(whole):
    problem, draw = whole

    def value(lam):
        gradient = jax.grad(problem.train_loss)
        hessian = jax.jacobian(gradient)(draw.theta, lam, draw.train)
        at_zero = gradient(jnp.zeros(4), lam, draw.train)
        return problem.val_loss(-jnp.linalg.solve(hessian, at_zero), lam, draw.val)

    got = bilevel.value_gradient(draw, draw.lam[None])[0]
    for i, step in enumerate(1e-4 * jnp.eye(4)):
        difference = (value(draw.lam + step) - value(draw.lam - step)) / 2e-4
        np.testing.assert_allclose(got[i], difference, rtol=1e-6)


# Besides the rates, the distance that the bias of each leaves: that of the penalty
# falls with the strength, that of few terms of a series with their number.
SOLVED = {
    "SOBA": ((0.5, 0.3, 0.0, 0.0), 1e-9),
    "MA-SOBA": ((0.5, 0.3, 0.0, 0.1), 1e-9),
    "AmIGO": ((0.5, 0.3, 0.0, 0.0), 1e-9),
    "StocBiO": ((0.5, 0.3, 0.0, 0.0), 1e-9),
    "F2SA": ((0.5, 0.3, 0.0, 1e4), 1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVED)
def test_solvers_by_hand_reach_the_optimum(whole, monkeypatch, name):
    problem, draw = whole
    monkeypatch.setattr(by_hand, "STEPS", 500)
    rates, close = SOLVED[name]
    _, lam = _run(runs.RIVALS[name].make, problem, draw, rates, 2000)
    start, end = bilevel.value_gradient(draw, jnp.stack([draw.lam, lam]))
    assert np.linalg.norm(end) < close * np.linalg.norm(start)


@pytest.mark.parametrize("name", runs.PAIRS)
def test_ours_is_the_mathematics_of_its_rival(whole, name):
    problem, draw = whole
    rates = (0.3, 0.2, 0.5, 0.4)
    solvers = runs.OURS[name], runs.RIVALS[runs.PAIRS[name]]
    got, expected = (_run(x.make, problem, draw, rates, 5) for x in solvers)
    for left, right in zip(got, expected):
        np.testing.assert_allclose(left, right, rtol=1e-9)


def test_reading_of_curves():
    falls = [[16.0, 8.0, 4.0, 2.0, *[1.0] * 21]] * 2
    late = [[16.0, 16.0, 8.0, 4.0, 2.0, *[1.0] * 20]] * 2
    curves = {name: np.array(x)[..., None] for name, x in zip("ab", (falls, late))}
    calls = {name: list(range(25)) for name in "ab"}
    row = {"curves": curves, "calls": calls, "log": True}
    assert figure.end(row, "a", 0) == (1.0, 0.0)
    np.testing.assert_allclose(figure.mean_curve(row, "a", 0)[3], 2**2.5)
    assert [figure.reached(row, name, 1.0, 0) for name in "ab"] == [7, 8]
    assert figure.reached(row, "a", 0.5, 0) == np.inf
    assert figure.best(row, ["b", "c"], 0) == "b"


def test_without_mnist_the_data_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"mnist\.npz is missing: data cleaning needs"):
        bilevel.cleaning(tmp_path, 0.5).make(0, False)


@pytest.mark.slow
def test_the_whole_benchmark_on_a_small_problem(tmp_path):
    problem = bilevel.quadratics(n=64, size=4, budget=200)
    names = ["SOBA", "hpo.SOBA"]
    with jax.enable_x64(False):
        row = runs.run(problem, names, range(2), 2)
    assert np.shape(row["curves"]["hpo.SOBA"]) == (2, runs.MARKS + runs.AFTER + 1, 1)
    assert all(x > 0 for x in row["seconds"]["hpo.SOBA"])
    figure.draw([row], str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_windows_add_up_to_the_objective():
    """And its derivative by hand is that of the library through all steps."""
    with jax.enable_x64(True):
        start = jnp.array([-1.0, 0.5])
        algorithm = hpo.Unrolled(
            unbiased.make_problem(unbiased.STEPS),
            unbiased.inner,
            optax.set_to_zero(),
            inner_steps=unbiased.STEPS,
        )
        point, seen = eqx.nn.make_with_state(unbiased.Point)()
        rates = tuple(hpo.Positive(jnp.exp(x)) for x in start)
        state = algorithm.init(point, rates, model_state=seen)
        got = algorithm.compute_hypergradient(state, None, None)
        got = jnp.stack([h.raw for h in got])
        value, slope = jax.value_and_grad(unbiased.whole)(start)
        np.testing.assert_allclose(got, slope, rtol=1e-9)
        total, window = 0.0, unbiased.algorithms(1, 0.1)["T1T2"]
        window = eqx.tree_at(lambda x: x.outer, window, optax.set_to_zero())
        state = window.init(point, rates, model_state=seen)
        for _ in range(unbiased.STEPS // unbiased.WINDOW):
            state = window.step(state, None, None)
            total += state.metrics.val_loss
        np.testing.assert_allclose(total, value, rtol=1e-12)


def test_half_of_the_labels_are_drawn():
    data = cleaning.load(None, 0)
    assert data.clean.sum() == 30
    true = np.random.default_rng(0).integers(0, 10, 220)
    changed = np.asarray(data.train[1]) != true[:60]
    assert not changed[data.clean].any() and changed.sum() > 20
    assert (np.asarray(data.test[1]) == true[120:]).all()
    assert cleaning.detection([1.0, 2.0, -1.0, 0.5], np.array([1, 1, 0, 0])) == (80, 1)


def test_failed_runs_count_as_infinite():
    errors, ok = np.array([3.0, np.nan, 1.0, 2.0, 1.0]), np.array([1, 0, 1, 0, 1]) > 0
    found = regression.report(regression.Result(errors, ok, {}), scale=2.0)
    assert found["failed"] == 2 and found["best"] == 4
    assert found["mean"][0] == pytest.approx(20 / 3)
    assert found["median"][0] == 12


def test_rows_of_a_regression_are_standard_without_the_test():
    data = regression.load("none", None)
    for rows in data.both:
        np.testing.assert_allclose(np.mean(rows, 0), 0, atol=1e-6)
        np.testing.assert_allclose(np.std(rows, 0, ddof=1), 1, rtol=1e-5)
    assert [len(x[0]) for x in data[:4]] == [80, 20, 100, 20]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unbiased", "regression", "cleaning"])
def test_published_experiments_run(name):
    command = [
        sys.executable,
        "-m",
        "docs.experiments.published",
        name,
        "--quick",
    ]
    root = pathlib.Path(__file__).parent.parent
    subprocess.run(command, check=True, cwd=root, capture_output=True)
