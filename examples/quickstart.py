"""Tunes the weight decay of each layer and the level of input noise while a network
trains, by the rule of DARTS, and compares with training at fixed values.

    pip install 'eqx_hpo[examples]'
    python quickstart.py
"""

import argparse
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from image_data import Images, load, NAMES, Splits
from jaxtyping import Array, Float, PRNGKeyArray, Scalar
from matplotlib.figure import Figure


HIDDEN_LAYERS = 2
INNER_STEPS = 5  # training steps for each update of the hyperparameters

DEFAULT = "default hyperparameters"
TUNED = "tuned online"
RETRAINED = "retrained from scratch with the tuned values"


class Regularisation(NamedTuple):
    """Holds placeholders before `tune`, plain arrays in the losses and after."""

    decay: Any  # one for each layer
    noise: Any


class Row(NamedTuple):
    solution: hpo.Solution
    train: float
    val: float
    test: float


def cross_entropy(model: eqx.nn.MLP, batch: Images) -> Scalar:
    logits = jax.vmap(model)(flatten(batch.images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.mean(losses)


def train_loss(
    model: eqx.nn.MLP, values: Regularisation, batch: Images, key: PRNGKeyArray
) -> Scalar:
    noise = values.noise * jr.normal(key, batch.images.shape)
    norms = jnp.stack([jnp.sum(layer.weight**2) for layer in model.layers])
    loss = cross_entropy(model, batch._replace(images=batch.images + noise))
    return loss + jnp.sum(values.decay * norms)


def val_loss(
    model: eqx.nn.MLP, values: Regularisation, batch: Images, key: PRNGKeyArray
) -> Scalar:
    del values, key
    return cross_entropy(model, batch)


@eqx.filter_jit
def accuracy(model: eqx.nn.MLP, data: Images) -> Scalar:
    guesses = jnp.argmax(jax.vmap(model)(flatten(data.images)), axis=-1)
    return jnp.mean(guesses == data.labels)


def flatten(images: Any) -> Float[Array, "n pixels"]:
    return jnp.reshape(images, (len(images), -1))


def make_algorithm(steps: int, outer: optax.GradientTransformation) -> hpo.T1T2:
    # The rate falls to zero, so that the last model is not at the mercy of the last
    # few batches and a comparison of accuracies means something.
    schedule = optax.cosine_decay_schedule(0.05, steps * INNER_STEPS)
    return hpo.T1T2(
        hpo.Problem(train_loss, val_loss),
        inner=optax.sgd(schedule, momentum=0.9),
        outer=outer,
        second_order=hpo.FiniteDifference(),
        inner_steps=INNER_STEPS,
    )


def compare(
    data: Splits,
    start: Regularisation,
    tuner: hpo.T1T2,
    fixed: hpo.T1T2,
    *,
    steps: int,
    seed: int,
) -> dict[str, Row]:
    """Trains three times, from the same weights and with the same batches."""
    model_key, tune_key = jr.split(jr.key(seed))
    pixels = data.train.images[0].size
    model = eqx.nn.MLP(pixels, 10, 128, HIDDEN_LAYERS, key=model_key)
    train = hpo.Minibatch(data.train, batch_size=min(64, len(data.train.labels)))
    val = hpo.Minibatch(data.val, batch_size=min(256, len(data.val.labels)))

    def run(algorithm: hpo.T1T2, values: Regularisation) -> Row:
        hyperparams = jax.tree.map(hpo.Positive, values)
        solution = hpo.tune(
            algorithm,
            model,
            hyperparams,
            train,
            val,
            steps=steps,
            key=tune_key,
            record_every=1,
        )
        return Row(solution, *(float(accuracy(solution.model, x)) for x in data))

    default, tuned = run(fixed, start), run(tuner, start)
    retrained = run(fixed, tuned.solution.values)
    return {DEFAULT: default, TUNED: tuned, RETRAINED: retrained}


def make_start(decay: float, noise: float) -> Regularisation:
    return Regularisation(jnp.full(HIDDEN_LAYERS + 1, decay), jnp.array(noise))


def print_table(rows: dict[str, Row]) -> None:
    print(f"{'accuracy':46}{'train':>8}{'val':>8}{'test':>8}")
    for name, row in rows.items():
        print(f"{name:46}{row.train:8.1%}{row.val:8.1%}{row.test:8.1%}")
    print(f"\n{'hyperparameters':26}{'noise':>8}   decay of each layer")
    for name in (DEFAULT, TUNED):
        values = rows[name].solution.values
        decay = "  ".join(f"{x:.1e}" for x in values.decay)
        print(f"{name:26}{values.noise:8.3f}   {decay}")


def draw(rows: dict[str, Row], path: str) -> None:
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    losses, trajectories = figure.subplots(1, 2)
    for name, label, style in [(DEFAULT, "default", ":"), (TUNED, "tuned", "-")]:
        history = rows[name].solution.history
        for kind, loss, colour in [
            ("train", history.train_loss, "tab:blue"),
            ("validation", history.val_loss, "tab:orange"),
        ]:
            x, y = smooth(history.step * INNER_STEPS), smooth(loss)
            losses.plot(x, y, style, color=colour, label=f"{kind}, {label}")

    history = rows[TUNED].solution.history
    x, values = history.step * INNER_STEPS, history.hyperparams
    trajectories.plot(x, values.noise, color="black", label="input noise")
    for layer, decay in enumerate(np.transpose(values.decay), start=1):
        # Thinner on top of thicker, as the layers may well agree.
        look = dict(color=f"C{layer + 1}", linewidth=6 / layer)
        trajectories.plot(x, decay, label=f"weight decay, layer {layer}", **look)

    for axes, label in [(losses, "loss of a batch"), (trajectories, "hyperparameter")]:
        axes.set(xlabel="training step", ylabel=label, yscale="log")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def smooth(x: np.ndarray) -> np.ndarray:
    # Each loss in the history is that of a single batch.
    window = max(1, len(x) // 30)
    return np.convolve(x, np.full(window, 1 / window), mode="valid")


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int = 300,
    steps: int = 600,
    seed: int = 0,
    figure: str = "quickstart.png",
) -> dict[str, Row]:
    data = load(dataset, folder=folder, size=size, seed=seed)
    tuner = make_algorithm(steps, outer=optax.adam(0.05))
    fixed = make_algorithm(steps, outer=optax.set_to_zero())
    start = make_start(decay=1e-4, noise=0.1)
    rows = compare(data, start, tuner, fixed, steps=steps, seed=seed)
    print_table(rows)
    draw(rows, figure)
    print(f"\nThe course of the run is in {figure}.")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--folder", help="with the data; else they are downloaded")
    parser.add_argument("--size", type=int, default=300, help="of the train set")
    parser.add_argument("--steps", type=int, default=600, help="hyperparameter updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", default="quickstart.png", help="file to write")
    main(**vars(parser.parse_args()))
