"""How does a training loop of your own, with its own batches, log and Orbax
checkpoints, tune hyperparameters, and go on after a break with the same bits?"""

import json
import pathlib
import tempfile

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits


# --8<-- [start:problem]
STEPS, BREAK, SAVE_EVERY = 1000, 620, 250
x, y = load_digits(return_X_y=True)
x, order = np.asarray(x / 16, np.float32), np.asarray(jr.permutation(jr.key(0), len(y)))
train, val, test = [(x[i], y[i]) for i in np.split(order, [300, 600])]


def val_loss(model, hyperparams, batch, key):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(jax.vmap(model)(batch[0]), batch[1]).mean()


def train_loss(model, hyperparams, batch, key):
    x = batch[0] + hyperparams["noise"] * jr.normal(key, batch[0].shape)
    norms = jnp.stack([jnp.sum(layer.weight**2) for layer in model.layers])
    loss = val_loss(model, hyperparams, (x, batch[1]), key)
    return loss + hyperparams["decay"] @ norms


inner, outer = optax.adam(1e-3), optax.adam(0.01)
algorithm = hpo.T1T2(hpo.Problem(train_loss, val_loss), inner, outer)
untuned = hpo.T1T2(algorithm.problem, inner, optax.set_to_zero())
model = eqx.nn.MLP(64, 10, 128, 2, key=jr.key(1))
hyperparams = {"decay": hpo.Positive(jnp.full(3, 1e-4)), "noise": hpo.Positive(0.1)}
# --8<-- [end:problem]


# --8<-- [start:loop]
def run(algorithm, folder, stop):
    """Trains up to step `stop`, from the newest checkpoint on if there is one."""
    state = algorithm.init(model, hyperparams)
    arrays, static = eqx.partition(state, eqx.is_array)
    with (
        ocp.CheckpointManager(folder / "checkpoints") as manager,
        open(folder / "log.jsonl", "a") as log,
    ):
        if manager.latest_step() is not None:
            args = ocp.args.StandardRestore(arrays)
            arrays = manager.restore(manager.latest_step(), args=args)
            state = eqx.combine(arrays, static)
        for step in range(int(state.step), stop):
            rows = np.random.default_rng(step).integers(0, 300, 50)
            batch = train[0][rows], train[1][rows]
            state = algorithm.step(state, batch, val, key=jr.key(step))
            if (step + 1) % SAVE_EVERY == 0:
                arrays = eqx.filter(state, eqx.is_array)
                manager.save(step + 1, args=ocp.args.StandardSave(arrays))
            if (step + 1) % 50 == 0:
                print(json.dumps(hpo.summary(state)), file=log)
    return state


# --8<-- [end:loop]
# --8<-- [start:check]
def accuracy(state):
    guesses = jnp.argmax(jax.vmap(state.model)(test[0]), axis=1)
    return float(jnp.mean(guesses == test[1]))


folder = pathlib.Path(tempfile.mkdtemp())
plain = run(untuned, folder / "plain", STEPS)
whole = run(algorithm, folder / "whole", STEPS)
run(algorithm, folder / "broken", BREAK)
rest = run(algorithm, folder / "broken", STEPS)  # from step 500 on
print(f"fixed: accuracy {accuracy(plain):.3f}")
print(f"tuned: accuracy {accuracy(whole):.3f}")
print("the same bits after a break:", bool(eqx.tree_equal(whole, rest)))
# --8<-- [end:check]

lines = (folder / "broken" / "log.jsonl").read_text().splitlines()
rows = {row["step"]: row for row in map(json.loads, lines)}
axes = plt.subplots(layout="constrained")[1]
axes.plot(list(rows), [row["hyperparams.noise"] for row in rows.values()])
axes.set(xlabel="step", ylabel="noise of the input")
plt.savefig("training_loop.png")
