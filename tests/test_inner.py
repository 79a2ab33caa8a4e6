"""Square roots at zero inside the inner optimiser."""

from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqx_hpo._inner import flat_at_zero


# The third weight never has a gradient: a border pixel, an embedding outside the batch.
X = jnp.array([[1, 0.5, 0], [2, -1, 0], [-1, 0.3, 0]])
Y = jnp.array([1, 1.5, -0.5])
WEIGHTS, SCALES = jnp.array([0.1, 0.2, 0.3]), jnp.array([1.0, 2.0, 3.0])
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
