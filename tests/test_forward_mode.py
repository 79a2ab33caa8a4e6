import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest

from .helpers import hand_unrolled, relative_error, step_temporaries
from .problems import logistic, ridge


HOLD = optax.set_to_zero()
INNER = {
    "momentum": lambda h: optax.sgd(h["rate"], momentum=0.9),
    "adam": lambda h: optax.adam(h["rate"]),
}


def _with_rate(case):
    return {**case.hyperparams, "rate": hpo.Positive(0.05)}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_equals_a_hand_written_unroll(inner, steps):
    case = logistic()
    hyperparams = _with_rate(case)
    algorithm = hpo.ForwardMode(case.problem, INNER[inner], HOLD, inner_steps=steps)
    state = algorithm.init(case.model, hyperparams)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    expected = hand_unrolled(
        case.problem, INNER[inner], case.model, hyperparams, case.train, case.val, steps
    )
    assert relative_error(got, expected, floor=1e-5) < 1e-10


def test_the_horizon_is_all_steps_since_the_restart():
    case = logistic()
    hyperparams = _with_rate(case)
    algorithm = hpo.ForwardMode(case.problem, INNER["adam"], HOLD)
    start = state = algorithm.init(case.model, hyperparams)
    for _ in range(6):
        state = algorithm.step(state, case.train, case.val)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    expected = hand_unrolled(
        case.problem, INNER["adam"], case.model, hyperparams, case.train, case.val, 7
    )
    assert relative_error(got, expected) < 1e-10
    again = algorithm.restart(state, case.model)
    got, expected = (
        algorithm.compute_hypergradient(x, case.train, case.val) for x in (again, start)
    )
    assert relative_error(got, expected) < 1e-14


def test_memory_does_not_grow_with_the_steps():
    case = ridge()
    few, many = (
        hpo.ForwardMode(case.problem, optax.adam(0.1), HOLD, inner_steps=steps)
        for steps in (10, 1000)
    )
    state = few.init(case.model, case.hyperparams)
    assert step_temporaries(few, state, case) == step_temporaries(many, state, case)


def test_adam_with_a_gradient_that_is_zero():
    """A weight that the loss does not use, and one whose gradient is zero at first: as
    by `Unrolled`, which has the same convention in reverse mode."""

    def train_loss(model, h, batch, key):
        del key
        used, late, _ = model
        return h * (used - batch) ** 2 + used**2 * late**2

    def val_loss(model, h, batch, key):
        del h, key
        return jnp.sum((model - batch) ** 2)

    problem, model = hpo.Problem(train_loss, val_loss), jnp.array([0.0, 0.3, 1.0])
    for steps in (1, 6):
        args = (problem, optax.adam(0.1), HOLD)
        got, nested, expected = (
            x.compute_hypergradient(x.init(model, 0.5), jnp.ones(()), jnp.ones(()))
            for x in (
                hpo.ForwardMode(*args, inner_steps=steps),
                hpo.Unrolled(*args, inner_steps=steps, checkpoint="nested"),
                hpo.Unrolled(*args, inner_steps=steps),
            )
        )
        assert jnp.isfinite(got)
        assert jnp.allclose(got, expected, rtol=1e-10, atol=1e-14)
        assert jnp.allclose(nested, expected, rtol=1e-12, atol=1e-14)


def _scheduled(steps, window, inner, hyperparams):
    """A training whose hyperparameters are rows of a schedule, in one closed loop."""
    case = ridge()

    def loss(hyperparams):
        model, opt_state = case.model, None
        for step in range(steps):
            now = jtu.tree_map(lambda x: x[min(step // window, 2)], hyperparams)
            optimiser = inner(now)
            opt_state = optimiser.init(model) if opt_state is None else opt_state
            grads = jax.grad(case.problem.train_loss)(model, now, case.train, None)
            updates, opt_state = optimiser.update(grads, opt_state, model)
            model = optax.apply_updates(model, updates)
        return case.problem.val_loss(model, None, case.val, None)

    return jax.jit(jax.grad(loss))(hyperparams)


def test_schedules_share_hyperparameters_over_windows():
    case = ridge()
    inner = lambda h: optax.sgd(h["rate"], momentum=h["momentum"])
    hyperparams = {
        "penalty": jnp.stack([case.hyperparams["penalty"] + i for i in range(3)]),
        "rate": jnp.array([0.1, 0.05, 0.02]),
        "momentum": jnp.array([0.5, 0.7, 0.9]),
    }
    algorithm = hpo.ForwardMode(case.problem, inner, HOLD, inner_steps=4, sharing=3)
    state = algorithm.init(case.model, hyperparams)
    # Windows end within a call, and the last window goes on.
    for steps in (4, 8, 12):
        got = algorithm.compute_hypergradient(state, case.train, case.val)
        expected = _scheduled(steps, 3, inner, hyperparams)
        assert relative_error(got, expected) < 1e-12
        state = algorithm.step(state, case.train, case.val)
    state = algorithm.restart(state, case.model)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    assert relative_error(got, _scheduled(4, 3, inner, hyperparams)) < 1e-12


def test_windows_of_different_lengths():
    case = ridge()
    hyperparams = {"penalty": jnp.zeros((2, 6)), "rate": jnp.ones(3)}
    algorithm = hpo.ForwardMode(case.problem, INNER["momentum"], HOLD, sharing=3)
    with pytest.raises(ValueError, match="leading axis"):
        algorithm.init(case.model, hyperparams)


def test_bad_sharing():
    case = ridge()
    with pytest.raises(ValueError, match="sharing"):
        hpo.ForwardMode(case.problem, optax.sgd(0.1), HOLD, sharing=0)
