"""One of two processes that save and read arrays which neither has as a whole:
`python -m tests.orbax_processes PORT FOLDER INDEX`."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np


def _split(tree, mesh):
    """Spreads arrays over the devices of both processes."""

    def put(x):
        x = np.asarray(x)
        spec = ("x",) if x.ndim > 0 and len(x) % 4 == 0 else ()
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jtu.tree_map(lambda x: put(x) if isinstance(x, jax.Array) else x, tree)


def _check(got, expected):
    for x, y in zip(jtu.tree_leaves(got), jtu.tree_leaves(expected), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array):
            assert x.sharding == y.sharding and x.committed == y.committed
            parts = zip(x.addressable_shards, y.addressable_shards, strict=True)
            assert all(np.array_equal(_data(p), _data(q), True) for p, q in parts)
        elif isinstance(x, np.ndarray):
            assert np.array_equal(x, y)


def _data(part):
    is_key = jnp.issubdtype(part.data.dtype, jax.dtypes.prng_key)
    return np.asarray(jr.key_data(part.data) if is_key else part.data, float)


def main(port: str, folder: str, index: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))

    import equinox as eqx
    import eqx_hpo as hpo
    import optax
    from eqx_hpo._container import DamagedFile
    from eqx_hpo._orbax_store import OrbaxStore
    from eqx_hpo._stores import Keep, Snapshot

    from .problems import ridge

    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    case = ridge(8)
    algorithm = hpo.T1T2(case.problem, optax.adam(0.1), optax.adam(0.05))
    start = algorithm.init(case.model, case.hyperparams)
    model = {"split": jr.normal(jr.key(0), (2**17,)), "other": jnp.arange(3)}
    state = eqx.tree_at(lambda s: s.model, _split(start, mesh), _split(model, mesh))
    own = {"numpy": np.arange(3), "key": jr.key(1), "free": jnp.arange(2.0), "n": 3.5}
    state = eqx.tree_at(
        lambda s: s.model_state, state, own, is_leaf=lambda x: x is None
    )
    like = jtu.tree_map(lambda x: x * 0 if eqx.is_inexact_array(x) else x, state)

    store = OrbaxStore(pathlib.Path(folder))
    store.prepare(state, clear=True)
    for step in (1, 2, 2):  # the last one is there already
        at = eqx.tree_at(lambda s: s.step, state, _split(jnp.asarray(step), mesh))
        snapshot = Snapshot(step, at, {"readings": np.arange(step)}, {}, (step, at))
        store.put(snapshot, Keep({step - 1, step}, {step}))()
    store.close()

    store = OrbaxStore(pathlib.Path(folder))
    store.prepare(state, clear=False)
    assert (store.steps(), store.bests()) == ([1, 2], [2])
    snapshot = store.read(2, like)
    _check(snapshot.state, at)
    assert snapshot.best is not None
    _check(snapshot.best[1], at)
    assert snapshot.extra["readings"].tolist() == [0, 1]
    if index == "0":
        _flip_the_largest(pathlib.Path(folder) / "step-0000000001")
    store.prepare(state, clear=False)  # so that the other one waits
    try:
        store.read(1, like)
    except DamagedFile:
        pass
    else:
        raise AssertionError("a flipped bit was not found")
    store.put(snapshot, Keep({2}, {2}))()
    store.close()


def _flip_the_largest(folder):
    files = folder.glob("arrays/ocdbt.process_1/d/*")
    path = max(files, key=lambda x: x.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


if __name__ == "__main__":
    main(*sys.argv[1:])
