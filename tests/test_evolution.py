"""Evolution against smoothed gradients in closed form, and what it does around them."""

import functools as ft
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from .helpers import equal, relative_error
from .problems import ridge


HOLD = optax.set_to_zero()
RATE, STEPS, FREQUENCY = 0.2, 3, 1.5
# `w` moves by a fixed share of the way to `h`, so it is linear in all `h` so far, and
# the mean of a sine over Gaussian noise is a sine again, times a factor.
PROBLEM = hpo.Problem(
    lambda w, h, batch, key: 0.5 * jnp.sum((w - h) ** 2),
    lambda w, h, batch, key: jnp.sum(jnp.sin(FREQUENCY * w) * jnp.array([1.0, -0.5])),
)
START, H = jnp.array([0.3, -0.2]), jnp.array([0.5, 1.0])


def _algorithm(estimator, **options):
    settings = {"inner_steps": STEPS, "pairs": 100, "scale": 0.4} | options
    return hpo.Evolution(
        PROBLEM, optax.sgd(RATE), HOLD, estimator=estimator, **settings
    )


def _smoothed(estimator, windows):
    """The gradient after so many windows, and that of the truncated estimate."""
    kept = (1 - RATE) ** STEPS
    gains = [(1 - kept) * kept**i for i in range(windows)]  # of the last window first
    seen = {
        "noise_reuse": [sum(gains)],
        "persistent": gains,
        "antithetic": gains[:1],
    }[estimator]
    w = H + kept**windows * (START - H)
    damping = jnp.exp(-0.5 * (FREQUENCY * 0.4) ** 2 * sum(x**2 for x in seen))
    slope = FREQUENCY * jnp.cos(FREQUENCY * w) * jnp.array([1.0, -0.5])
    return damping * slope * sum(seen), slope * sum(gains)


@ft.cache
def _estimates(estimator, windows):
    """From 10,000 pairs, in 100 independent runs."""
    algorithm = _algorithm(estimator)

    def run(key):
        state = algorithm.init(START, H)
        for i in range(windows - 1):
            state = algorithm.step(state, None, None, key=jr.fold_in(key, i))
        key = jr.fold_in(key, windows)
        return algorithm.compute_hypergradient(state, None, None, key=key)

    return jax.jit(jax.vmap(run))(jr.split(jr.key(0), 100))


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("estimator", ["noise_reuse", "persistent", "antithetic"])
def test_is_unbiased_for_the_smoothed_gradient(estimator, windows):
    estimates = _estimates(estimator, windows)
    error = jnp.std(estimates, axis=0, ddof=1) / 10
    mean = jnp.mean(estimates, axis=0)
    expected, true = _smoothed(estimator, windows)
    assert jnp.all(jnp.abs(mean - expected) < 3 * error)
    assert jnp.all(error < 0.1 * jnp.abs(expected))
    if estimator == "antithetic" and windows == 3:
        # It sees the last window alone.
        assert jnp.all(jnp.abs(mean / true) < 0.7)


def test_the_noise_is_that_of_the_raw_arrays():
    """The gradient of `log h` by noise on the logarithm."""
    problem = hpo.Problem(
        lambda w, h, b, k: 0.5 * jnp.sum((w - h["x"]) ** 2),
        lambda w, h, b, k: jnp.log(w),
    )
    algorithm = hpo.Evolution(
        problem, optax.sgd(1.0), HOLD, inner_steps=1, pairs=2000, scale=0.5
    )
    state = algorithm.init(jnp.array(1.0), {"x": hpo.Positive(2.0)})
    got = algorithm.compute_hypergradient(state, None, None, key=jr.key(0))
    # Of `log exp(raw)`, whatever the scale: only the mean of the squares varies.
    assert abs(got["x"].raw - 1) < 4 * jnp.sqrt(2 / 2000)


def _steps(algorithm, count, **data):
    case = ridge()
    state = algorithm.init(case.model, case.hyperparams)
    for i in range(count):
        state = algorithm.step(state, case.train, case.val, key=jr.key(i))
    return state


@pytest.mark.parametrize("estimator", ["noise_reuse", "persistent", "antithetic"])
def test_the_model_is_trained_without_noise(estimator):
    case = ridge()
    args = (case.problem, optax.adam(0.1), HOLD)
    state = _steps(hpo.Evolution(*args, inner_steps=2, pairs=3, estimator=estimator), 3)
    expected = _steps(hpo.FirstOrder(*args, inner_steps=2), 3)
    for part in ("model", "inner_opt_state"):
        assert relative_error(getattr(state, part), getattr(expected, part)) < 1e-14
    assert state.metrics.val_loss == expected.metrics.val_loss


def test_what_becomes_of_noise_and_copies():
    case = ridge()
    args = (case.problem, optax.sgd(0.1), HOLD)
    states = {}
    for estimator in ("noise_reuse", "persistent", "antithetic"):
        algorithm = hpo.Evolution(*args, inner_steps=2, pairs=3, estimator=estimator)
        states[estimator] = [_steps(algorithm, i) for i in range(3)]
    noise = lambda name, i: states[name][i].memory.episode[1]["penalty"]
    assert not jnp.any(noise("noise_reuse", 0))
    assert jnp.all(noise("noise_reuse", 1) != 0)
    assert equal(noise("noise_reuse", 1), noise("noise_reuse", 2))
    first, both = noise("persistent", 1), noise("persistent", 2)
    assert jnp.all(first != both)
    # The keys and the draws are the same for both.
    assert equal(first, noise("noise_reuse", 1))
    assert states["antithetic"][2].memory.episode is None
    copies = states["noise_reuse"][2].memory.episode[0].params
    assert copies.shape == (3, 2, 6)
    # Trained at opposite noise, and both episodes begin where the model does.
    algorithm = hpo.Evolution(*args, inner_steps=2, pairs=3)
    fresh = algorithm.restart(states["noise_reuse"][2], case.model)
    assert jnp.all(fresh.memory.episode[0].params == case.model)
    assert not jnp.any(fresh.memory.episode[1]["penalty"])


def _with_failures(threshold):
    """Training that blows up where the first hyperparameter is above a threshold."""
    problem = hpo.Problem(
        lambda w, h, b, k: jnp.where(h[0] > threshold, jnp.nan, 1) * jnp.sum(w**2),
        # An accuracy is finite even where the weights are not.
        lambda w, h, b, k: jnp.where(jnp.isnan(w[0]), 1.0, jnp.sum(w) + jnp.sum(h)),
    )
    algorithm = hpo.Evolution(problem, optax.sgd(0.1), HOLD, inner_steps=2, pairs=40)
    state = algorithm.init(jnp.ones(2), jnp.zeros(2))
    return algorithm, algorithm.step(state, None, None, key=jr.key(0))


def test_pairs_that_fail_are_left_out_and_start_anew():
    algorithm, state = _with_failures(0.05)
    failed = int(state.metrics.diagnostics.failed)
    assert 5 < failed < 35
    assert int(state.total_skipped) == 0
    copies, noise = state.memory.episode
    out = ~jnp.any(noise != 0, axis=1)
    assert int(jnp.sum(out)) == failed
    assert equal(out, jnp.any(noise == 0, axis=1))
    assert jnp.all(copies.params[out] == state.model)
    assert jnp.all(jnp.abs(noise[~out][:, 0]) <= 0.05)
    # Of `sum(h)`, over the pairs that are left.
    left = noise[~out]
    expected = left.T @ (2 * jnp.sum(left, axis=1)) / (2 * 0.1**2 * len(left))
    got = algorithm.compute_hypergradient(
        algorithm.init(jnp.ones(2), jnp.zeros(2)), None, None, key=jr.key(0)
    )
    assert relative_error(got, expected) < 1e-12
    again = algorithm.step(state, None, None, key=jr.key(1))
    new = again.memory.episode[1]
    kept = ~out & jnp.any(new != 0, axis=1)
    assert equal(new[kept], noise[kept])


def test_a_step_in_which_all_fail_is_skipped():
    _, state = _with_failures(-10.0)
    assert int(state.total_skipped) == 1
    assert int(state.metrics.diagnostics.failed) == 40


@pytest.mark.slow
def test_the_outer_update_gets_the_standard_error():
    seen = []

    def watch(updates, state, params=None, *, error, grad, **_):
        jax.debug.callback(lambda *x: seen.append(x), error, grad)
        return updates, state

    update: Any = watch
    spy = optax.GradientTransformationExtraArgs(lambda params: (), update)
    algorithm = hpo.Evolution(
        PROBLEM, optax.sgd(RATE), spy, inner_steps=1, pairs=200, scale=0.4
    )

    @jax.jit
    def estimate(key):
        algorithm_ = algorithm.init(START, H)
        return algorithm.compute_hypergradient(algorithm_, None, None, key=key)

    algorithm.step(algorithm.init(START, H), None, None, key=jr.key(0))
    jax.effects_barrier()
    spread = jnp.std(jax.vmap(estimate)(jr.split(jr.key(1), 200)), axis=0)
    assert np.allclose(seen[0][0], spread, rtol=0.2)
    gated = hpo.Evolution(
        PROBLEM,
        optax.sgd(RATE),
        optax.chain(hpo.gate(1e6), optax.sgd(0.1)),
        inner_steps=1,
    )
    state = gated.step(gated.init(START, H), None, None, key=jr.key(0))
    assert jnp.array_equal(state.hyperparams, H)


def _accuracy(w, h, batch, key):
    x, y = batch
    return jnp.mean(jnp.argmax(x @ w, axis=1) != y)


def _outside(w, h, batch, key):
    x, y = batch
    shape = jax.ShapeDtypeStruct((), w.dtype)
    count = lambda w, x, y: np.mean(np.argmax(x @ w, axis=-1) != y).astype(w.dtype)
    return jax.pure_callback(count, shape, w, x, y, vmap_method="sequential")


@pytest.mark.parametrize("val_loss", [_accuracy, _outside])
def test_any_function_of_the_model_is_tuned(val_loss):
    """The share of errors has no slope anywhere, and NumPy none at all."""
    keys = jr.split(jr.key(0), 3)
    true = jr.normal(keys[0], (3, 3))
    x = jr.normal(keys[1], (300, 3))
    y = jnp.argmax(x @ true, axis=1)
    # All labels of one class are flipped, and its weight should fall.
    noisy = jnp.where(y == 0, 1, y)

    def train_loss(w, h, batch, key):
        x, y, wrong = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
        return jnp.mean(jnp.where(wrong, jax.nn.sigmoid(h), 1.0) * losses)

    x = jnp.concatenate([x, x])
    train = (x, jnp.concatenate([y, noisy]), jnp.arange(600) >= 300)
    algorithm = hpo.Evolution(
        hpo.Problem(train_loss, val_loss),
        optax.adam(0.3),
        optax.adam(0.3),
        inner_steps=20,
        pairs=4,
        scale=0.5,
        estimator="antithetic",
    )
    state = algorithm.init(jnp.zeros((3, 3)), jnp.array(3.0))
    for i in range(25):
        state = algorithm.restart(state, jnp.zeros((3, 3)))
        state = algorithm.step(state, train, (x[:300], y), key=jr.key(i))
    assert int(state.total_skipped) == 0
    assert state.hyperparams < 0.5


@pytest.mark.slow
def test_the_pairs_may_be_split_over_devices():
    algorithm = _algorithm("persistent", pairs=8)
    mesh = jax.make_mesh((8,), ("pairs",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("pairs"))
    state = algorithm.init(START, H)
    placed = eqx.tree_at(
        lambda s: s.memory.episode,
        jax.device_put(state, jax.NamedSharding(mesh, jax.P())),
        jax.device_put(state.memory.episode, split),
    )
    states = [state, placed]
    for i in range(3):
        states = [algorithm.step(s, None, None, key=jr.key(i)) for s in states]
    assert relative_error(states[1], states[0]) < 1e-12
    copies, noise = states[1].memory.episode
    assert copies.params.sharding.spec[0] == "pairs"
    assert noise.sharding.spec[0] == "pairs"


@pytest.mark.slow
def test_each_task_of_several_has_its_own_pairs():
    case = ridge()
    train, val = hpo.folds(case.train, 4)
    plain = hpo.Evolution(
        case.problem, optax.sgd(0.1), HOLD, inner_steps=2, pairs=2000, scale=0.01
    )
    learner = hpo.MetaLearner(plain, 4)
    state = learner.init(case.model, case.hyperparams, train=train, val=val)
    got = learner.compute_hypergradient(state, train, val, key=jr.key(0))
    exact = hpo.MetaLearner(
        hpo.Unrolled(case.problem, optax.sgd(0.1), HOLD, inner_steps=2), 4
    )
    start = exact.init(case.model, case.hyperparams, train=train, val=val)
    expected = exact.compute_hypergradient(start, train, val)
    assert relative_error(got, expected) < 0.15
    state = learner.step(state, train, val, key=jr.key(0))
    noise = state.memory.episode[1][1]["penalty"]
    assert noise.shape == (4, 2000, 6)
    assert len(jnp.unique(noise)) == noise.size


def test_warns_of_what_nothing_depends_on():
    """Not of what has no derivative: values are compared."""
    problem = hpo.Problem(
        lambda w, h, b, k: jnp.sum((w - jnp.round(h["used"])) ** 2) + jnp.sum(b),
        lambda w, h, b, k: jnp.sum(w**2) + jnp.sum(b),
    )
    algorithm = hpo.Evolution(problem, optax.sgd(0.1), HOLD, inner_steps=1)
    hyperparams = {"used": jnp.array(0.3), "unused": jnp.array(0.3)}
    ones = jnp.ones(2)
    with pytest.warns(
        UserWarning, match=r"of zero: `hyperparams\['unused'\]`\. Neither"
    ):
        algorithm.init(ones, hyperparams, train=ones, val=2 * ones)
