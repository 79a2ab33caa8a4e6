import equinox as eqx
import eqx_hpo as hpo
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from .helpers import equal
from .problems import ridge


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
    with pytest.raises(ValueError, match="is not a state saved by"):
        hpo.load(tmp_path / "file", _state()[1])


def test_a_newer_format_is_refused(tmp_path):
    header = b'{"format": "eqx_hpo.BilevelState", "version": 99}\n'
    (tmp_path / "file").write_bytes(header)
    with pytest.raises(ValueError, match="version 99"):
        hpo.load(tmp_path / "file", _state()[1])


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    state, like = _state()
    hpo.save(tmp_path / "state", state)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(eqx, "tree_serialise_leaves", fail)
    with pytest.raises(OSError, match="disk full"):
        hpo.save(tmp_path / "state", like)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert equal(hpo.load(tmp_path / "state", like), state)
