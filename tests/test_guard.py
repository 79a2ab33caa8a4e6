"""What a step writes into the state: everything, or nothing."""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import pytest
from eqx_hpo import _misc
from eqx_hpo._optimizer import guard

from .helpers import ALGORITHMS, arrays, equal
from .problems import ridge


def _kept(before, after) -> bool:
    """Whether `after` is `before` but for the counters and the report."""
    parts = lambda s: (
        s.model, s.hyperparams, s.inner_opt_state, s.outer_opt_state, s.memory,
        s.model_state, s.episode_step,
    )  # fmt: skip
    return (
        equal(parts(before), parts(after))
        and int(after.step) == int(before.step) + 1
        and int(after.skipped) == int(before.skipped) + 1
    )


QUICK = [("t1t2", "train"), ("greedy_3", "val"), ("hyperdistill", "train")]


@pytest.mark.parametrize(
    "name, bad",
    [
        pytest.param(name, bad, marks=[] if (name, bad) in QUICK else pytest.mark.slow)
        for name in ALGORITHMS
        for bad in ("train", "val")
    ],
)
def test_data_that_are_not_finite_change_nothing(name, bad):
    case = ridge()
    algorithm = ALGORITHMS[name](case.problem, optax.adam(0.1), optax.adam(0.1))
    state = algorithm.init(case.model, case.hyperparams, train=case.train)
    state = algorithm.step(state, case.train, case.val)
    assert int(state.skipped) == 0
    data = {"train": case.train, "val": case.val}
    data[bad] = jtu.tree_map(lambda x: x * jnp.nan, data[bad])
    after = algorithm.step(state, data["train"], data["val"])
    assert _kept(state, after)
    again = algorithm.step(after, case.train, case.val)
    assert int(again.skipped) == 0
    taken = algorithm.inner_steps
    assert int(again.episode_step) == 2 * taken and int(again.step) == 3


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Large states go another way than small ones, to the same end."""
    if request.param == "large":
        monkeypatch.setattr(guard, "_LARGE", 0)
        monkeypatch.setattr(_misc, "_FEW", 0)


def _quadratic(w, h, batch, key):
    return jnp.sum((w * batch - h) ** 2)


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_a_second_moment_that_overflows_is_not_kept(where, size):
    """All losses and gradients are finite, and the parameters do not move by more than
    a rate: only the optimiser's state would be infinite, and freeze the run."""
    scale = jnp.float32(1e25)
    problem = hpo.Problem(
        _quadratic,
        lambda w, h, b, key: 1e10 * jnp.sum(w) + jnp.sum(h) * jnp.max(b),
    )
    adam = lambda is_it: optax.adam(0.1) if is_it else optax.sgd(1e-30)
    algorithm = hpo.FirstOrder(
        problem, adam(where == "inner"), adam(where == "outer"), inner_steps=1
    )
    one = jnp.ones(2, jnp.float32)
    state = algorithm.init(one, one)
    train, val = (1e12 * one, one) if where == "inner" else (one, scale * one)
    after = algorithm.step(state, train, val)
    reports = after.metrics
    assert jnp.isfinite(reports.train_loss) and jnp.isfinite(reports.val_loss)
    assert jnp.isfinite(reports.hypergradient_norm)
    assert _kept(state, after)
    fine = algorithm.step(after, one, one)
    assert int(fine.skipped) == 0
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in arrays(fine.outer_opt_state))


def test_a_statistic_that_overflows_is_not_kept():
    """The running variance of the model's state becomes infinite, nothing else."""

    def train_loss(model, h, batch, key):
        (w, variance), squares = model, jnp.mean(batch**2)
        loss = jnp.sum((w - h) ** 2) + 0 * jnp.sum(jnp.tanh(batch))
        return loss, 0.9 * variance + 0.1 * squares

    def val_loss(model, h, batch, key):
        return jnp.sum((model[0] - batch) ** 2)

    algorithm = hpo.T1T2(
        hpo.Problem(train_loss, val_loss), optax.sgd(0.1), optax.sgd(0.1)
    )
    one = jnp.ones(2, jnp.float32)
    state = algorithm.init(one, one, model_state=jnp.array(1.0, jnp.float32))
    after = algorithm.step(state, 1e30 * one, one)
    assert jnp.isfinite(after.metrics.train_loss)
    assert _kept(state, after)
    assert int(algorithm.step(after, one, one).skipped) == 0


class _Counts(hpo.AbstractAlgorithm):
    """T1T2 with a memory that doubles at each step."""

    problem: hpo.Problem
    inner: Any
    outer: optax.GradientTransformation
    second_order: hpo.AbstractSecondOrder = hpo.ReverseOverReverse()
    inner_steps: int = eqx.field(static=True, default=1)
    unroll: int | None = eqx.field(static=True, default=None)
    through: ClassVar[Any] = "update"
    val_at_each_step: ClassVar[bool] = False

    def init_memory(self, inner, hyperparams, batch):
        return hpo.Memory(lasting=jnp.array(1e38, jnp.float32))

    def init_diagnostics(self):
        return None

    def estimate(self, levels, inner, hyperparams, memory):
        first = jnp.array(0)
        inner, pullback, train = levels.advance(inner, hyperparams, first)
        val, alpha, direct = levels.validation_gradient(inner, hyperparams, first)
        total = jtu.tree_map(jnp.add, direct, pullback(alpha))
        memory = hpo.Memory(lasting=2 * memory.lasting)
        return hpo.Estimate(inner, memory, total, train, val)


def test_a_memory_that_overflows_is_not_kept():
    case = ridge()
    algorithm = _Counts(case.problem, optax.sgd(0.1), optax.sgd(0.1))
    state = algorithm.init(case.model, case.hyperparams)
    state = algorithm.step(state, case.train, case.val)
    assert int(state.skipped) == 0 and state.memory.lasting == 2e38
    assert _kept(state, algorithm.step(state, case.train, case.val))


def test_an_infinity_that_stays_is_none_of_a_steps_making(size):
    """A mask inside the model, and the start of a running minimum."""

    def train_loss(model, h, batch, key):
        (weights, least), mask = model, jax.lax.stop_gradient(model[0]["mask"])
        shares = jax.nn.softmax(weights["w"] + mask)
        loss = jnp.sum((shares - batch) ** 2) + h * jnp.sum(weights["w"] ** 2)
        return loss, jnp.where(jnp.max(batch) > 5, loss, least)

    def val_loss(model, h, batch, key):
        return jnp.sum((model[0]["w"] - batch) ** 2)

    problem = hpo.Problem(train_loss, val_loss)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1))
    model = {"w": jnp.ones(3), "mask": jnp.array([0.0, 0.0, -jnp.inf])}
    state = algorithm.init(model, jnp.array(0.1), model_state=jnp.array(jnp.inf))
    after = algorithm.step(state, jnp.ones(3), jnp.ones(3))
    assert int(after.skipped) == 0
    assert equal(after.model["mask"], model["mask"]) and jnp.isinf(after.model_state)
    after = algorithm.step(after, 6 * jnp.ones(3), jnp.ones(3))
    assert int(after.skipped) == 0 and jnp.isfinite(after.model_state)


@ft.cache
def _outer_updates():
    return {
        "adam": optax.adam(0.1),
        "top_k": optax.chain(optax.adam(0.1), hpo.select_top_k(2)),
    }


@pytest.mark.parametrize("name", ["adam", "top_k"])
def test_an_update_that_overflows_is_not_kept(name, size):
    """Whether it is computed once, since it loops, or twice."""
    blow_up = optax.stateless(
        lambda updates, _: jtu.tree_map(lambda x: 1e38 * jnp.sign(x), updates)
    )
    outer = optax.chain(_outer_updates()[name], blow_up, optax.scale(10.0))
    algorithm = hpo.T1T2(ridge().problem, optax.sgd(0.1), outer)
    cast = lambda tree: jtu.tree_map(lambda x: x.astype(jnp.float32), tree)
    model, hyperparams, train, val = cast(
        (ridge().model, ridge().hyperparams, ridge().train, ridge().val)
    )
    state = algorithm.init(model, hyperparams)
    after = algorithm.step(state, train, val)
    assert jnp.isfinite(after.metrics.hypergradient_norm)
    assert _kept(state, after)


def test_a_hypergradient_that_is_not_finite_is_not_kept(size):
    """Even if the losses are finite, and what the outer optimiser makes of it."""
    loss = lambda w, h, batch, key: jnp.sum((w - h) ** 2)
    steep = lambda w, h, batch, key: jnp.sum(jnp.sqrt(h - 1))
    signs = optax.stateless(lambda updates, _: jtu.tree_map(jnp.sign, updates))
    outer = optax.chain(signs, optax.sgd(0.1))
    algorithm = hpo.FirstOrder(hpo.Problem(loss, steep), optax.sgd(0.1), outer)
    state = algorithm.init(jnp.zeros(4), jnp.ones(4))
    after = algorithm.step(state, None, None)
    assert jnp.isfinite(after.metrics.val_loss)
    assert _kept(state, after)


def test_noise_of_a_skipped_step_is_not_kept():
    loss = lambda w, h, batch, key: jnp.sum((w - h) ** 2) * batch
    algorithm = hpo.T1T2(hpo.Problem(loss, loss), optax.sgd(0.1), optax.sgd(0.1))
    state = algorithm.init(jnp.ones(3), hpo.Choice(3, sample=True))
    one, bad = jnp.array(1.0), jnp.array(jnp.nan)
    assert _kept(state, algorithm.step(state, bad, one, key=jr.key(0)))
    after = algorithm.step(state, one, one, key=jr.key(0))
    assert jnp.any(after.hyperparams.noise != state.hyperparams.noise)


def test_the_norm_reported_is_finite_where_its_square_is_not(size):
    loss = lambda w, h, batch, key: jnp.sum((w - h) ** 2)
    steep = lambda w, h, batch, key: 1e25 * jnp.sum(h)
    algorithm = hpo.FirstOrder(
        hpo.Problem(loss, steep), optax.sgd(0.1), optax.sgd(1e-30)
    )
    one = jnp.ones(4, jnp.float32)
    after = algorithm.step(algorithm.init(one, one), None, None)
    assert int(after.skipped) == 0
    assert jnp.allclose(after.metrics.hypergradient_norm, 2e25, rtol=1e-6)


def test_large_states_take_the_steps_of_small_ones(monkeypatch):
    loss = lambda w, h, batch, key: (
        jnp.sum((w - batch) ** 2)
        + jnp.sum(h["rate"] * h["bound"] * (h["choice"] @ jnp.arange(3.0)) * w**2)
    )
    goal = lambda w, h, batch, key: jnp.sum((w - 2 * batch) ** 2)
    hyperparams = {
        "rate": hpo.Positive(jnp.linspace(0.1, 0.2, 4)),
        "bound": hpo.Interval(jnp.linspace(0.1, 0.2, 4), 0.0, 1.0),
        "choice": hpo.Choice(3, sample=True),
    }

    def run():
        problem = hpo.Problem(loss, goal)
        algorithm = hpo.T1T2(problem, optax.sgd(0.01), optax.adam(0.1), inner_steps=3)
        state = algorithm.init(jnp.ones(4), hyperparams)
        for i in range(3):
            state = algorithm.step(state, jnp.arange(4.0), jnp.ones(4), key=jr.key(i))
        assert int(state.skipped) == 0
        return arrays(state)

    small = run()
    monkeypatch.setattr(guard, "_LARGE", 0)
    monkeypatch.setattr(_misc, "_FEW", 0)
    for x, y in zip(small, run(), strict=True):
        assert jnp.allclose(x, y, rtol=1e-12, atol=0, equal_nan=True)


def test_large_states_without_overflow_go_on(size):
    case = ridge()
    algorithm = hpo.T1T2(case.problem, optax.adam(0.1), optax.adam(0.1))
    state = algorithm.init(case.model, case.hyperparams)
    for _ in range(3):
        state = algorithm.step(state, case.train, case.val)
    assert int(state.skipped) == 0 and int(state.episode_step) == 3
    assert jnp.all(state.hyperparams["penalty"] != case.hyperparams["penalty"])
