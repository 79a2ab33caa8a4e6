"""`Monitor`: the best state bit for bit, whatever ends the run."""

import functools as ft
import os
import signal
from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from .helpers import equal
from .problems import ridge


CASE = ridge()
KEY = jr.key(5)
TRAIN = hpo.Minibatch(CASE.train, 8)
SCORES = [0.5, 0.3, 0.4, float("nan"), 0.2, 0.25, 0.2, 0.6, 0.7, 0.8]


@ft.cache
def _algorithm():
    return hpo.T1T2(CASE.problem, optax.sgd(0.1, momentum=0.9), optax.adam(0.05))


def _tune(**kwargs) -> Any:
    settings = {"steps": 30, "key": KEY, "progress": False, **kwargs}
    args = (CASE.model, CASE.hyperparams, TRAIN, CASE.val)
    return hpo.tune(_algorithm(), *args, **settings)


def _scores(state):
    """Scores that a test knows, one for each third step."""
    return SCORES[int(state.step) // 3 % len(SCORES)]


@ft.cache
def _states():
    """All states of the run without a monitor, copied."""
    copies = []
    _tune(callback=copies.append, record_every=1)
    return copies


def test_best_state_is_bit_for_bit_that_of_the_run():
    solution = _tune(monitor=hpo.Monitor(_scores, every=3))
    best = solution.best
    assert (best.step, best.value) == (12, 0.2)
    assert equal(best.state, _states()[11])
    assert equal(solution.model, best.state.model)
    assert equal(solution.hyperparams, best.state.hyperparams)
    assert equal(solution.values, hpo.unwrap(best.state.hyperparams))
    assert equal(solution.state, _states()[-1])
    assert solution.result == hpo.RESULTS.successful
    assert solution.message.endswith(" Best by the monitor: 0.2 at step 12.")


def test_readings_are_in_the_history():
    steps, values = _tune(monitor=hpo.Monitor(_scores, every=3)).history.monitor
    np.testing.assert_array_equal(steps, np.arange(0, 31, 3))
    np.testing.assert_array_equal(values, [*SCORES, SCORES[0]])
    assert _tune().history.monitor is None and _tune().best is None


def test_mode_max():
    best = _tune(monitor=hpo.Monitor(_scores, every=3, mode="max")).best
    assert (best.step, best.value) == (27, 0.8)


@pytest.mark.parametrize("patience, end, step", [(1, 6, 3), (2, 9, 3), (3, 21, 12)])
def test_patience(patience, end, step):
    solution = _tune(monitor=hpo.Monitor(_scores, every=3, patience=patience))
    assert solution.result == hpo.RESULTS.patience
    assert (int(solution.state.step), solution.best.step) == (end, step)
    assert equal(solution.state, _states()[end - 1])
    assert equal(solution.best.state, _states()[step - 1])
    text = "The monitor saw nothing better for as long as its `patience` lasts."
    assert solution.message.startswith(f"{text} Steps taken: {end}.")


@pytest.mark.parametrize("first", [9, 11, 15])
def test_goes_on_from_a_best(first):
    monitor = ft.partial(hpo.Monitor, _scores, every=3, patience=3)
    whole = _tune(monitor=monitor())
    begun = _tune(monitor=monitor(), steps=first)
    rest = _tune(monitor=monitor(best=begun.best), state=begun.state)
    assert rest.result == whole.result == hpo.RESULTS.patience
    assert equal(rest.state, whole.state)
    assert rest.best.step == whole.best.step and equal(rest.best, whole.best)


def test_ctrl_c_keeps_the_best():
    def interrupted(state):
        if int(state.step) == 18:
            os.kill(os.getpid(), signal.SIGINT)
        return _scores(state)

    solution = _tune(monitor=hpo.Monitor(interrupted, every=3))
    assert solution.result == hpo.RESULTS.interrupted
    assert int(solution.state.step) == 18
    assert equal(solution.best.state, _states()[11])


@pytest.mark.parametrize("at, taken", [(0, 0), (30, 30)])
def test_ctrl_c_in_the_first_and_in_the_last_reading(at, taken):
    def interrupted(state):
        if int(state.step) == at:
            raise KeyboardInterrupt
        return _scores(state)

    solution = _tune(monitor=hpo.Monitor(interrupted, every=30))
    assert solution.result == hpo.RESULTS.interrupted
    assert int(solution.state.step) == taken
    start = _algorithm().init(CASE.model, CASE.hyperparams)
    # Without a reading the last state counts, else the best one: both the first here.
    assert equal(solution.model, start.model)


def test_a_run_too_short_to_read_anything_is_refused():
    message = "`monitor` reads every 31 steps, and the run has 30: it would see nothing"
    with pytest.raises(ValueError, match=message):
        _tune(monitor=hpo.Monitor(_scores, every=31))
    # A run that goes on may be a part of a longer one.
    first = _tune(monitor=hpo.Monitor(_scores, every=3), steps=4)
    rest = _tune(monitor=hpo.Monitor(_scores, every=3), steps=1, state=first.state)
    assert list(rest.history.monitor.step) == [4]


def test_an_exception_of_the_metric_keeps_the_best():
    def broken(state):
        if int(state.step) == 18:
            raise RuntimeError("no data")
        return _scores(state)

    with pytest.raises(RuntimeError, match="no data") as caught:
        _tune(monitor=hpo.Monitor(broken, every=3))
    solution = vars(caught.value)["solution"]
    assert solution.result == hpo.RESULTS.failed
    assert equal(solution.best.state, _states()[11])
    assert equal(solution.model, _states()[11].model)


def test_a_metric_that_is_never_a_number():
    solution = _tune(monitor=hpo.Monitor(lambda state: np.nan, every=3, patience=4))
    assert solution.result == hpo.RESULTS.patience
    assert int(solution.state.step) == 12 and solution.best is None
    assert equal(solution.model, solution.state.model)
    assert solution.message.endswith(" The monitor's metric was never a number.")


@pytest.mark.parametrize(
    "number", [3, True, np.float32(1), jnp.array(2, jnp.bfloat16), jnp.ones((), int)]
)
def test_numbers_of_all_kinds(number):
    solution = _tune(monitor=hpo.Monitor(lambda state: number, every=30))
    assert solution.best.value == float(number) and solution.best.step == 0


@pytest.mark.parametrize(
    "wrong, text",
    [
        (None, "None"),
        ("good", "'good'"),
        (np.ones(2), r"an array of dtype float64 and shape \(2,\)"),
        (1j, "1j"),
    ],
)
def test_what_is_no_number_is_refused(wrong, text):
    message = rf"`metric` must return one real number; got {text}\."
    with pytest.raises(ValueError, match=message):
        _tune(monitor=hpo.Monitor(lambda state: wrong, every=3))


def test_watches_data_of_the_host_and_trains_at_once():
    x, y = (np.asarray(a) for a in CASE.val)
    error = lambda state: np.mean((x @ np.asarray(state.model) - y) ** 2)
    monitor = hpo.Monitor(error, every=5)
    args = (_algorithm(), CASE.model, CASE.hyperparams, TRAIN)
    options: Any = dict(steps=40, key=KEY, progress=False)
    solution: Any = hpo.fit(*args, monitor=monitor, **options)
    values = solution.history.monitor.value
    assert solution.best.value == values.min() < values[0]
    assert solution.best.value == error(solution.best.state)
    # The one without a monitor has the same steps.
    plain = hpo.fit(*args, **options)
    assert equal(plain.state, solution.state)


def test_discretised_is_of_the_best():
    def loss(model, values, batch, key):
        return jnp.sum((model - values) ** 2)

    problem = hpo.Problem(loss, loss)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(5.0))
    monitor = hpo.Monitor(lambda state: -int(state.step == 0), every=1)
    start = (jnp.ones(()), hpo.Switch(-0.4), jnp.zeros(2), jnp.ones(2))
    options: Any = dict(steps=20, key=None, progress=False)
    last: Any = hpo.tune(algorithm, *start, **options)
    best: Any = hpo.tune(algorithm, *start, **options, monitor=monitor)
    assert (float(last.discretised.values), float(best.discretised.values)) == (1, 0)


def test_the_state_is_held_once_and_the_best_once_more():
    big = jnp.zeros(10**6)

    def loss(model, decay, batch, key):
        return jnp.mean((model - batch) ** 2) + decay * jnp.mean(model**2)

    algorithm = hpo.FirstOrder(hpo.Problem(loss, loss), optax.sgd(0.1), optax.sgd(0.1))
    start = (algorithm, big, hpo.Positive(0.1), jnp.ones(()), jnp.ones(()))
    held = []

    def metric(state):
        large = [x for x in jax.live_arrays() if x.size == 10**6]
        held.append(len({x.unsafe_buffer_pointer() for x in large}))
        return -int(state.step)

    hpo.tune(
        *start, steps=6, key=None, progress=False, monitor=hpo.Monitor(metric, every=1)
    )
    # The model given, that of the state, and the best before this one.
    assert held == [2, *[3] * 6]
