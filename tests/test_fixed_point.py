"""FixedPoint against closed forms and unrolling."""

import functools as ft

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optax
import pytest

from .helpers import relative_error, RULES
from .problems import logistic, ridge


HOLD = optax.set_to_zero()
MOMENTUM = optax.sgd(0.1, momentum=0.9)


def _rates(h):
    return optax.sgd(jnp.exp(h["rate"]), momentum=jax.nn.sigmoid(h["momentum"]))


def _with_rates(case):
    return case.hyperparams | {
        "rate": jnp.log(jnp.array(0.1)), "momentum": jnp.array(2.0)
    }  # fmt: skip


@ft.cache
def _trained(terms):
    """Ridge regression at its minimum, by momentum, whose settings are tuned too."""
    case = ridge()
    algorithm = hpo.FixedPoint(case.problem, _rates, HOLD, inner_steps=600, terms=terms)
    state = algorithm.init(case.model, _with_rates(case))
    for _ in range(3):
        state = algorithm.step(state, case.train, case.val)
    return case, state, algorithm.compute_hypergradient(state, case.train, case.val)


@pytest.mark.parametrize("terms, bound", [(5, 1.0), (50, 0.2), (400, 1e-9)])
def test_tends_to_the_closed_form_with_the_number_of_terms(terms, bound):
    case, state, got = _trained(terms)
    expected = case.hypergradient(case.hyperparams)
    error = relative_error({"penalty": got["penalty"]}, expected)
    assert error < bound
    if bound > 1e-6:
        assert error > bound / 20
    # No rate moves a minimum.
    assert abs(got["rate"]) < 1e-12
    assert abs(got["momentum"]) < 1e-12


@pytest.mark.parametrize("optimiser", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("terms", [0, 4])
def test_equals_the_sum_by_hand_off_the_fixed_point(optimiser, terms):
    case = ridge()
    inner = {
        "momentum": _rates,
        "adam": lambda h: optax.adam(jnp.exp(h["rate"]), jax.nn.sigmoid(h["momentum"])),
        "adamw": lambda h: optax.adamw(
            jnp.exp(h["rate"]), weight_decay=jax.nn.sigmoid(h["momentum"])
        ),
    }[optimiser]
    algorithm = hpo.FixedPoint(case.problem, inner, HOLD, inner_steps=3, terms=terms)
    hyperparams = _with_rates(case)
    state = algorithm.init(case.model, hyperparams)
    got = algorithm.compute_hypergradient(state, case.train, case.val)

    def update(moving, fixed, h):
        params, opt_state = combine(moving, fixed)
        grads = jax.grad(case.problem.train_loss)(params, h, case.train, None)
        updates, opt_state = inner(h).update(grads, opt_state, params)
        return split((optax.apply_updates(params, updates), opt_state))

    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    split = lambda tree: (
        [x for x in jtu.tree_leaves(tree) if is_float(x)],
        [None if is_float(x) else x for x in jtu.tree_leaves(tree)],
    )

    def combine(moving, fixed):
        moving = iter(moving)
        leaves = [next(moving) if x is None else x for x in fixed]
        return jtu.tree_unflatten(treedef, leaves)

    start = (case.model, inner(hyperparams).init(case.model))
    treedef = jtu.tree_structure(start)
    moving, fixed = split(start)
    for _ in range(2):
        moving, fixed = update(moving, fixed, hyperparams)
    _, pullback = jax.vjp(lambda m, h: update(m, fixed, h)[0], moving, hyperparams)
    end, _ = update(moving, fixed, hyperparams)
    val = lambda moving, h: case.problem.val_loss(
        combine(moving, fixed)[0], h, case.val, None
    )
    cotangent, total = jax.grad(val, (0, 1))(end, hyperparams)
    for _ in range(terms + 1):
        cotangent, product = pullback(cotangent)
        total = jtu.tree_map(jnp.add, total, product)
    assert abs(total["rate"]) > 1e-6
    assert relative_error(got, total) < 1e-10


def test_equals_unrolled_where_training_stands_still():
    case, state, got = _trained(5)
    unrolled = hpo.Unrolled(case.problem, _rates, HOLD, inner_steps=6)
    expected = unrolled.compute_hypergradient(
        unrolled.init(state.model, state.hyperparams), case.train, case.val
    )
    assert relative_error(got, expected) < 1e-10


def test_is_t1t2_without_terms():
    case = ridge()
    args = (case.problem, _rates, HOLD)
    pair = (
        hpo.FixedPoint(*args, inner_steps=3, terms=0),
        hpo.T1T2(*args, inner_steps=3),
    )
    got = [
        x.compute_hypergradient(x.init(case.model, _with_rates(case)), *_data(case))
        for x in pair
    ]
    assert relative_error(*got) < 1e-14


def _data(case):
    return case.train, case.val


def test_with_plain_descent_it_is_implicit_by_a_neumann_series():
    case = logistic()
    args = (case.problem, optax.sgd(0.1), HOLD)
    pair = (
        hpo.FixedPoint(*args, inner_steps=3000, terms=7),
        hpo.Implicit(
            *args, inner_steps=2999, linear_solver=hpo.Neumann(8, 0.1), warm_start=False
        ),
    )
    got = [
        x.compute_hypergradient(x.init(case.model, case.hyperparams), *_data(case))
        for x in pair
    ]
    assert relative_error(*got) < 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule):
    case = ridge()
    args = (case.problem, MOMENTUM, HOLD, RULES[rule])
    algorithm = hpo.FixedPoint(*args, inner_steps=600, terms=300)
    got = algorithm.compute_hypergradient(
        algorithm.init(case.model, case.hyperparams), *_data(case)
    )
    assert relative_error(got, case.hypergradient(case.hyperparams)) < 1e-4


def test_implicit_and_its_error_point_here():
    case = ridge()
    with pytest.raises(ValueError, match="Tune them by `FixedPoint`"):
        hpo.Implicit(
            case.problem, _rates, HOLD, inner_steps=1, linear_solver=lx.CG(1e-3, 1e-3)
        )
    with pytest.raises(ValueError, match="`terms` must be an integer of at least 0"):
        hpo.FixedPoint(case.problem, MOMENTUM, HOLD, inner_steps=1, terms=-1)
