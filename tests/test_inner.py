"""Square roots at zero inside the inner optimiser, and what its `init` keeps."""

import functools as ft
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqx_hpo._flat import flat_at_zero

from .helpers import relative_error


# The third weight never has a gradient: a border pixel, an embedding outside the batch.
X = jnp.array([[1, 0.5, 0], [2, -1, 0], [-1, 0.3, 0]])
Y = jnp.array([1, 1.5, -0.5])
WEIGHTS, SCALES = jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0])


def _train_loss(w):
    return jnp.mean((X @ w - Y) ** 2)


PROBLEM = hpo.Problem(
    lambda w, h, batch, key: jnp.mean(h * (X @ w - Y) ** 2),
    lambda w, h, batch, key: jnp.mean((X @ w - Y) ** 2),
)


def _is_even(step: Any, **extra_args: Any) -> Any:
    del extra_args
    return step % 2 == 0


CLIP = optax.clip_by_global_norm(0.5)
OPTIMISERS = {
    "adam": optax.adam(0.1),
    "clip, adam": optax.chain(CLIP, optax.adam(0.1)),
    "adam, clip": optax.chain(optax.adam(0.1), optax.clip_by_global_norm(0.05)),
    "clip, adamw": optax.chain(CLIP, optax.adamw(0.1)),
    "lamb": optax.lamb(0.1),
    "adaptive clip": optax.chain(optax.adaptive_grad_clip(0.1), optax.adam(0.1)),
    "block rms": optax.chain(optax.clip_by_block_rms(0.1), optax.adam(0.1)),
    "normalise": optax.chain(optax.normalize_by_update_norm(), optax.adam(0.1)),
    "nadam": optax.nadam(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "every second step": optax.conditionally_mask(optax.adam(0.1), _is_even),
}


def _loss(h, inner, steps):
    inner = inner if isinstance(inner, optax.GradientTransformation) else inner(h)
    weights, state = WEIGHTS, inner.init(WEIGHTS)
    for _ in range(steps):
        grads = jax.grad(PROBLEM.train_loss)(weights, h, None, None)
        updates, state = inner.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
    return PROBLEM.val_loss(weights, h, None, None)


def _differences(inner, steps, width=1e-6):
    loss = jax.jit(lambda h: _loss(h, inner, steps))
    at = lambda i, sign: loss(SCALES.at[i].add(sign * width))
    return np.array([(at(i, 1) - at(i, -1)) / (2 * width) for i in range(3)])


@pytest.mark.parametrize(
    "name, algorithm",
    [
        pytest.param(
            name, algorithm, marks=[] if name == "clip, adam" else pytest.mark.slow
        )
        for name in OPTIMISERS
        for algorithm in (hpo.Unrolled, hpo.ForwardMode)
    ],
)
def test_entries_without_a_gradient_spread_no_nan(name, algorithm):
    inner = OPTIMISERS[name]
    algorithm = algorithm(PROBLEM, inner, optax.sgd(0.1), inner_steps=3)
    state = algorithm.init(WEIGHTS, SCALES)
    got = algorithm.compute_hypergradient(state, None, None)
    expected = _differences(inner, 3)
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


def test_the_case_of_clipped_adam_to_four_digits():
    inner = OPTIMISERS["clip, adam"]
    algorithm = hpo.Unrolled(PROBLEM, inner, optax.sgd(0.1), inner_steps=2)
    state = algorithm.init(WEIGHTS, SCALES)
    got = algorithm.compute_hypergradient(state, None, None)
    assert np.allclose(got, [4.379e-5, -1.971e-5, -1.458e-6], rtol=3e-4)


def test_a_scale_that_starts_at_zero_has_its_true_slope():
    """Under Adam a gradient that appears is worth 1 / eps at first."""
    inner = optax.adam(0.1)
    problem = hpo.Problem(
        lambda w, h, batch, key: jnp.sum(h * (w - 1) ** 2),
        lambda w, h, batch, key: jnp.sum((w - 3) ** 2),
    )
    algorithm = hpo.T1T2(problem, inner, optax.sgd(0.1))
    state = algorithm.init(jnp.zeros(2), jnp.zeros(2))
    got = algorithm.compute_hypergradient(state, None, None)
    # w = 0.1 * 2 h / (2 |h| + eps), so dw/dh = 0.2 / eps at 0, and dC2/dw = -6.
    assert jnp.allclose(got, -6 * 0.2 / 1e-8, rtol=1e-6)


@pytest.mark.slow
def test_values_and_rules_of_the_function_itself_are_kept():
    @jax.custom_vjp
    def clip(x):
        return jnp.clip(x, 0, 1)

    clip.defvjp(lambda x: (clip(x), None), lambda _, cotangent: (7 * cotangent,))

    def fn(x):
        root = jnp.sqrt(x)
        scaled = jax.jit(lambda x: jax.lax.rsqrt(x + 1))(x)
        return (
            clip(root) + jax.lax.cond(jnp.sum(x) > 0, jnp.sqrt, jnp.square, x) * scaled
        )

    mended = flat_at_zero(fn)
    x = jnp.array([0.0, 0.25, 4.0, jnp.nan])
    assert jnp.array_equal(mended(x), fn(x), equal_nan=True)
    x = jnp.array([0.25, 4.0])
    jacobian = lambda fn: jax.vjp(fn, x)[1](jnp.ones(2))[0]
    assert jnp.allclose(jacobian(mended), jacobian(fn), rtol=1e-14)
    slope = jax.grad(lambda x: jnp.sum(mended(x)))(jnp.array([0.0, 1.0]))
    assert slope[0] == 0 and jnp.isfinite(slope[1])


# What `init` keeps


def _plain(h):
    return optax.rmsprop(0.1 * h[0], decay=0.3 * h[1])


def _injected(h):
    return optax.inject_hyperparams(optax.rmsprop)(0.1 * h[0], decay=0.3 * h[1])


KEPT = {
    "inject rmsprop": _injected,
    "inject momentum": lambda h: optax.inject_hyperparams(optax.sgd)(
        0.1 * h[0], momentum=0.3 * h[1]
    ),
    "inject behind a condition": lambda h: optax.apply_if_finite(_injected(h), 3),
    "inject a schedule": lambda h: optax.inject_hyperparams(optax.sgd)(
        lambda step: 0.1 * h[0] / (1 + step), momentum=0.3 * h[1]
    ),
    "rprop": lambda h: optax.rprop(0.01 * h[0]),
    "prodigy": lambda h: optax.contrib.prodigy(h[1], estim_lr0=0.05 * h[0]),
    "adagrad": lambda h: optax.adagrad(0.1, initial_accumulator_value=0.1 * h[1]),
}
ALGORITHMS = {
    "t1t2": (hpo.T1T2, 1),
    "drmad": (hpo.DrMAD, 1),
    "drmad_3": (hpo.DrMAD, 3),
    "unrolled": (hpo.Unrolled, 3),
    "forward": (hpo.ForwardMode, 3),
}


def _cases():
    for name in KEPT:
        for algorithm in ALGORITHMS:
            # The first update of Rprop is zero, and then it goes straight ahead.
            left_out = ("t1t2", "drmad") if name == "rprop" else ("drmad_3",)
            if algorithm in left_out:
                continue
            quick = algorithm == "t1t2" and name in ("adagrad", "inject rmsprop")
            marks = [] if quick else pytest.mark.slow
            yield pytest.param(name, algorithm, marks=marks)


@pytest.mark.parametrize("name, algorithm", list(_cases()))
def test_what_init_keeps_of_the_hyperparameters_is_differentiated(name, algorithm):
    make, steps = ALGORITHMS[algorithm]
    algorithm = make(PROBLEM, KEPT[name], optax.sgd(0.1), inner_steps=steps)
    state = algorithm.init(WEIGHTS, SCALES)
    got = algorithm.compute_hypergradient(state, None, None)
    expected = _differences(KEPT[name], steps)
    assert np.linalg.norm(expected[:2]) > 1e-4
    assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


MOVING = {
    "t1t2": ft.partial(hpo.T1T2, inner_steps=2),
    "greedy": ft.partial(hpo.Greedy, inner_steps=3),
    "hyperdistill": ft.partial(hpo.HyperDistill, horizon=3),
    "drmad": ft.partial(hpo.DrMAD, inner_steps=3),
    "unrolled": ft.partial(hpo.Unrolled, inner_steps=2, truncation=1),
    "forward": hpo.ForwardMode,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "t1t2" else pytest.mark.slow)
        for name in MOVING
    ],
)
def test_an_injected_setting_moves_with_its_hyperparameter(name):
    def run(inner):
        algorithm = MOVING[name](PROBLEM, inner, optax.sgd(0.05))
        solution = hpo.tune(
            algorithm, WEIGHTS, SCALES, None, None,
            steps=4, restart_every=3, key=None, progress=False,
        )  # fmt: skip
        return solution.state

    injected, plain = run(_injected), run(_plain)
    assert jnp.all(jnp.abs(plain.hyperparams[:2] - SCALES[:2]) > 1e-5)
    got, expected = ((x.model, x.hyperparams) for x in (injected, plain))
    assert relative_error(got, expected) < 1e-13


def test_each_step_takes_its_entry_of_a_schedule():
    def hypergradient(inner):
        problem = hpo.Problem(lambda w, h, *_: _train_loss(w), PROBLEM.val_loss)
        algorithm = hpo.Unrolled(problem, inner, optax.sgd(0.1), inner_steps=3)
        entries = jnp.array([[1.0, 2.0], [0.5, 3.0]])
        state = algorithm.init(WEIGHTS, hpo.Schedule(entries, every=2))
        return algorithm.compute_hypergradient(state, None, None)

    got, expected = hypergradient(_injected), hypergradient(_plain)
    assert np.all(np.abs(jax.tree.leaves(expected)[0]) > 1e-4)
    assert relative_error(got, expected) < 1e-13


def test_a_first_accumulator_counts_only_in_the_first_step_of_an_episode():
    inner = KEPT["adagrad"]
    algorithm = hpo.T1T2(PROBLEM, inner, optax.sgd(0.0))
    state = algorithm.init(WEIGHTS, SCALES)
    for _ in range(2):
        state = algorithm.step(state, None, None)
    weights, opt_state = WEIGHTS, inner(SCALES).init(WEIGHTS)
    for _ in range(2):
        grads = jax.grad(PROBLEM.train_loss)(weights, SCALES, None, None)
        updates, opt_state = inner(SCALES).update(grads, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
    assert relative_error(state.model, weights) < 1e-14
    # One more step, where the accumulator is what the last ones made of it.
    got = algorithm.compute_hypergradient(state, None, None)

    def loss(h):
        grads = jax.grad(PROBLEM.train_loss)(weights, h, None, None)
        updates, _ = inner(h).update(grads, opt_state, weights)
        return PROBLEM.val_loss(optax.apply_updates(weights, updates), h, None, None)

    assert relative_error(got, jax.grad(loss)(SCALES)) < 1e-12


def test_where_init_keeps_nothing_nothing_is_added():
    def step(inner, follow):
        with pytest.MonkeyPatch.context() as patch:
            if not follow:
                keep = lambda inner, update, state, *_: state.opt_state
                patch.setattr("eqx_hpo._inner._follow_init", keep)
            # A new function each time, as an old one would not be traced again.
            algorithm = hpo.T1T2(PROBLEM, lambda h: inner(h), optax.sgd(0.1))
            state = algorithm.init(WEIGHTS, SCALES)
            carried, static = eqx.partition(state, eqx.is_array)
            fn = lambda x: eqx.filter(
                algorithm.step(eqx.combine(x, static), None, None), eqx.is_array
            )
            return jax.jit(fn).lower(carried).as_text()

    assert step(_plain, follow=True) == step(_plain, follow=False)
    assert step(_injected, follow=True) != step(_injected, follow=False)
