"""One of two processes of a run whose hyperparameters are split over both:
`python -m tests.two_processes NUMBER PORT FOLDER OUTPUT BACKEND`."""

import json
import pathlib
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


def _val_loss(model, hyperparams, batch, key):
    del hyperparams, key
    return jnp.mean((batch[0] @ model - batch[1]) ** 2)


def _train_loss(model, hyperparams, batch, key):
    del key
    errors = (batch[0] @ model - batch[1]) ** 2
    decay = hyperparams["decay"] * jnp.sum(model**2)
    return jnp.mean(hyperparams["weights"] * errors) + decay


def run(folder: str, backend: str) -> hpo.Solution:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 4)).astype("f"), rng.normal(size=64).astype("f")

    def put(array, *axes):
        array = np.asarray(array, "f")
        sharding = NamedSharding(mesh, P(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    train, val = (put(x, "rows"), put(y, "rows")), (put(x[::-1]), put(y[::-1]))
    weights = hpo.Interval(jnp.full(64, 0.5), 0.0, 1.0)
    weights = eqx.tree_at(lambda h: h.raw, weights, put(weights.raw, "rows"))

    def metric(state):
        time.sleep(0.01)
        return jnp.sum(state.model**2)

    return hpo.tune(
        hpo.T1T2(hpo.Problem(_train_loss, _val_loss), optax.sgd(0.1), optax.adam(0.1)),
        put(np.zeros(4)),
        {"weights": weights, "decay": hpo.Positive(0.1)},
        train,
        val,
        steps=300,
        key=jr.key(0),
        record_every=7,
        monitor=hpo.Monitor(metric, every=10),
        checkpoint=hpo.Checkpoints(folder, every=4, backend=backend),
        progress=False,
    )


def digest(solution: hpo.Solution) -> dict[str, Any]:
    """What this process has of the solution, as text."""

    def local(x):
        if not isinstance(x, jax.Array):
            return np.asarray(x).tobytes().hex()
        return [np.asarray(s.data).tobytes().hex() for s in x.addressable_shards]

    arrays = lambda tree: jtu.tree_leaves(eqx.filter(tree, eqx.is_array_like))
    parts = {"state": solution.state, "history": solution.history}
    parts |= {"best": solution.best, "result": solution.result}
    return {name: [local(x) for x in arrays(tree)] for name, tree in parts.items()} | {
        "message": solution.message
    }


def main(number: str, port: str, folder: str, output: str, backend: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
    print("begins", flush=True)
    try:
        text = json.dumps(digest(run(folder, backend)))
    except ValueError as e:
        text = str(e)
    pathlib.Path(f"{output}{number}").write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
