import math
from typing import Any, ClassVar

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import optax
import pytest
from eqx_hpo import _diagnostics

from .helpers import hand_unrolled, relative_error
from .problems import logistic, ridge


STEPS = 4
OUTER = optax.adam(0.1)


@pytest.fixture(autouse=True)
def count_flops_once(request, monkeypatch):
    """They need a second compilation, so that a single test has them."""
    counted = (
        test_exact_algorithms_are_exact_however_they_cut_it,
        test_an_algorithm_with_its_own_init,
    )
    if request.function not in counted:
        monkeypatch.setattr(_diagnostics, "_LARGEST_UNROLL", 0)


def _compare(algorithms, case=None, train=None, val=None, **kwargs):
    case = logistic() if case is None else case
    train = case.train if train is None else train
    val = case.val if val is None else val
    kwargs = {"key": None, "repeats": 1, **kwargs}
    return hpo.compare_hypergradients(
        algorithms, case.model, case.hyperparams, train, val, **kwargs
    )


def _algorithms(inner, problem):
    args = (problem, inner, OUTER)
    return {
        "one step": hpo.T1T2(*args),
        "exact": hpo.Unrolled(*args, inner_steps=STEPS),
        "forward": hpo.ForwardMode(*args, inner_steps=2),
        "greedy": hpo.Greedy(*args, inner_steps=STEPS),
    }


@pytest.mark.slow
def test_exact_algorithms_are_exact_however_they_cut_it():
    case, inner = logistic(), optax.adam(0.1)
    got = _compare(_algorithms(inner, case.problem))
    rows = {row.name: row for row in got.rows}
    assert list(rows) == ["one step", "exact", "forward", "greedy"]
    for name in ("exact", "forward"):
        assert rows[name].relative_error < 1e-10
        assert math.isclose(rows[name].cosine, 1, rel_tol=1e-12)
    assert rows["one step"].relative_error > 0.1
    expected = hand_unrolled(
        case.problem, inner, case.model, case.hyperparams, case.train, case.val, STEPS
    )
    assert relative_error(got.exact, expected) < 1e-10
    for row in got.rows:
        assert row.seconds > 0 and row.flops > 0 and row.temporaries > 0
    table = str(got).splitlines()
    assert len(table) == 5 and table[2].startswith("exact")


def test_the_one_step_row_is_the_last_hypergradient_of_the_training():
    case, inner = ridge(), optax.sgd(0.1, momentum=0.9)
    algorithms = _algorithms(inner, case.problem)
    many = hpo.T1T2(case.problem, inner, OUTER, inner_steps=STEPS)
    got = _compare([algorithms["one step"], many], case)
    assert [row.name for row in got.rows] == ["T1T2 (1)", "T1T2 (2)"]
    first, second = got.rows
    assert math.isclose(first.cosine, second.cosine, rel_tol=1e-12)
    assert first.cosine < 0.999


@pytest.mark.slow
def test_random_losses_and_batches_have_a_reference_of_their_own():
    """Noise in the loss and batches drawn at random, which differ with how the
    training is cut into calls."""

    def train_loss(model, h, batch, key):
        x, y = batch
        noise = h["noise"] * jr.normal(key, x.shape)
        return jnp.mean(((x + noise) @ model - y) ** 2)

    def val_loss(model, h, batch, key):
        x, y = batch
        return jnp.mean((x @ model - y) ** 2)

    case, problem = ridge(), hpo.Problem(train_loss, val_loss)
    args = (problem, optax.sgd(0.05, momentum=0.5), OUTER)
    algorithms = [
        hpo.Unrolled(*args, inner_steps=STEPS),
        hpo.ForwardMode(*args),
        hpo.ForwardMode(*args, inner_steps=2),
    ]
    got = hpo.compare_hypergradients(
        algorithms,
        case.model,
        {"noise": hpo.Positive(0.3)},
        hpo.Minibatch(case.train, 4),
        hpo.Minibatch(case.val, 8),
        key=jr.key(0),
        repeats=1,
    )
    assert all(row.relative_error < 1e-10 for row in got.rows)


def test_central_differences_as_the_reference():
    case, inner = ridge(), optax.sgd(0.1)
    got = _compare(
        [hpo.Unrolled(case.problem, inner, OUTER, inner_steps=STEPS)],
        case,
        reference="differences",
    )
    assert 1e-13 < got.rows[0].relative_error < 1e-6


def test_in_the_middle_of_a_training():
    case, inner = ridge(), optax.sgd(0.1, momentum=0.9)
    algorithm = hpo.Unrolled(case.problem, inner, optax.set_to_zero(), inner_steps=3)
    state = algorithm.init(case.model, case.hyperparams)
    state = algorithm.step(state, case.train, case.val)
    got = hpo.compare_hypergradients(
        [algorithm],
        state.model,
        state.hyperparams,
        case.train,
        case.val,
        key=None,
        inner_opt_state=state.inner_opt_state,
        repeats=1,
    )
    expected = algorithm.compute_hypergradient(state, case.train, case.val)
    assert relative_error(got.exact, expected) < 1e-12
    assert got.rows[0].relative_error < 1e-12


@pytest.mark.slow
def test_schedules_and_implicit():
    case = ridge()
    penalties = jnp.stack([case.hyperparams["penalty"]] * 2)
    hyperparams = {"penalty": hpo.Schedule(penalties, every=2)}
    algorithm = hpo.ForwardMode(case.problem, optax.sgd(0.1), OUTER)
    longer = hpo.ForwardMode(case.problem, optax.sgd(0.1), OUTER, inner_steps=3)
    got = hpo.compare_hypergradients(
        [algorithm, longer],
        case.model,
        hyperparams,
        case.train,
        case.val,
        key=None,
        repeats=1,
    )
    assert all(row.relative_error < 1e-12 for row in got.rows)
    implicit = hpo.Implicit(
        case.problem, optax.sgd(0.3), OUTER, inner_steps=40, linear_solver=lx.LU()
    )
    got = _compare([implicit], case)
    assert 1e-9 < got.rows[0].relative_error < 0.1
    assert math.isnan(got.rows[0].flops)


def test_a_figure():
    case = ridge()
    got = _compare([hpo.T1T2(case.problem, optax.sgd(0.1), OUTER)], case)
    assert len(got.draw().axes) == 4


def test_a_step_that_is_skipped_is_not_a_number():
    case = ridge()
    got = _compare([hpo.T1T2(case.problem, optax.sgd(1e200), OUTER)], case)
    assert math.isnan(got.rows[0].cosine)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(inner_steps=3), "no multiple"),
        (dict(algorithms={}), "empty"),
        (dict(reference="exact"), "reference"),
        (dict(repeats=0), "`repeats`"),
    ],
)
def test_bad_arguments(change, match):
    case = ridge()
    args = (case.problem, optax.sgd(0.1), OUTER)
    algorithms = [
        hpo.T1T2(*args, inner_steps=4),
        hpo.T1T2(*args, inner_steps=change.pop("inner_steps", 2)),
    ]
    with pytest.raises((ValueError, TypeError), match=match):
        _compare(change.pop("algorithms", algorithms), case, **change)


def test_a_meta_learner_is_refused():
    case = ridge()
    plain = hpo.T1T2(case.problem, optax.sgd(0.1), OUTER)
    with pytest.raises(ValueError, match="what it wraps"):
        _compare([hpo.MetaLearner(plain, 2, horizon=2)], case)


def test_convolutions_are_unrolled_on_cpus():
    """Loops would make them slow."""

    def loss(model, h, batch, key):
        del key
        out = jax.lax.conv(batch, model, (1, 1), "SAME")
        return jnp.mean(out**2) + h * jnp.sum(model**2)

    problem = hpo.Problem(loss, lambda w, h, batch, key: jnp.sum((w - 1) ** 2))
    model, batch = jnp.ones((1, 1, 3, 3)), jnp.ones((2, 1, 5, 5))
    algorithm = hpo.Greedy(problem, optax.sgd(0.01), OUTER, inner_steps=3)
    state = algorithm.init(model, 0.1)
    rolled = hpo.Greedy(problem, optax.sgd(0.01), OUTER, inner_steps=3, unroll=1)
    for algorithm, loops in ((algorithm, False), (rolled, True)):
        step = lambda state: algorithm.step(state, batch, batch)
        assert ("stablehlo.while" in jax.jit(step).lower(state).as_text()) == loops


class _OwnInit(hpo.AbstractAlgorithm):
    """Has an `__init__` of its own, and so no `dataclasses.replace`."""

    problem: hpo.Problem
    inner: Any
    outer: Any
    second_order: hpo.AbstractSecondOrder
    inner_steps: int = eqx.field(static=True)
    unroll: int | None = eqx.field(static=True)
    through: ClassVar[Any] = "update"
    val_at_each_step: ClassVar[bool] = False

    def __init__(self, problem):
        self.problem = problem
        self.inner, self.outer = optax.sgd(0.1), optax.sgd(0.1)
        self.second_order = hpo.ReverseOverReverse()
        self.inner_steps, self.unroll = 3, None

    def init_memory(self, inner, hyperparams, batch):
        return hpo.Memory()

    def init_diagnostics(self):
        return None

    def estimate(self, levels, inner, hyperparams, memory):
        exact = hpo.Unrolled(self.problem, self.inner, self.outer, inner_steps=3)
        return exact.estimate(levels, inner, hyperparams, memory)


def test_an_algorithm_with_its_own_init():
    got = _compare([_OwnInit(ridge().problem)], ridge())
    assert got.rows[0].relative_error < 1e-12
    assert got.rows[0].flops > 0
