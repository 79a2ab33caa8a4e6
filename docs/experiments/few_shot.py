"""Few-shot classification: five handwritten characters are told apart after a few steps
of training on a single drawing of each. Every other layer of the network is shared by
all tasks. Those layers are the hyperparameters, learned across tasks; each task trains
the others, from the same start.

    python -m docs.experiments.few_shot
    python -m docs.experiments.few_shot --choose --first 100 --seeds 4 --gammas 0.9 0.99
    python -m docs.experiments.few_shot --episodes 100 --seeds 10

An episode is some inner steps on each of four new tasks. The hyperparameters move after
each step, or after as many as the name of a method says. All methods see the same
networks and tasks. Characters are split into those for learning, with their rotations
by 90 degrees, those for choosing settings (`val`) and those of the test.

The table holds the accuracy on new tasks of characters not learned from, in percent:
mean and 95% interval (Student's t) over the seeds. The `final` one is on the characters
of the test, or with `--choose` again on those of `val`; then its differences to two
methods, seed by seed. Seconds include compilation.
"""

import functools as ft
import time
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar
from scipy import stats

from .common import command, cross_entropy, mean_and_error, save, subplots
from .hyper_cleaning import cut_patches
from .image_data import load_characters


WAYS, SHOTS, QUERIES = 5, 1, 1
TASKS, VAL_TASKS, TEST_TASKS, CHUNK = 4, 100, 500, 100
VAL_CHARACTERS, TEST_CHARACTERS = 12, 24  # the others are for learning
SIZE, CHANNELS, LAYERS, POINTS = 16, 16, 4, 5
OUTER_RATE, GREEDY_RATE, GREEDY_STEPS = 1e-3, 3e-3, 5
PERIOD = 50  # episodes, after which the scale is fitted anew
FIRST_ORDER, ONE_STEP, DISTILL = "first order", "T1-T2", "HyperDistill"


class Batch(NamedTuple):
    """Images as the patches that the first convolution sees.

    The convolutions are products of matrices, with the examples last, since true ones
    run slowly inside compiled loops on CPUs.
    """

    patches: Float[Array, "*tasks pixels height width n"]
    labels: Int[Array, "*tasks n"]


class Tasks(NamedTuple):
    support: Batch
    query: Batch


Characters = Float[np.ndarray, "characters drawings height width"]
Drawings = Float[Array, "*tasks ways each height width"]


class Layer(eqx.Module):
    """Convolution, BatchNorm by the statistics of the batch at hand, and ReLU."""

    weight: Float[Array, "channels pixels"]
    scale: Float[Array, " channels"]
    shift: Float[Array, " channels"]

    def __init__(self, pixels: int, key: PRNGKeyArray):
        self.weight = jr.normal(key, (CHANNELS, pixels)) * pixels**-0.5
        self.scale, self.shift = jnp.ones(CHANNELS), jnp.zeros(CHANNELS)

    def __call__(self, patches: Float[Array, "pixels height width n"]) -> Array:
        x = self.weight @ patches.reshape(len(patches), -1)
        mean = jnp.mean(x, axis=1)
        variance = jnp.mean(x**2, axis=1) - mean**2
        scale = self.scale * lax.rsqrt(variance + 1e-5)
        shift = self.shift - mean * scale
        x = jax.nn.relu(x * scale[:, None] + shift[:, None])
        return x.reshape(CHANNELS, *patches.shape[1:])


class Net(eqx.Module):
    layers: list[Layer]
    weight: Float[Array, "ways features"]
    bias: Float[Array, " ways"]

    def __init__(self, key: PRNGKeyArray):
        pixels = [9] + [4 * CHANNELS] * (LAYERS - 1)
        self.layers = [Layer(*x) for x in zip(pixels, jr.split(key, LAYERS))]
        self.weight = jnp.zeros((WAYS, CHANNELS * (SIZE // 2**LAYERS) ** 2))
        self.bias = jnp.zeros(WAYS)

    def __call__(self, x: Float[Array, "pixels height width n"]) -> Array:
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = layer(cut_blocks(x))
        return (self.weight @ x.reshape(-1, x.shape[-1]) + self.bias[:, None]).T


class Row(NamedTuple):
    val: Float[np.ndarray, "seeds points"]  # at the start and during learning
    final: Float[np.ndarray, " seeds"]  # on the test, or on `val` with `--choose`
    seconds: float


def cut_blocks(x: Float[Array, "channels height width n"]) -> Array:
    """What a 2x2 convolution with stride 2 sees of its input."""
    channels, height, width, n = x.shape
    x = x.reshape(channels, height // 2, 2, width // 2, 2, n)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, height // 2, width // 2, n)


def split(net: Net) -> tuple[Net, Net]:
    """The hyperparameters and the model."""
    parts = lambda net: (net.layers, net.weight, net.bias)
    shared = [i % 2 == 1 for i in range(LAYERS)]
    return hpo.partition(net, eqx.tree_at(parts, net, (shared, False, False)))


def loss(model: Net, hyperparams: Net, batch: Batch, key: None) -> Scalar:
    del key
    return cross_entropy(eqx.combine(model, hyperparams)(batch.patches), batch.labels)


def accuracy(model: Net, hyperparams: Net, batch: Batch) -> Scalar:
    logits = eqx.combine(model, hyperparams)(batch.patches)
    return jnp.mean(jnp.argmax(logits, axis=1) == batch.labels)


def split_characters(folder: str | None) -> tuple[Characters, Characters, Characters]:
    """Those for learning, for choosing settings and of the test, the same each time."""
    images = load_characters(folder)
    images = images[np.random.default_rng(0).permutation(len(images))]
    images = images.reshape(*images.shape[:2], 14, 2, 14, 2).mean((3, 5))
    images = np.pad(images, [(0, 0)] * 2 + [((SIZE - 14) // 2,) * 2] * 2)
    ends = [TEST_CHARACTERS, TEST_CHARACTERS + VAL_CHARACTERS]
    test, val, train = np.split(images, ends)
    return np.concatenate([np.rot90(train, i, (2, 3)) for i in range(4)]), val, test


def draw_tasks(
    characters: Characters, seeds: Sequence[int], shape: tuple[int, ...]
) -> Int[np.ndarray, "seeds ... ways each"]:
    """Which drawings make up each task, counted through all characters."""
    size, drawings = characters.shape[:2]
    tasks = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        chosen = rng.permuted(np.tile(np.arange(size), (*shape, 1)), axis=-1)
        each = np.tile(np.arange(drawings), (*shape, WAYS, 1))
        each = rng.permuted(each, axis=-1)[..., : SHOTS + QUERIES]
        tasks.append(drawings * chosen[..., :WAYS, None] + each)
    return np.stack(tasks)


@jax.vmap
def to_batch(images: Drawings) -> Batch:
    labels = jnp.repeat(jnp.arange(WAYS), images.shape[1])
    images = images.reshape(1, -1, SIZE, SIZE)
    return Batch(cut_patches(jnp.moveaxis(images, 1, 3)), labels)


def to_tasks(images: Drawings) -> Tasks:
    return Tasks(to_batch(images[:, :, :SHOTS]), to_batch(images[:, :, SHOTS:]))


def make_methods(
    horizon: int,
    rate: float,
    momentum: float,
    gammas: Sequence[float],
    reptile: float,
) -> dict[str, hpo.MetaLearner]:
    problem, inner = hpo.Problem(loss, loss), optax.sgd(rate, momentum=momentum)
    args = (problem, inner, optax.adam(OUTER_RATE))
    methods = {FIRST_ORDER: hpo.FirstOrder(*args), ONE_STEP: hpo.T1T2(*args)}
    for gamma in gammas:
        distill = hpo.HyperDistill(
            *args, horizon=horizon, discount=gamma, estimation_period=PERIOD
        )
        methods[f"{DISTILL} {gamma}"] = distill
    args = (problem, inner, optax.adam(GREEDY_RATE))
    greedy = hpo.Greedy(*args, inner_steps=GREEDY_STEPS, discount=0.9)
    methods[f"greedy 0.9, {GREEDY_STEPS} steps"] = greedy
    learner = ft.partial(hpo.MetaLearner, tasks=TASKS, horizon=horizon, reptile=reptile)
    return {name: learner(method) for name, method in methods.items()}


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0, None, 0))
def learn(
    learner: hpo.MetaLearner,
    net: Net,
    images: Float[Array, "drawings height width"],
    rows: Int[Array, "points episodes tasks ways each"],
) -> Net:
    """The networks at the start and during learning."""
    hyperparams, model = split(net)
    assert learner.horizon is not None
    steps = learner.horizon // learner.inner_steps
    first = to_tasks(images[rows[0, 0]])
    state = learner.init(model, hyperparams, train=first.support, val=first.query)

    def run_episode(state, rows):
        tasks = to_tasks(images[rows])
        step = lambda state, _: (learner.step(state, *tasks), None)
        return lax.scan(step, state, length=steps)

    def run_part(state, rows):
        state, _ = lax.scan(run_episode, state, rows)
        return state, eqx.combine(learner.initialisation(state), state.hyperparams)

    _, nets = lax.scan(run_part, state, rows)
    return jtu.tree_map(lambda x, y: jnp.concatenate([x[None], y]), net, nets)


@eqx.filter_jit
def adapt(
    trainer: hpo.FirstOrder, nets: Net, images: Float[Array, "seeds tasks ..."]
) -> Float[Array, " seeds"]:
    """Accuracy on new tasks after the inner steps."""
    learner = hpo.MetaLearner(trainer, CHUNK, horizon=trainer.inner_steps)

    def of_seed(net_and_images):
        net, images = net_and_images
        tasks = to_tasks(images)
        hyperparams, model = split(net)
        state = learner.step(learner.init(model, hyperparams), *tasks)
        each = jax.vmap(accuracy, in_axes=(0, None, 0))
        return jnp.mean(each(state.model, hyperparams, tasks.query))

    return lax.map(of_seed, (nets, images))


def evaluate(
    trainer: hpo.FirstOrder,
    nets: Net,
    characters: Characters,
    seeds: Sequence[int],
    tasks: int,
) -> Float[np.ndarray, " seeds"]:
    images = characters.reshape(-1, SIZE, SIZE)
    rows = draw_tasks(characters, seeds, (tasks,))
    chunks = np.split(images[rows], tasks // CHUNK, axis=1)
    return 100 * np.mean([adapt(trainer, nets, jnp.asarray(x)) for x in chunks], axis=0)


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    mean, error = mean_and_error(values)
    return mean, float(stats.t.ppf(0.975, max(1, len(values) - 1)) * error)


def print_header() -> None:
    titles = ("val, %", "final, %", f"to {FIRST_ORDER}", f"to {ONE_STEP}", "seconds")
    print(f"{'':22}" + "".join(f"{title:>16}" for title in titles))


def print_row(name: str, rows: dict[str, Row]) -> None:
    row = rows[name]
    columns = [row.val[:, -1], row.final]
    bases = [rows.get(base) for base in (FIRST_ORDER, ONE_STEP)]
    columns += [row.final - base.final for base in bases if base is not None]
    cells = ["{:.2f} ±{:5.2f}".format(*mean_and_interval(x)) for x in columns]
    cells += [""] * (4 - len(cells))
    print(f"{name:22}" + "".join(f"{x:>16}" for x in cells), end="")
    print(f"{row.seconds:16.0f}", flush=True)


def draw_figure(rows: dict[str, Row], episodes: int, path: str) -> None:
    figure, (course, final) = subplots((9, 3.6), 1, 2)
    places = np.linspace(0, episodes, POINTS + 1)
    for number, (name, row) in enumerate(rows.items()):
        means, widths = np.transpose([mean_and_interval(x) for x in row.val.T])
        course.plot(places, means, color=f"C{number}", label=name)
        course.fill_between(places, means - widths, means + widths, alpha=0.15)
        mean, width = mean_and_interval(row.final)
        final.errorbar(mean, name, xerr=width, fmt="o", color=f"C{number}", capsize=3)
    course.set(xlabel="episodes", ylabel="accuracy on characters held out, %")
    course.legend()
    final.invert_yaxis()
    final.set(xlabel="final accuracy, %")
    save(figure, path, course, final)


QUICK = dict(horizon=5, episodes=5, seeds=2)


def main(
    *,
    folder: str | None = None,
    seeds: int = 2,
    first: int = 0,
    episodes: int = 20,
    horizon: int = 20,
    rate: float = 0.02,
    momentum: float = 0.0,
    reptile: float = 0.0,
    gammas: Sequence[float] = (0.99,),
    choose: bool = False,
    figure: str = "few_shot.png",
) -> dict[str, Row]:
    chosen = range(first, first + seeds)
    train, val, test = split_characters(folder)
    images = jnp.asarray(train.reshape(-1, SIZE, SIZE))
    shape = (POINTS, episodes // POINTS, TASKS)
    tasks = jnp.asarray(draw_tasks(train, chosen, shape))
    nets = eqx.filter_vmap(Net)(jnp.stack([jr.key(seed) for seed in chosen]))
    methods = make_methods(horizon, rate, momentum, gammas, reptile)
    args = methods[ONE_STEP].algorithm
    trainer = hpo.FirstOrder(args.problem, args.inner, args.outer, inner_steps=horizon)
    rows = {}
    print_header()
    for name, learner in methods.items():
        start = time.perf_counter()
        found = jax.block_until_ready(learn(learner, nets, images, tasks))
        seconds = time.perf_counter() - start
        stages = [jtu.tree_map(lambda x: x[:, i], found) for i in range(POINTS + 1)]
        course = [evaluate(trainer, x, val, chosen, VAL_TASKS) for x in stages]
        final = course[-1]
        if not choose:
            final = evaluate(trainer, stages[-1], test, chosen, TEST_TASKS)
        rows[name] = Row(np.stack(course, axis=1), final, seconds)
        print_row(name, rows)
    draw_figure(rows, episodes, figure)
    print(f"\nThe course of learning and the accuracies are in {figure}.")
    return rows


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        folder="with omniglot_small1.npz; else a download",
        episodes="a multiple of 5",
        horizon="inner steps",
        rate="of the inner steps",
        reptile="its rate",
        choose="do not use the test",
    )
