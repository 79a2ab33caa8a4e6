import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from eqx_hpo._discrete import refresh

from .helpers import equal


LOGITS = jnp.array([[0.5, 1.5, -1.0], [2.0, 0.0, 1.0]])


def _score(model, hyperparams, batch, key):
    del key
    return jnp.sum((model - 1) ** 2) + jnp.sum(hyperparams["c"] @ batch)


COSTS = jnp.array([0.3, 0.0, 0.2])
PROBLEM = hpo.Problem(_score, _score)
ALGORITHM = hpo.FirstOrder(PROBLEM, optax.sgd(0.1), optax.sgd(0.1))
T1T2 = hpo.T1T2(
    PROBLEM, optax.sgd(0.1), optax.sgd(0.1), second_order=hpo.FiniteDifference()
)


def test_choice_is_a_softmax_at_a_temperature():
    choice = hpo.Choice(LOGITS, temperature=0.5)
    assert jnp.allclose(choice.unwrap(), jax.nn.softmax(2 * LOGITS, -1), rtol=1e-14)
    expected = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert jnp.array_equal(hpo.discretise(choice), expected)
    assert jnp.allclose(hpo.Choice(4).unwrap(), 0.25)


@pytest.mark.parametrize(
    ("soft", "hard"),
    [
        (hpo.Choice(LOGITS), hpo.Choice(LOGITS, straight_through=True)),
        (hpo.Switch(LOGITS), hpo.Switch(LOGITS, straight_through=True)),
        (hpo.Integer(2.3, 0, 5), hpo.Integer(2.3, 0, 5, straight_through=True)),
    ],
    ids=["choice", "switch", "integer"],
)
def test_straight_through_has_the_value_of_one_and_the_derivative_of_the_other(
    soft, hard
):
    assert jnp.array_equal(hard.unwrap(), hpo.discretise(soft))
    pull = lambda x: jnp.sum(jnp.cos(jnp.arange(x.raw.size)) * x.unwrap().ravel())
    gradients = [jax.grad(pull)(x).raw for x in (soft, hard)]
    assert jnp.array_equal(*gradients) and jnp.any(gradients[0] != 0)


def test_samples_follow_the_categorical_distribution():
    """The largest of logits with Gumbel noise is a sample of their softmax."""
    choice = hpo.Choice(LOGITS, sample=True, straight_through=True)
    switch = hpo.Switch(LOGITS[0], sample=True, straight_through=True)

    def draw(key):
        drawn = refresh((choice, switch), key, jnp.array(0))
        return hpo.unwrap(drawn)

    choices, switches = jax.vmap(draw)(jr.split(jr.key(0), 20_000))
    expected = jax.nn.softmax(LOGITS, axis=-1)
    assert jnp.allclose(choices.mean(0), expected, atol=0.015)
    assert jnp.allclose(switches.mean(0), jax.nn.sigmoid(LOGITS[0]), atol=0.015)


def test_noise_and_temperature_are_a_function_of_key_and_step():
    halved = lambda step: 0.5**step
    hyperparams = {"c": hpo.Choice(3, sample=True, temperature=halved)}
    state = ALGORITHM.init(jnp.ones(2), hyperparams)
    states = [state]
    for _ in range(3):
        states.append(ALGORITHM.step(states[-1], COSTS, COSTS, key=jr.key(7)))
    temperatures = [s.hyperparams["c"].temperature for s in states]
    assert np.allclose(temperatures, [1, 1, 0.5, 0.25])
    noises = [s.hyperparams["c"].noise for s in states[1:]]
    assert not np.allclose(noises[0], noises[1])
    again = ALGORITHM.step(states[0], COSTS, COSTS, key=jr.key(7))
    assert equal(again, states[1])


def test_two_placeholders_get_different_noise():
    pair = (hpo.Choice(3, sample=True), hpo.Choice(3, sample=True))
    first, second = refresh(pair, jr.key(0), jnp.array(0))
    assert not np.allclose(first.noise, second.noise)


def test_a_hypergradient_is_that_of_the_step(getkey):
    """Also with finite differences, both sides of which see the same noise."""
    hyperparams = {"c": hpo.Choice(LOGITS[0], sample=True, temperature=0.7)}
    state = T1T2.init(jnp.ones(2), hyperparams)
    key = getkey()
    gradient = T1T2.compute_hypergradient(state, COSTS, COSTS, key=key)["c"].raw
    new = T1T2.step(state, COSTS, COSTS, key=key)
    choice = new.hyperparams["c"]
    assert jnp.allclose(choice.raw, LOGITS[0] - 0.1 * gradient, rtol=1e-12)
    used = eqx.tree_at(lambda x: x.raw, choice, LOGITS[0])
    at = lambda raw: COSTS @ eqx.tree_at(lambda x: x.raw, used, raw).unwrap()
    assert jnp.allclose(gradient, jax.grad(at)(LOGITS[0]), rtol=1e-9)


def test_only_logits_are_trained_and_a_skipped_step_keeps_all():
    choice = hpo.Choice(3, sample=True, temperature=lambda step: 1.0 / (1 + step))
    state = ALGORITHM.init(jnp.ones(2), {"c": choice})
    skipped = ALGORITHM.step(state, COSTS, jnp.full(3, jnp.nan), key=jr.key(0))
    assert int(skipped.skipped) == 1
    assert equal(skipped.hyperparams, state.hyperparams)
    moments = eqx.filter(state.outer_opt_state, eqx.is_array)
    assert sum(x.size for x in jax.tree.leaves(moments)) <= 3


def test_integer_bounds_belong_to_the_range():
    for value in (1, 5):
        integer = hpo.Integer(value, 1, 5)
        assert jnp.allclose(integer.unwrap(), value)
        assert hpo.discretise(integer) == value
    far = eqx.tree_at(lambda x: x.raw, hpo.Integer(2, 1, 5), jnp.array(1e4))
    assert hpo.discretise(far) == 5 and far.unwrap() == 5.5


def test_discretise_leaves_the_rest_unwrapped():
    tree = {"c": hpo.Choice(2), "p": hpo.Positive(2.0), "x": jnp.ones(2), "n": None}
    got = hpo.discretise(tree)
    assert jnp.allclose(got["p"], 2.0) and jnp.array_equal(got["c"], jnp.eye(2)[0])
    assert jax.tree.structure(got) == jax.tree.structure(hpo.unwrap(tree))


@pytest.mark.parametrize("sample", [False, True])
def test_tune_finds_the_option_and_reports_the_gap(sample):
    hyperparams = {"c": hpo.Choice(3, sample=sample, temperature=0.5)}
    solution = hpo.tune(
        ALGORITHM,
        jnp.zeros(2),
        hyperparams,
        COSTS,
        jnp.copy(COSTS),
        steps=300,
        key=jr.key(0),
    )
    report = solution.discretised
    assert report is not None
    assert jnp.array_equal(report.values["c"], jnp.array([0.0, 1.0, 0.0]))
    loss = lambda values: _score(solution.model, values, COSTS, None)
    assert jnp.allclose(report.val_loss, loss(report.values))
    assert jnp.allclose(report.relaxed_val_loss, loss(solution.values))
    assert report.val_loss < report.relaxed_val_loss
    assert f"{float(report.val_loss):.4g} with discretised" in solution.message
    # Values and history are at the centre of the noise.
    logits = solution.hyperparams["c"].raw
    assert jnp.allclose(solution.values["c"], jax.nn.softmax(logits / 0.5))
    assert jnp.allclose(solution.history.hyperparams["c"][-1], solution.values["c"])


def test_without_discrete_hyperparameters_there_is_no_such_report():
    hyperparams = {"c": jnp.ones(3)}
    start = (ALGORITHM, jnp.zeros(2), hyperparams)
    solution = hpo.tune(*start, COSTS, jnp.copy(COSTS), steps=2, key=None)
    assert solution.discretised is None


def test_bad_input_raises():
    for temperature in (0.0, -1.0, lambda step: step - 1.0):
        for make in (lambda **x: hpo.Choice(3, **x), lambda **x: hpo.Switch(0.1, **x)):
            with pytest.raises(ValueError, match="`temperature.*above zero"):
                make(temperature=temperature)
    with pytest.raises(ValueError, match="`temperature` must be .* got an array"):
        hpo.Choice(3, temperature=jnp.ones(3))
    for logits, match in (
        (0, "an integer of at least 1; got 0"),
        (jnp.array(1.0), "an axis for the options"),
        (jnp.zeros((2, 0)), "must not be empty"),
    ):
        with pytest.raises(ValueError, match=match):
            hpo.Choice(logits)
    with pytest.raises(ValueError, match="`Integer.*needs `lower` <= `value`"):
        hpo.Integer(7, 1, 5)
    state = ALGORITHM.init(jnp.ones(2), {"c": hpo.Choice(3, sample=True)})
    with pytest.raises(ValueError, match=r"`key` is missing: a `Choice.*sample=True"):
        ALGORITHM.step(state, COSTS, COSTS)
