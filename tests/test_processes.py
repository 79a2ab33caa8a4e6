"""A run over two processes, each with two devices."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from .helpers import ROOT


pytestmark = pytest.mark.slow


@contextlib.contextmanager
def _two(folder, backend="orbax"):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "tests.two_processes"]
    rest = [port, str(folder / "run"), str(folder / "output"), backend]
    processes = [
        subprocess.Popen(
            [*command, str(i), *rest],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _outputs(folder):
    return [(folder / f"output{i}").read_text() for i in range(2)]


def _to_the_end(folder, backend="orbax"):
    with _two(folder, backend) as processes:
        assert [process.wait(120) for process in processes] == [0, 0]
    return _outputs(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    pytest.importorskip("orbax.checkpoint")
    begun = time.monotonic()
    outputs = _to_the_end(tmp_path_factory.mktemp("whole"))
    first, second = map(json.loads, outputs)
    assert first["history"] == second["history"]
    assert first["message"] == second["message"]
    assert first["state"] != second["state"]  # each has its half
    return outputs, time.monotonic() - begun


def test_killed_and_started_again(whole, tmp_path):
    outputs, seconds = whole
    rng, kills = random.Random(0), 0
    while True:
        with _two(tmp_path) as processes:
            try:
                for process in processes:
                    process.wait(rng.uniform(0, seconds / 2))
            except subprocess.TimeoutExpired:
                kills += 1
                for process in processes:
                    process.kill()
                continue
        break
    assert kills > 0 and _outputs(tmp_path) == outputs
    names = [x.name for x in (tmp_path / "run").iterdir()]
    assert not any("partial" in name or "trial" in name for name in names)


def test_a_signal_to_one_ends_both(whole, tmp_path):
    with _two(tmp_path) as processes:
        while not [*(tmp_path / "run").glob("step-*")]:
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in processes] == [0, 0]
    first, second = map(json.loads, _outputs(tmp_path))
    assert first["result"] == second["result"]
    assert "told to end by a signal" in first["message"] == second["message"]
    assert _to_the_end(tmp_path) == whole[0]


def test_one_file_cannot_hold_it(tmp_path):
    for text in _to_the_end(tmp_path, "file"):
        assert "is split over the devices of several processes" in text
        assert "orbax" in text
