r"""Learns the learning rate of each layer of a small MLP in two ways: greedily, while
it is trained, and as a schedule, by forward mode through the whole of training.

The first is cheap and short-sighted: within one step, a small rate looks better than it
is (Wu et al., "Understanding Short-Horizon Bias in Stochastic Meta-Optimization", ICLR
2018). The second is that of Micaelli and Storkey, "Gradient-based Hyperparameter
Optimization Over Long Horizons", NeurIPS 2021. Constant rates and cosine decay, chosen
from a grid, stand beside them, and so do optimisers that promise to need no rate or no
schedule: Prodigy and the schedule-free ones of Optax.

    python -m docs.experiments.learning_rates
    python -m docs.experiments.learning_rates --dataset fashion_mnist --size 3000 \
        --steps 2000 --seeds 5
"""

import functools as ft
import time
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Scalar
from optax import contrib

from . import image_data
from .common import (
    apply_layers,
    collect,
    command,
    cross_entropy,
    describe,
    make_layers,
    mean_and_error,
    save,
    subplots,
)


HIDDEN, LAYERS = 16, 2
BATCH, MOMENTUM = 16, 0.9
WINDOWS = 10  # of the learned schedule, each with a rate for each layer
POINTS = 50  # in the course of a training
START = 0.01  # of each learned rate
GRID = (0.003, 0.01, 0.03, 0.1, 0.3)  # constant rates, and peaks of cosine decay
ONLINE_RATE, SCHEDULE_RATE = 0.03, 0.1  # of Adam, which moves the logarithm of a rate

CONSTANT, COSINE = "best constant rate", "best cosine decay"
ONLINE, LEARNED = "online, greedy", "schedule, non-greedy"
OTHER_START = "the same, other first weights"
FIXED, FIXED_SEEN = "schedule, one order", "the same, on that order"
PRODIGY, PRODIGY_COSINE = "Prodigy", "Prodigy, cosine decay"
FREE_SGD, FREE_ADAM = "schedule-free SGD", "schedule-free AdamW"
BEST_SGD, BEST_ADAM = f"best {FREE_SGD}", f"best {FREE_ADAM}"
FREE = (PRODIGY, PRODIGY_COSINE, FREE_SGD, BEST_SGD, FREE_ADAM, BEST_ADAM)
MULTIPLES = (0.1, 0.3, 1.0, 3.0, 10.0)  # of Optax's rate, for the best ones
SHOWN = (CONSTANT, COSINE, ONLINE, LEARNED)  # in the figure


class Data(NamedTuple):
    x: Float[Array, "n pixels"]
    y: Int[Array, " n"]


class Course(NamedTuple):
    rates: Float[Any, "steps layers"]
    val_losses: Float[Any, " points"]
    model: Any


class Row(NamedTuple):
    course: Course
    losses: list[float]  # train, validation, test
    accuracy: float  # on test, in percent
    seconds: float  # of the CPU, to find the rates; where they are found in the
    # training, with it


def load_data(dataset: str, folder: str | None, size: int | None, seed: int):
    """Images of 4x4 or 7x7 pixels, so that the small model cannot learn them by heart:
    the gradient of a minibatch then remains noisy."""
    parts = image_data.load(dataset, folder=folder, size=size, seed=seed)
    factor = 2 if dataset == "digits" else 4
    return [Data(shrink(x.images, factor), jnp.asarray(x.labels)) for x in parts]


def shrink(images: Any, factor: int) -> Float[Array, "n pixels"]:
    n, height, width, _ = images.shape
    blocks = images.reshape(n, height // factor, factor, width // factor, factor, -1)
    return jnp.asarray(blocks.mean((2, 4)).reshape(n, -1))


def make_model(pixels: int, seed: int) -> list[eqx.nn.Linear]:
    return make_layers((pixels, HIDDEN, 10), jr.key(seed))


def loss(model: Any, rates: Any, data: Data, key: None) -> Scalar:
    return cross_entropy(apply_layers(model, data.x), data.y)


def scale_layers(rates: Float[Array, " layers"]) -> optax.GradientTransformation:
    """Multiplies the updates of each layer by minus its rate."""

    def scale(updates, params):
        del params
        scaled = zip(rates, updates, strict=True)
        return [jtu.tree_map(lambda x: -rate * x, layer) for rate, layer in scaled]

    return optax.stateless(scale)


def make_inner(rates: Float[Array, " layers"]) -> optax.GradientTransformation:
    return optax.chain(optax.trace(MOMENTUM), scale_layers(rates))


def make_free(name: str, multiple: Scalar | float, steps: int) -> Any:
    """Optimisers as Optax makes them, at a multiple of Optax's own rate."""
    makers = {
        PRODIGY: lambda: contrib.prodigy(multiple),
        PRODIGY_COSINE: lambda: contrib.prodigy(
            optax.cosine_decay_schedule(multiple, steps)
        ),
        FREE_SGD: lambda: contrib.schedule_free_sgd(multiple),
        FREE_ADAM: lambda: contrib.schedule_free_adamw(0.0025 * multiple),
    }
    return makers[name]()


def make_batches(train: Data, order: int) -> hpo.Minibatch:
    """Shuffled epochs: batch number `i` follows from `order` and `i` alone."""
    return hpo.Minibatch(train, BATCH, replacement=False, seed=order)


@jax.jit
def train_with(
    rates: Float[Array, "steps layers"], model: Any, batches: hpo.Minibatch, val: Data
) -> Course:
    """A training with the rates of each step given."""

    def step(carry, now):
        model, opt_state = carry
        number, rates = now
        gradient = jax.grad(loss)(model, None, batches.draw(number, number, None), None)
        updates, opt_state = make_inner(rates).update(gradient, opt_state)
        return (optax.apply_updates(model, updates), opt_state), None

    numbers, carry = jnp.arange(len(rates)), (model, make_inner(rates[0]).init(model))
    model, val_losses = follow(step, carry, (numbers, rates), lambda x: x[0], val)
    return Course(rates, val_losses, model)


@ft.partial(jax.jit, static_argnames=("name", "steps"))
def train_free(
    name: str,
    multiple: Scalar | float,
    model: Any,
    batches: hpo.Minibatch,
    val: Data,
    steps: int,
) -> Course:
    """A training by an optimiser that promises to need no schedule."""
    optimiser, averages = (
        make_free(name, multiple, steps),
        name in (FREE_SGD, FREE_ADAM),
    )

    def step(carry, number):
        model, opt_state = carry
        gradient = jax.grad(loss)(model, None, batches.draw(number, number, None), None)
        updates, opt_state = optimiser.update(gradient, opt_state, model)
        return (optax.apply_updates(model, updates), opt_state), None

    def read(carry):
        model, opt_state = carry
        return (
            contrib.schedule_free_eval_params(opt_state, model) if averages else model
        )

    carry = (model, optimiser.init(model))
    model, val_losses = follow(step, carry, jnp.arange(steps), read, val)
    return Course(jnp.full((steps, LAYERS), jnp.nan), val_losses, model)


def follow(step: Any, carry: Any, inputs: Any, read: Any, val: Data) -> Any:
    """Runs all steps. Returns the model at the end and its losses on the way there."""

    def part(carry, now):
        carry, _ = jax.lax.scan(step, carry, now)
        return carry, loss(read(carry), None, val, None)

    split = lambda x: x.reshape(POINTS, -1, *x.shape[1:])
    carry, val_losses = jax.lax.scan(part, carry, jtu.tree_map(split, inputs))
    return read(carry), val_losses


def find_multiple(
    name: str, model: Any, batches: hpo.Minibatch, val: Data, steps: int
) -> Scalar:
    """The multiple of Optax's rate with the lowest validation loss at the end."""
    train = lambda multiple: train_free(name, multiple, model, batches, val, steps)
    courses = jax.vmap(train)(jnp.array(MULTIPLES))
    return jnp.array(MULTIPLES)[jnp.nanargmin(courses.val_losses[:, -1])]


def choose_from_grid(
    shape: Float[Array, " steps"], model: Any, batches: hpo.Minibatch, val: Data
) -> Float[Array, "steps layers"]:
    """The multiple of `shape` with the lowest validation loss at the end."""
    all_rates = jnp.array(GRID)[:, None, None] * jnp.tile(shape[:, None], LAYERS)
    courses = jax.vmap(lambda rates: train_with(rates, model, batches, val))(all_rates)
    return all_rates[jnp.nanargmin(courses.val_losses[:, -1])]


def train_online(
    algorithm: hpo.T1T2, model: Any, batches: hpo.Minibatch, val: Data, steps: int
) -> Course:
    """A rate for each layer, moved after each training step by a look one step back."""
    hyperparams = hpo.Positive(jnp.full(LAYERS, START))
    args = (algorithm, model, hyperparams, batches, val)
    solution = hpo.tune(*args, steps=steps, key=None, record_every=1)
    history, every = solution.history, steps // POINTS
    losses = history.val_loss[every - 1 :: every]
    return Course(history.hyperparams, losses, solution.model)


def learn_schedule(
    algorithm: hpo.ForwardMode, model: Any, train: Any, val: Data, updates: int
) -> Float[Array, "steps layers"]:
    """A rate for each window and layer, moved after each complete training."""
    rates, every = jnp.full((WINDOWS, LAYERS), START), algorithm.inner_steps // WINDOWS
    args = (algorithm, model, hpo.Schedule(hpo.Positive(rates), every), train, val)
    solution = hpo.tune(*args, steps=updates, key=None, restart_every=1)
    return jnp.repeat(solution.values, every, axis=0)


def make_algorithms(steps: int, updates: int) -> tuple[hpo.T1T2, hpo.ForwardMode]:
    problem = hpo.Problem(loss, loss)
    # Each update of the schedule sees another order of the batches. The falling rate
    # averages over them.
    outer = optax.adam(optax.cosine_decay_schedule(SCHEDULE_RATE, updates))
    schedule = hpo.ForwardMode(problem, make_inner, outer, inner_steps=steps)
    return hpo.T1T2(problem, make_inner, optax.adam(ONLINE_RATE)), schedule


def compare(
    data: list[Data], steps: int, updates: int, seed: int, algorithms: Any
) -> dict[str, Row]:
    """Finds rates on one order of the batches, or on many, and trains on a new one."""
    train, val, _ = data
    pixels, (online, schedule) = train.x.shape[1], algorithms
    model, other = make_model(pixels, seed), make_model(pixels, seed + 1000)
    search, final = (make_batches(train, 2 * seed + i) for i in range(2))
    order = hpo.Stacked(jax.vmap(lambda i: search.draw(i, i, None))(jnp.arange(steps)))
    cosine = (1 + jnp.cos(jnp.pi * jnp.arange(steps) / steps)) / 2
    finders = {
        CONSTANT: lambda: choose_from_grid(jnp.ones(steps), model, search, val),
        COSINE: lambda: choose_from_grid(cosine, model, search, val),
        LEARNED: lambda: learn_schedule(schedule, model, search, val, updates),
        FIXED: lambda: learn_schedule(schedule, model, order, val, updates),
    }
    start = time.process_time()
    course = train_online(online, model, final, val, steps)
    rows = {ONLINE: assess(course, data, time.process_time() - start)}
    for name, find in finders.items():
        start = time.process_time()
        rates = jax.block_until_ready(find())
        seconds = time.process_time() - start
        rows[name] = assess(train_with(rates, model, final, val), data, seconds)
    again = {OTHER_START: (LEARNED, other, final), FIXED_SEEN: (FIXED, model, search)}
    for name, (source, start_model, batches) in again.items():
        rates = rows[source].course.rates
        course = train_with(rates, start_model, batches, val)
        rows[name] = assess(course, data, rows[source].seconds)
    rows |= compare_free(data, steps, model, search, final)
    return {
        name: rows[name] for name in (*SHOWN, OTHER_START, FIXED, FIXED_SEEN, *FREE)
    }


def compare_free(
    data: list[Data],
    steps: int,
    model: Any,
    search: hpo.Minibatch,
    final: hpo.Minibatch,
) -> dict[str, Row]:
    """Trainings without a rate to choose, and with one that is chosen on `search`."""
    rows, best = {}, {BEST_SGD: FREE_SGD, BEST_ADAM: FREE_ADAM}
    for name in FREE:
        start, multiple = time.process_time(), 1.0
        if name in best:
            multiple = find_multiple(best[name], model, search, data[1], steps)
            multiple = jax.block_until_ready(multiple)
        seconds = time.process_time() - start
        args = (best.get(name, name), multiple, model, final, data[1], steps)
        course = jax.block_until_ready(train_free(*args))
        if name not in best:
            seconds = time.process_time() - start
        rows[name] = assess(course, data, seconds)
    return rows


def assess(course: Course, data: list[Data], seconds: float) -> Row:
    losses = [float(loss(course.model, None, part, None)) for part in data]
    guesses = jnp.argmax(apply_layers(course.model, data[-1].x), axis=1)
    accuracy = 100 * float(jnp.mean(guesses == data[-1].y))
    return Row(course, losses, accuracy, seconds)


def print_table(results: dict[str, list[Row]]) -> None:
    names = ("train loss", "val. loss", "test loss", "test acc., %")
    print(f"{'':31}", *(f"{name:>15}" for name in names), f"{'CPU s':>7}")
    for name, rows in results.items():
        columns = [*zip(*(row.losses for row in rows)), [row.accuracy for row in rows]]
        cells = "".join(f"{describe(column):>16}" for column in columns)
        print(f"{name:31}{cells}{np.median([row.seconds for row in rows]):8.1f}")
    test = {
        name: np.array([row.losses[-1] for row in x]) for name, x in results.items()
    }
    print("\ntest loss, minus that of the best cosine decay, mean and standard error")
    for name, losses in test.items():
        gap, error = mean_and_error(losses - test[COSINE])
        print(f"{name:31}{gap:+9.3f} ± {error:.3f}")


def draw(results: dict[str, list[Row]], path: str) -> None:
    figure, (left, right) = subplots((10, 4.4), 1, 2)
    for colour, name in enumerate(SHOWN):
        courses = [row.course for row in results[name]]
        rates = np.exp(np.mean([np.log(x.rates) for x in courses], axis=0))
        steps, look = len(rates), dict(color=f"C{colour}")
        left.plot(np.arange(steps), rates[:, 0], label=name, **look)
        left.plot(np.arange(steps), rates[:, 1], "--", **look)
        losses = np.array([x.val_losses for x in courses])
        x, mean = np.arange(1, POINTS + 1) * steps / POINTS, losses.mean(axis=0)
        deviation = losses.std(axis=0, ddof=min(1, len(losses) - 1))
        right.plot(x, mean, **look)
        right.fill_between(x, mean - deviation, mean + deviation, alpha=0.15, **look)
    left.set(yscale="log", ylim=(1e-3, 0.5))
    left.set_ylabel("learning rate (solid: layer 1, dashed: layer 2)")
    lowest = np.mean([x.course.val_losses for x in results[LEARNED]], axis=0).min()
    right.set(ylabel="validation loss", ylim=(0.9 * lowest, 2.2 * lowest))
    for axes in (left, right):
        axes.set_xlabel("training step")
    figure.legend(loc="outside upper center", ncols=len(SHOWN))
    save(figure, path, left, right)


QUICK = dict(size=200, steps=200, updates=8)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int | None = None,
    steps: int = 1000,
    updates: int = 40,
    seeds: int = 1,
    first: int = 0,
    figure: str = "learning_rates.png",
) -> dict[str, list[Row]]:
    if steps % POINTS or steps % WINDOWS:
        raise SystemExit(f"`steps` must be a multiple of {POINTS} and of {WINDOWS}.")
    algorithms = make_algorithms(steps, updates)

    def of_seed(seed: int) -> dict[str, Row]:
        data = load_data(dataset, folder, size, seed)
        return compare(data, steps, updates, seed, algorithms)

    results = collect(of_seed, seeds, first)
    print_table(results)
    draw(results, figure)
    print(f"\nThe rates and the courses are in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        dataset={"choices": image_data.NAMES[:3]},
        size={"help": "of train and of validation", "type": int},
        steps="of a training",
        updates="of the schedule",
    )
