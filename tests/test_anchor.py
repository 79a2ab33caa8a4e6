import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from .helpers import equal, relative_error


TARGET = {"a": jnp.array([1.0, 3.0, -2.0]), "b": jnp.array([[0.5, 0.1]])}
START = {"a": jnp.array([0.5, 0.0, 0.2]), "b": hpo.Real(jnp.array([[-1.0, 2.0]]))}
STRENGTH = 0.7


def _val_loss(model, h, batch, key):
    del model, batch, key
    square = lambda x, y: jnp.sum((x - y) ** 2) / 2
    return square(h["a"], TARGET["a"]) + square(h["b"], TARGET["b"])


def _solve(outer):
    problem = hpo.Problem(lambda w, h, batch, key: jnp.sum(w**2), _val_loss)
    algorithm = hpo.FirstOrder(problem, optax.sgd(0.1), outer)
    solution = hpo.tune(
        algorithm, jnp.ones(1), START, None, None, steps=300, key=None, progress=False
    )
    return solution.values


def test_towards_the_mean():
    """Deviations from the mean of an array shrink by 1 + strength; the mean is free."""
    got = _solve(optax.chain(hpo.anchor(STRENGTH), optax.sgd(0.2)))
    shrink = lambda x: jnp.mean(x) + (x - jnp.mean(x)) / (1 + STRENGTH)
    assert relative_error(got, jax.tree.map(shrink, TARGET)) < 1e-10


def test_towards_the_start():
    got = _solve(optax.chain(hpo.anchor(STRENGTH, to="start"), optax.sgd(0.2)))
    between = lambda x, y: (x + STRENGTH * y) / (1 + STRENGTH)
    expected = jax.tree.map(between, TARGET, hpo.unwrap(START))
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("to", ["mean", "start"])
def test_is_the_gradient_of_a_square(to):
    outer = hpo.anchor(STRENGTH, to=to)
    raw = {"a": jr.normal(jr.key(0), (4,)), "b": jr.normal(jr.key(1), (2, 3))}
    begin = jax.tree.map(lambda x: x + 1, raw)
    updates = jax.tree.map(jnp.ones_like, raw)
    got, _ = outer.update(updates, outer.init(begin), raw)

    def penalty(raw):
        centre = jax.tree.map(jnp.mean, raw) if to == "mean" else begin
        squares = jax.tree.map(lambda x, c: jnp.sum((x - c) ** 2), raw, centre)
        return STRENGTH * sum(squares.values()) / 2 + sum(
            jnp.sum(x) for x in raw.values()
        )

    assert relative_error(got, jax.grad(penalty)(raw)) < 1e-12


def test_strength_zero_is_nothing_and_dtypes_stay():
    raw = jnp.arange(3, dtype=jnp.bfloat16)
    for to in ("mean", "start"):
        outer = hpo.anchor(0.0, to=to)
        got, _ = outer.update(raw, outer.init(raw), raw)
        assert equal(got, raw)


def test_bad_input_raises():
    with pytest.raises(ValueError, match="`strength` must be a number of at"):
        hpo.anchor(-1.0)
    with pytest.raises(ValueError, match="`to` must be 'mean' or 'start'; got"):
        hpo.anchor(1.0, to="median")
    outer = hpo.anchor(1.0)
    with pytest.raises(ValueError, match="`anchor` needs the parameters"):
        outer.update(jnp.ones(2), outer.init(jnp.ones(2)))
