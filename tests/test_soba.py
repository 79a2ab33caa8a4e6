"""SOBA and MA-SOBA against hand-written ones, and against the closed form."""

import functools as ft

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import pytest

from .helpers import equal, relative_error, RULES
from .problems import quadratic, ridge


HOLD = optax.set_to_zero()
SGD = optax.sgd(0.1)
RATES = {"train": 0.1, "linear": 0.05, "outer": 0.2}


def _losses(weights, batch):
    x, y = batch
    return (jnp.tanh(x @ weights["first"]) @ weights["last"] - y) ** 2


def _train_loss(weights, h, batch, key):
    decay = jnp.exp(h["decay"]) * sum(jnp.sum(x**2) for x in weights.values())
    return jnp.mean(h["share"] * _losses(weights, batch)) + decay


def _val_loss(weights, h, batch, key):
    return jnp.mean(_losses(weights, batch)) + 0.1 * h["decay"] ** 2


PROBLEM = hpo.Problem(_train_loss, _val_loss)


@ft.cache
def _start():
    keys = jr.split(jr.key(0), 4)
    weights = {"first": jr.normal(keys[0], (3, 4)), "last": jr.normal(keys[1], (4,))}
    hyperparams = {
        "decay": jnp.array(-3.0),
        "share": hpo.Interval(jnp.full(8, 0.4), 0.0, 1.0),
    }
    batches = [
        (jr.normal(keys[i], (100, 8, 3)), jr.normal(keys[i], (100, 8))) for i in (2, 3)
    ]
    return weights, hyperparams, *batches


def _by_hand(steps, averaging):
    """The equations (5) to (7) of the paper, on the `raw` arrays."""
    weights, hyperparams, trains, vals = _start()
    raw = {"decay": hyperparams["decay"], "share": hyperparams["share"].raw}

    def losses(weights, raw, train, val):
        h = {"decay": raw["decay"], "share": jax.nn.sigmoid(raw["share"])}
        return _train_loss(weights, h, train, None), _val_loss(weights, h, val, None)

    @jax.jit
    def step(weights, v, raw, average, train, val):
        inner = lambda w, r: losses(w, r, train, val)[0]
        outer = lambda w, r: losses(w, r, train, val)[1]
        gradient = jax.grad(inner)(weights, raw)
        along = jax.jvp(lambda w: jax.grad(inner)(w, raw), (weights,), (v,))[1]
        dot = lambda r: sum(
            jnp.vdot(x, y)
            for x, y in zip(
                jtu.tree_leaves(jax.grad(inner)(weights, r)), jtu.tree_leaves(v)
            )
        )
        alpha, direct = jax.grad(outer, (0, 1))(weights, raw)
        estimate = jtu.tree_map(jnp.add, direct, jax.grad(dot)(raw))
        if averaging > 0:
            mix = lambda h, d: (1 - averaging) * h + averaging * d
            average = jtu.tree_map(mix, average, estimate)
        else:
            average = estimate
        move = lambda rate: lambda x, d: x - rate * d
        return (
            jtu.tree_map(move(RATES["train"]), weights, gradient),
            jtu.tree_map(move(RATES["linear"]), v, jtu.tree_map(jnp.add, along, alpha)),
            jtu.tree_map(move(RATES["outer"]), raw, average),
            average,
        )

    v, average = jtu.tree_map(jnp.zeros_like, (weights, raw))
    for i in range(steps):
        batch = jtu.tree_map(lambda x: x[i], (trains, vals))
        weights, v, raw, average = step(weights, v, raw, average, *batch)
    return weights, v, raw


def _algorithm(averaging=0.0, rule=None):
    args = (PROBLEM, optax.sgd(RATES["train"]), optax.sgd(RATES["outer"]))
    return hpo.SOBA(
        *args,
        rule or hpo.ForwardOverReverse(),
        linear_rate=RATES["linear"],
        averaging=averaging,
    )


@pytest.mark.parametrize("averaging", [0.0, 0.3, 1.0])
def test_equals_a_hand_written_one_over_100_stochastic_steps(averaging):
    weights, hyperparams, trains, vals = _start()
    algorithm = _algorithm(averaging)
    state = algorithm.init(weights, hyperparams)
    for i in range(100):
        batch = jtu.tree_map(lambda x: x[i], (trains, vals))
        state = algorithm.step(state, *batch)
    expected = _by_hand(100, averaging)
    raw = {
        "decay": state.hyperparams["decay"],
        "share": state.hyperparams["share"].raw,
    }
    got = (state.model, state.memory.episode, raw)
    assert int(state.total_skipped) == 0
    for x, y in zip(got, expected):
        assert relative_error(x, y) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_both_products(rule):
    weights, hyperparams, trains, vals = _start()
    batch = jtu.tree_map(lambda x: x[0], (trains, vals))
    states = []
    for choice in (RULES[rule], hpo.ReverseOverReverse()):
        algorithm = _algorithm(rule=choice)
        state = algorithm.init(weights, hyperparams)
        for _ in range(3):
            state = algorithm.step(state, *batch)
        states.append((state.model, state.memory.episode, state.hyperparams))
    limit = 1e-5 if rule == "finite_difference" else 1e-13
    assert relative_error(*states) < limit


@pytest.mark.parametrize("make", [ridge, quadratic])
def test_tends_to_the_closed_form(make):
    case = make()
    algorithm = hpo.SOBA(case.problem, optax.sgd(0.3), HOLD, linear_rate=0.3)
    state = algorithm.init(case.model, case.hyperparams)
    run = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, 1000, lambda i, s: algorithm.step(s, case.train, case.val), state
        )
    )
    state = run(state)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    assert relative_error(got, case.hypergradient(case.hyperparams)) < 1e-10
    assert relative_error(state.model, case.response(case.hyperparams)) < 1e-10


def test_finds_the_best_hyperparameters_of_the_quadratic():
    """`w = h` at the bottom, so the optimum of `|h - b|^2 + 0.1 |h|^2` is `b / 1.1`."""
    case = quadratic()
    algorithm = hpo.SOBA(case.problem, optax.sgd(0.3), optax.sgd(0.05), linear_rate=0.3)
    state = algorithm.init(case.model, case.hyperparams)
    run = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, 2000, lambda i, s: algorithm.step(s, case.train, case.val), state
        )
    )
    assert relative_error(run(state).hyperparams, case.val / 1.1) < 1e-10


def test_a_rate_may_be_a_schedule():
    case = ridge()
    schedule = lambda step: jnp.where(step < 2, 0.3, 0.1)
    whole = hpo.SOBA(case.problem, SGD, HOLD, linear_rate=lambda step: 1 + 0 * step)
    start = whole.init(case.model, case.hyperparams)
    assert int(whole.step(start, case.train, case.val).skipped) == 0
    args = (case.problem, optax.sgd(0.3), HOLD)
    algorithm = hpo.SOBA(*args, linear_rate=schedule)
    state = algorithm.init(case.model, case.hyperparams)
    by_hand = state
    for i in range(4):
        state = algorithm.step(state, case.train, case.val)
        fixed = hpo.SOBA(*args, linear_rate=0.3 if i < 2 else 0.1)
        by_hand = fixed.step(by_hand, case.train, case.val)
    assert relative_error(state.memory.episode, by_hand.memory.episode) < 1e-14
    wrong = hpo.SOBA(*args, linear_rate=lambda step: jnp.ones(2))
    with pytest.raises(ValueError, match="`linear_rate` must be a number, or a func"):
        wrong.step(state, case.train, case.val)


def test_the_vector_belongs_to_the_episode_and_the_average_lives_on():
    case = ridge()
    args = (case.problem, optax.sgd(0.3), optax.sgd(0.1))
    algorithm = hpo.SOBA(*args, linear_rate=0.3, averaging=0.2)
    state = algorithm.init(case.model, case.hyperparams)
    for _ in range(3):
        state = algorithm.step(state, case.train, case.val)
    fresh = algorithm.restart(state, case.model)
    assert not jnp.any(fresh.memory.episode)
    assert jnp.any(state.memory.episode)
    assert equal(fresh.memory.lasting, state.memory.lasting)


@pytest.mark.parametrize("averaging", [0.0, 0.25])
def test_under_folds_the_hypergradient_is_the_mean(averaging):
    case = ridge()
    train, val = hpo.folds(case.train, 4)
    args = (case.problem, optax.sgd(0.3), optax.sgd(0.1))
    plain = hpo.SOBA(*args, linear_rate=0.3, averaging=averaging)
    learner = hpo.MetaLearner(plain, 4)
    state = learner.init(case.model, case.hyperparams, train=train, val=val)
    held = hpo.SOBA(case.problem, optax.sgd(0.3), HOLD, linear_rate=0.3)
    singles = [held.init(case.model, case.hyperparams) for _ in range(4)]
    average, estimates = jtu.tree_map(jnp.zeros_like, case.hyperparams), []
    for _ in range(3):
        state = learner.step(state, train, val)
        hyperparams, estimates = singles[0].hyperparams, []
        for i, single in enumerate(singles):
            rows = jtu.tree_map(lambda x: x[i], (train, val))
            estimates.append(held.compute_hypergradient(single, *rows))
            singles[i] = held.step(single, *rows)
        mean = jtu.tree_map(lambda *x: sum(x) / 4, *estimates)
        share = averaging or 1.0
        average = jtu.tree_map(lambda h, d: (1 - share) * h + share * d, average, mean)
        hyperparams = jtu.tree_map(lambda x, d: x - 0.1 * d, hyperparams, average)
        singles = [
            eqx.tree_at(lambda s: s.hyperparams, s, hyperparams) for s in singles
        ]
    assert relative_error(state.hyperparams, singles[0].hyperparams) < 1e-12
    # An average says no less about how far the folds disagree.
    spread = jtu.tree_map(lambda *x: jnp.std(jnp.stack(x), 0, ddof=1) / 2, *estimates)
    error = state.metrics.diagnostics.standard_error
    assert relative_error(error, spread) < 1e-9


def test_complex_weights_equal_their_real_parts():
    """`w = h` at the bottom again, with `w` one complex number in place of two."""
    case = quadratic()
    matrix, target = case.train, case.val

    def real(w):
        return jnp.stack([jnp.real(w), jnp.imag(w)])

    problem = hpo.Problem(
        lambda w, h, batch, key: case.problem.train_loss(real(w), h, batch, key),
        lambda w, h, batch, key: case.problem.val_loss(real(w), h, batch, key),
    )
    conjugate = optax.stateless(lambda g, _: jtu.tree_map(jnp.conj, g))
    got = hpo.SOBA(
        problem, optax.chain(conjugate, optax.sgd(0.3)), HOLD, linear_rate=0.3
    )
    expected = hpo.SOBA(case.problem, optax.sgd(0.3), HOLD, linear_rate=0.3)
    states = [
        got.init(jnp.array(0.3 + 0.4j), case.hyperparams),
        expected.init(case.model, case.hyperparams),
    ]
    for _ in range(5):
        states = [
            algorithm.step(state, matrix, target)
            for algorithm, state in zip((got, expected), states)
        ]
    assert relative_error(real(states[0].model), states[1].model) < 1e-14
    gradients = [
        algorithm.compute_hypergradient(state, matrix, target)
        for algorithm, state in zip((got, expected), states)
    ]
    assert relative_error(*gradients) < 1e-13


def test_a_rate_among_the_hyperparameters_is_refused():
    with pytest.raises(ValueError, match="Tune them by `FixedPoint`"):
        hpo.SOBA(PROBLEM, lambda h: optax.sgd(h["decay"]), HOLD, linear_rate=0.1)


def test_made_within_jit_it_is_the_same():
    case = ridge()

    def run(rate):
        algorithm = hpo.SOBA(case.problem, optax.sgd(0.3), SGD, linear_rate=rate)
        state = algorithm.init(case.model, case.hyperparams)
        assert state.memory.lasting is None
        for _ in range(2):
            state = algorithm.step(state, case.train, case.val)
        return state.hyperparams

    assert relative_error(jax.jit(run)(0.3), run(0.3)) < 1e-13
