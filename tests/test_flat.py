"""The derivatives of an update where the chain rule would make 0 * inf."""

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqx_hpo._flat import flat_at_zero


def _reverse(fn, x):
    return jax.vjp(fn, x)[1](jnp.ones_like(fn(x)))[0]


def _forward(fn, x):
    return jax.jvp(fn, (x,), (jnp.ones_like(x),))[1]


def _quotient(x):
    """A quotient that is thrown away where it is not finite."""
    norm = jnp.linalg.norm(x)
    return jnp.where(norm > 0, x / norm, 3 * x)


def _root_of_a_counter(x, count):
    factor = jnp.sqrt(count - 2.0)
    # As in RAdam: the NaN of the factor reaches a product and a quotient.
    scaled = factor * x / (jnp.sqrt(x**2 + 1) + 0.1 * factor)
    return jnp.where(count > 2, scaled, 5 * x)


ZEROS, SOME = jnp.zeros(3), jnp.array([0.5, -1.5, 2.0])
# A function, an argument where JAX finds NaN or infinity, and the true derivative.
CASES = {
    "square root": (lambda x: jnp.sqrt(x**2), ZEROS, 0),
    "cube root": (lambda x: jnp.cbrt(x**4), ZEROS, 0),
    "power": (lambda x: (x**2) ** 0.7, ZEROS, 0),
    "inverse": (lambda x: jnp.where(x == 0, 2 * x, x**-2), ZEROS, 2),
    "quotient": (_quotient, ZEROS, 3),
    "root of a counter": (lambda x: _root_of_a_counter(x, jnp.array(1)), SOME, 5),
}


@pytest.mark.parametrize("differentiate", [_reverse, _forward])
@pytest.mark.parametrize("name", CASES)
def test_where_a_slope_is_infinite_there_is_no_derivative(name, differentiate):
    fn, x, slope = CASES[name]
    mended = flat_at_zero(fn) if name != "root of a counter" else _mended_counter
    assert jnp.array_equal(mended(x), fn(x))
    assert jnp.array_equal(differentiate(mended, x), jnp.full(3, slope))


def _mended_counter(x):
    return flat_at_zero(_root_of_a_counter)(x, jnp.array(1))


@pytest.mark.parametrize("name", CASES)
def test_reverse_mode_alone_has_no_such_derivative(name):
    """So the cases above are cases."""
    fn, x, _ = CASES[name]
    assert not jnp.all(jnp.isfinite(_reverse(fn, x)))


def test_elsewhere_derivatives_and_values_are_those_of_the_function():
    def fn(x, count):
        root = jnp.cbrt(x) + jnp.abs(x) ** 0.7 + x**-3
        return root / jnp.linalg.norm(x) + _root_of_a_counter(x, count)

    count = jnp.array(5)
    for differentiate in (_reverse, _forward):
        got = differentiate(lambda x: flat_at_zero(fn)(x, count), SOME)
        expected = differentiate(lambda x: fn(x, count), SOME)
        assert jnp.allclose(got, expected, rtol=1e-13)
    assert jnp.allclose(flat_at_zero(fn)(SOME, count), fn(SOME, count), rtol=1e-15)


def test_a_value_that_is_not_finite_shows():
    x = jnp.array([0.0, 1.0, -1.0])
    count = jnp.array(1)
    for fn in (
        lambda x, count: x / (0 * x),
        lambda x, count: x**-1,
        lambda x, count: jnp.sqrt(x),
        lambda x, count: jnp.sqrt(count - 2.0) * x,
    ):
        expected = fn(x, count)
        assert not jnp.all(jnp.isfinite(expected))
        assert jnp.array_equal(flat_at_zero(fn)(x, count), expected, equal_nan=True)


NORMS = {
    "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x == "clip" else pytest.mark.slow) for x in NORMS],
)
def test_a_gradient_that_is_all_zero(name):
    """Training stands at its minimum, and stays there whatever the scales are."""
    problem = hpo.Problem(
        lambda w, h, *_: jnp.sum(h * (w - 1) ** 2), lambda w, *_: jnp.sum((w - 3) ** 2)
    )
    algorithm = hpo.Unrolled(problem, NORMS[name], optax.sgd(0.1), inner_steps=2)
    state = algorithm.init(jnp.ones(2), jnp.ones(2))
    got = algorithm.compute_hypergradient(state, None, None)
    assert np.array_equal(got, np.zeros(2))
