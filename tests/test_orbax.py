import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
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
from eqx_hpo._checkpoints import Keeper
from eqx_hpo._checksum import checksum
from eqx_hpo._container import DamagedFile
from eqx_hpo._stores import Keep, Snapshot
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from .helpers import equal, ROOT
from .problems import ridge


pytest.importorskip("orbax.checkpoint")
from eqx_hpo._orbax_store import OrbaxStore


# Where Orbax fails to read, TensorStore calls back a loop that is closed by then.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

CASE = ridge()
ALGORITHM = hpo.T1T2(CASE.problem, optax.sgd(0.1, momentum=0.9), optax.adam(0.05))
DTYPES = (
    "bool int4 int8 uint16 int32 uint64 bfloat16 float16 float32 float64 complex64 "
    "complex128 float8_e4m3fn"
).split()
VALUES = jnp.array([[0, 1, 3, -2], [1, 0, 1, 1]])


def _tune(steps=12, key=0, algorithm: Any = ALGORITHM, checkpoint=None, **kwargs):
    monitor = hpo.Monitor(lambda state: state.metrics.val_loss, every=2)
    settings = {"monitor": monitor, "record_every": 1, "progress": False, **kwargs}
    start = algorithm, CASE.model, CASE.hyperparams, CASE.train, CASE.val
    settings |= {"steps": steps, "key": jr.key(key), "checkpoint": checkpoint}
    return hpo.tune(*start, **settings)


def _checkpoints(folder, every=3, **kwargs):
    return hpo.Checkpoints(folder, every=every, backend="orbax", **kwargs)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _strays(folder):
    """What must not be left."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return [x for x in names if "partial" in x or "gone" in x or "tmp" in x]


def _check_equal(left, right):
    assert equal(left.state, right.state)
    assert equal(left.history, right.history)
    assert equal(left.best, right.best)


def _store(folder, state, clear=False):
    store = OrbaxStore(folder)
    store.prepare(state, clear)
    return store


def _state(model):
    """A state with other things in it."""
    state = ALGORITHM.init(CASE.model, CASE.hyperparams)
    return eqx.tree_at(lambda s: s.model, state, model)


def _blank(state):
    """A state without the numbers of `state`, at the same places."""

    def blank(x):
        if not eqx.is_inexact_array(x):
            return x
        zeros = np.zeros(x.shape, x.dtype)
        return jax.device_put(zeros, x.sharding) if x.committed else jnp.asarray(zeros)

    return jtu.tree_map(blank, state)


def _content(tree):
    """Bit for bit, without a compilation."""
    leaves = [_data(x) if eqx.is_array(x) else x for x in jtu.tree_leaves(tree)]
    arrays = [np.asarray(x) for x in leaves if not callable(x)]
    return [(x.dtype, x.shape, x.tobytes()) for x in arrays]


def _data(x):
    return jr.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _put(store, state, step=0, best=None, **extra):
    keep = Keep({step}, set() if best is None else {best[0]})
    store.put(Snapshot(step, state, extra, {"rows": 3}, best), keep)()


def _flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole():
    return _tune()


@pytest.fixture
def waits(monkeypatch):
    """Lets a run wait for each save. Else it leaves out what falls due meanwhile."""

    def save(self, run, watcher):
        self._collect()
        self._try(run, watcher, stopped=False)

    monkeypatch.setattr(Keeper, "save", save)


def test_a_run_in_two_parts_equals_one(tmp_path, whole):
    checkpoint = _checkpoints(tmp_path)
    _tune(7, checkpoint=checkpoint)
    solution = _tune(checkpoint=checkpoint)
    _check_equal(solution, whole)
    assert solution.result == hpo.RESULTS.successful
    _check_equal(_tune(checkpoint=checkpoint), whole)  # and once more, at its end


def test_a_step_that_is_there_already(tmp_path):
    """As at the end of a run that a callback ends where a checkpoint is."""
    state = _state(CASE.model)
    store = _store(tmp_path, state)
    _put(store, state, 6, (6, state), readings=np.zeros(1))
    times = [x.stat().st_mtime_ns for x in tmp_path.glob("*/arrays")]
    for _ in range(2):
        _put(store, state, 6, (6, state), readings=np.ones(2))
        assert [x.stat().st_mtime_ns for x in tmp_path.glob("*/arrays")] == times
        assert store.read(6, _blank(state)).extra["readings"].tolist() == [1, 1]
        store.close()
        store = _store(tmp_path, state)
        store.read(6, _blank(state))
    store.close()
    # What it has not read it does not trust.
    store = _store(tmp_path, state)
    _put(store, state, 6, (6, state), readings=np.ones(3))
    assert [x.stat().st_mtime_ns for x in tmp_path.glob("*/arrays")] != times
    assert len(store.read(6, _blank(state)).extra["readings"]) == 3
    store.close()


def test_what_is_kept(tmp_path, waits):
    checkpoint = _checkpoints(tmp_path, 2, keep_last=3)
    values = {0: 9.0, 2: 2.0, 4: 1.0}
    monitor = hpo.Monitor(lambda state: values.get(int(state.step), 3.0), every=2)
    _tune(8, monitor=monitor, checkpoint=checkpoint)
    steps = ["step-0000000004", "step-0000000006", "step-0000000008"]
    assert _names(tmp_path) == ["best-0000000004", "history", *steps]
    _tune(2, checkpoint=_checkpoints(tmp_path, 2, resume=False))
    assert _names(tmp_path) == ["best-0000000002", "history", "step-0000000002"]


def test_how_many_best_states_are_kept(tmp_path, waits):
    values = {0: 9.0, 2: 2.0, 4: 1.0}
    monitor = hpo.Monitor(lambda state: values.get(int(state.step), 3.0), every=2)
    checkpoint = _checkpoints(tmp_path, 1, keep_last=1, keep_best=2)
    _tune(6, monitor=monitor, checkpoint=checkpoint)
    names = ["best-0000000002", "best-0000000004", "history", "step-0000000006"]
    assert _names(tmp_path) == names


@pytest.mark.parametrize(
    "kind, damage",
    [
        ("step", lambda x: [_flip(file) for file in (x / "arrays/d").iterdir()]),
        ("step", lambda x: _flip(x / "header")),
        ("step", lambda x: shutil.rmtree(x / "arrays/d")),
        ("best", lambda x: [_flip(file) for file in (x / "arrays/d").iterdir()]),
        ("best", lambda x: shutil.rmtree(x)),
    ],
)
def test_what_is_damaged_is_found(tmp_path, whole, kind, damage):
    checkpoint = _checkpoints(tmp_path)
    _tune(6, checkpoint=checkpoint)
    damage(tmp_path / f"{kind}-0000000006")
    with pytest.warns(UserWarning, match=rf"{kind}-0*6.* The run goes on from step 3"):
        solution = _tune(checkpoint=checkpoint)
    _check_equal(solution, whole)
    # What took its place is good, the best state of step 6 too.
    _check_equal(_tune(checkpoint=checkpoint), whole)


def test_nothing_that_can_be_read(tmp_path):
    checkpoint = _checkpoints(tmp_path)
    _tune(6, checkpoint=checkpoint)
    for folder in tmp_path.glob("step-*"):
        _flip(folder / "header")
    with pytest.raises(ValueError, match="step-0*6/header` is damaged.*to begin anew"):
        _tune(checkpoint=checkpoint)


def test_no_flipped_bit_gives_another_state(tmp_path):
    # Large enough for a file of numbers, which have no checksum but ours.
    state = _state(jr.normal(jr.key(0), (2**11,)))
    store = _store(tmp_path, state)
    _put(store, state)
    sizes = {x: x.stat().st_size for x in tmp_path.glob("step-*/**/*") if x.is_file()}
    places = lambda size: range(0, size, max(199, size // 10))
    tries = [(x, i) for x, size in sizes.items() for i in places(size)]
    expected, found = _content(state), 0
    for path, place in tries:
        _flip(path, place)
        try:
            assert _content(store.read(0, _blank(state)).state) == expected
        except (DamagedFile, OSError):
            found += 1
        _flip(path, place)
    assert _content(store.read(0, _blank(state)).state) == expected
    assert found > len(tries) / 4  # the others lie where nothing of ours does
    store.close()


def test_other_runs_are_refused(tmp_path):
    checkpoint = _checkpoints(tmp_path)
    _tune(3, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="of another run: `key` is"):
        _tune(3, key=1, checkpoint=checkpoint)
    other = hpo.Greedy(
        ALGORITHM.problem, ALGORITHM.inner, ALGORITHM.outer, inner_steps=1
    )
    with pytest.raises(ValueError, match="the algorithm is T1T2 there and Greedy"):
        _tune(3, algorithm=other, checkpoint=checkpoint)
    other = hpo.T1T2(ALGORITHM.problem, optax.sgd(0.1), ALGORITHM.outer)
    with pytest.raises(ValueError, match="inner_opt_state.* and nothing in `like`"):
        _tune(3, algorithm=other, checkpoint=checkpoint)


def test_a_folder_of_the_other_backend(tmp_path):
    _tune(3, checkpoint=hpo.Checkpoints(tmp_path))
    with pytest.raises(ValueError, match='holds checkpoints of the backend "file"'):
        _tune(3, checkpoint=_checkpoints(tmp_path))


@pytest.mark.slow
def test_a_dtype_of_each_kind(tmp_path):
    model = {dtype: VALUES.astype(dtype) for dtype in DTYPES}
    model |= {"a/b": jnp.ones(2), "": jnp.zeros(3), "empty": jnp.ones((0, 2))}
    model |= {"nan": jnp.array([jnp.nan, -0.0, jnp.inf]), "numpy": np.arange(3)}
    model |= {
        "key": jr.key(1),
        "keys": jr.split(jr.key(2, impl="rbg"), 3),
        "sin": jnp.sin,
    }
    state = _state({**model, "number": 3.5})
    like = _blank(_state({**model, "key": jr.key(0), "number": 0.0}))
    store = _store(tmp_path, state)
    _put(store, state, 4, (2, state), readings=np.arange(3))
    snapshot = store.read(4, like)
    assert _content(snapshot.state) == _content(state)
    assert snapshot.state.model["number"] == 3.5
    assert snapshot.best is not None and snapshot.best[0] == 2
    assert _content(snapshot.best[1]) == _content(state)
    assert snapshot.extra["readings"].tolist() == [0, 1, 2]
    assert snapshot.header["rows"] == 3
    store.close()


def test_a_dtype_that_orbax_does_not_save(tmp_path):
    state = _state(jnp.zeros(2, jnp.uint4))
    with pytest.raises(ValueError, match="Orbax does not save `state.model`.* uint4"):
        _store(tmp_path, state)


@pytest.mark.parametrize(
    "kind",
    [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)],
)
def test_arrays_go_where_those_of_like_are(tmp_path, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    x = VALUES.astype(float).T
    model = {
        "split": put(x, "x", "y"),
        "copied": put(x),
        "third": jax.device_put(x, jax.devices()[3]),
        "free": x,
        "keys": put(jr.split(jr.key(1), 4), "x"),
    }
    other = {
        "split": put(x, "y"),
        "copied": x,
        "third": jax.device_put(x, jax.devices()[2]),
        "free": jax.device_put(x, jax.devices()[1]),
        "keys": put(jr.split(jr.key(0), 4)),
    }
    state = _state(model)
    store = _store(tmp_path, state)
    _put(store, state)
    for places in (model, other):
        like = _blank(_state(places))
        got = store.read(0, like).state
        assert _content(got) == _content(state)
        for x, y in zip(jtu.tree_leaves(got), jtu.tree_leaves(like)):
            assert x.sharding == y.sharding and x.committed == y.committed
    store.close()


@pytest.mark.parametrize("size", [3, 2**12, 2**20])
def test_the_memory_of_what_is_saved_may_be_used_again(tmp_path, size):
    state = _state(jnp.arange(float(size)))
    store = _store(tmp_path, state)
    like, expected = _blank(state), _content(state)
    write = store.put(Snapshot(0, state, {}, {}, None), Keep({0}, set()))
    after = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(state.model)
    jax.block_until_ready(after)
    write()
    assert _content(store.read(0, like).state) == expected
    store.close()


def test_a_save_that_fails_is_a_warning(tmp_path, whole, waits, monkeypatch):
    move, steps = OrbaxStore._move, []

    def fail_once(self, folder, path):
        steps.append(path.name)
        if len(steps) == 2:
            raise OSError("disk full")
        move(self, folder, path)

    monkeypatch.setattr(OrbaxStore, "_move", fail_once)
    checkpoint = _checkpoints(tmp_path, 6)
    with pytest.warns(UserWarning, match=r"step 6 could not .*\(OSError: disk full\)"):
        solution = _tune(checkpoint=checkpoint)
    assert "Saves that failed: 1, the last one at step 6" in solution.message
    _check_equal(solution, whole)
    assert _strays(tmp_path) == []
    _check_equal(_tune(checkpoint=checkpoint), whole)


def test_a_folder_that_goes_away(tmp_path, whole, waits):
    folder = tmp_path / "run"

    def metric(state):
        if state.step == 6:
            folder.rename(tmp_path / "away")
            folder.write_bytes(b"")
        elif state.step == 10:
            folder.unlink()
        return state.metrics.val_loss

    monitor, checkpoint = hpo.Monitor(metric, every=2), _checkpoints(folder, 2)
    with pytest.warns(UserWarning, match="could not be saved"):
        solution = _tune(monitor=monitor, checkpoint=checkpoint)
    _check_equal(solution, whole)
    _check_equal(_tune(checkpoint=checkpoint), whole)


def test_what_a_killed_process_left_is_removed(tmp_path, whole):
    checkpoint = _checkpoints(tmp_path)
    _tune(6, checkpoint=checkpoint)
    left = tmp_path / "step-0000000009.partial" / "arrays.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (tmp_path / "step-0000000003").rename(tmp_path / "step-0000000003.gone")
    (tmp_path / "step-0000000006" / ".header.12345678.partial").touch()
    _check_equal(_tune(checkpoint=checkpoint), whole)
    assert _strays(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`checkpoint` cannot be written to .*file"):
        _tune(checkpoint=_checkpoints(tmp_path / "file" / "run"))


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"needs Orbax: `pip install 'eqx_hpo\[orb"):
        _tune(checkpoint=_checkpoints(tmp_path))
    assert _names(tmp_path) == []


@pytest.mark.slow
def test_orbax_is_imported_only_if_it_is_asked_for():
    code = "import sys, eqx_hpo; assert 'orbax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_sees_each_bit(dtype):
    x = np.asarray(VALUES.astype(dtype))
    known = int(checksum(x))
    width = 1 if dtype == "bool" else 4 if dtype == "int4" else 8 * x.itemsize
    sums = {known}
    for entry, bit in itertools.product(range(x.size), range(width)):
        other = x.copy()
        raw = other.reshape(-1).view(np.uint8).reshape(x.size, -1)
        raw[entry, bit // 8] ^= 1 << bit % 8
        sums.add(int(checksum(other)))
    assert len(sums) == 1 + x.size * width


def test_the_checksum_sees_the_place():
    x = jnp.array([1.0, -1.0, 2.0, 0.0, -0.0, 5.0])
    swaps = itertools.combinations(range(6), 2)
    orders = [np.arange(6)] + [_swapped(i, j) for i, j in swaps]
    assert len({int(checksum(x[order])) for order in orders}) == 16


def _swapped(i, j):
    order = np.arange(6)
    order[[i, j]] = j, i
    return order


def test_the_checksum_does_not_see_the_sharding():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = jr.normal(jr.key(0), (16, 24, 2))
    shardings = [P(), P("x"), P(None, "x")]
    sums = {int(checksum(jax.device_put(x, NamedSharding(mesh, p)))) for p in shardings}
    assert sums == {int(checksum(x))}


def _spawn(*arguments):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["minibatch", "folds"])
def test_kills_at_any_time(tmp_path, kind):
    folder, ends = tmp_path / "orbax", [tmp_path / "end", tmp_path / "whole"]
    pick, kills = random.Random(0), 0
    while not ends[0].exists():
        with _spawn("tests.interrupted", kind, folder, ends[0], 0.1) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begins\n"
            if kills < 5:
                time.sleep(pick.uniform(1, 4))
                process.kill()
        kills += process.returncode != 0
    assert kills == 5
    assert _strays(folder) == []
    with _spawn("tests.interrupted", kind, "none", ends[1]) as process:
        process.communicate()
    found, expected = (json.loads(end.read_text()) for end in ends)
    assert found == expected


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Arrays that no process has as a whole, others that each has, and a file that is
    damaged, of which both hear."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = ["tests.orbax_processes", port, tmp_path / "run"]
    with _spawn(*command, 0) as first, _spawn(*command, 1) as second:
        first.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert _names(tmp_path / "run") == ["best-0000000002", "step-0000000002"]
