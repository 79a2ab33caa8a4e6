"""Runs that a test interrupts: `python -m tests.interrupted KIND PLACE OUTPUT` takes
one to its end, from where an earlier call was killed, and writes what it came to."""

import hashlib
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


X = jr.normal(jr.key(0), (48, 4))
Y = X @ jnp.arange(4.0) + 0.3 * jr.normal(jr.key(1), (48,))
STEPS = 240


def _val_loss(model, hyperparams, batch, key):
    del hyperparams, key
    return jnp.mean((batch[0] @ model - batch[1]) ** 2)


def _train_loss(model, hyperparams, batch, key):
    return _val_loss(model, None, batch, key) + jnp.sum(hyperparams * model**2)


PROBLEM = hpo.Problem(_train_loss, _val_loss)
OPTIMISERS = optax.adam(0.03), optax.adam(0.02)


class Loader:
    """Batches in a random order, which tells its position."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def __iter__(self):
        return self

    def __next__(self):
        rows = self._rng.integers(0, 32, 8)
        return np.asarray(X)[rows], np.asarray(Y)[rows]

    def state_dict(self):
        return self._rng.bit_generator.state

    def load_state_dict(self, state):
        self._rng.bit_generator.state = state


def _batches(seed: int):
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, 32, 8)
        yield np.asarray(X)[rows], np.asarray(Y)[rows]


class _Net(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.linear = eqx.nn.Linear(4, 3, key=jr.key(3))
        self.norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="ema")

    def __call__(self, x, state):
        hidden, state = self.norm(self.linear(x), state)
        return jnp.sum(jnp.tanh(hidden)), state


def _net_loss(model, batch):
    net, state = model
    apply = jax.vmap(net, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    out, state = apply(batch[0], state)
    return jnp.mean((out - batch[1]) ** 2), state


def _net_train_loss(model, hyperparams, batch, key):
    del key
    loss, state = _net_loss(model, batch)
    return loss + hyperparams * jnp.sum(model[0].linear.weight ** 2), state


def _net_val_loss(model, hyperparams, batch, key):
    del hyperparams, key
    model = eqx.nn.inference_mode(model[0]), model[1]
    return _net_loss(model, batch)[0]


def _choice_loss(model, hyperparams, batch, key):
    powers = jnp.stack([jnp.abs(model), model**2, jnp.abs(model) ** 3], axis=0)
    penalty = 0.1 * jnp.sum(hyperparams @ powers)
    return _val_loss(model, None, batch, key) + penalty


def settings(kind: str) -> dict[str, Any]:
    """The arguments of `tune` for one kind of run."""
    whole, held_out = (X[:32], Y[:32]), (X[32:], Y[32:])
    run: dict[str, Any] = dict(
        algorithm=hpo.T1T2(PROBLEM, *OPTIMISERS),
        model=jnp.zeros(4),
        hyperparams=hpo.Positive(0.1),
        train=hpo.Minibatch(whole, 8),
        val=hpo.Minibatch(held_out, 8),
    )
    if kind == "epochs":
        run["train"] = hpo.Minibatch(whole, 7, replacement=False)
        run["val"] = hpo.Minibatch(held_out, 5, replacement=False, seed=3)
    elif kind == "hyperdistill":
        run["algorithm"] = hpo.HyperDistill(
            PROBLEM, *OPTIMISERS, horizon=6, estimation_period=3
        )
    elif kind == "greedy":
        run["algorithm"] = hpo.Greedy(PROBLEM, *OPTIMISERS, inner_steps=3)
    elif kind == "folds":
        algorithm = hpo.Unrolled(PROBLEM, *OPTIMISERS, inner_steps=2)
        run["algorithm"] = hpo.MetaLearner(algorithm, 4)
        run["train"], run["val"] = hpo.folds(whole, 4)
        run["restart_every"] = 20
    elif kind == "batch_norm":
        problem = hpo.Problem(_net_train_loss, _net_val_loss)
        run["algorithm"] = hpo.T1T2(problem, *OPTIMISERS)
        run["model"], run["model_state"] = eqx.nn.make_with_state(_Net)()
    elif kind == "choice":
        run["algorithm"] = hpo.T1T2(hpo.Problem(_choice_loss, _val_loss), *OPTIMISERS)
        run["hyperparams"] = hpo.Choice(3, sample=True)
    elif kind == "loader":
        run["algorithm"] = hpo.T1T2(PROBLEM, *OPTIMISERS, inner_steps=2)
        run["train"], run["val"] = Loader(0), Loader(1)
    elif kind == "generator":
        run["train"], run["val"] = _batches(0), _batches(1)
    else:
        assert kind == "minibatch"
    return run


KINDS = (
    "minibatch", "epochs", "hyperdistill", "greedy", "folds", "batch_norm", "choice",
    "loader", "generator",
)  # fmt: skip


def run(kind: str, checkpoint: Any, seconds: float = 0.0, **changes: Any):
    """Takes a run to its end. `seconds` is how long the metric takes each time."""

    def metric(state):
        time.sleep(seconds)
        model = state.model.linear.weight if kind == "batch_norm" else state.model
        return jnp.mean((model - 1) ** 2)

    arguments = {
        **settings(kind),
        "steps": STEPS,
        "key": jr.key(5),
        "record_every": 7,
        "monitor": hpo.Monitor(metric, every=10),
        "checkpoint": checkpoint,
        "progress": False,
    }
    return hpo.tune(**{**arguments, **changes})


def digest(solution: hpo.Solution) -> dict[str, str]:
    """What must be equal, bit for bit."""

    def of(tree):
        leaves = jtu.tree_leaves(tree)
        text = [str((x.dtype, x.shape)) for x in map(np.asarray, leaves)]
        content = b"".join(np.asarray(x).tobytes() for x in leaves)
        return hashlib.sha256("".join(text).encode() + content).hexdigest()

    arrays = lambda tree: eqx.filter(tree, eqx.is_array_like)
    parts = {"state": solution.state, "history": solution.history}
    parts |= {"best": solution.best, "discretised": solution.discretised}
    return {name: of(arrays(x)) for name, x in parts.items()} | {
        "message": solution.message
    }


def main(kind: str, place: str, output: str, seconds: str = "0.01") -> None:
    checkpoint: Any = None
    if place.endswith(".ckpt"):
        checkpoint = place
    elif place != "none":
        backend = "orbax" if place.endswith("orbax") else "file"
        checkpoint = hpo.Checkpoints(place, every=4, backend=backend)
    print("begins", flush=True)
    solution = run(kind, checkpoint, float(seconds), checkpoint_every=4)
    pathlib.Path(output).write_text(json.dumps(digest(solution)))


if __name__ == "__main__":
    main(*sys.argv[1:])
