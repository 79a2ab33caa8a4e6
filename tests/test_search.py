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
from eqx_hpo._discrete import AbstractDiscrete
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


def _at_low(model, rate, *rest):
    return PROBLEM.train_loss(model, LOW, *rest)


OF_RATES = hpo.T1T2(
    hpo.Problem(_at_low, _at_low), lambda rate: optax.sgd(rate), OUTER, inner_steps=400
)


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_learning_rate_can_be_searched():
    algorithm = hpo.T1T2(PROBLEM, lambda h: optax.sgd(h[1]), OUTER)
    losses = lambda model, h, *rest: PROBLEM.train_loss(model, h[0], *rest)
    algorithm = eqx.tree_at(lambda x: x.problem, algorithm, hpo.Problem(losses, losses))
    low, high = ((x, hpo.Positive(y)) for x, y in ((LOW, 1e-4), (HIGH, 0.3)))
    solution = _search(algorithm, low, high)
    rates = solution.history.hyperparams[1]
    assert rates.min() > 1e-4 and rates.max() < 0.3
    assert solution.history.val_loss.std() > 0


@pytest.mark.slow
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


def _rates(low=1e-3, **settings):
    # A rate above the stable ones overflows within the 4,000 steps of a trial.
    ends = hpo.Positive(low), hpo.Positive(1e3)
    settings = {"trials": 12, "steps": 10, "sampler": "random", **settings}
    return _search(OF_RATES, *ends, **settings)


def test_failed_trials_are_counted_and_never_the_best():
    solution = _rates()
    failed = ~np.isfinite(solution.history.val_loss)
    assert 0 < failed.sum() < 12
    assert solution.message.endswith(f"Trials that were not finite: {failed.sum()}.")
    assert (
        solution.values
        == solution.history.hyperparams[np.nanargmin(solution.history.val_loss)]
    )
    assert solution.result == hpo.RESULTS.successful
    all_fail = _rates(900.0, trials=3)
    assert all_fail.result == hpo.RESULTS.nonfinite
    assert "No trial was completed: 3 failed." in all_fail.message
    assert equal(all_fail.model, CASE.model)
    assert np.isnan(all_fail.history.val_loss).all()


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

    with pytest.warns(UserWarning, match="RuntimeError: from the callback"):
        solution = _search(callback=callback)
    assert solution.result == hpo.RESULTS.callback_failed
    assert isinstance(solution.exception, RuntimeError)
    assert "Best of 3 trials" in solution.message
    assert solution.state.metrics.val_loss == np.nanmin(solution.history.val_loss)


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


@pytest.mark.slow
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


def test_side_by_side_the_same_trials_and_one_compilation(caplog):
    def train_loss(model, penalty, batch, key):
        noise = 0.01 * jr.normal(key, model.shape)
        return PROBLEM.train_loss(model + noise, penalty, batch, None)

    problem = hpo.Problem(train_loss, PROBLEM.val_loss)
    algorithm = hpo.T1T2(problem, INNER, OUTER, inner_steps=2)
    settings: dict[str, Any] = {"train": hpo.Minibatch(CASE.train, 5)}
    settings |= {"sampler": "random", "parallel": 4}
    _search(algorithm, trials=4, **settings)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        beside = _search(algorithm, trials=11, **settings)
    # No round compiles anew, nor the last one with three trials: only the history.
    messages = [record.getMessage() for record in caplog.records]
    compiled = [x.split()[1] for x in messages if x.startswith("Compiling ")]
    assert compiled == ["jit(recorded)"]
    alone = _search(algorithm, trials=11, **{**settings, "parallel": 1})
    assert equal(alone.history.hyperparams, beside.history.hyperparams)
    for name in ("step", "val_loss", "train_loss"):
        one, other = (getattr(x.history, name) for x in (alone, beside))
        assert other == pytest.approx(one, rel=1e-12)
    assert beside.state.step == alone.state.step
    assert relative_error(beside.state, alone.state) < 1e-12
    assert beside.message == alone.message


def test_side_by_side_trials_fail_alone():
    alone, beside = _rates(), _rates(parallel=6)
    assert 0 < np.isnan(alone.history.val_loss).sum() < 12
    one, other = alone.history.val_loss, beside.history.val_loss
    assert other == pytest.approx(one, rel=1e-12, nan_ok=True)
    assert relative_error(beside.model, alone.model) < 1e-12
    # The number of the guard's skipped steps, too.
    assert equal(alone.history.skipped, beside.history.skipped)


def _at_once(low=0.0, high=1.0, **settings):
    """Trials whose validation loss is their hyperparameter, whatever the training."""
    steps = []

    def train_loss(model, height, batch, key):
        jax.debug.callback(lambda _: steps.append(None), model[0])
        return jnp.sum(model**2)

    problem = hpo.Problem(train_loss, lambda model, height, batch, key: height)
    algorithm = hpo.T1T2(problem, INNER, OUTER)
    solution = _search(algorithm, low, high, **{"sampler": "random", **settings})
    jax.effects_barrier()
    return solution, len(steps)


@pytest.mark.slow
def test_halving_lets_the_best_third_go_on():
    solution, taken = _at_once(trials=9, steps=10, parallel=9, pruner="halving")
    history = solution.history
    # One third of a third of the steps for all, one third for the best third.
    rank = np.argsort(np.argsort(history.hyperparams))
    expected = np.where(rank == 0, 10, np.where(rank < 3, 3, 1))
    assert history.step.tolist() == expected.tolist()
    assert history.val_loss == pytest.approx(history.hyperparams)
    assert taken == history.step.sum() == 9 * 1 + 3 * 2 + 1 * 7
    best = int(np.argmin(rank))
    assert solution.values == history.hyperparams[best]
    assert solution.message == (
        f"Best of 9 trials: number {best + 1}, validation loss "
        f"{float(solution.values):.4g}. Trials that were pruned: 8, so that 22 of 90 "
        "steps were taken."
    )


@pytest.mark.slow
def test_halving_of_rounds_with_fewer_trials_and_with_failures():
    solution = _rates(trials=11, parallel=6, pruner="halving", steps=9)
    alone = _rates(trials=11, steps=9)
    step = solution.history.step
    assert set(step[:6].tolist()) == set(step[6:].tolist()) == {3, 9}
    one, other = alone.history.val_loss, solution.history.val_loss
    for part in (slice(0, 6), slice(6, 11)):
        # The third is rounded up: two of six, and two of five, unless fewer are finite.
        kept = min(2, np.isfinite(other[part]).sum())
        assert (step[part] == 9).sum() == kept > 0
    assert other[step == 9] == pytest.approx(one[step == 9], rel=1e-12)
    assert solution.state.metrics.val_loss == np.nanmin(other[step == 9])
    failed = np.isnan(other)
    pruned = ((step == 3) & ~failed).sum()
    assert failed.sum() > 0 and pruned > 0
    assert solution.message.endswith(
        f"Trials that were pruned: {pruned}, so that {step.sum()} of 99 "
        f"steps were taken. Trials that were not finite: {failed.sum()}."
    )


def test_a_pruner_of_optuna():
    storage = optuna.storages.InMemoryStorage()
    settings: dict[str, Any] = {"trials": 7, "steps": 10, "storage": storage}
    pruner = optuna.pruners.ThresholdPruner(upper=0.5, n_warmup_steps=5)
    solution, _ = _at_once(pruner=pruner, report_every=4, parallel=4, **settings)
    history = solution.history
    is_bad = history.hyperparams > 0.5
    assert 0 < is_bad.sum() < 7
    assert history.step.tolist() == np.where(is_bad, 8, 10).tolist()
    assert solution.values == history.hyperparams.min()
    trials = optuna.load_study(study_name="search", storage=storage).trials
    assert [x.state.name == "PRUNED" for x in trials] == is_bad.tolist()
    heights = history.hyperparams.tolist()
    for trial, height in zip(trials, heights, strict=True):
        assert trial.value == height
        assert trial.intermediate_values == {4: height, 8: height}


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["HyperbandPruner", "MedianPruner"])
def test_the_pruners_of_optuna_find_the_same_again(pruner):
    make = getattr(optuna.pruners, pruner)
    settings: dict[str, Any] = {"trials": 40, "steps": 20, "parallel": 5}
    one, other = (_at_once(pruner=make(), **settings)[0] for _ in range(2))
    assert equal(one.history, other.history)
    assert 0 < (one.history.step < 20).sum() < 40
    assert one.history.step[np.argmin(one.history.val_loss)] == 20


def _discrete_loss(model, h, batch, key):
    """Lowest at the options 1 and 0, at 4 and at on."""
    choice = jnp.sum(h["choice"] * jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]))
    return choice + (h["whole"] - 4) ** 2 + 2 * (1 - h["switch"]) + h["rate"]


def _with_discrete():
    def train_loss(model, h, batch, key):
        return jnp.sum((model - jnp.sum(h["choice"])) ** 2)

    def end(whole, rate):
        return {
            "choice": hpo.Choice(jnp.zeros((2, 3)), sample=True),
            "whole": hpo.Integer(whole, -2, 9),
            "switch": hpo.Switch(0.0, temperature=lambda step: 1.0 / (1 + step)),
            "rate": hpo.Positive(rate),
        }

    problem = hpo.Problem(train_loss, _discrete_loss)
    algorithm = hpo.T1T2(problem, lambda h: optax.sgd(h["rate"]), OUTER)
    return algorithm, (end(1, 1e-3), end(5, 0.1))


@pytest.mark.slow
def test_discrete_hyperparameters_are_searched_as_what_they_are():
    algorithm, ends = _with_discrete()
    solution = _search(algorithm, *ends, trials=60, parallel=10)
    tried = solution.history.hyperparams
    for value in tried["choice"].reshape(-1, 3).tolist():
        assert sorted(value) == [0, 0, 1]
    assert set(tried["whole"].tolist()) == {1, 2, 3, 4, 5}
    assert set(tried["switch"].tolist()) == {0, 1}
    for i in range(60):
        values = jax.tree.map(lambda x: x[i], tried)
        expected = _discrete_loss(None, values, None, None)
        assert solution.history.val_loss[i] == pytest.approx(float(expected), rel=1e-12)
    values = solution.values
    assert values["choice"].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert (values["whole"], values["switch"]) == (4, 1)
    assert equal(hpo.discretise(solution.hyperparams), values)
    assert isinstance(solution.hyperparams["choice"], hpo.Choice)
    assert solution.discretised is None


@pytest.mark.slow
def test_tune_goes_on_with_discrete_hyperparameters():
    algorithm, start = _with_discrete()
    solution = _search(algorithm, *start, trials=4)
    args = (algorithm, solution.model, solution.hyperparams, CASE.train, CASE.val)
    more = hpo.tune(*args, steps=1, key=jr.key(0), state=solution.state)
    assert more.result == hpo.RESULTS.successful


@pytest.mark.slow
def test_a_schedule_of_integers():
    def losses(model, h, batch, key):
        return jnp.sum((model - h) ** 2)

    ends = [
        hpo.Schedule(hpo.Integer(jnp.full(2, x), 0, 3), every=2) for x in (0.0, 3.0)
    ]
    problem = hpo.Problem(losses, losses)
    algorithm = hpo.T1T2(problem, optax.sgd(0.5), OUTER)
    solution = _search(algorithm, *ends, trials=9, sampler="random", parallel=3)
    history = solution.history
    assert set(history.hyperparams.ravel().tolist()) == {0, 1, 2, 3}
    # A step goes to the number of its window, and the last one of four sees the second.
    assert np.all(history.val_loss == 0)
    assert np.all(solution.model == solution.values[1])


def _stop_after(count):
    seen = []
    return lambda state: seen.append(None) or len(seen) == count


def test_a_grid_ends_the_search():
    grid = [-3.0, -1.0, 1.0]
    sampler = optuna.samplers.GridSampler({"[0]": grid}, seed=0)
    settings: dict[str, Any] = {"trials": 9, "parallel": 2}
    solution, _ = _at_once(sampler=sampler, low=-4.0, high=2.0, **settings)
    assert solution.result == hpo.RESULTS.successful
    # The second round is full, though the grid has only one more.
    assert len(solution.history.step) == 4
    assert set(solution.history.hyperparams.tolist()) == set(grid)


def test_trials_that_have_failed_are_not_put_to_a_pruner():
    def loss(model, height, batch, key):
        return jnp.sum(model**2) + jnp.where(height > 0.5, jnp.nan, height)

    algorithm = hpo.T1T2(hpo.Problem(loss, loss), INNER, OUTER)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    settings: dict[str, Any] = {"trials": 6, "steps": 10, "sampler": "random"}
    # A warning of NumPy's, of slices that are all NaN, would be an error.
    history = _search(algorithm, 0.0, 1.0, pruner=pruner, **settings).history
    has_failed = history.hyperparams > 0.5
    assert 0 < has_failed.sum() < 6
    assert np.array_equal(np.isnan(history.val_loss), has_failed)
    assert np.all(history.step[has_failed] == 1)


@pytest.mark.slow
def test_a_stored_search_goes_on_in_the_middle_of_halving():
    storage = optuna.storages.InMemoryStorage()
    settings: dict[str, Any] = {"trials": 9, "steps": 9, "parallel": 9}
    settings |= {"storage": storage, "pruner": "halving"}
    calls = []

    def interrupt(state):
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt

    first, _ = _at_once(callback=interrupt, **settings)
    assert first.result == hpo.RESULTS.interrupted
    # The last trials report the same once more, of which Optuna would warn.
    rest, _ = _at_once(**settings)
    assert rest.result == hpo.RESULTS.successful
    assert rest.state.metrics.val_loss == rest.history.hyperparams.min()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler, parallel, trials",
    [("random", 1, 6), pytest.param("tpe", 2, 16, marks=pytest.mark.slow)],
)
def test_a_stored_search_goes_on_bit_for_bit(sampler, parallel, trials, tmp_path):
    settings: dict[str, Any] = {"sampler": sampler, "parallel": parallel}
    settings |= {"trials": trials, "train": hpo.Minibatch(CASE.train, 5)}
    whole = _search(**settings)
    storage = f"sqlite:///{tmp_path}/search.db"
    first = _search(callback=_stop_after(trials - 4), storage=storage, **settings)
    assert first.result == hpo.RESULTS.stopped
    assert len(first.history.step) == trials - 4
    # Killed as it began the next trial.
    study = optuna.load_study(study_name="search", storage=storage)
    study.ask()
    rest = _search(storage=storage, **settings)
    assert equal(rest.history, whole.history)
    assert equal(rest.state, whole.state)
    assert rest.message == whole.message
    # With nothing left to do, the best trial is trained again.
    again = _search(storage=storage, **settings)
    assert equal(again.history, whole.history)
    assert equal(again.state, whole.state)


@pytest.mark.slow
def test_a_journal_remembers_failed_and_pruned_trials(tmp_path):
    storages = optuna.storages
    make = lambda: storages.JournalStorage(
        storages.journal.JournalFileBackend(str(tmp_path / "journal"))
    )
    settings: dict[str, Any] = {"parallel": 6, "pruner": "halving", "steps": 9}
    first = _rates(storage=make(), **settings)
    assert 0 < np.isnan(first.history.val_loss).sum() < 8
    again = _rates(storage=make(), **settings)
    assert equal(again.history, first.history)
    assert again.message == first.message


def test_a_study_of_another_search_is_refused():
    storage = optuna.storages.InMemoryStorage()
    settings: dict[str, Any] = {"storage": storage, "trials": 1}
    _search(**settings)
    changes = {"steps": {"steps": 5}, "key": {"key": jr.key(1)}}
    changes["low` or `high"] = {"high": HIGH + 1}
    for name, change in changes.items():
        with pytest.raises(ValueError) as info:
            _search(**settings, **change)
        assert str(info.value) == (
            f"`storage` holds a study 'search' that was made with another `{name}`. "
            "Give the same again, or another `study_name`."
        )
    study = optuna.create_study(storage=storage, study_name="other")
    study.tell(study.ask(), 0.0)
    with pytest.raises(ValueError) as info:
        _search(study_name="other", **settings)
    assert str(info.value) == (
        "`storage` holds a study 'other' that `search` has not made. Give another "
        "`study_name`."
    )


@pytest.mark.slow
def test_the_trials_of_a_round_share_the_batches_of_an_iterator():
    solution = _search(train=iter([CASE.train] * 16), parallel=3)
    assert solution.result == hpo.RESULTS.successful
    whole = _search(parallel=3)
    assert solution.history.val_loss == pytest.approx(whole.history.val_loss)


@pytest.mark.slow
def test_convolutions_side_by_side():
    def losses(model, h, batch, key):
        out = jax.lax.conv(batch, model, (1,), "SAME")
        return jnp.mean((out - h) ** 2)

    algorithm = hpo.T1T2(hpo.Problem(losses, losses), optax.sgd(0.1), OUTER)
    data, model = jr.normal(jr.key(0), (2, 4, 2, 8)), jnp.zeros((1, 2, 3))
    options: dict[str, Any] = dict(trials=5, steps=3, key=None, sampler="random")
    args = (algorithm, model, 0.0, 1.0, *data)
    alone, beside = (hpo.search(*args, **options, parallel=n) for n in (1, 3))
    one, other = alone.history.val_loss, beside.history.val_loss
    assert other == pytest.approx(one, rel=1e-12)


class _Sign(AbstractDiscrete):
    raw: Any

    def unwrap(self):
        return jnp.tanh(self.raw)

    def discretise(self):
        return jnp.sign(self.raw)


def _integers(value):
    return {"n": hpo.Integer(value, 0, 9)}


TEXTS: dict[str, dict[str, Any]] = {
    "`low['n'].raw` is above `high['n'].raw`: at coordinate 0 they are 5 and 3.": {
        "low": _integers(5),
        "high": _integers(3),
    },
    "`low[0]` is a _Sign, a discrete hyperparameter whose values `search` does not "
    "know. It knows `Choice`, `Switch` and `Integer`.": {
        "low": [_Sign(jnp.array(1.0))],
        "high": [_Sign(jnp.array(1.0))],
    },
    "`sampler` must be 'random', 'tpe', 'gp' or a sampler of `optuna.samplers`; got "
    "'grid'.": {"sampler": "grid"},
    "`pruner` must be 'halving', a pruner of `optuna.pruners`, or `None`; got "
    "'best'.": {"pruner": "best"},
    "`pruner='halving'` lets the best third of the trials of a round go on for three "
    "times the steps, so `parallel` must be at least 3; got 1.": {"pruner": "halving"},
    "`pruner='halving'` lets the best third of the trials of a round go on for three "
    "times the steps, so `steps` must be at least 3; got 2.": {
        "pruner": "halving",
        "parallel": 3,
        "steps": 2,
    },
    "`report_every` is for a pruner of `optuna.pruners`, and `pruner` is None. Leave "
    "it out.": {"report_every": 2},
    "`storage` must be the URL of a database, such as 'sqlite:///search.db', a storage "
    "of `optuna.storages`, or `None`; got 1.": {"storage": 1},
    "`train` is an iterator. With `storage` it must be arrays or a `Minibatch`, so "
    "that the best trial can be trained again.": {
        "train": iter([CASE.train]),
        "storage": "sqlite://",
    },
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text):
    with pytest.raises(ValueError) as info:
        _search(**TEXTS[text])
    assert str(info.value) == text


def test_a_storage_that_does_not_open():
    with pytest.raises(ValueError, match="`storage` cannot be opened by Optuna: "):
        _search(storage="no url")


def test_what_a_gaussian_process_needs(monkeypatch):
    find = lambda name: None if name in ("scipy", "torch") else object()
    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(ImportError) as info:
        _search(sampler="gp")
    assert str(info.value) == (
        "`sampler='gp'` needs scipy and torch: `pip install scipy torch`. (Of PyTorch "
        "the build for CPUs is enough.)"
    )


def test_the_first_trials_of_a_gaussian_process_need_nothing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    solution = _search(sampler="gp", trials=2)
    assert solution.message.startswith("Best of 2 trials: ")


@pytest.mark.slow
def test_a_callback_stops_at_the_end_of_a_round():
    seen = []

    def callback(state):
        seen.append(int(state.step))
        return len(seen) == 1

    solution = _search(trials=12, parallel=3, callback=callback)
    assert solution.result == hpo.RESULTS.stopped
    assert seen == [4, 8, 12]
    assert len(solution.history.step) == 3


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"eqx_hpo\[optuna\]"):
        _search()
