"""Which labels are wrong? Each train image of the digits gets a weight, and a few clean
images say by the gradient of their loss which weights to lower."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score


# 1000 train images, 50 clean ones, 747 for the test. 40% of the train labels are one
# too high: an error that always goes in one direction is one that a network learns.
x, y = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
order = rng.permutation(len(x))
x, y = jnp.float32(x[order] / 16), y[order]
wrong = rng.random(1000) < 0.4
labels = jnp.asarray(np.where(wrong, (y[:1000] + 1) % 10, y[:1000]))
train, val = (x[:1000], labels), (x[1000:1050], jnp.asarray(y[1000:1050]))
both = jax.tree.map(lambda *parts: jnp.concatenate(parts), train, val)


# --8<-- [start:problem]
def cross_entropy(model, x, y):
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def train_loss(model, weights, batch, key):
    return jnp.mean(weights * cross_entropy(model, *batch))


def val_loss(model, weights, batch, key):
    return jnp.mean(cross_entropy(model, *batch))


problem = hpo.Problem(train_loss, val_loss)
inner = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))
algorithm = hpo.T1T2(problem, inner, optax.adam(0.1), inner_steps=10)
model = eqx.nn.MLP(64, 10, 64, 1, key=jr.key(0))
weights = hpo.Interval(jnp.full(1000, 0.5), 0.0, 1.0)
solution = hpo.tune(algorithm, model, weights, train, val, steps=100, key=None)
# --8<-- [end:problem]


# --8<-- [start:compare]
def accuracy(weights, data):
    """Of a model that is trained afresh, on the test images."""
    args = (algorithm, model, weights, data)
    fitted = hpo.fit(*args, steps=40, key=None, progress=False).model
    guesses = jnp.argmax(jax.vmap(fitted)(x[1050:]), axis=1)
    return 100 * np.mean(guesses == y[1050:])


rows = {
    "train images, no weights": accuracy(jnp.ones(1000), train),
    "train and clean images": accuracy(jnp.ones(1050), both),
    "clean images alone": accuracy(jnp.ones(50), val),
    "train images, weights": accuracy(solution.values, train),
}
print("test accuracy in %")
for name, value in rows.items():
    print(f"{name:26}{value:.1f}")
found = roc_auc_score(wrong, 1 - solution.values)
print(f"wrong labels have lower weights: AUC {found:.3f}")
# --8<-- [end:compare]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
parts, colours = [solution.values[~wrong], solution.values[wrong]], ["C0", "C3"]
left.hist(parts, 20, label=["right labels", "wrong labels"], color=colours)
left.set(xlabel="weight of a train image", ylabel="images")
left.legend(frameon=False)
bars = right.barh([*rows], [*rows.values()], 0.6, color=["0.7"] * 3 + ["C0"])
right.bar_label(bars, fmt="%.1f", padding=4)
right.set(xlim=(0, 100), xlabel="test accuracy, %")
right.invert_yaxis()
figure.savefig("noisy_labels.png", dpi=150)
