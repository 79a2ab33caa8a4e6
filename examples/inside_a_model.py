"""How much noise should each layer of a network see in training? The levels are fields
of the layers, and are tuned while the network trains."""

from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits


x, y = load_digits(return_X_y=True)
order = jr.permutation(jr.key(0), len(x))
x, y = jnp.float32(x / 16)[order], jnp.asarray(y)[order]
train, val, test = (x[:300], y[:300]), (x[300:600], y[300:600]), (x[600:], y[600:])
data = x[:600], y[:600]  # what the last trainings see


# --8<-- [start:model]
class Noise(eqx.Module):
    level: Any  # a placeholder; an array in the losses; None where it is split off

    def __call__(self, x, *, key):
        return x if key is None else x + self.level * jr.normal(key, x.shape)


def make_network(level):
    layers = []
    for outputs, key in zip([64, 64, 10], jr.split(jr.key(0), 3)):
        layers += [Noise(hpo.Positive(level)), eqx.nn.Linear(64, outputs, key=key)]
        # Normed, or the network drowns the noise by larger activations.
        norm = eqx.nn.LayerNorm(64, use_weight=False, use_bias=False)
        layers += [norm, eqx.nn.Lambda(jax.nn.relu)]
    return eqx.nn.Sequential(layers[:-2])


levels, model = hpo.partition(make_network(0.1))
# --8<-- [end:model]


# --8<-- [start:tune]
def compute_loss(model, levels, batch, keys):
    network = eqx.combine(model, levels)
    logits = jax.vmap(lambda x, key: network(x, key=key))(batch[0], keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return jnp.mean(losses)


def train_loss(model, levels, batch, key):
    return compute_loss(model, levels, batch, jr.split(key, len(batch[0])))


def val_loss(model, levels, batch, key):
    return compute_loss(model, levels, batch, None)


problem = hpo.Problem(train_loss, val_loss)
algorithm = hpo.T1T2(problem, optax.sgd(0.1, momentum=0.9), optax.adam(0.01))
solution = hpo.tune(algorithm, model, levels, train, val, steps=500, key=jr.key(1))
# --8<-- [end:tune]


def same(level):
    return hpo.partition(make_network(level))[0]


def fit(levels, data):
    args, key = (algorithm, model, levels, data), jr.key(2)
    return hpo.fit(*args, steps=500, key=key, progress=False).model


def grid_loss(level):
    return val_loss(fit(same(level), train), same(level), val, None)


best = min([0.1, 0.3, 1.0], key=grid_loss)
rows = {"no noise": same(1e-6), "0.1 in all layers": same(0.1)}
rows |= {f"grid of 3: {best} in all": same(best), "tuned": solution.hyperparams}
found = ", ".join(f"{level:.2f}" for level in jax.tree.leaves(solution.values))
print(f"tuned noise of the layers: {found}\ntest accuracy in %")
for name, levels in rows.items():
    network = eqx.combine(fit(levels, data), levels)
    logits = jax.vmap(lambda x: network(x, key=None))(test[0])
    rows[name] = 100 * jnp.mean(jnp.argmax(logits, axis=1) == test[1])
    print(f"{name:24}{rows[name]:.1f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
course = jnp.stack(jax.tree.leaves(solution.history.hyperparams), axis=1)
left.plot(solution.history.step, course, label=["layer 1", "layer 2", "layer 3"])
left.set(xlabel="step", ylabel="noise of the inputs of a layer", ylim=0)
left.legend(frameon=False)
right.plot([*rows.values()], [*rows], "o", ms=12)
right.set(xlim=(95, 99), xlabel="test accuracy, %")
right.invert_yaxis()
figure.savefig("inside_a_model.png", dpi=150)
