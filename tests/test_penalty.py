"""Penalty against closed forms, and what it computes."""

import functools as ft

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

from .helpers import equal, relative_error
from .problems import quadratic, ridge


HOLD = optax.set_to_zero()
SGD = optax.sgd(0.3)  # one for all, so that they share what is compiled


@ft.cache
def _quadratic():
    """Quadratic losses of six weights and three hyperparameters in general position."""
    keys = jr.split(jr.key(5), 5)
    spread = lambda key: jr.normal(key, (6, 6)) / 4
    inner = jnp.eye(6) + spread(keys[0]) @ spread(keys[0]).T
    outer = jnp.eye(6) + spread(keys[1]) @ spread(keys[1]).T
    mixed, target = jr.normal(keys[2], (6, 3)), jr.normal(keys[3], (6,))

    def train_loss(w, h, batch, key):
        return 0.5 * w @ inner @ w + w @ mixed @ h

    def val_loss(w, h, batch, key):
        return 0.5 * (w - target) @ outer @ (w - target) + 0.05 * h @ h + w[:3] @ h

    h = jr.normal(keys[4], (3,))

    def value(h):
        return val_loss(-jnp.linalg.solve(inner, mixed @ h), h, None, None)

    return hpo.Problem(train_loss, val_loss), h, jax.grad(value)(h)


def _converged(problem, model, hyperparams, data, strength, **options):
    algorithm = hpo.Penalty(
        problem,
        SGD,
        HOLD,
        strength=strength,
        inner_steps=400,
        **options,
    )
    state = algorithm.init(model, hyperparams)
    state = algorithm.step(state, *data)
    return algorithm, state


@pytest.mark.parametrize("name", ["quadratic", "ridge"])
def test_the_bias_falls_as_one_over_the_strength_and_is_told(name):
    if name == "quadratic":
        problem, h, true = _quadratic()
        model, data = jnp.zeros(6), (None, None)
    else:
        case = ridge()
        problem, h, model = case.problem, case.hyperparams, case.model
        data, true = (case.train, case.val), case.hypergradient(h)
    strengths, biases = [30.0, 100.0, 300.0, 1000.0], []
    for strength in strengths:
        algorithm, state = _converged(
            problem, model, h, data, strength, bias_every=1, bias_steps=400
        )
        got = algorithm.compute_hypergradient(state, *data)
        difference = jtu.tree_map(jnp.subtract, got, true)
        bias = float(optax.tree.norm(difference))
        told = state.metrics.diagnostics
        assert abs(told.bias / bias - 1) < 0.2
        norm = state.metrics.hypergradient_norm
        assert jnp.allclose(told.relative_bias, told.bias / norm)
        biases.append(bias)
    slope = np.polyfit(np.log(strengths), np.log(biases), 1)[0]
    assert abs(slope + 1) < 0.05


def test_the_model_is_trained_on_the_train_loss_alone():
    problem, h, _ = _quadratic()
    algorithm = hpo.Penalty(
        problem, optax.sgd(0.1, momentum=0.9), HOLD, strength=3.0, inner_steps=4
    )
    plain = hpo.FirstOrder(problem, optax.sgd(0.1, momentum=0.9), HOLD, inner_steps=4)
    states = [x.init(jnp.ones(6), h) for x in (algorithm, plain)]
    for _ in range(3):
        states = [x.step(s, None, None) for x, s in zip((algorithm, plain), states)]
    for part in ("model", "inner_opt_state"):
        assert relative_error(*(getattr(s, part) for s in states)) < 1e-14
    assert states[0].metrics.val_loss == states[1].metrics.val_loss
    assert states[0].metrics.train_loss == states[1].metrics.train_loss


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_equals_f2sa_by_hand_on_batches(inner_steps):
    """Kwon et al., algorithm 1, with the strength as a schedule."""
    case = ridge()
    problem, strength = case.problem, lambda step: 5.0 + 2.0 * step
    algorithm = hpo.Penalty(
        problem,
        optax.sgd(0.2),
        optax.sgd(0.1),
        strength=strength,
        inner_steps=inner_steps,
    )
    rows = lambda data, i: jtu.tree_map(lambda x: x[4 * i : 4 * i + 4], data)
    state = algorithm.init(case.model, case.hyperparams)
    y = z = case.model
    h = case.hyperparams
    train, val = problem.train_loss, problem.val_loss
    for step in range(2):
        stacks = []
        for data in (case.train, case.val):
            parts = [rows(data, step * inner_steps + i) for i in range(inner_steps)]
            stacks.append(jtu.tree_map(lambda *x: jnp.stack(x), *parts))
        state = algorithm.step(state, *map(hpo.Stacked, stacks))
        s = strength(step)
        for i in range(inner_steps):
            batch, other = jtu.tree_map(lambda x: x[i], tuple(stacks))
            loss = lambda w: train(w, h, batch, None) + val(w, h, other, None) / s
            y = y - 0.2 * jax.grad(loss)(y)
            z = z - 0.2 * jax.grad(train)(z, h, batch, None)
        value = lambda h: (
            val(y, h, other, None)
            + s * (train(y, h, batch, None) - train(z, h, batch, None))
        )
        h = jtu.tree_map(lambda x, g: x - 0.1 * g, h, jax.grad(value)(h))
    assert relative_error(state.model, z) < 1e-13
    assert relative_error(state.memory.episode[0].params, y) < 1e-13
    assert relative_error(state.hyperparams, h) < 1e-12


def _network(width=64):
    keys = jr.split(jr.key(0), 3)
    model = eqx.nn.MLP(32, 4, width, 2, key=keys[0])
    data = jr.normal(keys[1], (256, 32)), jr.normal(keys[2], (256, 4))

    def losses(model, batch):
        x, y = batch
        return jnp.sum((jax.vmap(model)(x) - y) ** 2, axis=1)

    problem = hpo.Problem(
        lambda m, h, batch, key: jnp.mean(h * losses(m, batch)),
        lambda m, h, batch, key: jnp.mean(losses(m, batch)),
    )
    return problem, model, data


def test_costs_no_more_than_four_gradients():
    """Of the same number of examples, whose weights are tuned."""
    problem, model, data = _network()
    h = jnp.full(256, 0.5)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    algorithm = hpo.Penalty(problem, optax.sgd(0.1), optax.sgd(0.1), strength=10.0)
    state = algorithm.init(model, h)
    arrays, rest = eqx.partition(state, eqx.is_array)
    step = lambda arrays: eqx.filter(
        algorithm.step(eqx.combine(arrays, rest), data, data), eqx.is_array
    )

    def loss(params):
        return problem.train_loss(eqx.combine(params, static), h, data, None)

    def flops_of(fn, x):
        analysis = jax.jit(fn).lower(x).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    flops = [flops_of(step, arrays), flops_of(jax.value_and_grad(loss), params)]
    assert flops[0] / flops[1] < 4.2


@jax.custom_vjp
def _once(x):
    return jnp.tanh(x)


def _backward(x, g):
    # A kernel without a derivative of its own: neither mode goes through it.
    return (
        jax.pure_callback(
            lambda x, g: np.asarray(g * (1 - np.tanh(x) ** 2), x.dtype), x, x, g
        ),
    )


_once.defvjp(lambda x: (jnp.tanh(x), x), _backward)


def _with_activation(activation):
    case = ridge()
    x, y = case.train

    def val_loss(w, h, batch, key):
        x, y = batch
        return jnp.mean((activation(x @ w) - y) ** 2)

    def train_loss(w, h, batch, key):
        return val_loss(w, h, batch, key) + jnp.exp(h) * jnp.sum(w**2)

    problem = hpo.Problem(train_loss, val_loss)
    algorithm = hpo.Penalty(
        problem, optax.adam(0.05), optax.sgd(0.1), strength=10.0, inner_steps=3
    )
    state = algorithm.init(case.model, jnp.array(-2.0))
    for _ in range(2):
        state = algorithm.step(state, case.train, case.val)
    return algorithm, state, (case.train, case.val)


def test_needs_no_second_derivative():
    algorithm, got, data = _with_activation(_once)
    _, expected, _ = _with_activation(jnp.tanh)
    assert int(got.total_skipped) == 0
    assert relative_error(got.hyperparams, expected.hyperparams) < 1e-12
    second = hpo.T1T2(algorithm.problem, optax.adam(0.05), HOLD)
    state = second.init(got.model, got.hyperparams)
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        second.step(state, *data)


def test_the_bias_is_looked_at_at_an_interval_and_kept():
    problem, h, _ = _quadratic()
    algorithm = hpo.Penalty(
        problem, optax.sgd(0.3), optax.sgd(0.1), strength=20.0, inner_steps=2,
        bias_every=3, bias_steps=5,
    )  # fmt: skip
    state = algorithm.init(jnp.zeros(6), h)
    seen = []
    for _ in range(7):
        state = algorithm.step(state, None, None)
        seen.append(float(state.metrics.diagnostics.bias))
    assert seen[:2] == [np.inf] * 2
    assert len({*seen[2:5]}) == 1 and len({*seen[5:]}) == 1
    assert np.isfinite(seen[2]) and seen[2] != seen[5]
    state = algorithm.restart(state, jnp.zeros(6))
    assert not jnp.any(state.memory.episode[0].params)
    state = algorithm.step(state, None, None)
    assert jnp.isinf(state.metrics.diagnostics.bias)
    assert int(state.total_skipped) == 0


def test_episodes_of_tasks_begin_without_a_look():
    case = ridge()
    train, val = hpo.folds(case.train, 2)
    plain = hpo.Penalty(
        case.problem, SGD, HOLD, strength=5.0, bias_every=2, bias_steps=1
    )
    learner = hpo.MetaLearner(plain, 2, horizon=4)
    state = learner.init(case.model, case.hyperparams, train=train, val=val)
    known = []
    for _ in range(6):
        state = learner.step(state, train, val)
        known.append(bool(jnp.isfinite(state.metrics.diagnostics.tasks.bias).all()))
    assert int(state.total_skipped) == 0
    assert known == [False, True, True, True, False, True]


def test_where_nothing_has_moved_there_is_no_look():
    """At a rate of zero the hypergradient is zero at first, and so is its bias."""
    problem, h, _ = _quadratic()
    direct = hpo.Problem(
        problem.train_loss, lambda w, h, b, k: problem.val_loss(w, 0 * h, b, k)
    )
    inner = optax.sgd(lambda count: jnp.where(jnp.asarray(count) < 2, 0.0, 0.1))
    algorithm = hpo.Penalty(
        direct, inner, HOLD, strength=5.0, bias_every=1, bias_steps=1
    )
    state = algorithm.step(algorithm.init(jnp.zeros(6), h), None, None)
    assert jnp.isinf(state.metrics.diagnostics.relative_bias)
    for _ in range(2):
        state = algorithm.step(state, None, None)
    assert int(state.total_skipped) == 0
    assert jnp.any(state.model != 0)


def test_a_look_has_the_present_entry_of_a_schedule():
    problem, h, _ = _quadratic()
    told = []
    for hyperparams in (h, hpo.Schedule(jnp.stack([h, -h]), every=3)):
        algorithm = hpo.Penalty(
            problem, SGD, HOLD, strength=5.0, inner_steps=3, bias_every=1, bias_steps=9
        )
        state = algorithm.init(jnp.ones(6), hyperparams)
        told.append(algorithm.step(state, None, None).metrics.diagnostics)
    assert relative_error(told[1], told[0]) < 1e-13


def test_a_look_that_fails_is_no_skipped_step():
    """The third copy diverges at half the strength, where the curvature is larger."""
    problem = hpo.Problem(
        lambda w, h, b, k: 0.5 * jnp.sum((w - h) ** 2),
        lambda w, h, b, k: 50.0 * jnp.sum(w**2),
    )
    algorithm = hpo.Penalty(
        problem, optax.sgd(1.0), HOLD, strength=150.0, inner_steps=2,
        bias_every=1, bias_steps=3000,
    )  # fmt: skip
    state = algorithm.init(jnp.ones(2), jnp.ones(2))
    state = algorithm.step(state, None, None)
    assert int(state.total_skipped) == 0
    assert jnp.isinf(state.metrics.diagnostics.bias)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_models_in_half_precision(dtype):
    problem, model, data = _network(16)
    cast = lambda tree: jtu.tree_map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree
    )

    def run(model, data, inner):
        algorithm = hpo.Penalty(problem, inner, HOLD, strength=10.0, inner_steps=20)
        state = algorithm.init(model, jnp.full(256, 0.5, jnp.float32))
        state = algorithm.step(state, data, data)
        assert int(state.total_skipped) == 0
        return algorithm.compute_hypergradient(state, data, data)

    single = jtu.tree_map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x,
        (model, data),
    )
    expected = run(single[0], single[1], optax.sgd(0.02))
    mixed = run(cast(single[0]), cast(single[1]), hpo.mixed_precision(optax.sgd(0.02)))
    assert relative_error(mixed, expected) < 0.05


def test_two_copies_of_batch_normalisation():
    """Each copy has statistics of its own, and the user gets those of the plain one."""
    norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="batch")
    state = eqx.nn.State(norm)

    def apply(model, state, x):
        norm, weight = model
        mapped = jax.vmap(
            lambda x, s: norm(x, s), axis_name="batch", in_axes=(0, None),
            out_axes=(0, None),
        )  # fmt: skip
        out, state = mapped(x, state)
        return out @ weight, state

    def train_loss(model_and_state, h, batch, key):
        model, state = model_and_state
        out, new = apply(model, state, batch)
        return jnp.mean((out - 1) ** 2) + jnp.exp(h) * jnp.sum(model[1] ** 2), new

    def val_loss(model_and_state, h, batch, key):
        model, state = model_and_state
        out, _ = apply(eqx.nn.inference_mode(model), state, batch)
        return jnp.mean((out - 2) ** 2)

    problem = hpo.Problem(train_loss, val_loss)
    inner = optax.sgd(0.1)
    model, batch = (norm, jnp.ones(3)), jr.normal(jr.key(0), (8, 3))
    states = []
    for algorithm in (
        hpo.Penalty(problem, inner, HOLD, strength=2.0, inner_steps=3),
        hpo.FirstOrder(problem, inner, HOLD, inner_steps=3),
    ):
        start = algorithm.init(model, jnp.array(-2.0), model_state=state)
        states.append(algorithm.step(start, batch, batch))
    assert relative_error(states[0].model_state, states[1].model_state) < 1e-12
    assert relative_error(states[0].model, states[1].model) < 1e-12
    assert not equal(states[0].memory.episode[0].params, states[0].model)


def test_a_rate_among_the_hyperparameters_is_refused():
    case = quadratic()
    with pytest.raises(ValueError, match="Tune them by `FixedPoint`"):
        hpo.Penalty(case.problem, lambda h: optax.sgd(h[0]), HOLD, strength=1.0)
