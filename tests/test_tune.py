import functools as ft
import itertools
import os
import signal
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from eqx_hpo._progress import _shows_a_bar

from .helpers import equal, relative_error
from .problems import ridge


CASE = ridge()
INNER = optax.sgd(0.1, momentum=0.9)


@ft.cache  # so that the tests share what is compiled
def _algorithm(**kwargs):
    return hpo.T1T2(CASE.problem, INNER, optax.adam(0.05), **kwargs)


def _tune(algorithm=None, train=CASE.train, val=CASE.val, **kwargs):
    settings = {"steps": 12, "key": jr.key(0), **kwargs}
    algorithm = _algorithm() if algorithm is None else algorithm
    return hpo.tune(algorithm, CASE.model, CASE.hyperparams, train, val, **settings)


def _by_hand(algorithm, train, val, steps, key):
    state = algorithm.init(CASE.model, CASE.hyperparams)
    for i in range(steps):
        step_key = jr.fold_in(key, i)
        state = algorithm.step(state, next(train), next(val), key=step_key)
    return state


@pytest.mark.parametrize("callback", [None, lambda state: None])
def test_equals_steps_by_hand(callback):
    solution = _tune(callback=callback, record_every=5)
    train, val = itertools.repeat(CASE.train), itertools.repeat(CASE.val)
    expected = _by_hand(_algorithm(), train, val, 12, jr.key(0))
    assert relative_error(solution.state, expected) < 1e-13
    assert equal(solution.model, solution.state.model)
    assert equal(solution.hyperparams, solution.state.hyperparams)
    assert equal(solution.values, hpo.unwrap(solution.hyperparams))
    assert solution.result == hpo.RESULTS.successful
    assert solution.message.startswith("Finished after step 12. Validation loss ")


@pytest.mark.parametrize(
    "history, expected", [(1, 12), (5, 3), (4, 3), (100, 1), (None, 12)]
)
def test_history(history, expected):
    solution = _tune(record_every=history)
    h = solution.history
    assert h.step.shape == h.val_loss.shape == (expected,)
    assert h.hyperparams["penalty"].shape == (expected, 6)
    interval = history or 1
    assert h.step.tolist() == sorted({*range(interval, 13, interval), 12})
    assert h.val_loss[-1] == solution.state.metrics.val_loss
    assert h.train_loss[-1] == solution.state.metrics.train_loss
    assert h.hypergradient_norm[-1] == solution.state.metrics.hypergradient_norm
    assert np.array_equal(h.hyperparams["penalty"][-1], solution.values["penalty"])
    dense = _tune(record_every=1).history
    rows = h.step - 1
    assert np.allclose(h.val_loss, dense.val_loss[rows], rtol=1e-12)
    assert np.allclose(h.hyperparams["penalty"], dense.hyperparams["penalty"][rows])


def test_a_history_longer_than_its_block_on_the_device():
    solution = _tune(steps=700, record_every=1)
    assert np.array_equal(solution.history.step, np.arange(1, 701))
    assert np.all(np.isfinite(solution.history.val_loss))


DATA = {
    "arrays": lambda: (CASE.train, CASE.val),
    "minibatch": lambda: (hpo.Minibatch(CASE.train, 8), hpo.Minibatch(CASE.val, 8)),
    "epochs": lambda: (
        hpo.Minibatch(CASE.train, 8, replacement=False),
        hpo.Minibatch(CASE.val, 8, replacement=False, seed=1),
    ),
}


@pytest.mark.parametrize("data_name", DATA)
@pytest.mark.parametrize("settings", [{}, {"restart_every": 5, "record_every": 4}])
def test_stopped_saved_and_continued_equals_uninterrupted(
    data_name, settings, tmp_path
):
    train, val = DATA[data_name]()
    algorithm = _algorithm(inner_steps=2)
    whole = _tune(algorithm, train, val, steps=17, **settings)
    path = tmp_path / "state"
    _tune(algorithm, train, val, steps=10, checkpoint=path, **settings)
    state = hpo.load(path, algorithm.init(CASE.model, CASE.hyperparams))
    rest = _tune(algorithm, train, val, steps=7, state=state, **settings)
    assert equal(rest.state, whole.state)
    assert int(state.step) == 10  # `tune` donated a copy of it


def test_restart_every_few_steps():
    solution = _tune(steps=12, restart_every=5)
    algorithm = _algorithm()
    state = algorithm.init(CASE.model, CASE.hyperparams)
    for i in range(12):
        if i in (5, 10):
            state = algorithm.restart(state, CASE.model)
        state = algorithm.step(state, CASE.train, CASE.val)
    assert relative_error(solution.state, state) < 1e-13


def _host_batches(seed, count=None):
    rng = np.random.default_rng(seed)
    x, y = map(np.asarray, CASE.train)
    for _ in itertools.count() if count is None else range(count):
        rows = rng.integers(0, len(x), 8)
        yield x[rows], y[rows]


class _Loader:
    """As a data loader: started again at each epoch."""

    def __init__(self, batches):
        self.batches = batches
        self.epochs = 0

    def __iter__(self):
        self.epochs += 1
        return iter(self.batches)


def test_python_iterators():
    solution = _tune(train=_host_batches(0), val=_host_batches(1))
    expected = _by_hand(_algorithm(), _host_batches(0), _host_batches(1), 12, jr.key(0))
    assert relative_error(solution.state, expected) < 1e-13


def test_an_iterator_gives_a_batch_to_each_inner_step():
    solution = _tune(_algorithm(inner_steps=3), train=_host_batches(0), steps=4)
    batches = _host_batches(0)
    stack = lambda *x: np.stack(x)
    stacked = (
        hpo.Stacked(jtu.tree_map(stack, *itertools.islice(batches, 3)))
        for _ in range(4)
    )
    val = itertools.repeat(CASE.val)
    expected = _by_hand(_algorithm(inner_steps=3), stacked, val, 4, jr.key(0))
    assert relative_error(solution.state, expected) < 1e-13
    batches = list(itertools.islice(_host_batches(0), 12))
    ready = [
        hpo.Stacked(jtu.tree_map(stack, *batches[i : i + 3])) for i in (0, 3, 6, 9)
    ]
    ready = _tune(_algorithm(inner_steps=3), train=iter(ready), steps=4)
    assert equal(ready.state, solution.state)


def test_a_loader_is_started_again():
    loader = _Loader(list(_host_batches(0, 5)))
    solution = _tune(train=loader, val=_Loader([CASE.val]))
    assert loader.epochs == 3
    assert solution.result == hpo.RESULTS.successful
    assert int(solution.state.step) == 12


def test_an_iterator_that_ends_ends_the_run():
    solution = _tune(train=_host_batches(0, 5), record_every=2)
    assert solution.result == hpo.RESULTS.data_exhausted
    assert int(solution.state.step) == 5
    assert solution.history.step.tolist() == [2, 4, 5]
    assert "iterator" in solution.message and "5" in solution.message


def test_bad_loaders():
    with pytest.raises(ValueError, match="`train` is empty"):
        _tune(train=_Loader([]))
    x, y = CASE.train
    odd = _Loader([(x[:8], y[:8]), (x[:5], y[:5])])
    with pytest.raises(ValueError, match="batches of different shapes"):
        _tune(_algorithm(inner_steps=2), train=odd)


@pytest.mark.parametrize("how", ["raised", "signal", "second_signal"])
def test_ctrl_c_returns_what_there_is(how, tmp_path):
    def interrupt(state):
        if state.step == 6:
            if how == "raised":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)
            if how == "second_signal":
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    path = tmp_path / "state"
    solution = _tune(callback=interrupt, record_every=2, checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is before
    assert solution.result == hpo.RESULTS.interrupted
    assert int(solution.state.step) == 6
    assert solution.history.step.tolist() == [2, 4, 6]
    assert "interrupted" in solution.message
    saved = hpo.load(path, _algorithm().init(CASE.model, CASE.hyperparams))
    assert equal(saved, solution.state)


def test_ctrl_c_in_a_loader():
    def batches():
        yield from _host_batches(0, 3)
        raise KeyboardInterrupt

    solution = _tune(train=batches())
    assert solution.result == hpo.RESULTS.interrupted
    assert int(solution.state.step) == 3


def test_an_error_of_the_callback_saves(tmp_path):
    def fail(state):
        if state.step == 4:
            raise RuntimeError("mine")

    path = tmp_path / "state"
    with pytest.warns(UserWarning, match="RuntimeError: mine"):
        _tune(callback=fail, record_every=2, checkpoint=path)
    saved = hpo.load(path, _algorithm().init(CASE.model, CASE.hyperparams))
    assert int(saved.step) == 4


def test_callback_sees_records_and_stops():
    seen = []

    def callback(state):
        seen.append(state)
        return len(seen) == 3

    solution = _tune(callback=callback, record_every=2)
    assert [int(state.step) for state in seen] == [2, 4, 6]  # still alive
    assert solution.result == hpo.RESULTS.stopped
    assert int(solution.state.step) == 6


def _batches_with_nan():
    """NaN from the eighth on."""
    x, y = map(np.asarray, CASE.train)
    for i in itertools.count():
        yield x, (y if i < 7 else y * np.nan)


def _count_up():
    """An outer update that adds one to `n` and leaves the rest alone."""

    def update(updates, state, params=None):
        del params
        zeros = jtu.tree_map(jnp.zeros_like, updates)
        return {**zeros, "n": jnp.ones(())}, state

    return optax.GradientTransformation(lambda params: (), update)


def _nan_from_the_eighth_step(w, h, batch, key):
    bad = jnp.where(h["n"] >= 7, jnp.nan, 0.0)
    return CASE.problem.train_loss(w, h, batch, key) + bad


@pytest.mark.filterwarnings("ignore:These hyperparameters get a hypergradient of zero")
@pytest.mark.parametrize("from_host", [False, True])
def test_non_finite_steps_end_the_run(from_host):
    if from_host:
        problem, outer, train = CASE.problem, optax.adam(0.05), _batches_with_nan()
    else:
        problem = hpo.Problem(_nan_from_the_eighth_step, CASE.problem.val_loss)
        outer, train = _count_up(), CASE.train
    hyperparams = {**CASE.hyperparams, "n": jnp.array(0.0)}
    algorithm = hpo.T1T2(problem, INNER, outer)
    run = lambda train, **kwargs: hpo.tune(
        algorithm, CASE.model, hyperparams, train, CASE.val,
        key=None, max_skipped=5, **kwargs,
    )  # fmt: skip
    solution = run(train, steps=100)
    assert solution.result == hpo.RESULTS.nonfinite
    assert "5 of 12 steps were not finite; first at step 8." in solution.message
    assert "Likely causes" in solution.message and "nan" in solution.message
    assert int(solution.state.skipped) == int(solution.state.total_skipped) == 5
    assert int(solution.state.step) == 12
    assert list(solution.history.skipped[-6:]) == [0, 1, 2, 3, 4, 5]
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jtu.tree_leaves(solution.model))
    again = run(CASE.train, steps=6, state=solution.state)
    expected = hpo.RESULTS.successful if from_host else hpo.RESULTS.nonfinite
    assert again.result == expected
    assert int(again.state.step) > int(solution.state.step)


def test_progress(capsys, monkeypatch):
    _tune()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("eqx_hpo._progress._LINE", 0.0)
    _tune(steps=12, record_every=12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("12/12 steps, ")
    assert all("a second, train " in line and ", val " in line for line in lines)
    _tune(progress=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    solution = _tune(steps=12)
    err = capsys.readouterr().err
    for word in ("train", "val", "hypergradient", "12/12", "it/s"):
        assert word in err
    _tune(progress=False)
    assert capsys.readouterr() == ("", "")
    assert solution.result == hpo.RESULTS.successful


@pytest.mark.parametrize("from_host", [False, True])
def test_compiles_once(from_host, caplog):
    algorithm = hpo.T1T2(CASE.problem, optax.sgd(0.1), optax.adam(0.05))
    train = itertools.repeat(CASE.train) if from_host else CASE.train
    with jax.log_compiles(), caplog.at_level("WARNING"):
        _tune(algorithm, train=train, steps=40, key=None)
    messages = [record.getMessage() for record in caplog.records]
    compiled = [x for x in messages if "Compiling jit(_advance)" in x]
    assert len(compiled) == 1


def test_in_a_notebook_there_is_a_bar():
    # Its streams say that they are no terminal.
    stream = type("OutStream", (), {"__module__": "ipykernel.iostream"})()
    assert _shows_a_bar(stream) and not _shows_a_bar(None)


@pytest.mark.parametrize("yes", [np.True_, jnp.array(True), 1])
def test_a_callback_stops_with_any_boolean(yes):
    solution = _tune(callback=lambda state: yes if state.step >= 6 else yes * 0)
    assert solution.result == hpo.RESULTS.stopped
    assert int(solution.state.step) == 6


def test_a_callback_that_returns_something_else():
    with pytest.raises(ValueError, match="`callback` must return a boolean, or `None`"):
        _tune(callback=lambda state: np.ones(3))


@pytest.mark.parametrize("kind", [StopIteration, RuntimeError])
def test_an_exception_of_the_callback_keeps_what_was_learned(kind):
    error = kind("from the callback")

    def callback(state):
        if state.step >= 6:
            raise error

    with pytest.warns(UserWarning, match="A callback ended the run"):
        solution = _tune(callback=callback)
    assert solution.result == hpo.RESULTS.callback_failed
    assert solution.exception is error
    assert equal(solution.model, _tune(steps=6, callback=lambda state: None).model)
    assert f"It was a {kind.__name__}: from the callback" in solution.message


def test_several_callbacks():
    seen = []
    callbacks = [
        lambda state: seen.append(("first", int(state.step))),
        lambda state: seen.append(("second", int(state.step))) or len(seen) > 3,
    ]
    solution = _tune(callback=callbacks, record_every=2)
    expected = [("first", 2), ("second", 2), ("first", 4), ("second", 4)]
    assert seen == expected
    assert solution.result == hpo.RESULTS.stopped


def test_an_exception_of_a_loader_keeps_what_was_learned():
    def batches():
        for _ in range(6):
            yield CASE.train
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as info:
        _tune(train=batches())
    error: Any = info.value
    assert int(error.solution.state.step) == 6


def test_an_exception_before_the_first_step_has_no_solution():
    with pytest.raises(OSError) as info:
        _tune(train=iter(_Failing()))
    assert not hasattr(info.value, "solution")


class _Failing:
    def __iter__(self):
        raise OSError
        yield


def test_many_skipped_steps_are_a_warning():
    train = [CASE.train] * 30
    bad = (CASE.train[0] * jnp.nan, CASE.train[1])
    train[2:30:3] = [bad] * 10
    text = "10 of 30 steps were not finite; first at step 3."
    with pytest.warns(UserWarning, match=text):
        solution = _tune(train=iter(train), steps=30)
    assert solution.result == hpo.RESULTS.successful
    assert text in solution.message
    assert solution.history.skipped[-1] == 10


def test_a_loss_that_ends_far_above_its_start_is_said():
    problem = hpo.Problem(
        lambda w, h, batch, key: jnp.sum(w**2 + h * w),
        lambda w, h, batch, key: jnp.sum((w - 1) ** 2),
    )
    algorithm = hpo.T1T2(problem, optax.sgd(1.5), optax.sgd(0.0))
    args = 2 * jnp.ones(1), jnp.ones(1), (), ()
    solution = hpo.tune(algorithm, *args, steps=30, key=None)
    assert solution.result == hpo.RESULTS.diverged
    # w + 1/2 is multiplied by -2 in each step.
    first, last = (2.5 * -2 - 1.5) ** 2, (2.5 * 2.0**30 - 1.5) ** 2
    assert f"Validation loss {first:.4g} at first" in solution.message
    assert f"{last:.4g} at the end." in solution.message
    calm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.0))
    solution = hpo.tune(calm, *args, steps=30, key=None)
    assert solution.result == hpo.RESULTS.successful


def test_a_state_of_another_problem_raises():
    other = ridge(features=4)
    state = _algorithm().init(other.model, other.hyperparams)
    with pytest.raises(ValueError, match=r"`state.model` is float64\[4\]"):
        _tune(state=state)


@pytest.mark.parametrize(
    "name",
    ["steps", "restart_every", "record_every", "checkpoint_every", "max_skipped"],
)
def test_bad_options(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        _tune(**{name: 0})


def test_a_zero_hypergradient_is_said_once():
    loss = lambda w, h, batch, key: jnp.sum((w - batch) ** 2)
    algorithm = hpo.T1T2(hpo.Problem(loss, loss), optax.sgd(0.1), optax.sgd(0.1))
    with pytest.warns(UserWarning, match="hypergradient of zero") as record:
        hpo.tune(
            algorithm, jnp.zeros(2), 0.5, jnp.ones(2), jnp.ones(2), steps=9, key=None
        )
    assert len(record) == 1


def test_aux_is_kept_in_one_structure():
    loss = lambda w, h, b, k: (h * jnp.sum((w - b) ** 2), {"norm": jnp.sum(w**2)})
    problem = hpo.Problem(loss, loss, has_aux=True)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.01))
    run = lambda state: hpo.tune(
        algorithm, jnp.zeros(2), jnp.array(0.5), jnp.ones(2), jnp.ones(2),
        steps=3, key=None,
        state=state,
    )  # fmt: skip
    started = run(None)
    assert started.state.metrics.aux[1]["norm"] > 0
    assert equal(run(algorithm.init(jnp.zeros(2), jnp.array(0.5))).state, started.state)


@pytest.mark.slow
def test_convolutions_run_a_step_a_call(getkey):
    conv = eqx.nn.Conv2d(1, 2, 3, key=getkey())
    images = jr.normal(getkey(), (4, 1, 8, 8))

    def loss(model, h, batch, key):
        return jnp.mean((jax.vmap(model)(batch) - h) ** 2)

    algorithm = hpo.T1T2(hpo.Problem(loss, loss), optax.sgd(0.1), optax.sgd(0.1))
    solution = hpo.tune(
        algorithm,
        conv,
        jnp.array(0.1),
        images,
        jnp.copy(images),
        steps=5,
        key=None,
        record_every=2,
    )
    state = algorithm.init(conv, jnp.array(0.1))
    for _ in range(5):
        state = algorithm.step(state, images, images)
    assert relative_error(solution.state, state) < 1e-5
    assert solution.history.step.tolist() == [2, 4, 5]


def test_tune_in_another_thread():
    import threading

    out = []
    thread = threading.Thread(target=lambda: out.append(_tune(steps=3)))
    thread.start()
    thread.join()
    assert int(out[0].state.step) == 3


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["tune", "fit"])
def test_numbers_too_large_to_be_counted_stand_for_never(driver):
    def loss(model, hyperparams, batch, key):
        return hyperparams * (model - batch) ** 2

    algorithm = hpo.T1T2(hpo.Problem(loss, loss), optax.sgd(0.1), optax.adam(0.1))
    monitor = hpo.Monitor(lambda state: 0.0, every=5, patience=1)
    options = dict.fromkeys(["steps", "record_every", "max_skipped"], 10**12)
    with jax.enable_x64(False):
        start = algorithm, jnp.zeros(()), jnp.ones(()), jnp.ones(())
        run = ft.partial(getattr(hpo, driver), *start, val=2 * jnp.ones(()))
        solution = run(**options, key=None, monitor=monitor)
    assert solution.result == hpo.RESULTS.patience
    assert list(solution.history.step) == [5]
