"""Which inputs matter? A neural network gets a weight decay for each of its inputs, and
the gradient of the validation loss finds out which ones to shrink."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import make_friedman1


# Only the first 5 of the 15 inputs matter. 200 examples to learn from, 2000 untouched.
x, y = make_friedman1(2200, 15, noise=1.0, random_state=0)
x, y = (x - x[:200].mean(0)) / x[:200].std(0), (y - y[:200].mean()) / y[:200].std()
data = jnp.float32(x[:200]), jnp.float32(y[:200])
test = jnp.float32(x[200:]), jnp.float32(y[200:])


# --8<-- [start:problem]
def val_loss(model, decays, data, key):
    x, y = data
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def train_loss(model, decays, data, key):
    first, *others = [jnp.sum(layer.weight**2, axis=0) for layer in model.layers]
    penalty = decays["inputs"] @ first + decays["rest"] * sum(map(jnp.sum, others))
    return val_loss(model, decays, data, key) + penalty


def make_decays(size):
    return {"inputs": hpo.Positive(jnp.full(15, size)), "rest": hpo.Positive(size)}


model = eqx.nn.MLP(15, "scalar", 32, 2, activation=jnp.tanh, key=jr.key(0))
problem = hpo.Problem(train_loss, val_loss)
algorithm = hpo.T1T2(problem, optax.adam(0.01), optax.adam(0.1), inner_steps=10)
# --8<-- [end:problem]

# --8<-- [start:tune]
solution = hpo.tune_folds(
    algorithm, model, make_decays(0.01), data, steps=100, fit_steps=500, key=None
)


def train(size, data, val=None):
    """Trains with one decay for everything."""
    args = (algorithm, model, make_decays(size), data)
    return hpo.fit(*args, val=val, steps=50, key=None, progress=False)


def fold_error(size):
    pairs = [jax.tree.map(lambda z: z[i], hpo.folds(data, 5)) for i in range(5)]
    return np.mean([train(size, *pair).history.val_loss[-1] for pair in pairs])


best = min([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0], key=fold_error)
# --8<-- [end:tune]

models = {
    "one decay, the default": train(1e-4, data).model,
    "one decay, a grid of 6": train(best, data).model,
    "16 decays, by gradient": solution.final.model,
}
errors = {name: float(val_loss(m, None, test, None)) for name, m in models.items()}
print("squared error on untouched data")
for name, error in errors.items():
    print(f"{name:24}{error:.3f}")

history, (blue, grey) = solution.tuning.history, ("#3f51b5", "#b3b7c0")
figure, axes = plt.subplot_mosaic(
    "LE;DE", figsize=(10, 4.6), layout="constrained", height_ratios=(1, 2.2)
)
axes["L"].plot(history.step, history.val_loss, color=blue, lw=2)
axes["L"].set(title="validation loss", ylim=0, xticklabels=[])
axes["D"].plot(history.step, history.hyperparams["inputs"][:, 5:], color=grey)
axes["D"].plot(history.step, history.hyperparams["inputs"][:, :5], color=blue)
axes["D"].set(title="weight decay of each input", yscale="log", xlabel="update")
axes["D"].text(1, 14, "ten inputs that do not matter", color="#777b85")
axes["D"].text(1, 7e-4, "five inputs that do", color=blue)
labels, colours = [x.replace(", ", ",\n") for x in errors], [grey, grey, blue]
bars = axes["E"].barh(labels, [*errors.values()], 0.6, color=colours)
axes["E"].bar_label(bars, fmt="%.3f", padding=4)
axes["E"].invert_yaxis()
axes["E"].set_title("squared error on untouched data")
for ax in axes.values():
    ax.spines[["top", "right"]].set_visible(False)
figure.savefig("quickstart.png", dpi=150)
