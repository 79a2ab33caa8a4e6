import functools as ft
from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from optax import projections


def _simplex_violation(x):
    return jnp.maximum(jnp.max(-x), jnp.abs(jnp.sum(x) - 1))


START = jnp.array([0.1, 0.2, 0.3, 0.15, 0.25])
# Name: (the last transformation of a chain, how far from feasible a value is).
CONSTRAINTS = {
    "box": (
        hpo.project(projections.projection_box, -0.1, 0.3),
        lambda x: jnp.max(jnp.maximum(-0.1 - x, x - 0.3)),
    ),
    "non_negative": (
        hpo.project(projections.projection_non_negative),
        lambda x: jnp.max(-x),
    ),
    "simplex": (hpo.project(projections.projection_simplex), _simplex_violation),
    "l2_ball": (
        hpo.project(projections.projection_l2_ball, 0.7),
        lambda x: jnp.linalg.norm(x) - 0.7,
    ),
    "norm": (
        hpo.project(projections.projection_l2_sphere, 0.7),
        lambda x: jnp.abs(jnp.linalg.norm(x) - 0.7),
    ),
    "mirror": (hpo.mirror(), _simplex_violation),
    "proximal_box": (
        hpo.proximal(hpo.Box(-0.1, 0.3), 0.1),
        lambda x: jnp.max(jnp.maximum(-0.1 - x, x - 0.3)),
    ),
}
OPTIMISERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.chain(optax.adam(0.3), hpo.select_top_k(2, rotate=0.5)),
    "lion": optax.lion(0.2),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_holds_at_each_of_1000_random_steps(getkey, constraint):
    last, violation = CONSTRAINTS[constraint]
    start = START.astype(jnp.float32)

    @ft.partial(jax.jit, static_argnums=0)
    def worst(outer, key):
        outer = optax.with_extra_args_support(outer)

        def step(carry, key):
            x, state = carry
            # Of all sizes, and sometimes huge.
            size = jnp.exp(3 * jr.normal(jr.fold_in(key, 1)))
            gradient = size * jr.normal(key, x.shape, x.dtype)
            gradient = gradient.astype(x.dtype)
            updates, state = outer.update(gradient, state, x, grad=gradient)
            x = jnp.asarray(optax.apply_updates(x, updates))
            return (x, state), (violation(x), jnp.all(jnp.isfinite(x)))

        carry = (start, outer.init(start))
        return jax.lax.scan(step, carry, jr.split(key, 1000))[1]

    for optimiser in OPTIMISERS.values():
        violations, finite = worst(optax.chain(optimiser, last), getkey())
        assert jnp.all(finite)
        # Optax's projection of large values rounds as these do.
        assert jnp.max(violations) < 1e-5


@pytest.mark.slow
def test_within_a_run_the_values_of_placeholders_stay_in_their_sets():
    """Bijections need no projection; parts of a tree are constrained by `where`."""
    hyperparams = {
        "share": hpo.Interval(0.5, 0.0, 1.0),
        "mix": hpo.Simplex(START),
        "box": hpo.Real(jnp.zeros(3)),
        "ball": jnp.full(2, 0.1),
    }
    outer = optax.chain(
        optax.adam(1.0),
        hpo.project(projections.projection_box, 0.0, 0.5, where=lambda h: h["box"]),
        hpo.project(projections.projection_l2_ball, 1.0, where=lambda h: h["ball"]),
    )

    def loss(model, h, batch, key):
        del batch
        noise = jr.normal(key, (4,))
        inner = noise[0] * h["share"] + h["mix"] @ jr.normal(key, (5,))
        return 30 * (inner + noise[1] * h["box"].sum() + noise[2] * h["ball"][0]) + (
            (model - noise[3]) ** 2
        )

    algorithm = hpo.FirstOrder(hpo.Problem(loss, loss), optax.sgd(0.1), outer)
    solution = hpo.tune(
        algorithm,
        jnp.ones(()),
        hyperparams,
        None,
        None,
        steps=200,
        key=jr.key(0),
        record_every=1,
    )
    course = solution.history.hyperparams
    assert (course["share"].min() >= 0) and (course["share"].max() <= 1)
    assert abs(course["mix"].sum(-1) - 1).max() < 1e-12
    assert course["mix"].min() >= 0
    assert (course["box"].min() >= 0) and (course["box"].max() <= 0.5)
    assert jnp.linalg.norm(course["ball"], axis=-1).max() <= 1 + 1e-12
    # The constraints were met, not just never reached.
    assert (course["box"] == 0.5).any()
    assert jnp.linalg.norm(course["ball"], axis=-1).max() > 0.999


def test_parts_are_projected_one_by_one():
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0, 2.0]), "c": jnp.ones(1)}
    ball = projections.projection_l2_ball
    project = hpo.project(ball, 1.0, where=lambda h: (h["a"], h["b"]))
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = project.update(zeros, project.init(tree), tree)
    got = optax.apply_updates(tree, updates)
    expected = {"a": jnp.array([0.6, 0.8]), "b": jnp.array([0.0, 1.0]), "c": tree["c"]}
    assert jax.tree.all(jax.tree.map(jnp.allclose, got, expected))


def test_a_whole_that_is_a_tuple_is_one_part():
    tree: Any = (jnp.array([3.0]), jnp.array([4.0]), None)
    project = hpo.project(projections.projection_l2_ball, 1.0)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = project.update(zeros, project.init(tree), tree)
    moved: Any = optax.apply_updates(tree, updates)
    first, second, _ = moved
    assert jnp.allclose(first, 0.6) and jnp.allclose(second, 0.8)


def test_mirror_step_is_the_exponentiated_gradient():
    gradient = jnp.array([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]])
    weights = jnp.array([[0.2, 0.3, 0.5], [0.0, 0.5, 0.5]])
    outer = optax.chain(optax.sgd(0.4), hpo.mirror())
    updates, _ = outer.update(gradient, outer.init(weights), weights)
    tilted = weights * jnp.exp(-0.4 * gradient)
    expected = tilted / tilted.sum(-1, keepdims=True)
    assert jnp.allclose(jnp.add(weights, jnp.asarray(updates)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "make", [lambda w: hpo.project(projections.projection_simplex, where=w), hpo.mirror]
)
def test_other_placeholders_raise(make):
    tree = {"a": hpo.Positive(1.0), "b": hpo.Real(START)}
    with pytest.raises(ValueError, match=r"\['a'\].* is of class Positive"):
        make(None).init(tree)
    make(lambda h: h["b"]).init(tree)


def test_other_bad_input_raises():
    with pytest.raises(ValueError, match="`mirror` needs weights"):
        hpo.mirror().init(jnp.array([0.5, 0.6]))
    project = hpo.project(projections.projection_non_negative)
    with pytest.raises(ValueError, match="`project` needs the parameters"):
        project.update(START, project.init(START))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("lower, upper", [(0.0, 1.0), (0.1, 0.3), (-1e-3, 1e-3)])
@pytest.mark.parametrize(
    "make",
    [
        lambda *box: hpo.project(optax.projections.projection_box, *box),
        lambda *box: hpo.proximal(hpo.Box(*box), 0.1),
    ],
)
def test_a_box_holds_to_the_last_bit(make, lower, upper, dtype):
    """Optax adds an update to the values: their sum must not round to the outside."""
    keys = jr.split(jr.key(0))
    start = jr.uniform(keys[0], (10_000,), jnp.float32, lower, upper).astype(dtype)
    updates = jr.normal(keys[1], (10_000,), dtype)
    outer = make(lower, upper)
    changes, _ = outer.update(updates, outer.init(start), start)
    got: Any = optax.apply_updates(start, changes)
    assert got.dtype == dtype
    assert jnp.all(
        (got >= jnp.asarray(lower, dtype)) & (got <= jnp.asarray(upper, dtype))
    )
    near = jnp.abs(got - upper) <= 2 * jnp.finfo(dtype).eps * max(upper, -lower)
    assert jnp.all(near | (start + updates <= upper))
