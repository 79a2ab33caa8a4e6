"""The black-box baseline, against training by hand."""

import os
import signal
import sys
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import optax.contrib
import pytest
from eqx_hpo._run import own_copy

from .helpers import equal, relative_error
from .problems import ridge


optuna = pytest.importorskip("optuna")

CASE = ridge()


def _loss_of_an_array(loss):
    return lambda model, penalty, *rest: loss(model, {"penalty": penalty}, *rest)


PROBLEM = hpo.Problem(
    _loss_of_an_array(CASE.problem.train_loss), _loss_of_an_array(CASE.problem.val_loss)
)
INNER, OUTER = optax.sgd(0.1, momentum=0.9), optax.adam(0.05)
ALGORITHM = hpo.T1T2(PROBLEM, INNER, OUTER, inner_steps=2)
LOW, HIGH = jnp.full(6, -4.0), jnp.full(6, 2.0)


def _search(algorithm: Any = ALGORITHM, low: Any = LOW, high: Any = HIGH, **kwargs):
    settings = {"trials": 5, "steps": 4, "key": jr.key(0), **kwargs}
    data = settings.pop("train", CASE.train), settings.pop("val", CASE.val)
    return hpo.search(algorithm, CASE.model, low, high, *data, **settings)


@eqx.filter_jit
def _train_by_hand(hyperparams, steps):
    gradient = jax.grad(PROBLEM.train_loss)

    def step(_, carry):
        model, opt_state = carry
        grad = gradient(model, hyperparams, CASE.train, None)
        updates, opt_state = INNER.update(grad, opt_state)
        return optax.apply_updates(model, updates), opt_state

    return jax.lax.fori_loop(0, steps, step, (CASE.model, INNER.init(CASE.model)))


@pytest.mark.parametrize(
    "sampler", ["random", "tpe", optuna.samplers.RandomSampler(seed=1)]
)
def test_each_trial_is_a_training_from_the_start(sampler):
    solution = _search(sampler=sampler)
    history = solution.history
    assert history.step.tolist() == [4] * 5
    assert np.all((-4 <= history.hyperparams) & (history.hyperparams <= 2))
    assert len(np.unique(history.hyperparams)) == 30
    for hyperparams, loss in zip(history.hyperparams, history.val_loss):
        model, _ = _train_by_hand(jnp.asarray(hyperparams), 8)
        expected = PROBLEM.val_loss(model, hyperparams, CASE.val, None)
        assert loss == pytest.approx(float(expected), rel=1e-12)
    best = np.argmin(history.val_loss)
    model, opt_state = _train_by_hand(solution.values, 8)
    assert equal(solution.values, jnp.asarray(history.hyperparams[best]))
    assert relative_error(solution.model, model) < 1e-12
    assert relative_error(solution.state.inner_opt_state, opt_state) < 1e-12
    assert solution.state.metrics.val_loss == history.val_loss[best]
    assert solution.result == hpo.RESULTS.successful
    assert solution.message.startswith(f"Best of 5 trials: number {best + 1}, ")


def test_same_key_same_search():
    same, again, other = (_search(key=jr.key(seed)) for seed in (0, 0, 1))
    assert equal(same.history, again.history)
    assert not equal(same.values, other.values)


def test_tpe_learns_what_random_search_does_not():
    losses = {
        sampler: _search(trials=60, sampler=sampler).history.val_loss
        for sampler in ("random", "tpe")
    }
    assert losses["tpe"][30:].mean() < losses["random"][30:].mean()


def test_placeholders_are_searched_in_their_raw_values():
    def losses(model, hyperparams, batch, key):
        weights = hyperparams["decay"] * hyperparams["shares"] * hyperparams["gate"]
        return PROBLEM.train_loss(model, jnp.tile(jnp.log(weights), 3), batch, key)

    def ends(decay, shares, gate):
        return {
            "decay": hpo.Positive(decay),
            "shares": hpo.Simplex(jnp.array(shares)),
            "gate": hpo.Interval(gate, 1.0, 3.0),
        }

    low, high = ends(1e-6, [0.5, 0.5], 1.1), ends(1.0, [0.9, 0.1], 2.9)
    algorithm = hpo.T1T2(hpo.Problem(losses, losses), INNER, OUTER)
    solution = _search(algorithm, low, high, trials=40, sampler="random")
    decay = solution.history.hyperparams["decay"]
    assert decay.min() > 1e-6 and decay.max() < 1
    # Half of the trials in the lower three orders of magnitude.
    assert 10 <= np.sum(decay < 1e-3) <= 30
    gate = solution.history.hyperparams["gate"]
    assert gate.min() > 1.1 and gate.max() < 2.9
    shares = solution.history.hyperparams["shares"]
    assert shares.sum(axis=1) == pytest.approx(np.ones(40))
    assert isinstance(solution.hyperparams["decay"], hpo.Positive)


def test_a_learning_rate_can_be_searched():
    algorithm = hpo.T1T2(PROBLEM, lambda h: optax.sgd(h[1]), OUTER)
    losses = lambda model, h, *rest: PROBLEM.train_loss(model, h[0], *rest)
    algorithm = eqx.tree_at(lambda x: x.problem, algorithm, hpo.Problem(losses, losses))
    low, high = ((x, hpo.Positive(y)) for x, y in ((LOW, 1e-4), (HIGH, 0.3)))
    solution = _search(algorithm, low, high)
    rates = solution.history.hyperparams[1]
    assert rates.min() > 1e-4 and rates.max() < 0.3
    assert solution.history.val_loss.std() > 0


@pytest.mark.parametrize(
    "make",
    [hpo.T1T2, hpo.Greedy, hpo.HyperDistill, hpo.Unrolled],
    ids=lambda x: x.__name__,
)
def test_tune_goes_on_from_the_best_trial(make):
    settings: dict[str, Any] = (
        {"discount": 0.9} if make in (hpo.Greedy, hpo.HyperDistill) else {}
    )
    algorithm = make(PROBLEM, INNER, OUTER, inner_steps=2, **settings)
    solution = _search(algorithm)
    args = (algorithm, solution.model, solution.hyperparams, CASE.train, CASE.val)
    more = hpo.tune(*args, steps=3, key=jr.key(0), state=solution.state)
    assert more.result == hpo.RESULTS.successful
    assert more.state.step == solution.state.step + 3
    assert not equal(more.values, solution.values)


def test_minibatches_are_drawn_for_training_and_validated_as_a_whole():
    train, val = (hpo.Minibatch(x, 5) for x in (CASE.train, CASE.val))
    solution = _search(train=train, val=val)
    loss = PROBLEM.val_loss(solution.model, solution.values, CASE.val, None)
    assert solution.history.val_loss.min() == pytest.approx(float(loss), rel=1e-12)
    assert relative_error(solution.model, _train_by_hand(solution.values, 8)[0]) > 1e-3


def test_failed_trials_are_counted_and_never_the_best():
    # A rate above the stable ones overflows within the 4,000 steps of a trial.
    losses = lambda model, h, *rest: PROBLEM.train_loss(model, LOW, *rest)
    problem = hpo.Problem(losses, losses)
    algorithm = hpo.T1T2(problem, lambda h: optax.sgd(h), OUTER, inner_steps=400)
    low, high = hpo.Positive(1e-3), hpo.Positive(1e3)
    solution = _search(algorithm, low, high, trials=12, steps=10, sampler="random")
    failed = ~np.isfinite(solution.history.val_loss)
    assert 0 < failed.sum() < 12
    assert solution.message.endswith(f"Trials that were not finite: {failed.sum()}.")
    assert (
        solution.values
        == solution.history.hyperparams[np.nanargmin(solution.history.val_loss)]
    )
    assert solution.result == hpo.RESULTS.successful
    all_fail = _search(algorithm, hpo.Positive(900.0), high, trials=3, steps=10)
    assert all_fail.result == hpo.RESULTS.nonfinite
    assert "No trial was completed: 3 failed." in all_fail.message


def test_callback_sees_every_trial_and_stops():
    seen = []

    def callback(state):
        seen.append(own_copy(state, state))
        return len(seen) == 3

    solution = _search(callback=callback)
    assert solution.result == hpo.RESULTS.stopped
    assert [int(state.step) for state in seen] == [4, 8, 12]
    assert [state.metrics.val_loss for state in seen] == list(solution.history.val_loss)
    assert "Best of 3 trials" in solution.message


def test_an_exception_keeps_the_best():
    count = 0

    def callback(state):
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback") as info:
        _search(callback=callback)
    error: Any = info.value
    assert error.solution.result == hpo.RESULTS.failed
    assert "Best of 3 trials" in error.solution.message
    best = np.nanmin(error.solution.history.val_loss)
    assert error.solution.state.metrics.val_loss == best


def test_ctrl_c_keeps_the_best():
    def batches():
        for i in range(100):
            if i == 20:
                os.kill(os.getpid(), signal.SIGINT)
            yield CASE.train

    def callback(state):
        if state.step == 8:
            raise KeyboardInterrupt

    for settings in ({"train": batches()}, {"callback": callback}):
        solution = _search(**settings)
        assert solution.result == hpo.RESULTS.interrupted
        assert "Best of 2 trials" in solution.message
        assert len(solution.history.step) == 2
    loss = PROBLEM.val_loss(solution.model, solution.values, CASE.val, None)
    assert solution.history.val_loss[:2].min() == pytest.approx(float(loss))


def test_data_that_end_end_the_search():
    solution = _search(train=iter([CASE.train] * 20))
    assert solution.result == hpo.RESULTS.data_exhausted
    assert "Best of 2 trials" in solution.message
    assert solution.history.step.tolist() == [4, 4]
    assert solution.state.metrics.val_loss == solution.history.val_loss.min()
    none = _search(train=iter([CASE.train] * 5))
    assert none.result == hpo.RESULTS.data_exhausted
    assert "No trial was completed" in none.message
    assert len(none.history.step) == 0


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"low": LOW.at[2].set(jnp.nan)}, "`low` must be finite"),
        (
            {"low": LOW.at[2].set(HIGH[2] + 1)},
            "`low` is above `high`: at coordinate 2 their unconstrained values are",
        ),
        ({"high": (HIGH,)}, "`high` does not have the structure"),
        ({"high": jnp.full(5, 2.0)}, "`high`"),
        ({"low": (), "high": ()}, "no hyperparameters"),
        (
            {"low": hpo.Interval(LOW, -9.0, 0.0), "high": hpo.Interval(LOW, -9.0, 1.0)},
            "same constants",
        ),
        ({"trials": 2**20, "steps": 2**11}, "inner steps"),
        ({"trials": 0}, "`trials`"),
        ({"steps": 0}, "`steps`"),
        ({"sampler": "grid"}, "`sampler`"),
        ({"sampler": np.array([])}, "`sampler` must be 'random', .*; got an array"),
    ],
)
def test_bad_input(kwargs, match):
    with pytest.raises(ValueError, match=match):
        _search(**kwargs)


def test_one_model_only():
    algorithm = hpo.MetaLearner(ALGORITHM, 2)
    with pytest.raises(ValueError, match="an algorithm for one model"):
        _search(algorithm)


def test_the_state_suits_any_outer_optimiser_and_aux():
    """One that keeps the parameters, and an `aux` with the size of a batch."""

    def losses(model, penalty, batch, key):
        residuals = batch[0] @ model - batch[1]
        return PROBLEM.train_loss(model, penalty, batch, key), residuals

    problem = hpo.Problem(losses, losses, has_aux=True)
    outer = optax.contrib.schedule_free_sgd(1e-9)
    algorithm = hpo.T1T2(problem, INNER, outer, inner_steps=2)
    val = hpo.Minibatch(CASE.val, 5)
    solution = _search(algorithm, val=val)
    args = (algorithm, solution.model, solution.hyperparams, CASE.train, val)
    more = hpo.tune(*args, steps=1, key=jr.key(0), state=solution.state)
    assert relative_error(more.values, solution.values) < 1e-6


@pytest.mark.filterwarnings("error")
def test_what_has_no_gradient_can_be_searched():
    def losses(model, penalty, *rest):
        return PROBLEM.train_loss(model, jnp.round(penalty), *rest)

    algorithm = hpo.T1T2(hpo.Problem(losses, PROBLEM.val_loss), INNER, OUTER)
    assert _search(algorithm).history.val_loss.std() > 0


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"eqx_hpo\[optuna\]"):
        _search()
