import os
import random
import signal
import subprocess
import sys
import time

import eqx_hpo as hpo
import pytest
from eqx_hpo import _checkpoints

from .helpers import ROOT
from .interrupted import digest, KINDS, run


class Killed(BaseException):
    """Ends a run without a chance to save."""


@pytest.fixture
def kill(monkeypatch):
    """Ends a run at a step as a power cut does: nothing is saved afterwards."""

    def at(step):
        finish = _checkpoints.Keeper.finish

        def die(state):
            if int(state.step) >= step:
                monkeypatch.setattr(_checkpoints.Keeper, "finish", lambda *args: None)
                raise Killed

        def revive():
            monkeypatch.setattr(_checkpoints.Keeper, "finish", finish)

        return die, revive

    return at


def _names(folder):
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*"))


@pytest.mark.parametrize("place", ["file", "folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_goes_on_bit_for_bit(kind, place, tmp_path, kill):
    steps, every = 41, 6
    whole = digest(run(kind, None, steps=steps))
    where = tmp_path / "run"
    checkpoint = where if place == "file" else hpo.Checkpoints(where, every=every)
    start = lambda **changes: run(
        kind, checkpoint, steps=steps, checkpoint_every=every, **changes
    )
    die, revive = kill(22)
    with pytest.raises(Killed):
        start(callback=die)
    revive()
    assert digest(start()) == whole
    left = _names(tmp_path)
    assert digest(start()) == whole  # at once, from the end
    assert _names(tmp_path) == left
    assert not any("partial" in name or "trial" in name for name in left)
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
    begun = time.monotonic()
    assert _start(kind, "none", output).wait() == 0
    whole, seconds = output.read_text(), time.monotonic() - begun
    rng, kills = random.Random(f"{kind} {place}"), 0
    while kills < 20:
        folder = tmp_path / f"run{kills}"
        folder.mkdir()
        output.unlink()
        while not output.exists():
            process = _start(kind, str(folder / place), output)
            try:
                process.wait(rng.uniform(0, seconds / 2))
            except subprocess.TimeoutExpired:
                kills += 1
                process.kill()
            assert process.wait() in (0, -signal.SIGKILL)
        assert output.read_text() == whole
        names = _names(folder)
        assert not any("partial" in name or "trial" in name for name in names)
