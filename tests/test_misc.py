import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_hpo._jaxpr import holds_primitive, live_inputs
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


def _reached(h):
    moved = jax.lax.scan(
        lambda carry, x: ((carry[1], carry[0] * h["scanned"]), x * h["stacked"]),
        (h["first"], jax.lax.stop_gradient(h["stopped"])),
        jnp.ones(3),
    )
    branch = jax.lax.cond(h["tested"] > 0, lambda: h["chosen"], lambda: 2.0)
    looped = jax.lax.fori_loop(0, 3, lambda i, x: x * h["looped"], h["started"])
    counted = jnp.sum(h["compared"] > 0) + jnp.round(h["rounded"])
    called = jax.jit(jnp.floor)(h["floored"]) + jax.nn.relu(h["rectified"])
    return moved[0][0], moved[1], branch, looped, counted, called


def test_live_inputs():
    """By primitives, through calls, branches and loops."""
    names = [
        "chosen", "compared", "first", "floored", "looped", "rectified", "rounded",
        "scanned", "stacked", "started", "stopped", "tested", "unused",
    ]  # fmt: skip
    h = {name: jnp.array(1.0) for name in names}
    live = dict(zip(names, live_inputs(lambda h: (_reached(h),), h)[0], strict=True))
    dead = [name for name in names if not live[name]]
    expected = ["compared", "floored", "rounded", "stopped", "tested", "unused"]
    assert dead == expected


def test_holds_primitive_looks_into_inner_functions():
    fn = jax.jit(lambda x: jax.lax.cond(x[0] > 0, jnp.sort, jnp.sin, x))
    jaxpr = jax.make_jaxpr(fn)(jnp.ones(2)).jaxpr
    assert holds_primitive(jaxpr, {"sort"}) and not holds_primitive(jaxpr, {"cos"})
