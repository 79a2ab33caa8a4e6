import functools as ft

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from .helpers import arrays, CountingRule, relative_error, step_temporaries
from .problems import logistic, ridge


OUTER, FROZEN = optax.sgd(0.01), optax.sgd(0.0)
SGD = optax.sgd(0.1, momentum=0.9)
INNER = {
    "momentum": lambda h: optax.sgd(h["rate"], momentum=0.9),
    "adam": lambda h: optax.adam(h["rate"]),
}


@pytest.mark.parametrize("inner, inner_steps", [("momentum", 3), ("adam", 1)])
def test_no_memory_and_no_scale_is_one_step(inner, inner_steps):
    case = ridge()
    hyperparams = {**case.hyperparams, "rate": hpo.Positive(0.05)}
    args = (case.problem, INNER[inner], OUTER)
    one_step = hpo.T1T2(*args, inner_steps=inner_steps)
    algorithm = hpo.HyperDistill(
        *args, inner_steps=inner_steps, discount=0.0, scale=1.0
    )
    train = hpo.Minibatch(case.train, 5)
    state = algorithm.init(case.model, hyperparams, train=train)
    expected = one_step.init(case.model, hyperparams)
    for i in range(4):
        state = algorithm.step(state, train, case.val, key=jr.key(i))
        expected = one_step.step(expected, train, case.val, key=jr.key(i))
    assert relative_error(state.hyperparams, expected.hyperparams) < 1e-10
    assert relative_error(state.model, expected.model) < 1e-10


@pytest.mark.parametrize("discount", [0.7, 1.0])
def test_weights_are_the_average_of_eq_12(discount):
    case = ridge()
    make = ft.partial(hpo.HyperDistill, case.problem, SGD, FROZEN, scale=1.0)
    single, several = (make(discount=discount, inner_steps=n) for n in (1, 5))
    state = single.init(case.model, case.hyperparams, train=case.train)
    visited = []
    for _ in range(100):
        visited.append(np.asarray(state.model))
        state = single.step(state, case.train, case.val)
    discounts = discount ** np.arange(100)[::-1]
    expected = np.average(visited, axis=0, weights=discounts)
    assert relative_error(state.memory.episode.weights, expected) < 1e-10
    assert float(state.memory.episode.mass) == pytest.approx(discounts.sum(), 1e-12)
    fewer = several.init(case.model, case.hyperparams, train=case.train)
    for _ in range(20):
        fewer = several.step(fewer, case.train, case.val)
    assert relative_error(fewer.memory.episode, state.memory.episode) < 1e-10


@ft.cache
def _distance_problem():
    def loss(model, hyperparams, batch, key):
        del batch, key
        return jnp.sum((model - hyperparams) ** 2)

    return hpo.Problem(loss, loss)


@eqx.filter_jit
def _run_many(algorithm, state, stamp, steps, runs):
    """The distilled batch after so many steps, for many keys."""

    def run(key):
        def body(state, t):
            key_t = jr.fold_in(key, t)
            batch = jax.tree.map(lambda x: x[None], stamp(t))
            return algorithm.step(state, hpo.Stacked(batch), None, key=key_t), None

        return jax.lax.scan(body, state, jnp.arange(steps))[0].memory.episode.batch

    return jax.vmap(run)(jr.split(jr.key(0), runs))


@pytest.mark.parametrize("discount", [0.6, 0.95, 1.0])
def test_composition_of_the_distilled_batch(discount):
    size, steps, runs = 10, 12, 1000

    def val_loss(model, hyperparams, batch, key):
        del batch, key
        return jnp.sum((model - hyperparams) ** 2)

    problem = hpo.Problem(val_loss, val_loss)
    algorithm = hpo.HyperDistill(
        problem, optax.sgd(0.1), OUTER, discount=discount, scale=1.0
    )
    # Which step and which place an example comes from.
    stamp = lambda t: (jnp.full((size, 2), t), jnp.arange(size))
    first = hpo.Stacked(jax.tree.map(lambda x: x[None], stamp(0)))
    empty = algorithm.init(jnp.ones(2), jnp.zeros(2), train=first)

    born, place = _run_many(algorithm, empty, stamp, steps, runs)
    assert born.shape == (runs, size, 2)
    assert jnp.all(born[..., 0] == born[..., 1])
    assert jnp.all(place == jnp.arange(size))
    shares = [float(jnp.mean(born == t)) for t in range(steps)]
    weights = discount ** np.arange(steps)[::-1]
    # Four standard errors of a share that is never more spread than a binomial one.
    expected = weights / weights.sum()
    tolerance = 4 * np.sqrt(expected / (runs * size)) + 1e-9
    assert np.all(np.abs(shares - expected) < tolerance)


def test_a_batch_mixed_with_itself_is_itself():
    """So a batch that is always the same is not held."""
    case = ridge()
    algorithm = hpo.HyperDistill(case.problem, SGD, OUTER, scale=1.0)
    stacked = hpo.Stacked(jax.tree.map(lambda x: x[None], case.train))
    states = [
        algorithm.init(case.model, case.hyperparams, train=train)
        for train in (stacked, case.train)
    ]
    for _ in range(3):
        states = [
            algorithm.step(state, train, case.val)
            for state, train in zip(states, (stacked, case.train))
        ]
    assert relative_error(states[0].memory.episode.batch, case.train) == 0.0
    assert states[1].memory.episode.batch is None
    assert relative_error(states[1].hyperparams, states[0].hyperparams) < 1e-14


STRENGTH, TARGET = np.array([1.0, 0.4, 2.0]), np.array([0.5, -1.0, 0.2])


@ft.cache
def _tanh_problem():
    """A train loss whose second derivatives depend on the weights."""

    def train_loss(model, hyperparams, batch, key):
        del key
        return jnp.sum(batch * jnp.log(jnp.cosh(model - hyperparams)))

    def val_loss(model, hyperparams, batch, key):
        del hyperparams, batch, key
        return 0.5 * jnp.sum((model - TARGET) ** 2)

    return hpo.Problem(train_loss, val_loss)


def _fit_in_numpy(theta, hyperparams, discount, horizon, rate=0.1, momentum=0.9):
    """Algorithm 4, with all derivatives written out."""
    path, trace = [theta], np.zeros(3)
    for _ in range(horizon):
        gradient = STRENGTH * np.tanh(path[-1] - hyperparams)
        trace = momentum * trace + gradient
        path.append(path[-1] - rate * trace)
    curvature = lambda w: STRENGTH / np.cosh(w - hyperparams) ** 2
    alpha = path[-1] - TARGET
    adjoint = alpha
    exact, average, xs, ys = np.zeros(3), np.zeros(3), [], []
    for u in range(1, horizon + 1):
        t = horizon - u + 1
        point = (1 - (t - 1) / horizon) * path[0] + (t - 1) / horizon * path[-1]
        exact = exact + adjoint * rate * curvature(point)
        adjoint = adjoint * (1 - rate * curvature(point))
        if discount < 1:
            keep = (1 - discount ** (u - 1)) / (1 - discount**u)
            factor = (1 - discount**u) / (1 - discount)
        else:
            keep, factor = (u - 1) / u, u
        average = keep * average + (1 - keep) * point
        v = alpha * rate * curvature(average)
        xs.append(np.linalg.norm(v) * factor)
        ys.append(v @ exact / np.linalg.norm(v))
    return np.dot(xs, ys) / np.dot(xs, xs)


def test_the_scale_equals_an_independent_one():
    theta, hyperparams = np.array([2.0, -0.3, 0.8]), np.array([0.1, 0.4, -0.5])
    train = jnp.asarray(STRENGTH)
    for discount in (0.0, 0.9, 1.0):
        algorithm = hpo.HyperDistill(
            _tanh_problem(), SGD, OUTER, discount=discount, horizon=7
        )
        state = algorithm.init(theta, hyperparams, train=train)
        assert jnp.isnan(state.memory.lasting)
        state = algorithm.step(state, train, None)
        expected = _fit_in_numpy(theta, hyperparams, discount, 7)
        assert float(state.memory.lasting) == pytest.approx(expected, rel=1e-10)


def test_first_steps_by_hand():
    rate, scale = 0.1, 0.7
    algorithm = hpo.HyperDistill(
        _tanh_problem(), optax.sgd(rate), FROZEN, discount=0.5, scale=scale
    )
    hyperparams, train = np.array([0.1, 0.4, -0.5]), jnp.asarray(STRENGTH)
    theta = [np.array([2.0, -0.3, 0.8])]
    state = algorithm.init(theta[0], hyperparams, train=train)
    for _ in range(2):
        gradient = STRENGTH * np.tanh(theta[-1] - hyperparams)
        theta.append(theta[-1] - rate * gradient)
        state = algorithm.step(state, train, None)
    got = algorithm.compute_hypergradient(state, train, None)
    gradient = STRENGTH * np.tanh(theta[-1] - hyperparams)
    alpha = theta[-1] - rate * gradient - TARGET
    weights = np.array([0.25, 0.5, 1.0])
    average = np.average(theta, axis=0, weights=weights)
    curvature = STRENGTH / np.cosh(average - hyperparams) ** 2
    expected = scale * weights.sum() * alpha * rate * curvature
    assert relative_error(got, jnp.asarray(expected)) < 1e-12


def test_the_scale_is_fitted_when_due_and_lives_on():
    case = ridge()
    algorithm = hpo.HyperDistill(
        case.problem, optax.sgd(0.05), OUTER, horizon=2, estimation_period=3
    )
    state = algorithm.init(case.model, case.hyperparams, train=case.train)
    scales = []
    for i in range(13):
        if i == 8:
            state = algorithm.restart(state, case.model)
            assert not any(jnp.any(x) for x in arrays(state.memory.episode))
        state = algorithm.step(state, case.train, case.val)
        scales.append(float(state.memory.lasting))
    changes = [i for i in range(1, 13) if scales[i] != scales[i - 1]]
    assert changes == [6, 12]


@pytest.mark.parametrize(
    "tasks, seeds", [(3, 2), pytest.param(None, None, marks=pytest.mark.slow)]
)
def test_one_product_a_step_and_a_fit_only_when_due(tasks, seeds):
    case, rule, horizon = logistic(), CountingRule(), 4
    algorithm = hpo.HyperDistill(
        case.problem, optax.sgd(0.1), OUTER, rule, horizon=horizon, estimation_period=2
    )
    train, val, step = case.train, case.val, algorithm.step
    if tasks is not None:
        train, val = (_replicate(x, tasks) for x in (train, val))
        algorithm = hpo.MetaLearner(algorithm, tasks, horizon=horizon)
        step = algorithm.step
    state = algorithm.init(case.model, case.hyperparams, train=train)
    if seeds is not None:
        state = _replicate(state, seeds)
        step = jax.jit(jax.vmap(algorithm.step, in_axes=(0, None, None)))
    for i in range(9):
        before = rule.count()
        state = step(state, train, val)
        products = 1 + 2 * horizon if i in (0, 8) else 1
        assert rule.count() - before == products, i


def _replicate(tree, size):
    copy = lambda x: jnp.broadcast_to(x, (size, *x.shape)) if eqx.is_array(x) else x
    return jax.tree.map(copy, tree)


@pytest.mark.slow
def test_temporaries_do_not_grow_with_the_horizon():
    case = logistic()

    def temporaries(horizon):
        algorithm = hpo.HyperDistill(
            case.problem, optax.adam(0.1), OUTER, horizon=horizon
        )
        state = algorithm.init(case.model, case.hyperparams, train=case.train)
        return step_temporaries(algorithm, state, case)

    # Adam's counter is kept for each step.
    assert temporaries(1000) <= 1.05 * temporaries(10) + 4 * 1000


@ft.cache
def _logistic_times():
    """An algorithm whose validation loss is multiplied by the validation batch."""
    case = logistic()

    def val_loss(model, hyperparams, batch, key):
        return batch * case.problem.val_loss(model, hyperparams, case.val, key)

    problem = hpo.Problem(case.problem.train_loss, val_loss)
    algorithm = hpo.HyperDistill(problem, SGD, FROZEN, horizon=3)
    return algorithm, algorithm.init(case.model, case.hyperparams, train=case.train)


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_extreme_gradients_give_the_same_scale(discount):
    algorithm, _ = _logistic_times()
    algorithm = eqx.tree_at(lambda x: x.discount, algorithm, jnp.array(discount))

    def scale(size):
        state = _logistic_times()[1]
        for _ in range(3):
            state = algorithm.step(state, logistic().train, jnp.array(size))
        assert state.skipped == 0
        return float(state.memory.lasting)

    assert scale(1e-200) == pytest.approx(scale(1.0), rel=1e-9)
    assert scale(1e200) == pytest.approx(scale(1.0), rel=1e-9)


def test_a_fit_that_is_not_finite_is_a_skipped_step():
    algorithm, state = _logistic_times()
    train, one = logistic().train, jnp.array(1.0)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), train)
    skipped = algorithm.step(state, bad, one)
    assert skipped.skipped == 1
    state = algorithm.step(skipped, train, one)
    assert state.skipped == 0 and jnp.isfinite(state.memory.lasting)


def test_a_fit_that_sees_nothing_is_repeated_soon():
    algorithm, state = _logistic_times()
    scales = []
    for i in range(7):
        val = jnp.array(0.0 if i < 2 else 1.0)
        state = algorithm.step(state, logistic().train, val)
        scales.append(float(state.memory.lasting))
    assert state.skipped == 0
    assert scales[:3] == [0.0, 0.0, 0.0]
    assert scales[3] > 0.1 and scales[4:] == scales[3:4] * 3


def test_the_past_takes_its_batches_from_an_iterator():
    case = ridge()
    algorithm = hpo.HyperDistill(case.problem, SGD, OUTER, scale=1.0)
    x, y = (np.asarray(x) for x in case.train)
    batches = iter([(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)])
    solution = hpo.tune(
        algorithm,
        case.model,
        case.hyperparams,
        batches,
        case.val,
        steps=10,
        key=jr.key(0),
    )
    assert solution.result == hpo.RESULTS.data_exhausted
    assert solution.state.step == 3
    assert solution.state.memory.episode.batch[0].shape == (8, 6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"discount": 1.5}, "`discount` must be a number from 0 to 1; got 1.5"),
        ({"horizon": 0}, "`horizon` must be an integer of at least 1; got 0"),
        ({"estimation_period": 0}, "`estimation_period` must be an integer"),
    ],
)
def test_bad_options(options, message):
    make = ft.partial(hpo.HyperDistill, ridge().problem, optax.sgd(0.1), OUTER)
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_start_without_data_or_with_others_is_explained():
    case = ridge()
    algorithm = hpo.HyperDistill(case.problem, optax.sgd(0.1), OUTER)
    state = algorithm.init(case.model, case.hyperparams)
    batches = hpo.Minibatch(case.train, 7, replacement=False)
    with pytest.raises(ValueError, match=r"init\(..., train=\)"):
        algorithm.step(state, batches, case.val)
    state = algorithm.init(case.model, case.hyperparams, train=batches)
    with pytest.raises(ValueError, match=r"`train\[0\]` is float64\[24, 6\]"):
        algorithm.step(state, case.train, case.val)
