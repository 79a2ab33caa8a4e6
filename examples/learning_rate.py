"""Which learning rate at which step? A rate for each of ten windows of the training is
learned by the exact derivative of the final validation loss."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits


# Digits of 4x4 pixels, so that a network of 442 weights cannot learn them by heart.
x, y = load_digits(return_X_y=True)
order = jr.permutation(jr.key(0), len(x))
x = jnp.float32(x / 16).reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)[order]
y = jnp.asarray(y)[order]
train = hpo.Minibatch((x[:600], y[:600]), 32)
val, test = (x[600:1200], y[600:1200]), (x[1200:], y[1200:])


# --8<-- [start:tune]
def loss(model, rate, batch, key):
    logits = jax.vmap(model)(batch[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return jnp.mean(losses)


def make_inner(rate):
    return optax.sgd(rate, momentum=0.9)


steps, windows, updates = 500, 10, 80
problem, outer = hpo.Problem(loss, loss), optax.cosine_decay_schedule(0.1, updates)
algorithm = hpo.ForwardMode(problem, make_inner, optax.adam(outer), inner_steps=steps)
model = eqx.nn.MLP(16, 10, 16, 1, key=jr.key(0))
rates = hpo.Schedule(hpo.Positive(jnp.full(windows, 0.05)), every=steps // windows)
# Each update is a whole training from the start, on another order of the batches.
args, key = (algorithm, model, rates, train, val), jr.key(1)
solution = hpo.tune(*args, steps=updates, key=key, restart_every=1)
# --8<-- [end:tune]


# --8<-- [start:compare]
def train_with(rates, seed):
    """Trains at a rate for each step, on another order of the batches."""
    args = (algorithm, model, hpo.Schedule(rates, every=1), train)
    return hpo.fit(*args, steps=1, key=jr.key(seed), progress=False).model


def mean_loss(rates, data, seeds):
    return sum(loss(train_with(rates, i), None, data, None) for i in seeds) / len(seeds)


def best_peak(shape):
    grid = [peak * shape for peak in (0.03, 0.1, 0.3, 1.0)]
    return min(grid, key=lambda rates: mean_loss(rates, val, [2, 3, 4]))


cosine = optax.cosine_decay_schedule(1.0, steps)(jnp.arange(steps))
rows = {
    "constant rate, grid of 4": best_peak(jnp.ones(steps)),
    "cosine decay, grid of 4": best_peak(cosine),
    "learned, ten windows": jnp.repeat(solution.values, steps // windows),
}
losses = {name: mean_loss(rates, test, range(10, 20)) for name, rates in rows.items()}
print("test loss, mean over ten new orders of the batches")
for name, value in losses.items():
    print(f"{name:26}{value:.3f}")
# --8<-- [end:compare]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for (name, rates), colour in zip(rows.items(), ["0.7", "0.4", "C0"]):
    left.plot(rates, color=colour, label=name)
    right.barh(name, losses[name], 0.6, color=colour)
left.set(xlabel="training step", ylabel="learning rate", ylim=0)
left.legend(frameon=False)
right.set(xlabel="test loss")
right.invert_yaxis()
figure.savefig("learning_rate.png", dpi=150)
