r"""Learns how to augment images: the strengths of rotation, shift, zoom, brightness,
contrast and noise, and how often to flip, invert, posterise or cut, by the gradient of
the validation loss while a small network trains on few images.

    python -m docs.experiments.augmentation
    python -m docs.experiments.augmentation --seeds 5
    python -m docs.experiments.augmentation --dataset fashion_mnist --folder ... \
        --seeds 3
"""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray, Scalar
from matplotlib.figure import Figure

from .common import (
    apply_layers,
    command,
    cross_entropy,
    describe,
    make_layers,
    save,
    Scores,
)
from .image_data import Images, load, Splits


INNER_STEPS = 10  # training steps for each update of the augmentation
BATCH, HIDDEN = 50, 64
METHODS: dict[str, Any] = {
    "T1T2": hpo.T1T2,
    "Greedy": hpo.Greedy,
    "HyperDistill": ft.partial(hpo.HyperDistill, estimation_period=10),
}
NONE, DEFAULT, BY_HAND = "no augmentation", "default", "by hand"
SEARCHED = "best of random search"
ONLINE, RETRAINED, BOTH = "online", "retrained", "with validation images"
OPERATIONS = ("nothing", "mirror", "upside down", "invert", "posterise", "cut out")
# The largest strength of each. The default is a fifth of it.
LARGEST = dict(
    rotation=1.5, shift=0.5, zoom=1.0, brightness=1.0, contrast=1.0, noise=1.0
)
HAND_PICKED = dict(rotation=0.2, shift=0.1, zoom=0.1)


class Augmentation(NamedTuple):
    """Holds placeholders before `tune`, plain arrays in the losses and after."""

    strengths: dict[str, Any]
    weights: Any  # the probability of each of `OPERATIONS`


class Result(NamedTuple):
    rows: dict[str, Scores]
    solutions: dict[str, hpo.Solution]
    data: Splits


def make_start() -> Augmentation:
    strengths = {k: hpo.Interval(x / 5, 0.0, x) for k, x in LARGEST.items()}
    share = 1 / len(OPERATIONS)
    return Augmentation(strengths, hpo.Simplex(jnp.full(len(OPERATIONS), share)))


def make_plain(**given: float) -> Augmentation:
    """The strengths that are given and no operation."""
    strengths = {k: jnp.array(given.get(k, 0.0)) for k in LARGEST}
    return Augmentation(strengths, jnp.eye(len(OPERATIONS))[0])


def draw_random(key: PRNGKeyArray) -> Augmentation:
    """Strengths of any order of magnitude below the largest, and few operations."""
    keys = jr.split(key)
    shares = 10 ** jr.uniform(keys[0], (len(LARGEST),), minval=-2.0, maxval=-0.3)
    strengths = {k: share * x for (k, x), share in zip(LARGEST.items(), shares)}
    return Augmentation(strengths, jr.dirichlet(keys[1], jnp.ones(len(OPERATIONS)) / 2))


def warp(image: Any, s: dict[str, Any], u: Float[Array, "4"]) -> Any:
    """Rotates, zooms and shifts: samples bilinearly at the moved grid."""
    height, width, _ = image.shape
    rows, columns = jnp.mgrid[:height, :width].astype(image.dtype)
    rows, columns = rows - (height - 1) / 2, columns - (width - 1) / 2
    angle, scale = s["rotation"] * u[0], jnp.exp(s["zoom"] * u[1])
    sine, cosine = scale * jnp.sin(angle), scale * jnp.cos(angle)
    grid = (
        cosine * rows - sine * columns + (height - 1) / 2 + height * s["shift"] * u[2],
        sine * rows + cosine * columns + (width - 1) / 2 + width * s["shift"] * u[3],
    )
    sample = lambda channel: map_coordinates(channel, grid, order=1)
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def cut_out(image: Any, u: Float[Array, "2"]) -> Any:
    """A square of half the width becomes black."""
    height, width, _ = image.shape
    rows, columns = jnp.mgrid[:height, :width]
    row, column = (1 + u) / 2 * jnp.array([height, width])
    hidden = (abs(rows - row) < height / 4) & (abs(columns - column) < width / 4)
    return jnp.where(hidden[..., None], 0.0, image)


def augment(image: Any, s: dict[str, Any], u: Float[Array, "8"], noise: Any) -> Any:
    """The image after each of `OPERATIONS`, which all see the same moved image."""
    image = warp(image, s, u[:4])
    mean = jnp.mean(image)
    image = mean + (image - mean) * jnp.exp(s["contrast"] * u[4])
    image = image + s["brightness"] * u[5] + s["noise"] * noise
    changed = (image[:, ::-1], image[::-1], 1 - image, jnp.round(3 * image) / 3)
    return jnp.stack([image, *changed, cut_out(image, u[6:])])


def augment_all(images: Any, s: dict[str, Any], key: PRNGKeyArray) -> Any:
    uniform_key, noise_key = jr.split(key)
    u = jr.uniform(uniform_key, (len(images), 8), minval=-1.0, maxval=1.0)
    noise = jr.normal(noise_key, images.shape)
    return jax.vmap(augment, in_axes=(0, None, 0, 0), out_axes=1)(images, s, u, noise)


def make_model(data: Splits, key: PRNGKeyArray) -> list[eqx.nn.Linear]:
    return make_layers((data.train.images[0].size, HIDDEN, HIDDEN, 10), key)


def compute_logits(model: Any, images: Any) -> Float[Array, "n classes"]:
    return apply_layers(model, jnp.reshape(images, (len(images), -1)))


def train_loss(
    model: Any, values: Augmentation, batch: Images, key: PRNGKeyArray
) -> Scalar:
    """The expected loss if one of the operations is drawn with its probability."""
    images = augment_all(batch.images, values.strengths, key)
    loss = lambda images: cross_entropy(compute_logits(model, images), batch.labels)
    return values.weights @ jax.vmap(loss)(images)


def val_loss(
    model: Any, values: Augmentation, batch: Images, key: PRNGKeyArray
) -> Scalar:
    del values, key
    return cross_entropy(compute_logits(model, batch.images), batch.labels)


@eqx.filter_jit
def evaluate(model: Any, data: Splits) -> Scores:
    return Scores.of(ft.partial(compute_logits, model), data)


# Made once: a new schedule or algorithm would be compiled anew.
@ft.cache
def make_algorithm(method: str, steps: int) -> hpo.AbstractBilevelOptimizer:
    # The rate falls to zero, so that the last model is not at the mercy of the last
    # few batches and a comparison of accuracies means something.
    schedule = optax.cosine_decay_schedule(0.05, steps * INNER_STEPS)
    return METHODS[method](
        hpo.Problem(train_loss, val_loss),
        inner=optax.sgd(schedule, momentum=0.9),
        outer=optax.adam(0.05),
        inner_steps=INNER_STEPS,
    )


def train_all(
    data: Splits,
    model: Any,
    augmentations: list[Augmentation],
    steps: int,
    key: PRNGKeyArray,
) -> Scores:
    """Trains with each of the augmentations, from the same weights with the same
    batches."""
    # Of the algorithm it takes the loss and the way of training.
    algorithm = make_algorithm("T1T2", steps)
    train = hpo.Minibatch(data.train, min(BATCH, len(data.train.labels)))
    options: Any = dict(steps=steps, key=key, progress=False)

    def train_one(values: Augmentation) -> Scores:
        return evaluate(hpo.fit(algorithm, model, values, train, **options).model, data)

    return Scores(*np.transpose([train_one(values) for values in augmentations]))


def stack(augmentations: list[Augmentation]) -> Augmentation:
    return jtu.tree_map(lambda *x: jnp.stack(x), *augmentations)


def tune_all(
    data: Splits, model: Any, steps: int, key: PRNGKeyArray
) -> dict[str, hpo.Solution]:
    size = len(data.train.labels)
    train = hpo.Minibatch(data.train, min(BATCH, size))
    val = hpo.Minibatch(data.val, min(4 * BATCH, size))
    args = (model, make_start(), train, val)
    return {
        name: hpo.tune(make_algorithm(name, steps), *args, steps=steps, key=key)
        for name in METHODS
    }


def compare(data: Splits, steps: int, random: int, seed: int) -> Result:
    model_key, tune_key, train_key, random_key = jr.split(jr.key(seed), 4)
    model = make_model(data, model_key)
    solutions = tune_all(data, model, steps, tune_key)
    tuned = [solution.values for solution in solutions.values()]
    drawn = [draw_random(key) for key in jr.split(random_key, random)]
    given = [make_plain(), hpo.unwrap(make_start()), make_plain(**HAND_PICKED)]
    trained = train_all(data, model, [*given, *tuned, *drawn], steps, train_key)
    searched = trained.at(slice(3 + len(tuned), None))
    rows = {name: trained.at(i) for i, name in enumerate((NONE, DEFAULT, BY_HAND))}
    rows[SEARCHED] = searched.at(np.argmin(searched.val_loss))
    for i, (name, solution) in enumerate(solutions.items(), start=3):
        rows[f"{name}, {ONLINE}"] = evaluate(solution.model, data)
        rows[f"{name}, {RETRAINED}"] = trained.at(i)
    # A fair question to all tuning: what if these images were used for training?
    together = Images(*(np.concatenate(x) for x in zip(data.train, data.val)))
    more = data._replace(train=together)
    trained = train_all(more, model, [make_plain(), tuned[0]], steps, train_key)
    for i, name in enumerate([NONE, *solutions][:2]):
        rows[f"{name}, {BOTH}"] = trained.at(i)
    return Result(rows, solutions, data)


def print_tables(results: list[Result]) -> None:
    print(f"{'accuracy, %':42}{'validation':>14}{'test':>14}")
    for name in results[0].rows:
        rows = [result.rows[name] for result in results]
        val, test = (
            describe(100 * np.array(x), ".1f")
            for x in ([x.val for x in rows], [x.test for x in rows])
        )
        # The validation images are no measure where they were trained on.
        print(f"{name:42}{'' if BOTH in name else val:>14}{test:>14}")
    print("\ntuned values, means over the seeds")
    for name in results[0].solutions:
        values = stack([result.solutions[name].values for result in results])
        strengths = {k: jnp.mean(x) for k, x in values.strengths.items()}
        weights = dict(zip(OPERATIONS, jnp.mean(values.weights, axis=0)))
        for part in (strengths, weights):
            print(f"{name:14}", *(f"{k} {x:.3f} " for k, x in part.items()))


def draw_samples(data: Images, values: Augmentation, count: int) -> np.ndarray:
    """Images as training sees them, side by side."""
    image_key, operation_key = jr.split(jr.key(0))
    images = augment_all(data.images[:count], values.strengths, image_key)
    logits = jnp.log(values.weights)
    drawn = jr.categorical(operation_key, logits, shape=(count,))
    chosen = images[drawn, jnp.arange(count)]
    gap = [(0, 0), (0, 0), (0, 1), (0, 0)]
    return np.hstack(list(np.pad(np.clip(chosen, 0, 1), gap, constant_values=1)))


def draw(result: Result, path: str) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    history = result.solutions["T1T2"].history
    axes = parts[0].subplots(1, 2)
    x = history.step * INNER_STEPS
    for name, strengths in history.hyperparams.strengths.items():
        axes[0].plot(x, strengths, label=name)
    axes[1].plot(x, history.hyperparams.weights, label=OPERATIONS)
    for panel, label in zip(axes, ("strength", "probability of the operation")):
        panel.set(xlabel="training step", ylabel=label, ylim=(0, None))
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    tuned = result.solutions["T1T2"].values
    rows = {
        "train images": make_plain(),
        "the same as training sees them, at the default": hpo.unwrap(make_start()),
        "with the values of T1T2": tuned,
    }
    for panel, (name, values) in zip(parts[1].subplots(len(rows)), rows.items()):
        samples = draw_samples(result.data.train, values, 16)
        panel.imshow(samples, cmap="gray", vmin=0, vmax=1)
        panel.axis("off")
        panel.set_title(name, loc="left", fontsize=10)
    save(figure, path, *axes)


QUICK = dict(size=60, steps=30, random=1)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int = 200,
    steps: int = 100,
    random: int = 5,
    seeds: int = 1,
    first: int = 0,
    figure: str = "augmentation.png",
) -> list[Result]:
    results = []
    for seed in range(first, first + seeds):
        data = load(dataset, folder=folder, size=size, seed=seed)
        results.append(compare(data, steps, random, seed))
    print_tables(results)
    draw(results[0], figure)
    print(f"\nThe course of the first seed is in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        steps="augmentation updates",
        random="random augmentations",
    )
