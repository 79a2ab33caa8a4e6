from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import optax
import pytest
from eqx_hpo._hyperparameter import partition_raw

from .helpers import relative_error, step_temporaries
from .problems import logistic, ridge


OUTER = optax.sgd(0.1)
# The rate is among the hyperparameters, so that every part of an update is seen.
INNER = {
    "sgd": lambda h: optax.sgd(h["rate"]),
    "momentum": lambda h: optax.sgd(h["rate"], momentum=0.9),
    "adam": lambda h: optax.adam(h["rate"]),
}


def _case():
    case = ridge()
    return case, {**case.hyperparams, "rate": hpo.Positive(0.05)}


def _by_hand(
    case, inner, hyperparams, trains, vals, discount, momentum=0.0, final=False
):
    """Eq. 6 with explicit weights of each term, from a stored trajectory."""
    problem, length = case.problem, len(trains)
    raw, constants = partition_raw(hyperparams)
    to_plain = lambda raw: hpo.unwrap(eqx.combine(raw, constants))
    model = case.model
    opt_state = inner(to_plain(raw)).init(model)
    products, alphas = [], []
    for t in range(length):

        def update(raw, model=model, opt_state=opt_state, t=t):
            plain = to_plain(raw)
            grads = jax.grad(problem.train_loss)(model, plain, trains[t], None)
            updates, new = inner(plain).update(grads, opt_state, model)
            return optax.apply_updates(model, updates), new

        model, pullback, opt_state = jax.vjp(update, raw, has_aux=True)
        products.append(pullback)
        alphas.append(jax.grad(problem.val_loss)(model, to_plain(raw), vals[t], None))
    # How much of a push of one is left after so many steps.
    weights = [1.0]
    velocity = 1.0
    for _ in range(length - 1):
        velocity = momentum * velocity - (1 - discount) * weights[-1]
        weights.append(weights[-1] + velocity)
    terms = [
        jax.tree.map(lambda x: weights[length - 1 - t] * x, products[t](alpha)[0])
        for t, alpha in enumerate([alphas[-1]] * length if final else alphas)
    ]
    direct = jax.grad(lambda raw: problem.val_loss(model, to_plain(raw), vals[-1], 0))
    return jax.tree.map(lambda *x: sum(x), direct(raw), *terms)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("inner_steps", [1, 4])
def test_zero_discount_is_t1t2(inner, inner_steps):
    case, hyperparams = _case()
    greedy, t1t2 = (
        algorithm(
            case.problem, INNER[inner], OUTER, inner_steps=inner_steps, **discount
        )
        for algorithm, discount in [(hpo.Greedy, {"discount": 0.0}), (hpo.T1T2, {})]
    )
    state = greedy.init(case.model, hyperparams)
    got, expected = (
        x.compute_hypergradient(state, case.train, case.val) for x in (greedy, t1t2)
    )
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"final_gradient": True}], ids=str
)
def test_equals_the_sum_by_hand(inner, settings):
    case, hyperparams = _case()
    algorithm = hpo.Greedy(
        case.problem, INNER[inner], OUTER, inner_steps=4, discount=0.8, **settings
    )
    trains = [(jnp.roll(case.train[0], t, 0), case.train[1]) for t in range(4)]
    vals = [(jnp.roll(case.val[0], t, 0), case.val[1]) for t in range(4)]
    stack = lambda batches: hpo.Stacked(jax.tree.map(lambda *x: jnp.stack(x), *batches))
    state = algorithm.init(case.model, hyperparams)
    got = algorithm.compute_hypergradient(state, stack(trains), stack(vals))
    expected = _by_hand(
        case,
        INNER[inner],
        hyperparams,
        trains,
        vals,
        0.8,
        settings.get("momentum", 0.0),
        settings.get("final_gradient", False),
    )
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_is_exact_where_the_hessian_is_a_multiple_of_the_identity(momentum):
    def train_loss(model, target, batch, key):
        del batch, key
        return 0.5 * 0.7 * jnp.sum((model - jnp.tanh(target)) ** 2)

    def val_loss(model, target, batch, key):
        del batch, key
        return jnp.sum(jnp.cos(model)) + jnp.sum(target**2)

    problem = hpo.Problem(train_loss, val_loss)
    inner = optax.sgd(0.2, momentum=momentum)
    exact = hpo.Unrolled(problem, inner, OUTER, inner_steps=12)
    settings: dict[str, Any] = dict(
        discount=1 - 0.2 * 0.7, momentum=momentum, final_gradient=True
    )
    greedy = hpo.Greedy(problem, inner, OUTER, inner_steps=12, **settings)
    model, target = jnp.array([1.0, -2.0, 0.3]), jnp.array([0.2, 0.8, -1.0])
    state = exact.init(model, target)
    got, expected = (
        x.compute_hypergradient(state, None, None) for x in (greedy, exact)
    )
    assert relative_error(got, expected) < 1e-13


# What a prototype of the paper's section 5.2 gave, rounded as here.
TOY = {
    "t1t2": (0.86, 8.95),
    "greedy": (0.052, 14.7),
    "exact": (0.002, 8.95),
}


@pytest.mark.parametrize(
    "name",
    ["greedy", *[pytest.param(x, marks=pytest.mark.slow) for x in ("t1t2", "exact")]],
)
def test_toy_of_the_paper(name):
    def train_loss(model, target, batch, key):
        del batch, key
        return 0.5 * jnp.sum(jnp.array([1.0, 0.5]) * (model - target) ** 2)

    def val_loss(model, target, batch, key):
        del target, batch, key
        return jnp.sum(model**2) + 10 * jnp.sum(jnp.sin(model) ** 2)

    algorithm = {"t1t2": hpo.T1T2, "greedy": hpo.Greedy, "exact": hpo.Unrolled}[name]
    problem = hpo.Problem(train_loss, val_loss)
    algorithm = algorithm(problem, optax.sgd(0.1), OUTER, inner_steps=5)

    def final_loss(steps, restart):
        solution = hpo.tune(
            algorithm,
            jnp.full(2, 2.0),
            jnp.ones(2),
            None,
            None,
            steps=steps,
            key=None,
            restart_every=restart,
        )
        return solution.history.val_loss[-1]

    warm, restarted = TOY[name]
    # The validation loss of a step is that before its update.
    assert final_loss(21, None) == pytest.approx(warm, rel=0.1, abs=5e-4)
    assert final_loss(300, 1) == pytest.approx(restarted, rel=0.01)


def test_temporaries_and_traces_do_not_grow_with_the_inner_steps():
    case = logistic()
    traces = 0

    def train_loss(*args):
        nonlocal traces
        traces += 1
        return case.problem.train_loss(*args)

    def compile_step(inner_steps):
        problem = hpo.Problem(train_loss, case.problem.val_loss)
        inner = optax.sgd(0.1, momentum=0.9)
        # By default a small number of steps is looked at once more, for convolutions.
        algorithm = hpo.Greedy(problem, inner, OUTER, inner_steps=inner_steps, unroll=1)
        state = algorithm.init(case.model, case.hyperparams)
        return step_temporaries(algorithm, state, case)

    few = compile_step(10)
    traces_few, traces = traces, 0
    many = compile_step(1000)
    assert many <= 1.05 * few
    assert traces == traces_few


def test_an_iterator_gives_a_validation_batch_to_each_inner_step():
    drawn = []

    def loader(name):
        for i in range(100):
            drawn.append(name)
            yield jnp.full((), i, float)

    loss = lambda model, hyperparams, batch, key: (model - batch * hyperparams) ** 2
    problem = hpo.Problem(loss, loss)
    algorithm = hpo.Greedy(problem, optax.sgd(0.1), OUTER, inner_steps=3)
    one = jnp.ones(())
    hpo.tune(algorithm, one, one, loader("train"), loader("val"), steps=2, key=None)
    assert drawn.count("train") == drawn.count("val") == 6


def test_another_discount_compiles_nothing_anew():
    case = ridge()
    algorithm = hpo.Greedy(case.problem, optax.sgd(0.1), OUTER, inner_steps=3)
    state = algorithm.init(case.model, case.hyperparams)

    def hypergradient(discount):
        new = eqx.tree_at(lambda x: x.discount, algorithm, discount)
        return new.compute_hypergradient(state, case.train, case.val)["penalty"]

    discounts = jnp.array([0.3, 0.9])
    one_by_one = jnp.stack([hypergradient(discount) for discount in discounts])
    assert relative_error(jax.vmap(hypergradient)(discounts), one_by_one) < 1e-12


@pytest.mark.parametrize("name", ["discount", "momentum"])
@pytest.mark.parametrize("value", [-0.1, 1.5, jnp.zeros(2)], ids=str)
def test_a_share_out_of_range_raises(name, value):
    case = ridge()
    with pytest.raises(ValueError, match=f"`{name}` must be a number from 0 to 1"):
        hpo.Greedy(case.problem, optax.sgd(0.1), OUTER, inner_steps=3, **{name: value})
