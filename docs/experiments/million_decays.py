"""Tunes one weight decay for every weight of an MLP, more than a million of them, until
50 validation images are fitted without an error.

The sanity check of Lorraine et al., "Optimizing Millions of Hyperparameters by Implicit
Differentiation", AISTATS 2020. Such an overfit is no use in itself. It shows that the
hypergradient tells for each decay which way to move: the same updates, each given to
another weight, stand beside it.

    python -m docs.experiments.million_decays
    python -m docs.experiments.million_decays --dataset mnist --seeds 3
"""

import time
from collections.abc import Sequence
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

from . import image_data
from .common import (
    apply_layers,
    command,
    cross_entropy,
    describe,
    make_layers,
    mean_and_error,
    Method,
    plain_training,
    save,
    subplots,
)


HIDDEN = {"digits": (1024, 1024)}  # smaller images, so a wider second layer
DEFAULT_HIDDEN = (1024, 256)
START, LOWER, UPPER = 1e-2, 1e-5, 1.0  # of each weight decay
INNER, INNER_STEPS = optax.sgd(0.05, momentum=0.9), 10
NEUMANN = hpo.Neumann(terms=10, learning_rate=0.1)
# The hypergradient of one decay of a million is far below the usual `eps`, which would
# hold all of them where they are.
OUTER = optax.rmsprop(0.1, eps=1e-24)
TEST = 2000  # images at most
IMPLICIT, T1T2, NONE = "Implicit", "T1T2", "no tuning"
SWAPPED = "Implicit, swapped"
PARTS = ("train", "validation", "test")


class Data(NamedTuple):
    x: Float[Array, "n features"]
    y: Int[Array, " n"]


class Course(NamedTuple):
    steps: list[int]  # those whose accuracies and losses are recorded
    accuracies: list[list[float]]  # of each of `PARTS`, in percent
    val_losses: list[float]
    seconds: list[float]  # of each step
    reports: list[Any]  # of each step of `Implicit`


def load_data(dataset: str, folder: str | None, size: int, seed: int) -> list[Data]:
    splits = image_data.load(dataset, folder=folder, size=size, seed=seed)
    flat = [(x.images.reshape(len(x.labels), -1), x.labels) for x in splits]
    return [Data(jnp.asarray(x[:TEST]), jnp.asarray(y[:TEST])) for x, y in flat]


def make_model(features: int, hidden: Sequence[int], seed: int) -> list[eqx.nn.Linear]:
    return make_layers((features, *hidden, 10), jr.key(seed))


def val_loss(model: Any, decay: Any, data: Data, key: None) -> Scalar:
    return cross_entropy(apply_layers(model, data.x), data.y)


def train_loss(model: Any, decay: Any, data: Data, key: None) -> Scalar:
    penalty = jtu.tree_map(lambda d, w: jnp.sum(d * w**2) / 2, decay, model)
    return val_loss(model, None, data, key) + sum(jtu.tree_leaves(penalty))


def make_methods() -> dict[str, Method]:
    args = (hpo.Problem(train_loss, val_loss), INNER, OUTER)
    solver: Any = dict(linear_solver=NEUMANN, warm_start=False, curvature_steps=5)
    implicit = hpo.Implicit(*args, inner_steps=INNER_STEPS, **solver)
    t1t2 = hpo.T1T2(*args, inner_steps=INNER_STEPS)
    return {
        IMPLICIT: Method(implicit.init, implicit.step),
        T1T2: Method(t1t2.init, t1t2.step),
        SWAPPED: Method(implicit.init, implicit.step),
        NONE: plain_training(train_loss, INNER, INNER_STEPS),
    }


@jax.jit
def assess(model: Any, data: list[Data]) -> tuple[list[Scalar], Scalar]:
    """The accuracy on each part, and the validation loss."""
    right = [jnp.argmax(apply_layers(model, x), axis=1) == y for x, y in data]
    return [jnp.mean(x) for x in right], val_loss(model, None, data[1], None)


def start_state(method: Method, model: Any) -> Any:
    decay = jtu.tree_map(
        lambda w: hpo.Interval(jnp.full(w.shape, START), LOWER, UPPER), model
    )
    return method.init(model, decay)


def compile_step(method: Method, model: Any, data: list[Data]) -> Any:
    arguments = start_state(method, model), *data[:2]
    return jax.jit(lambda *args: method.step(*args)).lower(*arguments).compile()


def swap_updates(before: Any, after: Any) -> Any:
    """Gives each decay the update of another one of the same array."""
    swap = lambda old, new: old + jnp.flip(new - old)
    hyperparams = jtu.tree_map(swap, before.hyperparams, after.hyperparams)
    return eqx.tree_at(lambda state: state.hyperparams, after, hyperparams)


def run(state: Any, step: Any, data: list[Data], steps: int, swap: bool) -> Course:
    course, every = Course([], [], [], [], []), max(1, steps // 20)
    for number in range(steps + 1):
        if number % every == 0 or number == steps:
            accuracies, loss = assess(state.model, data)
            course.steps.append(number)
            course.accuracies.append([100 * float(x) for x in accuracies])
            course.val_losses.append(float(loss))
        if number < steps:
            before, start = state, time.perf_counter()
            state = jax.block_until_ready(step(before, *data[:2]))
            course.seconds.append(time.perf_counter() - start)
            state = swap_updates(before, state) if swap else state
            if isinstance(state, hpo.BilevelState):
                course.reports.append(state.metrics.diagnostics)
    return course


def with_error(values: Sequence[float]) -> str:
    return describe(values, ".3g", ".2g", of=mean_and_error)


def print_results(results: dict[str, list[Course]], steps: dict[str, Any]) -> None:
    print(f"{'at the end':18}", *(f"{part + ', %':>14}" for part in PARTS), end="")
    print(f"{'val. loss':>18}{'s a step':>10}{'MB':>7}")
    for name, courses in results.items():
        cells = [with_error(x) for x in zip(*(y.accuracies[-1] for y in courses))]
        loss = with_error([course.val_losses[-1] for course in courses])
        seconds = np.median([course.seconds for course in courses])
        memory = steps[name].memory_analysis().temp_size_in_bytes / 1e6
        print(f"{name:18}", *(f"{cell:>14}" for cell in cells), end="")
        print(f"{loss:>18}{seconds:10.3f}{memory:7.1f}")


def print_reports(courses: list[Course]) -> None:
    print(f"\n{IMPLICIT}, a line for each seed{'curvature':>26}{'gradient norm':>20}")
    print(
        "val. at 100 %  failed solves  residual     least     last     first     last"
    )
    for course in courses:
        perfect = [x for x, y in zip(course.steps, course.accuracies) if y[1] == 100]
        failed = [bool(x.result != hpo.RESULTS.successful) for x in course.reports]
        where = ", ".join(str(x + 1) for x in np.flatnonzero(failed))
        residual = np.median([float(x.residual) for x in course.reports])
        curvature = [float(x.curvature) for x in course.reports]
        norm = [float(x.gradient_norm) for x in course.reports]
        print(f"{min(perfect, default='-'):>13}{where:>15}{residual:10.2f}", end="")
        print(f"{min(curvature):10.3f}{curvature[-1]:9.3f}{norm[0]:10.3f}", end="")
        print(f"{norm[-1]:9.3f}")


def draw(results: dict[str, list[Course]], path: str) -> None:
    figure, panels = subplots((12, 4), 1, 3, sharey=True)
    for axes, (i, part) in zip(panels, enumerate(PARTS)):
        for number, (name, courses) in enumerate(results.items()):
            steps = courses[0].steps
            values = np.array([course.accuracies for course in courses])[:, :, i]
            axes.plot(steps, values.T, color=f"C{number}", linewidth=0.6, alpha=0.5)
            axes.plot(steps, values.mean(axis=0), color=f"C{number}", label=name)
        axes.set(xlabel="updates of the decays", title=part)
        if i == 0:
            axes.set(ylabel="accuracy, %", ylim=(0, 102))
            axes.legend(loc="lower right")
    save(figure, path, *panels)


QUICK = dict(hidden=(64,), size=20, steps=20)


def main(
    *,
    dataset: str = "digits",
    folder: str | None = None,
    size: int = 50,
    hidden: Sequence[int] | None = None,
    steps: int = 30,
    seeds: int = 1,
    first: int = 0,
    figure: str = "million_decays.png",
) -> dict[str, list[Course]]:
    methods, compiled = make_methods(), {}
    results: dict[str, list[Course]] = {name: [] for name in methods}
    for seed in range(first, first + seeds):
        data = load_data(dataset, folder, size, seed)
        widths = hidden or HIDDEN.get(dataset, DEFAULT_HIDDEN)
        model = make_model(data[0].x.shape[1], widths, seed)
        for name, method in methods.items():
            if name not in compiled:
                same = compiled.get(IMPLICIT) if name == SWAPPED else None
                compiled[name] = same or compile_step(method, model, data)
            start, swap = start_state(method, model), name == SWAPPED
            results[name].append(run(start, compiled[name], data, steps, swap))
        if seed == first:
            count = sum(x.size for x in jtu.tree_leaves(model))
            print(f"{count} hyperparameters, {size} validation images")
    print_results(results, compiled)
    print_reports(results[IMPLICIT])
    draw(results, figure)
    print(f"\nThe course is in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        size="of train and validation",
        hidden={"help": "widths of the layers", "type": int, "nargs": "+"},
        steps="updates of the decays",
    )
