"""How strongly should train images be rotated, shifted and blurred by noise? The
strengths are learned by the gradient of the loss on images that are left alone."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax
from jax.scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits


x, y = load_digits(return_X_y=True)
order = jr.permutation(jr.key(0), len(x))
x, y = jnp.float32(x / 16).reshape(-1, 8, 8)[order], jnp.asarray(y)[order]
train, val, test = (x[:100], y[:100]), (x[100:200], y[100:200]), (x[200:], y[200:])
data = x[:200], y[:200]  # what the last trainings see


# --8<-- [start:augment]
def augment(image, strengths, key):
    """Draws an angle in radians, a shift in pixels and noise of the grey levels."""
    keys = jr.split(key, 3)
    angle = strengths["rotation"] * jr.uniform(keys[0], minval=-1.0)
    shift = strengths["shift"] * jr.uniform(keys[1], (2, 1, 1), minval=-1.0)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    row, column = jnp.mgrid[:8, :8] - 3.5
    turned = jnp.stack([cosine * row - sine * column, sine * row + cosine * column])
    image = map_coordinates(image, turned + 3.5 + shift, order=1)
    return image + strengths["noise"] * jr.normal(keys[2], image.shape)


# --8<-- [end:augment]


# --8<-- [start:tune]
def val_loss(model, strengths, batch, key):
    logits = jax.vmap(model)(batch[0].reshape(-1, 64))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return jnp.mean(losses)


def train_loss(model, strengths, batch, key):
    keys = jr.split(key, len(batch[0]))
    images = jax.vmap(augment, in_axes=(0, None, 0))(batch[0], strengths, keys)
    return val_loss(model, strengths, (images, batch[1]), key)


problem = hpo.Problem(train_loss, val_loss)
inner = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9))
algorithm = hpo.Unrolled(problem, inner, optax.adam(0.1), inner_steps=100)
model = eqx.nn.MLP(64, 10, 64, 1, key=jr.key(0))
default = {"rotation": 0.1, "shift": 0.3, "noise": 0.1}
strengths = jax.tree.map(hpo.Positive, default)
# Each update differentiates 100 training steps from the start.
args, key = (algorithm, model, strengths, train, val), jr.key(1)
solution = hpo.tune(*args, steps=40, key=key, restart_every=1)
# --8<-- [end:tune]


# --8<-- [start:compare]
def accuracy(strengths, seed):
    """Of a network that is trained afresh on all 200 images, on the test images."""
    args = (algorithm, model, strengths, data)
    fitted = hpo.fit(*args, steps=10, key=jr.key(seed), progress=False).model
    guesses = jnp.argmax(jax.vmap(fitted)(test[0].reshape(-1, 64)), axis=1)
    return 100 * jnp.mean(guesses == test[1])


print("learned:", ", ".join(f"{k} {v:.2f}" for k, v in solution.values.items()))
none = dict.fromkeys(default, 0.0)
rows = {"none": none, "default": default, "learned": solution.values}
print("test accuracy in %, mean over three trainings")
for name, values in rows.items():
    mean = sum(accuracy(values, seed) for seed in (2, 3, 4)) / 3
    print(f"{name:10}{mean:.1f}")
# --8<-- [end:compare]

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, values in solution.history.hyperparams.items():
    axes[0].plot(solution.history.step, values, label=name)
axes[0].set(xlabel="update", ylabel="strength", ylim=0)
axes[0].legend(frameon=False)
shown, keys = x[:5], jr.split(jr.key(5), (3, 5))
draw = jax.vmap(augment, in_axes=(0, None, 0))
images = [shown, *(draw(shown, solution.values, row) for row in keys)]
frame = lambda row: jnp.hstack(jnp.pad(row, ((0, 0), (1, 1), (1, 1))))
axes[1].imshow(jnp.vstack([frame(row) for row in images]), "gray_r", vmin=0, vmax=1)
axes[1].set_title("five train images, and three augmented copies of each")
axes[1].axis("off")
figure.savefig("augmentation.png", dpi=150)
