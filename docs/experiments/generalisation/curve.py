"""Where black-box search overtakes: the error on the test against the budget, with 1, 9
and 1000 hyperparameters.

    python -m docs.experiments.generalisation.curve --folder DATA --json curve.json

Budgets are trainings on each fold, as in the table. Ours starts from the default here,
without a grid, and takes as many updates as the budget pays for; the values are the
mean of the second half. Random search and TPE take the best of as many trials; `shared`
is a grid of as many points, of one value for each group.
"""

import dataclasses
import pathlib
import warnings

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ..common import command, write_json
from . import recipe, rivals
from .__main__ import draw, FILES
from .figures import curves
from .problems import kernel, one_length, softmax
from .task import final, over_seeds, Task


BUDGETS = (1, 2, 4, 8, 20)
MORE = (*BUDGETS, 60)  # where a training is a solve


def ours(task: Task, data, keys, budgets):
    """The values that each budget pays for, one dict for each."""
    none = dataclasses.replace(recipe.SETTINGS["first"], grid=0)
    each = none.cost(task) / none.updates
    updates = [int(budget / each) for budget in budgets]
    settings = dataclasses.replace(none, updates=max(updates))
    path = over_seeds(
        lambda data, key: recipe.tune(task, settings, data, key)[0], data, keys
    )
    start = rivals.default(task, len(keys))
    mean = lambda n: jtu.tree_map(lambda x: jnp.mean(x[:, n // 2 : n], axis=1), path)
    return [mean(n) if n > 0 else start for n in updates]


def run(task: Task, seeds):
    budgets = MORE if task.closed else BUDGETS
    with jax.enable_x64(task.closed):
        data, keys = draw(task, seeds)
        trials = {
            "random": rivals.random_trials(task, data, keys, seeds, max(budgets)),
            "tpe": rivals.tpe_trials(task, data, keys, seeds, max(budgets)),
        }
        found = {"ours": ours(task, data, keys, budgets)}
        for name, x in trials.items():
            found[name] = [rivals.best_of(x, budget) for budget in budgets]
        found["shared"] = [rivals.shared(task, data, keys, b) for b in budgets]
        report = jax.jit(
            lambda h: over_seeds(
                lambda data, h, key: final(task, data, h, key)[0], data, h, keys
            )
        )
        figures = {
            k: [np.asarray(report(h)).tolist() for h in v] for k, v in found.items()
        }
    count = sum(v.size for v in task.default.values())
    row = {"problem": task.name, "metric": task.metric, "hyperparameters": count}
    return row | {"budgets": budgets, "figures": figures}


def show(row) -> None:
    print(f"{row['problem']}, {row['hyperparameters']} hyperparameters")
    print("".join(f"{x:>9}" for x in ("", *row["budgets"])))
    for name, figures in row["figures"].items():
        print(f"{name:>9}" + "".join(f"{np.mean(x):9.4f}" for x in figures), flush=True)


def main(
    *,
    folder: pathlib.Path,
    seeds: int = 10,
    json: str | None = None,
    figure: str | None = None,
) -> None:
    warnings.simplefilter("ignore")
    tasks = [
        one_length(folder, "concrete"),
        kernel(folder, "concrete"),
        softmax(folder),
    ]
    rows = []
    for task in tasks:
        rows.append(run(task, range(seeds)))
        show(rows[-1])
        write_json(json, rows)
    if figure is not None:
        curves(rows, figure)


if __name__ == "__main__":
    command(main, __doc__, **FILES)
