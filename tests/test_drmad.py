import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import optax
import pytest
from eqx_hpo._data import as_batches
from eqx_hpo._hyperparameter import partition_raw
from eqx_hpo._levels import make_levels
from eqx_hpo._optimizer.drmad import end_cotangent, pull_back

from .helpers import relative_error, step_temporaries
from .problems import logistic, ridge


OUTER = optax.sgd(0.1)
INNER = {
    "momentum": lambda h: optax.sgd(h["rate"], momentum=0.9),
    "adam": lambda h: optax.adam(h["rate"]),
}


def _hypergradient(algorithm, case, inner, inner_steps):
    hyperparams = {**case.hyperparams, "rate": hpo.Positive(0.05)}
    algorithm = algorithm(case.problem, inner, OUTER, inner_steps=inner_steps)
    state = algorithm.init(case.model, hyperparams)
    return algorithm.compute_hypergradient(state, case.train, case.val)


@pytest.mark.parametrize("inner", INNER)
def test_a_single_step_is_exact(inner):
    case = logistic()
    got = _hypergradient(hpo.DrMAD, case, INNER[inner], 1)
    expected = _hypergradient(hpo.T1T2, case, INNER[inner], 1)
    assert relative_error(got, expected) < 1e-12


def test_constant_second_derivatives_are_exact():
    def train_loss(model, target, batch, key):
        del key
        error = model - target
        return 0.5 * error @ (batch @ error)

    def val_loss(model, target, batch, key):
        del batch, key
        return jnp.sum(jnp.cos(model)) + jnp.sum(target**2)

    problem, inner = hpo.Problem(train_loss, val_loss), optax.sgd(0.2, momentum=0.5)
    train = jnp.array([[1.0, 0.3], [0.3, 0.7]])
    got, expected = (
        x.compute_hypergradient(x.init(jnp.ones(2), -jnp.ones(2)), train, None)
        for x in (
            hpo.DrMAD(problem, inner, OUTER, inner_steps=9),
            hpo.Unrolled(problem, inner, OUTER, inner_steps=9),
        )
    )
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("inner", INNER)
def test_equals_the_walk_by_hand(inner):
    case, steps = logistic(), 6
    hyperparams = {**case.hyperparams, "rate": hpo.Positive(0.05)}
    raw, constants = partition_raw(hyperparams)
    to_plain = lambda raw: hpo.unwrap(eqx.combine(raw, constants))

    def update(state, raw):
        (model, opt_state), plain = state, to_plain(raw)
        grads = jax.grad(case.problem.train_loss)(model, plain, case.train, None)
        updates, opt_state = INNER[inner](plain).update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state

    @jax.jit
    def by_hand(raw):
        first = (case.model, INNER[inner](to_plain(raw)).init(case.model))
        last = first
        for _ in range(steps):
            last = update(last, raw)

        def val_loss(model, raw):
            return case.problem.val_loss(model, to_plain(raw), case.val, None)

        alpha, total = jax.grad(val_loss, argnums=(0, 1))(last[0], raw)
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        zero = lambda x: jnp.zeros(x.shape, x.dtype if is_float(x) else jax.float0)
        cotangent = (alpha, jax.tree.map(zero, last[1]))
        for t in range(steps - 1, -1, -1):

            def point(x, y, t=t):
                return x + (y - x) * t / steps if is_float(x) else x + t

            _, pullback = jax.vjp(update, jax.tree.map(point, first, last), raw)
            cotangent, product = pullback(cotangent)
            total = jax.tree.map(jnp.add, total, product)
        return total

    got = _hypergradient(hpo.DrMAD, case, INNER[inner], steps)
    assert relative_error(got, by_hand(raw)) < 1e-10


def test_a_line_is_not_the_trajectory():
    case = logistic()
    got, exact = (
        _hypergradient(x, case, INNER["momentum"], 30)
        for x in (hpo.DrMAD, hpo.Unrolled)
    )
    assert 1e-4 < relative_error(got, exact) < 1.0


def test_temporaries_do_not_grow_with_the_inner_steps():
    case = ridge()

    def temporaries(inner_steps):
        inner = optax.adam(0.1)
        algorithm = hpo.DrMAD(case.problem, inner, OUTER, inner_steps=inner_steps)
        state = algorithm.init(case.model, case.hyperparams)
        return step_temporaries(algorithm, state, case)

    # The counter of Adam, a number of four bytes, is kept for each step.
    assert temporaries(1000) <= 1.05 * temporaries(10) + 8 * 1000


def test_a_second_moment_that_is_zero_passes_nothing_on():
    """On the line the gradients before it need not be zero."""
    problem = hpo.Problem(
        lambda w, h, batch, key: h * w[0] ** 2, lambda w, h, batch, key: jnp.sum(w**2)
    )
    algorithm = hpo.DrMAD(problem, optax.adam(0.1), OUTER, inner_steps=3)
    state = algorithm.init(jnp.ones(2), 0.5)
    levels = make_levels(
        problem,
        algorithm.inner,
        algorithm.second_order,
        state,
        state.hyperparams,
        as_batches(None, "train", 3),
        as_batches(None, "val", 3),
        state.step,
        None,
        lambda tree: tree,
    )
    inner = hpo.InnerState(state.model, state.inner_opt_state, None)
    cotangent = end_cotangent(inner, (jnp.ones(2), None))
    before, product = pull_back(
        levels, inner, state.hyperparams, cotangent, jnp.array(0)
    )
    leaves = jax.tree.leaves((before, product))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in leaves)


def test_counters_that_start_over_are_those_of_the_trajectory():
    """Exact, since the second derivatives are constant."""

    def train_loss(w, h, batch, key):
        return jnp.sum(batch * (w - h) ** 2)

    def val_loss(w, h, batch, key):
        return jnp.sum(jnp.sin(w))

    inner = optax.MultiSteps(optax.sgd(0.1, momentum=0.5), 2)
    algorithms = [
        make(hpo.Problem(train_loss, val_loss), inner, OUTER, inner_steps=7)
        for make in (hpo.DrMAD, hpo.Unrolled)
    ]
    got, expected = (
        x.compute_hypergradient(
            x.init(jnp.array([0.3, -0.2]), jnp.array([1.0, 2.0])),
            jnp.array([1.0, 0.7]),
            None,
        )
        for x in algorithms
    )
    assert jnp.all(jnp.abs(expected) > 0.01)
    assert relative_error(got, expected) < 1e-6


def test_keys_are_those_of_the_trajectory():
    def update(updates, state, params=None):
        keep = jax.random.bernoulli(state, shape=updates.shape)
        return -0.1 * keep * updates, jax.random.split(state)[0]

    inner = optax.GradientTransformation(lambda params: jax.random.key(1), update)
    problem = hpo.Problem(
        lambda w, h, *_: jnp.sum((w - h) ** 2), lambda w, h, *_: jnp.sum(jnp.sin(w))
    )
    got, expected = (
        x.compute_hypergradient(x.init(jnp.ones(5), jnp.zeros(5)), None, None)
        for x in (
            hpo.DrMAD(problem, inner, OUTER, inner_steps=4),
            hpo.Unrolled(problem, inner, OUTER, inner_steps=4),
        )
    )
    assert jnp.all(expected > 0.1)
    assert relative_error(got, expected) < 1e-12


def _every_third(wraps):
    """Gradient descent in each third step, by a counter that starts over or not."""

    def update(updates, state, params=None):
        updates = jax.tree.map(lambda g: -0.1 * g * (state % 3 == 1), updates)
        return updates, (state + 1) % 3 if wraps else state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), int), update)


@pytest.mark.slow
def test_the_fit_of_hyperdistill_keeps_counters_too():
    problem = hpo.Problem(
        lambda w, h, batch, key: jnp.sum(batch * (w - h) ** 2),
        lambda w, h, batch, key: jnp.sum((w - 3) ** 2),
    )
    batch = jnp.array([1.0, 0.7])

    def scale(wraps):
        algorithm = hpo.HyperDistill(problem, _every_third(wraps), OUTER, horizon=6)
        state = algorithm.init(jnp.zeros(2), jnp.ones(2), train=batch)
        return algorithm.step(state, batch, None).memory.lasting

    assert abs(scale(False)) > 0.1
    assert abs(scale(True) - scale(False)) < 1e-12
