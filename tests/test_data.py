import collections

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from .helpers import equal, relative_error
from .problems import ridge


def _draw(data, position, key=None):
    return data.draw(jnp.array(0), jnp.array(position), key)


@pytest.mark.parametrize("size, batch_size", [(12, 4), (13, 4), (1000, 100), (7, 7)])
def test_an_epoch_holds_each_example_once(size, batch_size):
    data = hpo.Minibatch(jnp.arange(size), batch_size, replacement=False)
    per_epoch = size // batch_size
    draw = jax.jit(lambda position: _draw(data, position))
    epochs = [
        np.concatenate([draw(e * per_epoch + i) for i in range(per_epoch)])
        for e in range(3)
    ]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == per_epoch * batch_size
        assert set(epoch.tolist()) <= set(range(size))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = hpo.Minibatch(jnp.arange(size), batch_size, replacement=False, seed=1)
    assert not np.array_equal(_draw(other, 0), draw(0))


def test_shuffles_are_uniform():
    """Where the first example of an epoch comes from, and how two neighbours are
    paired, over many epochs."""
    size, epochs = 8, 4000
    data = hpo.Minibatch(jnp.arange(size), size, replacement=False)
    orders = np.asarray(jax.vmap(lambda i: _draw(data, i))(jnp.arange(epochs)))
    for place in (0, 3, 7):
        counts = np.bincount(orders[:, place], minlength=size)
        assert np.all(np.abs(counts - epochs / size) < 5 * np.sqrt(epochs / size))
    pairs = collections.Counter(map(tuple, orders[:, :2].tolist()))
    expected = epochs / (size * (size - 1))
    assert len(pairs) == size * (size - 1)
    assert max(pairs.values()) < expected + 6 * np.sqrt(expected)


def test_replacement_draws_are_independent_and_rows_stay_together(getkey):
    x = jnp.arange(2000.0) % 50
    data = hpo.Minibatch((x, -x[:, None]), 2000)
    left, right = _draw(data, 0, getkey())
    assert left.shape == (2000,) and right.shape == (2000, 1)
    assert jnp.array_equal(left, -right[:, 0])
    counts = np.bincount(np.asarray(left, int), minlength=50)
    assert np.all(counts > 0) and counts.max() < 80
    assert not jnp.array_equal(left, _draw(data, 0, getkey())[0])


@pytest.mark.parametrize("replacement", [True, False])
def test_each_inner_step_gets_a_fresh_batch(replacement, getkey):
    """A model that adds up what it sees."""
    data = hpo.Minibatch(jnp.arange(100.0), 10, replacement=replacement)
    loss = lambda w, h, batch, key: h * w * jnp.sum(batch)
    algorithm = hpo.T1T2(
        hpo.Problem(loss, loss), optax.sgd(1.0), optax.set_to_zero(), inner_steps=5
    )
    state = algorithm.init(jnp.array(0.0), 1.0)
    seen = []
    for i in range(2):
        before = state.model
        state = algorithm.step(state, data, data, key=jr.fold_in(getkey(), i))
        seen.append(float(before - state.model))
    if replacement:
        assert seen[0] != seen[1]
    else:
        # Two calls of five inner steps are one epoch.
        assert sum(seen) == sum(range(100))


def test_stacked_gives_one_batch_to_each_inner_step():
    case = ridge()
    x, y = case.train
    parts = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    stacked = hpo.Stacked(jax.tree_util.tree_map(lambda *p: np.stack(p), *parts))
    inner = optax.sgd(0.1, momentum=0.9)
    algorithm = hpo.T1T2(case.problem, inner, optax.sgd(0.1), inner_steps=3)
    got = algorithm.step(
        algorithm.init(case.model, case.hyperparams), stacked, case.val
    )
    single = hpo.T1T2(case.problem, inner, optax.set_to_zero())
    state = single.init(case.model, case.hyperparams)
    for part in parts:
        state = single.step(state, part, case.val)
    assert relative_error(got.model, state.model) < 1e-13


@pytest.mark.parametrize(
    "make, match",
    [
        (
            lambda: hpo.Minibatch(jnp.zeros((3, 2)), 4),
            "from 1 to the 3 examples.*got 4",
        ),
        (lambda: hpo.Minibatch(jnp.zeros((3, 2)), 0), "at least 1; got 0"),
        (lambda: hpo.Minibatch(jnp.zeros((0, 2)), 1), "non-empty leading axis"),
        (lambda: hpo.Minibatch((jnp.zeros(3), jnp.zeros(4)), 1), "same, non-empty"),
        (lambda: hpo.Minibatch({}, 1), "pytree of arrays"),
        (lambda: hpo.Minibatch(jnp.array(1.0), 1), "pytree of arrays"),
        (lambda: hpo.Stacked((jnp.zeros(3), jnp.zeros(4))), "same, non-empty"),
    ],
)
def test_bad_data(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_data_in_a_step():
    case = ridge()
    algorithm = hpo.T1T2(case.problem, optax.sgd(0.1), optax.sgd(0.1), inner_steps=3)
    state = algorithm.init(case.model, case.hyperparams)
    empty = (jnp.zeros((0, 6)), jnp.zeros(0))
    with pytest.raises(ValueError, match=r"`train` is empty.*\(0, 6\)"):
        algorithm.step(state, empty, case.val)
    with pytest.raises(ValueError, match="`val` is empty"):
        algorithm.step(state, case.train, empty)
    two = hpo.Stacked((jnp.zeros((2, 4, 6)), jnp.zeros((2, 4))))
    with pytest.raises(ValueError, match="2 batches.*3 inner steps"):
        algorithm.step(state, two, case.val)
    with pytest.raises(ValueError, match="`key` is missing"):
        algorithm.step(state, hpo.Minibatch(case.train, 4), case.val)


def test_numpy_data_goes_to_the_device():
    data = hpo.Minibatch({"x": np.zeros((4, 2), np.float32)}, 2)
    assert isinstance(data.data["x"], jax.Array)
    assert equal(data, hpo.Minibatch({"x": jnp.zeros((4, 2), jnp.float32)}, 2))


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("batch_size", [8, 6])  # divisible by the devices, and not
def test_minibatch_on_a_mesh_with_explicit_axes(batch_size, replacement):
    x = jr.normal(jr.key(0), (32, 3))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.device_put(
        (x, x[:, 0]), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    draw = jax.jit(lambda batches, key: batches.draw(jnp.array(0), jnp.array(3), key))
    make = lambda data: hpo.Minibatch(data, batch_size, replacement=replacement)
    got = draw(make(split), jr.key(1))
    expected = draw(make((x, x[:, 0])), jr.key(1))
    assert all(jnp.array_equal(a, b) for a, b in zip(got, expected))
    is_split = not got[0].sharding.is_fully_replicated
    assert is_split == (batch_size == 8)
