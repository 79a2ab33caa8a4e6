from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest


PENALTIES = {
    "l1": hpo.L1(0.7),
    "elastic_net": hpo.ElasticNet(0.4, 1.5),
    "group_lasso": hpo.GroupLasso(0.8, axis=-1),
    "group_lasso_whole": hpo.GroupLasso(0.8),
    "box": hpo.Box(-0.3, 0.4),
}
STEP = 0.6


@pytest.mark.parametrize("name", PENALTIES)
def test_is_no_worse_than_a_numeric_minimiser(getkey, name):
    """The proximal operator minimises a strongly convex function: no point around it is
    better, at any distance and in any direction."""
    penalty = PENALTIES[name]
    x = jr.normal(getkey(), (3, 2))
    solution = penalty.prox(x, STEP)
    objective = lambda z: penalty.value(z) + jnp.sum((z - x) ** 2) / (2 * STEP)
    directions = jr.normal(getkey(), (2000, *x.shape))
    axes = jnp.eye(6).reshape(6, 3, 2)
    directions = jnp.concatenate([directions, axes, -axes, -solution[None]])
    best = objective(solution)
    for distance in (1e-4, 1e-2, 1.0):
        others = jax.vmap(objective)(solution + distance * directions)
        # By strong convexity they are worse by the square of the distance at least.
        squares = jnp.sum(jnp.square(distance * directions), axis=(1, 2))
        assert jnp.all(others - best >= squares / (2 * STEP) * (1 - 1e-6) - 1e-13)


def test_closed_forms():
    x = jnp.array([-1.0, -0.2, 0.0, 0.3, 2.0])
    soft = jnp.array([-0.58, 0.0, 0.0, 0.0, 1.58])
    assert jnp.allclose(PENALTIES["l1"].prox(x, STEP), soft)
    net = jnp.array([-0.76, 0.0, 0.0, 0.06, 1.76]) / 1.9
    assert jnp.allclose(PENALTIES["elastic_net"].prox(x, STEP), net)
    groups = jnp.array([[3.0, 4.0], [0.1, 0.2], [0.0, 0.0]])
    lasso = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]) * (1 - 0.48 / 5)
    assert jnp.allclose(PENALTIES["group_lasso"].prox(groups, STEP), lasso)
    assert jnp.allclose(PENALTIES["box"].prox(x, STEP), jnp.clip(x, -0.3, 0.4))


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_converges_to_the_lasso_with_exact_zeros(momentum):
    """Of the outer problem 0.5 |h - b|^2 + |h|_1 the solution is a soft threshold."""
    target = jnp.array([3.0, 0.5, -2.0, -0.9])
    loss = lambda model, h, batch, key: (
        0.5 * jnp.sum((h - target) ** 2) + 0 * model.sum()
    )
    rate = 0.05
    outer = optax.chain(
        optax.sgd(rate, momentum=momentum),
        hpo.proximal(hpo.L1(1.0), rate / (1 - momentum)),
    )
    algorithm = hpo.FirstOrder(hpo.Problem(loss, loss), optax.sgd(0.1), outer)
    start = jnp.full(4, 0.3)
    solution = hpo.tune(algorithm, jnp.ones(1), start, None, None, steps=800, key=None)
    assert jnp.allclose(solution.values, jnp.array([2.0, 0.0, -1.0, 0.0]), atol=1e-9)
    assert jnp.array_equal(solution.values == 0, jnp.abs(target) <= 1)


def test_a_schedule_of_the_rate_and_a_part_of_the_tree():
    tree: Any = {"a": jnp.ones(2), "b": hpo.Positive(2.0)}
    schedule = lambda step: jnp.where(step == 0, 0.25, 0.5)
    proximal = hpo.proximal(hpo.L1(1.0), schedule, where=lambda h: h["a"])
    state = proximal.init(tree)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    updates: Any
    for expected in (-0.25, -0.5):
        updates, state = proximal.update(zeros, state, tree)
        assert jnp.allclose(updates["a"], expected)
        assert updates["b"].raw == 0


def test_bad_input_raises():
    with pytest.raises(ValueError, match="`learning_rate` must be .* above zero"):
        hpo.proximal(hpo.L1(0.1), 0.0)
    with pytest.raises(ValueError, match="`strength` must be .* at least zero; got -1"):
        hpo.L1(-1.0)
    with pytest.raises(ValueError, match="`l2` must be a number of at least zero"):
        hpo.ElasticNet(0.1, -0.1)
    with pytest.raises(ValueError, match="`strength`"):
        hpo.GroupLasso(-0.1)
    with pytest.raises(ValueError, match="needs `lower` <= `upper`; got 1.0 and 0.0"):
        hpo.Box(1.0, 0.0)
    with pytest.raises(ValueError, match="is of class Positive"):
        positive: Any = {"b": hpo.Positive(2.0)}
        hpo.proximal(hpo.L1(0.1), 0.1).init(positive)


def test_a_strength_may_be_traced():
    prox = lambda strength: hpo.L1(strength).prox(jnp.ones(3), 0.5)
    slope = jax.jacfwd(prox)(jnp.array(0.2))
    assert jnp.allclose(slope, -0.5)
    assert eqx.tree_equal(jax.jit(prox)(0.2), prox(0.2))
