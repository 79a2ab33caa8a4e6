"""What goes wrong with one hold-out set, many hyperparameters and no stop, and what
folds and an anchor change.

    python -m docs.experiments.generalisation.overfitting --folder DATA --figure out.png

Softmax regression on 1100 images of 10 x 10 pixels, a decay for each of its 1000
weights, `Unrolled(50)` going on, Adam with rate 0.1. After some updates a model is
trained afresh on all 1100 images, and its accuracy on the test is compared with that of
the decay 1e-4 and of 3e-3, trained on all of them too. The validation loss is what the
tuning sees: that of the hold-out set, or the mean over the folds.
"""

import dataclasses
import functools as ft
import math
import pathlib
import warnings

import equinox as eqx
import eqx_hpo as hpo
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax

from ..common import command, mean_and_error, save, subplots, write_json
from . import problems
from .__main__ import draw, FILES
from .task import Data, final, FOLDS, over_seeds, Task


ROWS, START = 1100, 3e-3
MARKS = (3, 10, 30, 60)
# The number of folds that are held out in turn, and the width of the anchor.
WAYS = {
    "one hold-out set": (1, None),
    "five folds": (FOLDS, None),
    "one hold-out set, anchor": (1, 1.0),
    "five folds, anchor": (FOLDS, 1.0),
}


def make_task(folder: pathlib.Path) -> Task:
    task = problems.softmax(folder)
    shape = task.default["log decay"].shape
    return dataclasses.replace(
        task,
        make=ft.partial(problems._mnist_rows, folder / "mnist.npz", (100, 10), ROWS),
        default={"log decay": np.full(shape, math.log(START), np.float32)},
        loss=problems._entropy,
        steps=500,
    )


def tune(task: Task, count: int, width: float | None, data: Data, key):
    """The decays and the validation loss on the way."""
    assert task.train_loss is not None
    train, val = hpo.folds(data.pool, FOLDS, key=key)
    train, val = jtu.tree_map(lambda x: x[:count], (((), train), val))
    strength = 0.0 if width is None else 1 / (ROWS * width**2)
    bounds = [
        jtu.tree_map(jnp.asarray, {k: ends[k] for k in task.default})
        for ends in (task.low, task.high)
    ]
    outer = optax.chain(
        hpo.anchor(strength),
        optax.adam(0.1),
        hpo.project(optax.projections.projection_box, *bounds),
    )
    problem = hpo.Problem(
        task.train_loss, lambda model, h, batch, key: task.loss(model, batch)
    )
    single = hpo.Unrolled(problem, task.inner, outer, inner_steps=50)
    algorithm = hpo.MetaLearner(single, count)
    start = jtu.tree_map(jnp.asarray, task.default)
    state = algorithm.init(data.model, start, train=train)
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(arrays, _):
        state = algorithm.step(eqx.combine(arrays, static), train, val)
        out = (state.hyperparams, state.metrics.val_loss)
        return eqx.filter(state, eqx.is_array), out

    return lax.scan(step, arrays, None, MARKS[-1])[1]


def compare(task: Task, count: int, width: float | None, data: Data, key):
    """Accuracy on the test and validation loss, after each of the marks."""
    path, losses = tune(task, count, width, data, key)
    at = jnp.array(MARKS) - 1
    some = jtu.tree_map(lambda x: x[at], path)
    return lax.map(lambda h: final(task, data, h, key)[0], some), losses[at]


def run(task: Task, seeds):
    data, keys = draw(task, seeds)
    fixed = {}
    for decay in (1e-4, START):
        values = {"log decay": jnp.full_like(task.default["log decay"], jnp.log(decay))}
        one = lambda data, key, values=values: final(task, data, values, key)[0]
        fixed[str(decay)] = np.asarray(over_seeds(one, data, keys)).tolist()
    ways = {}
    for name, settings in WAYS.items():
        found = over_seeds(ft.partial(compare, task, *settings), data, keys)
        accuracy, loss = (np.asarray(x).T.tolist() for x in found)
        ways[name] = {"accuracy": accuracy, "loss": loss}
        show(name, ways[name], fixed)
    return {"marks": MARKS, "fixed": fixed, "ways": ways}


def show(name: str, way, fixed) -> None:
    best = np.array(fixed[str(START)])
    text = f"{name:28}"
    for accuracy, loss in zip(np.array(way["accuracy"]), np.array(way["loss"])):
        gain = accuracy - best
        mean, error = mean_and_error(gain)
        text += f"  {mean:+.2f} ± {error:.2f} ({loss.mean():.3f})"
    print(text, flush=True)


def draw_course(row, path: str) -> None:
    figure, (left, right) = subplots((9, 3.6), 1, 2)
    best = np.array(row["fixed"][str(START)])
    for number, (name, way) in enumerate(row["ways"].items()):
        gains = np.array(way["accuracy"]) - best
        means, errors = zip(*map(mean_and_error, gains))
        look = dict(color=f"C{number % 2}", ls="-" if number < 2 else "--", label=name)
        left.plot(row["marks"], np.mean(way["loss"], axis=1), marker=".", **look)
        right.errorbar(row["marks"], means, errors, marker=".", **look)
    right.axhline(0, color="black", lw=0.8)
    left.set(xlabel="updates", ylabel="validation loss, which tuning sees")
    right.set(xlabel="updates", ylabel=f"test accuracy, points over decay {START:g}")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    save(figure, path, left, right, dpi=150)


def main(
    *,
    folder: pathlib.Path,
    seeds: int = 10,
    json: str | None = None,
    figure: str | None = None,
) -> None:
    warnings.simplefilter("ignore")
    found = run(make_task(folder), range(seeds))
    write_json(json, found)
    if figure is not None:
        draw_course(found, figure)


if __name__ == "__main__":
    command(main, __doc__, **FILES)
