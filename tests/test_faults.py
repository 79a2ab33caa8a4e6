"""What goes wrong around a long run, a test for each line of the table in the docs."""

import errno
import os
import resource
import shutil
import signal
import time

import eqx_hpo as hpo
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .helpers import equal
from .interrupted import digest, run, X, Y


STEPS = 60


@pytest.fixture(scope="module")
def whole():
    return digest(run("minibatch", None, steps=STEPS))


def _without_message(solution):
    return {k: x for k, x in digest(solution).items() if k != "message"}


def _run(folder, callback=None, **changes):
    # Slow enough for each save to be done before the next one.
    checkpoint = hpo.Checkpoints(folder, every=10)
    changes = {"steps": STEPS, "record_every": 7, **changes}
    return run("minibatch", checkpoint, 0.03, callback=callback, **changes)


def _check_goes_on(solution, whole, reason):
    expected = {k: x for k, x in whole.items() if k != "message"}
    assert _without_message(solution) == expected
    assert "Saves that failed: " in solution.message and reason in solution.message


def _at(step, action):
    """A callback that does something once."""
    done = []

    def callback(state):
        if not done and state.step >= step:
            done.append(None)
            time.sleep(0.3)  # until nothing is being written
            action()

    return callback


def _failing(monkeypatch, name, number):
    """Lets a function of `os` fail, and mends it afterwards."""
    real = getattr(os, name)

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return (
        lambda: monkeypatch.setattr(os, name, fail),
        lambda: monkeypatch.setattr(os, name, real),
    )


@pytest.mark.parametrize(
    "name, number",
    [("fsync", errno.ENOSPC), ("open", errno.EROFS), ("replace", errno.EDQUOT)],
    ids=["disk full", "read-only", "quota"],
)
@pytest.mark.parametrize("mended", [False, True])
def test_a_disk_that_takes_nothing(name, number, mended, tmp_path, whole, monkeypatch):
    breaks, mends = _failing(monkeypatch, name, number)
    callbacks = [_at(18, breaks)] + [_at(40, mends)] * mended
    with pytest.warns(UserWarning, match="could not be saved .*tries again"):
        solution = _run(tmp_path / "run", callbacks)
    mends()
    _check_goes_on(solution, whole, os.strerror(number))
    assert not [*tmp_path.rglob("*partial*")]
    like = solution.state
    newest = max((tmp_path / "run").glob("step-*"))
    step = int(hpo.load(newest, like).step)
    assert step in ([STEPS] if mended else [10, 20])
    assert _without_message(_run(tmp_path / "run")) == _without_message(solution)


@pytest.mark.parametrize(
    "kind, limit, words",
    [
        (resource.RLIMIT_FSIZE, 700, "File too large"),
        pytest.param(
            *(resource.RLIMIT_NOFILE, 3, "Too many open files"), marks=pytest.mark.slow
        ),
    ],
    ids=["size", "number"],
)
def test_a_limit_of_files(kind, limit, words, tmp_path, whole):
    before = resource.getrlimit(kind)
    set_limit = lambda x: resource.setrlimit(kind, (x, before[1]))
    callbacks = [_at(20, lambda: set_limit(limit))]
    callbacks.append(_at(40, lambda: set_limit(before[0])))
    try:
        with pytest.warns(UserWarning, match=words):
            solution = _run(tmp_path / "run", callbacks)
    finally:
        set_limit(before[0])
    _check_goes_on(solution, whole, words)


def _remove(folder):
    shutil.rmtree(folder)


def test_a_folder_that_is_deleted(tmp_path, whole):
    """It is made anew, with the whole history."""
    folder = tmp_path / "run"
    solution = _run(folder, _at(35, lambda: _remove(folder)))
    expected = {k: x for k, x in whole.items() if k != "message"}
    assert _without_message(solution) == expected
    again = _run(folder)
    assert _without_message(again) == expected


def test_a_folder_in_place_of_which_is_a_file(tmp_path, whole):
    folder = tmp_path / "run"

    def replace():
        _remove(folder)
        folder.write_text("mine")

    with pytest.warns(UserWarning, match="could not be saved"):
        solution = _run(folder, _at(35, replace))
    _check_goes_on(solution, whole, "File exists")
    assert folder.read_text() == "mine"


def test_a_place_that_cannot_be_written_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="`checkpoint` cannot be written to"):
            _run(place)
    breaks, _ = _failing(monkeypatch, "open", errno.EROFS)
    breaks()
    with pytest.raises(ValueError, match="cannot be written to.*Read-only"):
        _run(tmp_path / "run")


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[60] ^= 4
    path.write_bytes(content)


def _replace(path):
    path.write_text("something else")


DAMAGES = {"truncated": _truncate, "flipped": _flip, "foreign": _replace}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["step", "best"])
def test_a_damaged_file_in_a_folder(damage, kind, tmp_path, whole):
    """The run goes on from the checkpoint before."""
    folder = tmp_path / "run"
    _run(folder, lambda state: state.step >= 35)
    older, newest = sorted(folder.glob("step-*"))
    if kind == "best":
        for path in folder.glob("best-*"):
            DAMAGES[damage](path)
        with pytest.raises(ValueError, match="best-.*(is damaged|is not a state)"):
            _run(folder)
        return
    DAMAGES[damage](newest)
    with pytest.warns(UserWarning, match="The run goes on from step"):
        solution = _run(folder)
    assert digest(solution) == whole and not older.exists()


def test_a_damaged_best_state_is_written_anew(tmp_path, whole):
    folder = tmp_path / "run"
    _run(folder, steps=20)
    _flip(max(folder.glob("best-*")))
    with pytest.warns(UserWarning, match="best-.* is damaged.*goes on from step 10"):
        solution = _run(folder)
    assert digest(solution) == whole
    assert digest(_run(folder)) == whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(damage, tmp_path):
    place = tmp_path / "run.ckpt"
    run("minibatch", place, steps=20)
    DAMAGES[damage](place)
    content = place.read_bytes()
    with pytest.raises(ValueError, match="run.ckpt` is (damaged|not a state)"):
        run("minibatch", place, steps=20)
    assert place.read_bytes() == content


def test_a_damaged_history(tmp_path, whole, kill):
    folder = tmp_path / "run"
    die, revive = kill(42)
    with pytest.raises(BaseException, match="^killed$"):
        _run(folder, die)
    revive()
    (folder / "history").unlink()
    with pytest.warns(UserWarning, match=r"0 of \d rows are left"):
        solution = _run(folder)
    assert solution.history.step.tolist()[-4:] == [42, 49, 56, 60]
    assert digest(solution)["state"] == whole["state"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_of_the_scheduler(name, tmp_path, whole):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    folder = tmp_path / "run"
    checkpoint = hpo.Checkpoints(folder, signals=("SIGTERM", "SIGUSR1"))
    send = _at(20, lambda: os.kill(os.getpid(), number))
    solution = run("minibatch", checkpoint, steps=STEPS, callback=send)
    assert solution.result == hpo.RESULTS.preempted
    assert int(solution.state.step) == 21
    assert signal.getsignal(number) == before
    assert digest(_run(folder)) == whole


def test_a_handler_of_the_program_stays(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(args))
    try:
        send = _at(20, lambda: os.kill(os.getpid(), signal.SIGTERM))
        solution = _run(tmp_path / "run", send)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert solution.result == hpo.RESULTS.successful and len(seen) == 1


def test_nohup_goes_on_to_ignore_ctrl_c(tmp_path, whole):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        send = _at(20, lambda: os.kill(os.getpid(), signal.SIGINT))
        solution = _run(tmp_path / "run", send)
    finally:
        signal.signal(signal.SIGINT, before)
    assert digest(solution) == whole


def test_a_callback_that_raises(tmp_path, whole):
    def fail():
        raise ConnectionError("the logger is gone")

    with pytest.warns(UserWarning, match="ConnectionError: the logger is gone"):
        solution = _run(tmp_path / "run", _at(20, fail))
    assert solution.result == hpo.RESULTS.callback_failed
    assert isinstance(solution.exception, ConnectionError)
    newest = max((tmp_path / "run").glob("step-*"))
    assert equal(hpo.load(newest, solution.state), solution.state)
    assert digest(_run(tmp_path / "run")) == whole


def _batches(ends_at=None, error=None, changes_at=None, nan=()):
    rng, number = np.random.default_rng(0), 0
    while number != ends_at:
        size = 8 if changes_at is None or number < changes_at else 5
        rows = rng.integers(0, 32, 8)[:size]
        factor = np.nan if number in nan else 1.0
        yield np.asarray(X)[rows], np.asarray(Y)[rows] * factor
        number += 1
    if error is not None:
        raise error


def test_an_iterator_that_raises(tmp_path):
    """The same call, with an iterator that does not, goes on."""
    whole = _run(tmp_path / "whole", train=_batches())
    with pytest.raises(OSError, match="no such file") as info:
        _run(tmp_path / "run", train=_batches(33, OSError("no such file")))
    assert int(info.value.solution.state.step) == 33  # pyright: ignore
    assert digest(_run(tmp_path / "run", train=_batches())) == digest(whole)


@pytest.mark.slow
def test_an_iterator_that_ends_early(tmp_path):
    whole = _run(tmp_path / "whole", train=_batches())
    solution = _run(tmp_path / "run", train=_batches(33))
    assert solution.result == hpo.RESULTS.data_exhausted
    again = _run(tmp_path / "run", train=_batches(33))
    assert digest(again) == digest(solution)
    assert digest(_run(tmp_path / "run", train=_batches())) == digest(whole)
    (tmp_path / "run" / "history").unlink()
    with pytest.raises(ValueError, match="`train` ended after 7 batches; .* 60"):
        with pytest.warns(UserWarning, match="history"):
            _run(tmp_path / "run", train=_batches(7))


@pytest.mark.slow
def test_batches_that_change_their_shape(tmp_path):
    """They are compiled anew; with several inner steps they cannot be stacked."""
    solution = _run(tmp_path / "run", train=_batches(changes_at=33))
    assert solution.result == hpo.RESULTS.successful
    algorithm = hpo.T1T2(
        hpo.Problem(*_losses()), optax.sgd(0.1), optax.sgd(0.1), inner_steps=2
    )
    with pytest.raises(ValueError, match="`train` gave batches of different shapes"):
        _run(tmp_path / "other", algorithm=algorithm, train=_batches(changes_at=33))


def _losses():
    loss = lambda w, h, batch, key: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    return lambda w, h, *rest: loss(w, h, *rest) + h * jnp.sum(w**2), loss


@pytest.mark.parametrize(
    "nan", [(0, 1), (30, 31), (58, 59)], ids=["start", "middle", "end"]
)
def test_batches_with_nan(nan, tmp_path, kill):
    whole = _run(tmp_path / "whole", train=_batches(nan=nan))
    assert int(whole.state.total_skipped) == 2
    assert (
        f"2 of {STEPS} steps were not finite; first at step {nan[0] + 1}"
        in whole.message
    )
    die, revive = kill(32)
    with pytest.raises(BaseException, match="^killed$"):
        _run(tmp_path / "run", die, train=_batches(nan=nan))
    revive()
    assert digest(_run(tmp_path / "run", train=_batches(nan=nan))) == digest(whole)


def test_nothing_but_nan(tmp_path):
    bad = range(20, 10**6)
    solution = _run(tmp_path / "run", train=_batches(nan=bad))
    assert solution.result == hpo.RESULTS.nonfinite
    assert digest(_run(tmp_path / "run", train=_batches(nan=bad))) == digest(solution)


@pytest.mark.slow
def test_one_of_four_tasks_is_nan(tmp_path):
    """The mean over the tasks is not finite: no task moves."""
    train, val = hpo.folds((X[:32], Y[:32]), 4)
    start = run("folds", None, steps=1, monitor=None).state
    train = train[0], train[1].at[2].set(jnp.nan)
    checkpoint = hpo.Checkpoints(tmp_path / "run", every=5)
    solution = run("folds", checkpoint, steps=30, state=start, train=train)
    assert solution.result == hpo.RESULTS.nonfinite
    assert int(solution.state.total_skipped) == 20
    assert equal(solution.model, start.model)
    assert equal(solution.hyperparams, start.hyperparams)
