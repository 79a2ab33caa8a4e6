import json
import os
import random
import signal
import subprocess
import sys
import time

import eqx_hpo as hpo
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from eqx_hpo import _loader_state

from . import interrupted
from .helpers import equal, ROOT
from .interrupted import digest, KINDS, run


def _names(folder):
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*"))


_PAIRS = [(kind, place) for kind in KINDS for place in ("file", "folder")]
_QUICK = {("minibatch", "file"), ("epochs", "folder"), ("loader", "folder")}


@pytest.mark.parametrize(
    "kind, place",
    [
        pytest.param(*pair, marks=[] if pair in _QUICK else pytest.mark.slow)
        for pair in _PAIRS
    ],
)
def test_the_same_call_goes_on_bit_for_bit(kind, place, tmp_path, kill):
    steps, every = 41, 6
    whole = digest(run(kind, None, steps=steps))
    where = tmp_path / "run"
    checkpoint = where if place == "file" else hpo.Checkpoints(where, every=every)
    start = lambda **changes: run(
        kind, checkpoint, steps=steps, checkpoint_every=every, **changes
    )
    die, revive = kill(22)
    with pytest.raises(BaseException, match="^killed$"):
        start(callback=die)
    revive()
    assert digest(start()) == whole
    left = _names(tmp_path)
    assert digest(start()) == whole  # at once, from the end
    assert _names(tmp_path) == left
    assert not _strays(tmp_path)
    if place == "file":
        assert left == ["run"]


def _start(kind, place, output):
    command = [sys.executable, "-m", "tests.interrupted", kind, place, str(output)]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(output.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {**os.environ, **cache}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run.ckpt", "folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(kind, place, tmp_path):
    output = tmp_path / "output.json"
    with _start(kind, "none", output) as process:
        begun = time.monotonic()
        assert process.wait() == 0
    whole, seconds = output.read_text(), time.monotonic() - begun
    rng, kills, runs = random.Random(f"{kind} {place}"), 0, 0
    while kills < 20:
        runs += 1
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        output.unlink()
        while not output.exists():
            with _start(kind, str(folder / place), output) as process:
                try:
                    process.wait(rng.uniform(0, seconds))
                except subprocess.TimeoutExpired:
                    kills += 1
                    process.kill()
                assert process.wait() in (0, -signal.SIGKILL)
        assert output.read_text() == whole
        assert not _strays(folder)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["run.ckpt", "folder"])
def test_two_presses_of_ctrl_c_at_random_moments(place, tmp_path):
    output = tmp_path / "output.json"
    with _start("minibatch", "none", output) as process:
        begun = time.monotonic()
        assert process.wait() == 0
    whole, seconds = output.read_text(), time.monotonic() - begun
    rng = random.Random(place)
    for number in range(10):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        with _start("minibatch", str(folder / place), output) as process:
            for _ in range(2):
                time.sleep(rng.uniform(0, seconds / 2))
                process.send_signal(signal.SIGINT)
            process.wait()
        assert not _strays(folder)
        output.unlink(missing_ok=True)
        with _start("minibatch", str(folder / place), output) as process:
            assert process.wait() == 0
        assert output.read_text() == whole


def _strays(folder):
    return [x for x in _names(folder) if "partial" in x or "trial" in x]


def test_what_is_kept(tmp_path):
    checkpoint = hpo.Checkpoints(tmp_path / "run", every=10, keep_last=3, keep_best=2)
    solution = run("minibatch", checkpoint, seconds=0.03, steps=60)
    steps = [f"step-{step:010d}.ckpt" for step in (40, 50, 60)]
    assert solution.best is not None
    names = _names(tmp_path / "run")
    assert [x for x in names if x.startswith("step")] == steps
    bests = [x for x in names if x.startswith("best")]
    assert f"best-{solution.best.step:010d}.ckpt" in bests and len(bests) <= 4
    assert {*names} == {*steps, *bests, "history"}
    like = solution.state
    assert equal(hpo.load(tmp_path / "run" / bests[-1], like), solution.best.state)
    assert equal(hpo.load(tmp_path / "run" / steps[-1], like), like)


def test_minutes(tmp_path):
    checkpoint = hpo.Checkpoints(tmp_path / "run", every=10**6, minutes=1e-9)
    seen = []
    run(
        "minibatch",
        checkpoint,
        0.1,
        steps=60,
        callback=lambda s: seen.append(_steps(tmp_path)),
    )
    assert len(seen[-1]) == 2 and 0 < seen[-1][0] < 60


def _steps(folder):
    names = sorted(x.name for x in folder.rglob("step-*"))
    return [int(x[5:15]) for x in names]


def test_another_run_is_refused(tmp_path):
    checkpoint = hpo.Checkpoints(tmp_path / "run", every=10)
    run("minibatch", checkpoint, 0.03, steps=20)
    with pytest.raises(ValueError, match="`key` is .* there and .* here"):
        run("minibatch", checkpoint, steps=20, key=jr.key(6))
    other = hpo.Unrolled(interrupted.PROBLEM, *interrupted.OPTIMISERS, inner_steps=1)
    with pytest.raises(ValueError, match="the algorithm is T1T2 there and Unrolled"):
        run("minibatch", checkpoint, steps=20, algorithm=other)
    with pytest.raises(ValueError, match="Positive in .* and Interval in `like`"):
        interval = hpo.Interval(0.1, 0.0, 1.0)
        run("minibatch", checkpoint, steps=20, hyperparams=interval)
    assert _steps(tmp_path) == [10, 20]


def test_begin_anew(tmp_path):
    place = tmp_path / "run"
    run("minibatch", hpo.Checkpoints(place, every=10), steps=20)
    changes = {"steps": 11, "key": jr.key(6)}
    anew = hpo.Checkpoints(place, every=10, resume=False)
    solution = run("minibatch", anew, 0.03, **changes)
    assert digest(solution) == digest(run("minibatch", None, **changes))
    assert _steps(tmp_path) == [10, 11]


def test_more_steps_than_at_first(tmp_path):
    place = hpo.Checkpoints(tmp_path / "run", every=5)
    run("minibatch", place, steps=20)
    assert digest(run("minibatch", place, steps=33)) == digest(
        run("minibatch", None, steps=33)
    )


def test_patience_and_a_callback_that_stopped_are_ends(tmp_path):
    stop = lambda state: state.step >= 14
    for name, changes in {
        "patience": {"monitor": hpo.Monitor(lambda s: s.step, every=3, patience=2)},
        "stopped": {"callback": stop},
    }.items():
        checkpoint = hpo.Checkpoints(tmp_path / name)
        first = run("minibatch", checkpoint, steps=60, **changes)
        again = run("minibatch", checkpoint, steps=60, **changes)
        assert digest(again) == digest(first)
        assert again.result == first.result == getattr(hpo.RESULTS, name)


def test_a_state_to_go_on_from(tmp_path, kill):
    """Its own steps come first; the same call again goes on behind them."""
    half = run("minibatch", None, steps=20)
    whole = run("minibatch", None, steps=30, state=half.state)
    checkpoint = hpo.Checkpoints(tmp_path / "run", every=4)
    die, revive = kill(42)
    with pytest.raises(BaseException, match="^killed$"):
        run("minibatch", checkpoint, steps=30, state=half.state, callback=die)
    revive()
    again = run("minibatch", checkpoint, steps=30, state=half.state)
    assert digest(again) == digest(whole)


def test_a_file_that_the_state_came_from(tmp_path):
    place = tmp_path / "run.ckpt"
    first = run("minibatch", place, steps=20)
    state = hpo.load(place, like=first.state)
    rest = run("minibatch", place, steps=10, state=state)
    assert int(hpo.load(place, like=first.state).step) == 30
    assert equal(rest.state, run("minibatch", None, steps=30).state)


def test_fit_goes_on_too(tmp_path, kill):
    settings = interrupted.settings("minibatch")
    del settings["val"]
    fit = lambda checkpoint, **changes: hpo.fit(
        **settings, steps=50, key=jr.key(0), record_every=3, progress=False,
        checkpoint=checkpoint, **changes,
    )  # fmt: skip
    checkpoint = hpo.Checkpoints(tmp_path / "run", every=7)
    die, revive = kill(30)
    with pytest.raises(BaseException, match="^killed$"):
        fit(checkpoint, callback=die)
    revive()
    assert digest(fit(checkpoint)) == digest(fit(None))


@pytest.mark.parametrize(
    "state", [{"a": [1, (2.5, None)], 3: b"x"}, np.arange(3), jnp.ones(2), (True, "b")]
)
def test_positions_of_loaders(state):
    class Holder:
        def get_state(self):
            return state

        def set_state(self, value):
            self.value = value

    holder = Holder()
    text = json.dumps(_loader_state.get_state("train", holder))
    _loader_state.set_state(holder, json.loads(text))
    if isinstance(state, (dict, tuple)):
        assert holder.value == state
    else:
        assert np.array_equal(holder.value, state)


def test_a_position_that_cannot_be_written(tmp_path):
    class Odd(interrupted.Loader):
        def state_dict(self):
            return {"rng": [object()]}

    with pytest.raises(ValueError, match=r"`train.state_dict\(\)\['rng'\]\[0\]` is a"):
        run("loader", tmp_path / "run", train=Odd(0))
