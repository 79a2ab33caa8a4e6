r"""Compares gradient-based tuning with random search and Optuna's TPE, as the same 1000
weights share 1, 10, 100 or 1000 weight decays: when does each reach which validation
loss, compilation excluded?

Softmax regression on few images of 10x10 pixels. What counts is the validation loss of
a complete training with the decays found so far. One core suffices.

    python -m docs.experiments.random_search
    taskset -c 0 python -m docs.experiments.random_search --dataset mnist \
        --numbers 1 10 100 1000 \
        --trials 100 --seeds 5
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Scalar

from . import image_data
from .common import command, cross_entropy, describe, save, subplots


SIDE, CLASSES = 10, 10
# The decays as they are shared: by all weights, by those of a class, by those of a
# pixel, and one for each weight.
SHAPES = {1: (1, 1), 10: (1, CLASSES), 100: (SIDE**2, 1), 1000: (SIDE**2, CLASSES)}
LOW, HIGH = float(np.log(1e-5)), float(np.log(1e-1))  # of the logarithm of a decay
TEST = 2000  # images at most
STEPS = 500  # of a complete training
INNER = optax.sgd(0.3, momentum=0.9)
RANDOM, TPE = "random search", "TPE"
EXACT, WINDOW, ONE_STEP = "Unrolled, restarted", "Unrolled, online", "T1T2, online"


class Data(NamedTuple):
    x: Float[Array, "n pixels"]
    y: Int[Array, " n"]


class Model(NamedTuple):
    weights: Float[Array, "pixels classes"]
    bias: Float[Array, " classes"]


class Method(NamedTuple):
    algorithm: hpo.AbstractBilevelOptimizer
    steps: int
    restart_every: int | None
    record_every: int  # steps between two complete trainings


class Point(NamedTuple):
    """The end of a complete training."""

    seconds: float
    val_loss: float
    state: hpo.BilevelState


class Course(NamedTuple):
    seconds: Float[np.ndarray, " points"]
    val_losses: Float[np.ndarray, " points"]  # the lowest so far
    test_loss: float  # of the model with the lowest validation loss


class Result(NamedTuple):
    training: float  # seconds of a complete training
    courses: dict[str, Course]


def load_data(dataset: str, folder: str | None, seed: int, size: int) -> list[Data]:
    val_size = 500 if dataset == "digits" else 1000
    splits = image_data.load(dataset, folder=folder, size=val_size, seed=seed)

    def prepare(part: image_data.Images, count: int) -> Data:
        images = jnp.asarray(part.images[:count].mean(axis=-1))
        small = jax.image.resize(images, (len(images), SIDE, SIDE), "linear")
        return Data(small.reshape(-1, SIDE**2), jnp.asarray(part.labels[:count]))

    return [prepare(x, n) for x, n in zip(splits, (size, val_size, TEST), strict=True)]


def val_loss(model: Model, log_decays: Any, data: Data, key: None) -> Scalar:
    return cross_entropy(data.x @ model.weights + model.bias, data.y)


def train_loss(
    model: Model, log_decays: Float[Array, "pixels classes"], data: Data, key: None
) -> Scalar:
    penalty = jnp.sum(jnp.exp(log_decays) * model.weights**2) / 2
    return val_loss(model, log_decays, data, key) + penalty


PROBLEM = hpo.Problem(train_loss, val_loss)
MODEL = Model(jnp.zeros((SIDE**2, CLASSES)), jnp.zeros(CLASSES))
# One step of it is a complete training, as the hyperparameters stay where they are.
TRAINER = hpo.T1T2(PROBLEM, INNER, optax.set_to_zero(), inner_steps=STEPS)


def make_methods() -> dict[str, Method]:
    def outer(rate: float, steps: int) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(rate, steps)
        # A short memory, as there are few steps; and the box that is searched.
        adam = optax.adam(schedule, b1=0.5, b2=0.9)
        box = hpo.project(optax.projections.projection_box, LOW, HIGH)
        return optax.chain(adam, box)

    exact = hpo.Unrolled(PROBLEM, INNER, outer(0.4, 40), inner_steps=STEPS)
    window = hpo.Unrolled(PROBLEM, INNER, outer(0.4, 40), inner_steps=STEPS // 5)
    one_step = hpo.T1T2(PROBLEM, INNER, outer(0.1, 300), inner_steps=10)
    return {
        EXACT: Method(exact, steps=40, restart_every=1, record_every=1),
        WINDOW: Method(window, steps=40, restart_every=None, record_every=4),
        ONE_STEP: Method(one_step, steps=300, restart_every=None, record_every=30),
    }


def train(log_decays: Any, data: list[Data]) -> hpo.BilevelState:
    return TRAINER.step(TRAINER.init(MODEL, log_decays), *data[:2])


class Recorder:
    """A callback that notes when each complete training has ended, and its loss."""

    def __init__(self, retrain: Callable[[Any], hpo.BilevelState] | None = None):
        self.points: list[Point] = []
        self._retrain = retrain
        # Of this process alone, whatever else the machine does.
        self._start = time.process_time()

    def __call__(self, state: hpo.BilevelState) -> None:
        if self._retrain is not None:
            state = self._retrain(state.hyperparams)
        loss = float(state.metrics.val_loss)
        seconds = time.process_time() - self._start
        self.points.append(Point(seconds, loss, state))


def search(
    sampler: Any, shape: tuple[int, int], data: list[Data], trials: int, seed: int
) -> list[Point]:
    low, high = jnp.full(shape, LOW), jnp.full(shape, HIGH)
    recorder = Recorder()
    options: Any = dict(progress=False, callback=recorder, sampler=sampler)
    options |= dict(trials=trials, steps=1, key=jr.key(seed))
    hpo.search(TRAINER, MODEL, low, high, *data[:2], **options)
    return recorder.points


def tune(
    method: Method, start: Any, data: list[Data], steps: int | None = None
) -> list[Point]:
    # A run with a restart at each step is made of complete trainings already. Online,
    # the decays so far are taken to one, and the time that this takes counts.
    retrain = (lambda x: train(x, data)) if method.restart_every is None else None
    recorder = Recorder(retrain)
    options: Any = dict(progress=False, callback=recorder)
    options |= dict(steps=steps or method.steps, record_every=method.record_every)
    options["restart_every"] = method.restart_every
    hpo.tune(method.algorithm, MODEL, start, *data[:2], key=None, **options)
    return recorder.points


def as_course(points: list[Point], test: Data) -> Course:
    losses = np.array([point.val_loss for point in points])
    best = points[int(np.argmin(losses))].state.model
    seconds = np.array([point.seconds for point in points])
    lowest = np.minimum.accumulate(losses)
    return Course(seconds, lowest, float(val_loss(best, None, test, None)))


def warm_up(shape: tuple[int, int], methods: dict[str, Method], data: Any) -> None:
    """Compiles everything."""
    for sampler in ("random", "tpe"):
        search(sampler, shape, data, trials=2, seed=0)
    for method in methods.values():
        tune(method, jnp.full(shape, LOW), data, steps=method.record_every)
    train(jnp.full(shape, LOW), data)


def compare(
    shape: tuple[int, int], methods: Any, data: list[Data], trials: int, seed: int
) -> Result:
    points = {RANDOM: search("random", shape, data, trials, seed)}
    points[TPE] = search("tpe", shape, data, trials, seed)
    start = points[RANDOM][0].state.hyperparams  # what random search tried first
    for name, method in methods.items():
        points[name] = tune(method, start, data)
    begin = time.process_time()
    for _ in range(10):
        jax.block_until_ready(train(start, data))
    training = (time.process_time() - begin) / 10
    return Result(training, {k: as_course(v, data[2]) for k, v in points.items()})


def train_on_all(data: list[Data], decay: float = 1e-4) -> float:
    """The test loss if the validation images are trained on as well, untuned."""
    joined = Data(*(jnp.concatenate(x) for x in zip(*data[:2], strict=True)))
    model = train(jnp.full((1, 1), np.log(decay)), [joined, data[1]]).model
    return float(val_loss(model, None, data[2], None))


def seconds_to_reach(course: Course, target: float) -> float:
    """Infinite where the validation loss never comes as low as that."""
    reached = np.flatnonzero(course.val_losses <= target)
    return float(course.seconds[reached[0]]) if len(reached) > 0 else np.inf


def fractions_of_random(
    results: list[Result], name: str
) -> Float[np.ndarray, "2 seeds"]:
    """The time to random search's last loss, as a fraction of all of its time and of
    that of its trainings alone."""
    fractions = []
    for training, courses in results:
        random = courses[RANDOM]
        seconds = seconds_to_reach(courses[name], random.val_losses[-1])
        budgets = random.seconds[-1], training * len(random.seconds)
        fractions.append([seconds / budget for budget in budgets])
    return np.array(fractions).T


def describe_finite(values: Any, digits: str = ".3f") -> str:
    finite = np.asarray(values)[np.isfinite(values)]
    if len(finite) > 1:
        return describe(finite, digits)
    return f"{finite[0]:{digits}}" if len(finite) == 1 else "-"


def print_header() -> None:
    titles = ("val. loss", "test loss", "seconds", "reached", "of all", "of training")
    print(f"{'':5}{'':20}", *(f"{title:>16}" for title in titles))


def print_rows(number: int, results: list[Result]) -> None:
    for name in results[0].courses:
        courses = [result.courses[name] for result in results]
        whole, alone = fractions_of_random(results, name)
        reached = f"{np.isfinite(whole).sum()} of {len(whole)}"
        cells = [describe_finite([x.val_losses[-1] for x in courses], ".4f")]
        cells.append(describe_finite([x.test_loss for x in courses], ".4f"))
        cells.append(describe_finite([x.seconds[-1] for x in courses], ".2f"))
        cells += [reached, describe_finite(whole), describe_finite(alone)]
        print(f"{number:<5}{name:20}", *(f"{cell:>16}" for cell in cells))
    training = describe_finite([1000 * x.training for x in results], ".1f")
    print(f"{'':5}a complete training: {training} ms", flush=True)


def draw(results: dict[int, list[Result]], path: str) -> None:
    size = 3.4 * len(results) + 0.6, 4.2
    figure, panels = subplots(size, 1, len(results), sharey=True, squeeze=False)
    panels = panels[0]
    for axes, (number, several) in zip(panels, results.items(), strict=True):
        for i, name in enumerate(several[0].courses):
            courses = [result.courses[name] for result in several]
            grid, values = join(courses)
            axes.plot(grid, values.mean(axis=0), color=f"C{i}", label=name)
            edges = values.min(axis=0), values.max(axis=0)
            axes.fill_between(grid, *edges, color=f"C{i}", alpha=0.15, linewidth=0)
        title = f"{number} weight decay" + "s" * (number > 1)
        axes.set(xscale="log", xlabel="seconds", title=title)
    panels[0].set_ylabel("lowest validation loss so far")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    save(figure, path, *panels)


def join(courses: list[Course]) -> tuple[np.ndarray, Float[np.ndarray, "seeds times"]]:
    """The courses at the same times."""
    first = max(course.seconds[0] for course in courses)
    last = max(course.seconds[-1] for course in courses)
    grid = np.geomspace(first, last, 300)
    at = lambda x: x.val_losses[np.searchsorted(x.seconds, grid, side="right") - 1]
    return grid, np.stack([at(course) for course in courses])


QUICK = dict(numbers=(100,), trials=5)


def main(
    *,
    dataset: str = "digits",
    folder: str | None = None,
    numbers: tuple[int, ...] = (1, 10, 100),
    size: int = 100,
    trials: int = 20,
    seeds: int = 1,
    first: int = 0,
    figure: str = "random_search.png",
) -> dict[int, list[Result]]:
    print_header()
    methods, results = make_methods(), {}
    all_data = [load_data(dataset, folder, first + i, size) for i in range(seeds)]
    for number in numbers:
        warm_up(SHAPES[number], methods, all_data[0])
        results[number] = [
            compare(SHAPES[number], methods, data, trials, first + i)
            for i, data in enumerate(all_data)
        ]
        print_rows(number, results[number])
    on_all = describe_finite([train_on_all(data) for data in all_data], ".4f")
    print(f"\nTest loss, trained on train and validation images, one decay: {on_all}")
    draw(results, figure)
    print(f"The courses are in {figure}.")
    return results


if __name__ == "__main__":
    command(main, __doc__, QUICK, numbers={"choices": SHAPES}, trials="of each search")
