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
                hpo.Unrolled(*args, inner_steps=steps, recompute=2),
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


def _schedules(every=3):
    values = {
        "penalty": jnp.stack([ridge().hyperparams["penalty"] + i for i in range(3)]),
        "rate": jnp.array([0.1, 0.05, 0.02]),
        "momentum": jnp.array([0.5, 0.7, 0.9]),
    }
    inner = lambda h: optax.sgd(h["rate"], momentum=h["momentum"])
    return inner, values, {k: hpo.Schedule(x, every) for k, x in values.items()}


@pytest.mark.slow
def test_schedules_share_hyperparameters_over_windows():
    case = ridge()
    inner, values, hyperparams = _schedules()
    algorithm = hpo.ForwardMode(case.problem, inner, HOLD, inner_steps=4)
    state = algorithm.init(case.model, hyperparams)
    # Windows end within a call, and the last window goes on.
    for steps in (4, 8, 12):
        got = algorithm.compute_hypergradient(state, case.train, case.val)
        expected = _scheduled(steps, 3, inner, values)
        assert relative_error(got, expected) < 1e-12
        state = algorithm.step(state, case.train, case.val)
    state = algorithm.restart(state, case.model)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    assert relative_error(got, _scheduled(4, 3, inner, values)) < 1e-12


@pytest.mark.parametrize("recompute", [0, 2])
def test_schedules_by_reverse_mode(recompute):
    case = ridge()
    inner, values, hyperparams = _schedules()
    algorithm = hpo.Unrolled(
        case.problem, inner, HOLD, inner_steps=11, recompute=recompute
    )
    state = algorithm.init(case.model, hyperparams)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    assert relative_error(got, _scheduled(11, 3, inner, values)) < 1e-12


def test_a_schedule_in_a_call_that_goes_on():
    """T1T2 moves the entry of its last inner step alone, counted from the start of the
    episode; a placeholder within, and hyperparameters that stay, beside it."""
    case = ridge()
    inner = lambda h: optax.sgd(h["rate"])
    hyperparams = {
        "rate": hpo.Schedule(hpo.Positive(jnp.full(3, 0.1)), every=2),
        "penalty": case.hyperparams["penalty"],
    }
    algorithm = hpo.T1T2(case.problem, inner, optax.sgd(0.1), inner_steps=2)
    state = algorithm.init(case.model, hyperparams)
    plain = hpo.T1T2(case.problem, inner, optax.sgd(0.1), inner_steps=2)
    for entry in (0, 1, 2, 2):
        gradient = algorithm.compute_hypergradient(state, case.train, case.val)
        moved = gradient["rate"].value.raw != 0
        assert list(moved) == [i == entry for i in range(3)]
        # The same step with the plain entry in its place.
        single = plain.init(
            state.model,
            {
                "rate": hpo.Positive(hpo.unwrap(state.hyperparams)["rate"][entry]),
                "penalty": state.hyperparams["penalty"],
            },
        )
        expected = plain.compute_hypergradient(single, case.train, case.val)
        got = (gradient["rate"].value.raw[entry], gradient["penalty"])
        assert relative_error(got, (expected["rate"].raw, expected["penalty"])) < 1e-12
        state = algorithm.step(state, case.train, case.val)
    assert int(state.episode_step) == 8
    assert int(algorithm.restart(state, case.model).episode_step) == 0


@pytest.mark.parametrize(
    "value, every, match",
    [
        (jnp.ones(3), 0, "`every`"),
        (0.1, 3, "leading axis"),
        (hpo.Positive(0.1), 3, "leading axis"),
        (hpo.Simplex(jnp.full(4, 0.25)), 3, "leading axis"),
        (jnp.zeros((0, 2)), 3, "must not be empty"),
    ],
)
def test_bad_schedules(value, every, match):
    with pytest.raises(ValueError, match=match):
        hpo.Schedule(value, every)
