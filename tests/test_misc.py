import jax.numpy as jnp
import numpy as np
import pytest
from eqx_hpo._misc import tree_norm


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm_neither_vanishes_nor_overflows(scale):
    scale = np.float32(scale)
    tree = {
        "a": scale * jnp.ones(3, jnp.float32),
        "b": -scale * jnp.ones((), jnp.float32),
    }
    assert tree_norm(tree).dtype == jnp.float32
    assert jnp.allclose(tree_norm(tree) / scale, 2.0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_norm_is_finite_only_if_all_is(bad):
    tree = [jnp.ones(3), jnp.array([1.0, bad, 2.0])]
    assert not jnp.isfinite(tree_norm(tree))
    assert not jnp.isfinite(tree_norm(tree[::-1]))


def test_norm_of_nothing_and_of_zero():
    assert tree_norm({}) == 0
    assert tree_norm([jnp.zeros((0, 2)), None]) == 0
    assert tree_norm(jnp.zeros(3)) == 0


def test_norm_of_half_precision_is_single():
    norm = tree_norm(jnp.full(10_000, 100.0, jnp.float16))
    assert norm.dtype == jnp.float32
    assert jnp.allclose(norm, 10_000.0)
