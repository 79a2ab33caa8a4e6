r"""Tunes eleven hyperparameters of a small convolutional net by gradient, by random
search and by Optuna's TPE, all with the same time, and shows who is where when.

A search repeats a training of `--steps`, or of three times as many, with what its
sampler proposes until its time is over. A gradient method spends its time on a single
training, and tunes meanwhile; beside it stands such a training that does not tune.
Every method is looked at after each `--steps`, and gives the model with the least
validation loss so far.

    python -m docs.experiments.cifar10
    python -m docs.experiments.cifar10 --dataset cifar10 --size 1300 --seconds 15 \
        --seeds 4
"""

import functools as ft
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from .common import command, cross_entropy, describe, save, subplots
from .image_data import load


CHANNELS, CLASSES = (16, 32, 64), 10
INNER_STEPS = 5  # training steps for each update of the hyperparameters
BATCH, VAL_BATCH = 64, 128
TEST = 2000  # images at most
MANY = 10_000  # trials; the time is over before
CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}

DEFAULT, RANDOM, TPE = "no tuning", "random search", "TPE"
LONG = "random search, long"
T1T2, GREEDY, DISTILL = "T1T2", "Greedy", "HyperDistill"
METHODS = (DEFAULT, RANDOM, LONG, TPE, T1T2, GREEDY, DISTILL)
FACTOR = 3  # by which the trainings of `LONG` are longer


class Batch(NamedTuple):
    images: Float[Array, "n height width channels"]
    labels: Int[Array, " n"]


class Data(NamedTuple):
    train: Batch
    val: Batch
    test: Batch


class Values(NamedTuple):
    """Placeholders for `search` and `tune`, plain arrays in the losses."""

    decay: Any  # of the weights of each layer
    dropout: Any  # standard deviation of a factor of each channel, for each convolution
    noise: Any  # standard deviation of what is added to each pixel
    brightness: Any  # the same of what is added to an image
    contrast: Any  # the same of a factor of an image
    smoothing: Any  # of the labels


class Convolution(eqx.Module):
    """2x2 with stride 2, as a product of matrices: true convolutions are slow in
    compiled loops on CPUs."""

    weight: Float[Array, "2 2 inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, key: PRNGKeyArray):
        self.weight = jr.normal(key, (2, 2, inputs, outputs)) / (2 * inputs) ** 0.5
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "height width inputs"]) -> Array:
        height, width, inputs = x.shape
        x = x.reshape(height // 2, 2, width // 2, 2, inputs)
        return jnp.einsum("hiwjc,ijco->hwo", x, self.weight) + self.bias


class Net(eqx.Module):
    convolutions: list[Convolution]
    linear: eqx.nn.Linear

    def __init__(self, shape: tuple[int, ...], key: PRNGKeyArray):
        height, width, channels = shape
        keys = jr.split(key, len(CHANNELS) + 1)
        sizes = zip((channels, *CHANNELS), CHANNELS, keys)
        self.convolutions = [Convolution(*size) for size in sizes]
        features = (height * width >> 2 * len(CHANNELS)) * CHANNELS[-1]
        self.linear = eqx.nn.Linear(features, CLASSES, key=keys[-1])

    def __call__(
        self, x: Float[Array, "height width channels"], factors: Any = None
    ) -> Float[Array, " classes"]:
        for i, convolution in enumerate(self.convolutions):
            x = jax.nn.relu(convolution(x))
            x = x if factors is None else x * factors[i]
        return self.linear(x.ravel())


class Task(NamedTuple):
    net: Net  # at the start
    data: Data
    steps: int  # of a trial, in updates of the hyperparameters
    key: PRNGKeyArray


class Record(NamedTuple):
    """A trial, or a look at a training under way."""

    seconds: float  # since the start
    val_loss: float
    test: float  # accuracy in percent
    values: Values


class Course(NamedTuple):
    records: list[Record]  # those better on validation than all before
    looks: int  # with those that were not


def augment(images: Array, values: Values, key: PRNGKeyArray) -> Array:
    keys, one_each = jr.split(key, 3), (len(images), 1, 1, 1)
    images = images * (1 + values.contrast * jr.normal(keys[0], one_each))
    images = images + values.brightness * jr.normal(keys[1], one_each)
    return images + values.noise * jr.normal(keys[2], images.shape)


def draw_factors(dropout: Any, count: int, key: PRNGKeyArray) -> list[Array]:
    """As dropout of channels, but smooth in its strength."""
    keys = jr.split(key, len(CHANNELS))
    return [
        1 + strength * jr.normal(k, (count, channels))
        for strength, channels, k in zip(dropout, CHANNELS, keys)
    ]


def train_loss(net: Net, values: Values, batch: Batch, key: PRNGKeyArray) -> Scalar:
    augment_key, dropout_key = jr.split(key)
    images = augment(batch.images, values, augment_key)
    factors = draw_factors(values.dropout, len(images), dropout_key)
    logits = jax.vmap(net)(images, factors)
    targets = jax.nn.one_hot(batch.labels, CLASSES)
    targets = optax.smooth_labels(targets, values.smoothing)
    weights = [layer.weight for layer in (*net.convolutions, net.linear)]
    norms = jnp.stack([jnp.sum(weight**2) for weight in weights])
    loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
    return loss + jnp.sum(values.decay * norms)


def val_loss(net: Net, values: Any, batch: Batch, key: Any) -> Scalar:
    del values, key
    return cross_entropy(jax.vmap(net)(batch.images), batch.labels)


@eqx.filter_jit
def assess(net: Net, data: Data) -> tuple[Scalar, Scalar]:
    """The validation loss and the test accuracy."""
    guesses = jnp.argmax(jax.vmap(net)(data.test.images), axis=-1)
    return val_loss(net, None, data.val, None), jnp.mean(guesses == data.test.labels)


def make_range() -> tuple[Values, Values]:
    """The ends of what the searches look through."""

    def make(decay, dropout, others, smoothing):
        return Values(
            hpo.Positive(jnp.full(len(CHANNELS) + 1, decay)),
            hpo.Positive(jnp.full(len(CHANNELS), dropout)),
            noise=hpo.Positive(others),
            brightness=hpo.Positive(others),
            contrast=hpo.Positive(others),
            smoothing=hpo.Interval(smoothing, 0.0, 1.0),
        )

    return make(1e-6, 0.03, 0.01, 0.003), make(1e-1, 3.0, 1.0, 0.5)


def load_data(dataset: str, folder: str | None, size: int, seed: int) -> Data:
    def prepare(data):
        images = (data.images[:TEST] - 0.5) * 4  # a standard deviation near one
        if dataset == "cifar10":  # 16x16 pixels are enough here, and quicker
            images = images.reshape(-1, 16, 2, 16, 2, 3).mean(axis=(2, 4))
        return Batch(jnp.asarray(images), jnp.asarray(data.labels[:TEST]))

    splits = load(dataset, folder=folder, size=size, seed=seed)
    return Data(*(prepare(data) for data in splits))


# Made once: a new algorithm would be compiled anew.
@ft.cache
def make_algorithms() -> dict[str, Any]:
    problem = hpo.Problem(train_loss, val_loss)
    args = (problem, optax.sgd(0.02, momentum=0.9), optax.adam(0.05))
    options: Any = dict(inner_steps=INNER_STEPS)
    return {
        T1T2: hpo.T1T2(*args, **options),
        GREEDY: hpo.Greedy(*args, **options),
        DISTILL: hpo.HyperDistill(*args, **options, estimation_period=50),
    }


def train(name: str, task: Task, callback: Callable[..., bool]) -> None:
    """Trains by one method until `callback` says that the time is over. It is called
    after each trial of a search, and as often in a single training. Where nothing is
    searched for, the start is the middle of the range of the searches."""
    (low, high), algorithms = make_range(), make_algorithms()
    middle = jax.tree.map(lambda x, y: (x + y) / 2, low, high)
    train, val = (
        hpo.Minibatch(part, min(size, len(part.labels)))
        for part, size in zip(task.data, (BATCH, VAL_BATCH))
    )
    shared: Any = dict(key=task.key, callback=callback, progress=False)
    single: Any = dict(steps=MANY * task.steps, record_every=task.steps, **shared)
    # Of the algorithm `fit` and `search` take the losses and the way of training.
    plain = algorithms[T1T2]
    if name == DEFAULT:
        hpo.fit(plain, task.net, middle, train, **single)
    elif name in algorithms:
        hpo.tune(algorithms[name], task.net, middle, train, val, **single)
    else:
        factor = FACTOR if name == LONG else 1
        shared |= dict(trials=MANY, steps=factor * task.steps)
        sampler: Any = "tpe" if name == TPE else "random"
        args = (plain, task.net, low, high, train, val)
        hpo.search(*args, sampler=sampler, **shared)


def run(name: str, task: Task, seconds: float, clock: Callable[[], float]) -> Course:
    finished = []

    def stop(state):
        jax.block_until_ready(state.model)
        finished.append((clock() - start, state))
        return finished[-1][0] > seconds

    start = clock()
    train(name, task, stop)
    # The first counts even if it took too long.
    kept = [x for x in finished if x[0] <= seconds] or finished[:1]
    records = []
    for elapsed, state in kept:
        loss, test = (float(x) for x in assess(state.model, task.data))
        if not records or loss < records[-1].val_loss:
            values = hpo.unwrap(state.hyperparams)
            records.append(Record(elapsed, loss, 100 * test, values))
    return Course(records, len(kept))


def look_up(
    courses: list[Course], times: Any
) -> Float[np.ndarray, "kinds seeds times"]:
    """Validation loss and test accuracy as they were at each time."""
    table = []
    for records in (course.records for course in courses):
        ends = [record.seconds for record in records]
        now = np.searchsorted(ends, times, side="right") - 1
        pairs = [(x.val_loss, x.test) for x in records]
        table.append(np.where(now < 0, np.nan, np.transpose(pairs)[:, now]))
    return np.stack(table, axis=1)


def print_table(results: dict[str, list[Course]], steps: int) -> None:
    columns = ("steps", "val. loss", "test, %")
    print(f"{'':20}", *(f"{column:>18}" for column in columns))
    for name, courses in results.items():
        length = INNER_STEPS * steps * (FACTOR if name == LONG else 1)
        rows = [(x.looks * length, *x.records[-1][1:3]) for x in courses]
        print(f"{name:20}", *(f"{describe(x, '.4g', '.2g'):>18}" for x in zip(*rows)))


def draw(results: dict[str, list[Course]], seconds: float, path: str) -> None:
    figure, panels = subplots((11, 4.2), 1, 2)
    # A first trial that took longer than all the time is still shown.
    firsts = [x.records[0].seconds for courses in results.values() for x in courses]
    times = np.linspace(0, max(seconds, *firsts), 400)
    for number, (name, courses) in enumerate(results.items()):
        for axes, values in zip(panels, look_up(courses, times)):
            # Nothing is drawn before all seeds have something to show.
            mean = values.mean(axis=0)
            deviation = values.std(axis=0, ddof=min(1, len(values) - 1))
            colour = f"C{number}"
            axes.plot(times, mean, color=colour, label=name)
            band = (mean - deviation, mean + deviation)
            axes.fill_between(times, *band, color=colour, alpha=0.12, linewidth=0)
    for axes, label in zip(panels, ("validation loss", "test accuracy, %")):
        axes.set(xlabel="seconds", ylabel=f"{label}, best so far")
    panels[1].legend(loc="lower right", ncols=2)
    save(figure, path, *panels)


QUICK = dict(size=100, steps=20, seconds=1.0, seeds=1)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int = 300,
    steps: int = 60,
    seconds: float = 3.0,
    clock: str = "wall",
    seeds: int = 2,
    first: int = 0,
    figure: str = "cifar10.png",
) -> dict[str, list[Course]]:
    results: dict[str, list[Course]] = {name: [] for name in METHODS}
    for seed in range(first, first + seeds):
        data = load_data(dataset, folder, size, seed)
        net_key, key = jr.split(jr.key(seed))
        net = Net(data.train.images.shape[1:], net_key)
        for name in METHODS:
            task = Task(net, data, steps, key)
            if seed == first:  # so that nothing is compiled while the time is taken
                train(name, task, lambda state: True)
            results[name].append(run(name, task, seconds, CLOCKS[clock]))
    print_table(results, steps)
    draw(results, seconds, figure)
    print(f"\nThe course is in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        dataset={"choices": ("digits", "cifar10")},
        steps="updates in a trial",
        seconds="of each method",
        clock={"choices": tuple(CLOCKS)},
    )
