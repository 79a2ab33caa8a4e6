"""`fit` against training written by hand, and against `tune` that moves nothing."""

import functools as ft
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from .helpers import equal, relative_error
from .problems import ridge


CASE = ridge()
INNER = optax.adam(0.05)
KEY = jr.key(3)
BATCHES = hpo.Minibatch(CASE.train, 8, replacement=False)


@ft.cache
def _algorithm(**kwargs):
    return hpo.T1T2(CASE.problem, INNER, optax.adam(0.05), **kwargs)


@ft.cache
def _still(**kwargs):
    return hpo.T1T2(CASE.problem, INNER, optax.set_to_zero(), **kwargs)


def _fit(train=CASE.train, algorithm=None, **kwargs):
    algorithm = _algorithm() if algorithm is None else algorithm
    settings = {"steps": 50, "key": KEY, "progress": False, **kwargs}
    return hpo.fit(algorithm, CASE.model, CASE.hyperparams, train, **settings)


def _tune(train=CASE.train, algorithm=None, **kwargs):
    algorithm = _still() if algorithm is None else algorithm
    settings = {"steps": 50, "key": KEY, "progress": False, **kwargs}
    args = (CASE.model, CASE.hyperparams, train, CASE.val)
    return hpo.tune(algorithm, *args, **settings)


def test_equals_training_by_hand():
    plain = hpo.unwrap(CASE.hyperparams)
    model, opt_state = CASE.model, INNER.init(CASE.model)
    grad = jax.jit(jax.grad(CASE.problem.train_loss))
    for _ in range(50):
        updates, opt_state = INNER.update(
            grad(model, plain, CASE.train, None), opt_state, model
        )
        model = optax.apply_updates(model, updates)
    solution = _fit()
    assert relative_error(solution.model, model) < 1e-12
    assert equal(solution.hyperparams, CASE.hyperparams)
    assert solution.result == hpo.RESULTS.successful
    assert solution.message == "Finished after step 50."
    assert int(solution.state.step) == int(solution.state.episode_step) == 50


@pytest.mark.parametrize("inner_steps, replacement", [(1, False), (3, True)])
def test_has_the_batches_of_tune(inner_steps, replacement):
    batches = hpo.Minibatch(CASE.train, 8, replacement=replacement)
    options = {} if inner_steps == 1 else {"inner_steps": inner_steps}
    tuned = _tune(batches, _still(**options), record_every=7)
    fitted = _fit(batches, _algorithm(**options), record_every=7)
    assert relative_error(fitted.model, tuned.model) < 1e-13
    np.testing.assert_array_equal(fitted.history.step, tuned.history.step)
    losses = fitted.history.train_loss, tuned.history.train_loss
    np.testing.assert_allclose(*losses, rtol=1e-12)


@pytest.mark.slow
def test_batches_of_an_iterator():
    batches = [jax.tree.map(lambda x: x[i : i + 8], CASE.train) for i in range(4)]
    fitted, tuned = _fit(iter(batches * 13)), _tune(iter(batches * 13))
    assert relative_error(fitted.model, tuned.model) < 1e-13
    assert relative_error(fitted.model, _fit().model) > 1e-3


def test_values_serve_as_placeholders_do():
    values = hpo.unwrap(CASE.hyperparams)
    args = (_algorithm(), CASE.model, values, CASE.train)
    solution = hpo.fit(*args, steps=50, key=KEY, progress=False)
    assert relative_error(solution.model, _fit().model) < 1e-13


def test_trains_one_model_of_a_meta_learner():
    learner = hpo.MetaLearner(_algorithm(), 3)
    assert equal(_fit(algorithm=learner).model, _fit().model)


def test_goes_on():
    whole = _fit(BATCHES, steps=60, record_every=20)
    first = _fit(BATCHES, steps=40, record_every=20)
    rest = _fit(BATCHES, steps=20, record_every=20, state=first.state)
    assert equal(rest.state, whole.state)
    assert list(rest.history.step) == [60]


def test_validation_loss_where_it_is_recorded():
    values = hpo.unwrap(CASE.hyperparams)
    loss = lambda model: CASE.problem.val_loss(model, values, CASE.val, None)
    seen = {}
    solution = _fit(
        steps=50,
        val=CASE.val,
        record_every=20,
        callback=lambda state: seen.update({int(state.step): loss(state.model)}),
    )
    assert list(solution.history.step) == [20, 40, 50]
    expected = [seen[20], seen[40], loss(solution.model)]
    np.testing.assert_allclose(solution.history.val_loss, expected, rtol=1e-12)
    first = loss(_fit(steps=1).model)
    assert f"Validation loss {float(first):.4g} at first" in solution.message


def test_without_validation_data_its_loss_is_nan():
    seen = []
    solution = _fit(
        record_every=10, callback=lambda state: seen.append(state.metrics.val_loss)
    )
    assert len(seen) == 5 and np.isnan(seen).all()
    assert np.isnan(solution.history.val_loss).all()
    assert int(solution.state.total_skipped) == 0


def _with_bad_rows(bad):
    x, y = CASE.train
    return hpo.Minibatch((x.at[jnp.array(bad)].set(jnp.nan), y), 8, replacement=False)


def test_steps_that_are_not_finite_are_skipped_one_by_one():
    train = _with_bad_rows([5])
    with pytest.warns(UserWarning, match=r"16 of 50 steps were not finite; first at"):
        fitted = _fit(train, record_every=20)
    with pytest.warns(UserWarning, match=r"16 of 50 steps were not finite; first at"):
        tuned = _tune(train, record_every=20)
    assert relative_error(fitted.model, tuned.model) < 1e-13
    counts = lambda x: (x.state.total_skipped, x.state.first_skipped, x.state.skipped)
    assert counts(fitted) == counts(tuned)
    np.testing.assert_array_equal(fitted.history.skipped, tuned.history.skipped)


def test_no_finite_step_ends_the_run_with_the_model_as_it_was():
    solution = _fit(_with_bad_rows(range(24)), max_skipped=6)
    assert solution.result == hpo.RESULTS.nonfinite
    assert int(solution.state.step) == 6
    assert equal(solution.model, CASE.model)


@pytest.mark.slow
def test_model_state_and_aux():
    def train_loss(models, decay, batch, key):
        (linear, norm), state = models
        x, y = batch
        apply = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        x, state = apply(x, state)
        error = jax.vmap(linear)(x)[:, 0] - y
        loss = jnp.mean(error**2) + decay * jnp.sum(linear.weight**2)
        return loss, (state, jnp.max(error))

    def val_loss(models, decay, batch, key):
        loss, (_, aux) = train_loss(models, decay, batch, key)
        return loss, aux

    norm, model_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        6, axis_name="batch", mode="batch"
    )
    model = (eqx.nn.Linear(6, 1, key=KEY), norm)
    problem = hpo.Problem(train_loss, val_loss, has_aux=True)
    args = (model, hpo.Positive(0.1), CASE.train)
    options: Any = dict(steps=20, key=None, model_state=model_state, progress=False)
    still = hpo.T1T2(problem, INNER, optax.set_to_zero())
    tuned = hpo.tune(still, *args, CASE.val, **options)
    for val in (None, CASE.val):
        fitted = hpo.fit(still, *args, val=val, **options)
        assert relative_error(fitted.model, tuned.model) < 1e-12
        assert relative_error(fitted.state.model_state, tuned.state.model_state) < 1e-12
        aux, expected = fitted.state.metrics.aux, tuned.state.metrics.aux
        np.testing.assert_allclose(aux[0], expected[0], rtol=1e-12)
        assert (aux[1] is None) == (val is None)


@pytest.mark.slow
def test_schedules_and_noise_move_with_the_steps():
    def loss(model, hyperparams, batch, key):
        x, y = batch
        noise = hyperparams["switch"] * jr.normal(key, x.shape)
        return jnp.mean(((x + noise) @ model - y) ** 2)

    problem = hpo.Problem(loss, loss)
    hyperparams = {
        "rate": hpo.Schedule(jnp.linspace(0.1, 0.01, 5), every=4),
        "switch": hpo.Switch(0.3, sample=True),
    }
    still = hpo.Unrolled(
        problem, lambda h: optax.sgd(h["rate"]), optax.set_to_zero(), inner_steps=2
    )
    args = (still, CASE.model, hyperparams, CASE.train)
    options: Any = dict(steps=12, key=KEY, record_every=5, progress=False)
    tuned = hpo.tune(*args, CASE.val, **options)
    assert relative_error(hpo.fit(*args, **options).model, tuned.model) < 1e-12


def test_compiles_once_and_only_what_training_needs():
    traced = []

    def train_loss(model, hyperparams, batch, key):
        traced.append("train")
        return CASE.problem.train_loss(model, hyperparams, batch, key)

    def val_loss(*args):
        raise AssertionError("There are no validation data.")

    algorithm = hpo.T1T2(hpo.Problem(train_loss, val_loss), INNER, optax.adam(0.1))
    _fit(algorithm=algorithm, steps=300, record_every=50)
    count = len(traced)
    _fit(algorithm=algorithm, steps=500, record_every=90)
    # Once to look for convolutions, and once to compile, at first.
    assert count <= 2 and len(traced) - count <= 1


def test_rejects_a_state_of_another_model():
    state = eqx.tree_at(lambda s: s.model, _fit().state, jnp.zeros(7))
    with pytest.raises(ValueError, match=r"`state\.model` is float64\[7\]"):
        _fit(state=state)


@pytest.mark.slow
def test_no_discretised_losses_without_validation_data():
    def loss(model, hyperparams, batch, key):
        return jnp.sum(hyperparams) * (model - 1) ** 2

    algorithm = hpo.T1T2(hpo.Problem(loss, loss), INNER, optax.adam(0.1))
    args = (algorithm, jnp.zeros(()), hpo.Choice(jnp.zeros(2)), ())
    settings = {"steps": 2, "key": None, "progress": False}
    solution = hpo.fit(*args, **settings)
    assert solution.discretised is None
    assert solution.message == "Finished after step 2."
    assert hpo.fit(*args, val=(), **settings).discretised is not None


def test_reports_no_validation_loss_that_was_not_taken():
    seen = []
    watch = lambda state: seen.append(float(state.metrics.val_loss)) or 0
    options = {"val": CASE.val, "steps": 6, "record_every": 4}
    begun = _fit(steps=2)  # without validation data
    rest = _fit(**options, state=begun.state, monitor=hpo.Monitor(watch, every=1))
    loss = lambda steps: _fit(**{**options, "steps": steps}).state.metrics.val_loss
    expected = [np.nan, *map(loss, [3, 4, 4, 4, 4, 8])]
    np.testing.assert_allclose(seen, expected, rtol=1e-12)
    assert f"Validation loss {float(loss(3)):.4g} at first" in rest.message


@pytest.mark.slow
def test_validates_after_the_first_finite_step():
    bad = jax.tree.map(lambda x: x * jnp.nan, CASE.train)
    seen = []
    watch = lambda state: seen.append(float(state.metrics.val_loss)) or 0
    _fit(
        iter([bad] + 10 * [CASE.train]),
        val=CASE.val,
        steps=11,
        record_every=20,
        monitor=hpo.Monitor(watch, every=1),
    )
    first = float(_fit(val=CASE.val, steps=1).state.metrics.val_loss)
    last = float(_fit(val=CASE.val, steps=10).state.metrics.val_loss)
    expected = [np.nan, np.nan, *9 * [first], last]
    np.testing.assert_allclose(seen, expected, rtol=1e-12)


@pytest.mark.parametrize("val", [None, CASE.val])
def test_progress_tells_what_there_is(val, capsys, monkeypatch):
    monkeypatch.setattr("eqx_hpo._progress._LINE", 0.0)
    _fit(steps=3, val=val, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 0
    for line in lines:
        assert "train " in line and "hypergradient" not in line
        assert ("val " in line) == (val is not None)
