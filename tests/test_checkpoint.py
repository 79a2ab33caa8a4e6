import functools as ft
import json
import os
import pickle
import struct
import zlib

import equinox as eqx
import eqx_hpo as hpo
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from .helpers import equal
from .problems import ridge


@ft.cache
def _state(inner=optax.adam(0.1), features=6):
    case = ridge(features)
    algorithm = hpo.T1T2(case.problem, inner, optax.adam(0.1))
    state = algorithm.init(case.model, case.hyperparams)
    return algorithm.step(state, case.train, case.val), state


def test_round_trip_bit_for_bit(tmp_path):
    state, like = _state()
    hpo.save(tmp_path / "state", state)
    assert equal(hpo.load(tmp_path / "state", like), state)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_other_dtypes_and_leaves(tmp_path):
    state, _ = _state()
    model = {"b": jnp.ones(2, jnp.bfloat16), "f": jnp.sin, "key": jr.key(1), "n": 3}
    state = eqx.tree_at(lambda s: s.model, state, model)
    other = {"b": jnp.zeros(2, jnp.bfloat16), "f": jnp.sin, "key": jr.key(0), "n": 0}
    like = eqx.tree_at(lambda s: s.model, state, other)
    hpo.save(str(tmp_path / "state"), state)
    got = hpo.load(str(tmp_path / "state"), like).model
    assert got["b"].dtype == jnp.bfloat16 and jnp.all(got["b"] == 1)
    assert jnp.array_equal(jr.key_data(got["key"]), jr.key_data(jr.key(1)))
    assert got["f"] is jnp.sin and got["n"] == 3


def test_mismatches_are_named(tmp_path):
    state, _ = _state()
    hpo.save(tmp_path / "state", state)
    with pytest.raises(ValueError, match=r"state.model` is float64\[6\].*float64\[5\]"):
        hpo.load(tmp_path / "state", _state(features=5)[1])
    with pytest.raises(ValueError, match="inner_opt_state.*nothing"):
        hpo.load(tmp_path / "state", _state(optax.sgd(0.1))[1])


@pytest.mark.parametrize("content", [b"", b"abc\n", b"{}\n", b"\xff\xfe\n"])
def test_files_that_are_no_state(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file` is not a state saved by"):
        hpo.load(tmp_path / "file", _state()[1])


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"eqx_hpo 00000099\nsomething")
    with pytest.raises(ValueError, match="file` has version 99"):
        hpo.load(tmp_path / "file", _state()[1])


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exit, ()

    (tmp_path / "file").write_bytes(b"eqx_hpo 00000002\n" + pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="file` is damaged"):
        hpo.load(tmp_path / "file", _state()[1])


@pytest.mark.parametrize("length", [400 * 10**9, 2**64 - 1])
def test_a_header_that_claims_to_be_huge(tmp_path, length):
    footer = struct.pack("<QI4s", length, 0, b"done")
    (tmp_path / "file").write_bytes(b"eqx_hpo 00000002\n" + footer)
    with pytest.raises(ValueError, match="file` is damaged"):
        hpo.load(tmp_path / "file", _state()[1])


def test_a_file_of_400_gb(tmp_path):
    """Without a byte of content: nothing is read before it makes sense."""
    size = 400 * 10**9
    with open(tmp_path / "file", "wb") as file:
        file.write(b"eqx_hpo 00000002\n")
        file.seek(size - 16)
        file.write(struct.pack("<QI4s", size - 33, 0, b"done"))
    with pytest.raises(ValueError, match="file` is damaged"):
        hpo.load(tmp_path / "file", _state()[1])


@pytest.mark.parametrize("arrays", [5, [["a"]], [["a", "object", [1], 0]], [[0] * 4]])
def test_headers_that_make_no_sense(tmp_path, arrays):
    text = json.dumps({"arrays": arrays}).encode()
    footer = struct.pack("<QI4s", len(text), zlib.crc32(text), b"done")
    (tmp_path / "file").write_bytes(b"eqx_hpo 00000002\n" + text + footer)
    with pytest.raises(ValueError, match="file` is damaged"):
        hpo.load(tmp_path / "file", _state()[1])


def test_every_truncation_is_found(tmp_path):
    state, like = _state()
    hpo.save(tmp_path / "state", state)
    content = (tmp_path / "state").read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 1]:
        (tmp_path / "state").write_bytes(content[:length])
        with pytest.raises(ValueError, match="state` is (damaged|not a state)"):
            hpo.load(tmp_path / "state", like)


def test_every_flipped_bit_is_found(tmp_path):
    state, like = _state()
    hpo.save(tmp_path / "state", state)
    content = bytearray((tmp_path / "state").read_bytes())
    for place in range(0, len(content), 13):
        content[place] ^= 1 << place % 8
        (tmp_path / "state").write_bytes(content)
        with pytest.raises(ValueError, match=r"state` (is|has version)"):
            hpo.load(tmp_path / "state", like)
        content[place] ^= 1 << place % 8


def test_another_class_of_placeholder_is_refused(tmp_path):
    case = ridge()
    algorithm = hpo.T1T2(case.problem, optax.sgd(0.1), optax.sgd(0.1))
    make = lambda kind: algorithm.init(case.model, {"decay": kind(jnp.ones(()))})
    hpo.save(tmp_path / "state", make(hpo.Real))
    with pytest.raises(
        ValueError,
        match=r"`state.hyperparams\['decay'\]` is Real in .* and Positive in `like`",
    ):
        hpo.load(tmp_path / "state", make(hpo.Positive))


def test_the_mode_is_that_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        hpo.save(tmp_path / "state", _state()[0])
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o640


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    state, like = _state()
    hpo.save(tmp_path / "state", state)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        hpo.save(tmp_path / "state", like)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert equal(hpo.load(tmp_path / "state", like), state)
