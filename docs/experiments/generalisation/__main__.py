r"""What tuning is worth on data that nobody tuned on, against rivals at equal cost.

    python -m docs.experiments.generalisation --folder DATA --seeds 10 --json out.json

`problems.py` says what the problems are, `recipe.py` what ours is, and `rivals.py` what
it is compared with. Cost is counted in trainings of a model on all folds but one, for
each fold. A hypergradient through K inner steps counts as 3 K training gradients (in
flops 2.0 K with weights of examples, 2.9 K with noise and a perceptron), and one by
closed form as 3 solves (in time 2.1). All but the default and early stopping have what
ours has. Everybody then trains once on all data outside the test, at no charge.

The table has differences to each rival, paired over the seeds, with standard errors:
100 log(rival's error / ours) for regressions, and percentage points of accuracy else.
Positive is better for ours; a sign after it tells of more than two standard errors.

    python -m docs.experiments.generalisation --folder DATA --first 10 --recipe second \
        --problems "cleaning 30% 300,cleaning 50% 300,sources,rare 1:100"

is the second recipe, for weights of examples, on seeds that the first has not seen.
"""

import pathlib
import time
import warnings
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np

from ..common import command, mean_and_error, write_json
from . import rivals
from .figures import differences
from .problems import load
from .recipe import SETTINGS, Settings, values
from .task import final, over_seeds, stack, Task


OTHER_SEEDS = range(100, 105)  # of the reference, and of all development
REFERENCE = 36  # points of its grid
# Options that the commands of this folder share.
FILES: dict[str, Any] = {
    "folder": {"type": pathlib.Path},
    "json": "a file for all figures",
    "figure": "a file for a picture",
}
RIVALS = ("shared", "random", "tpe", "early", "default", "reference")


def choose(task: Task, settings: Settings, data, keys, seeds, other: tuple[Any, Any]):
    """Functions that return the hyperparameters of each method, one for each seed."""
    count = len(seeds)
    budget = round(settings.cost(task))
    same = lambda x: np.broadcast_to(x, (count, *x.shape))
    trials = (task, data, keys, seeds, budget)
    return {
        "ours": lambda: values(task, settings, data, keys),
        "shared": lambda: rivals.shared(task, data, keys, budget),
        "random": lambda: rivals.best_of(rivals.random_trials(*trials)),
        "tpe": lambda: rivals.best_of(rivals.tpe_trials(*trials)),
        "default": lambda: rivals.default(task, count),
        "reference": lambda: jtu.tree_map(
            same, rivals.reference(task, *other, REFERENCE)
        ),
    }


def draw(task: Task, seeds):
    return stack([task.make(seed) for seed in seeds]), rivals.keys(seeds)


def run(task: Task, settings: Settings, seeds):
    """The reports of each method, an array over seeds and the two figures."""
    budget = round(settings.cost(task))
    row = {"problem": task.name, "metric": task.metric, "budget": budget}
    row |= {"hyperparameters": sum(v.size for v in task.default.values())}
    with jax.enable_x64(task.closed):
        data, keys = draw(task, seeds)
        report = lambda *args: over_seeds(
            lambda data, h, key: final(task, data, h, key), *args
        )
        methods = choose(task, settings, data, keys, seeds, draw(task, OTHER_SEEDS))
        figures, seconds = {}, {}
        for name, method in methods.items():
            start = time.perf_counter()
            figures[name] = np.asarray(report(data, method(), keys)).tolist()
            seconds[name] = time.perf_counter() - start
        if not task.closed:
            figures["early"] = np.asarray(rivals.early(task, data, keys)).tolist()
    return row | {"figures": figures, "seconds": seconds}


def difference(row, rival: str):
    """The mean of the paired differences, and its standard error."""
    ours, other = (np.array(row["figures"][x])[:, 0] for x in ("ours", rival))
    gain = 100 * np.log(other / ours) if row["metric"] == "error" else ours - other
    return mean_and_error(gain)


def show(row) -> str:
    ours = np.array(row["figures"]["ours"]).mean(axis=0)
    text = f"{row['problem']:18}{row['hyperparameters']:6}{row['budget']:5}"
    text += f"{ours[0]:9.4f} " + (f"({ours[1]:.3f})" if ours[1] != ours[0] else " " * 7)
    for rival in RIVALS:
        if rival not in row["figures"]:
            text += " " * 15
            continue
        mean, error = difference(row, rival)
        mark = " +-"[int(np.sign(mean)) * (abs(mean) > 2 * error)]
        text += f"{mean:+7.2f} ±{error:5.2f}{mark}"
    return text


def verdict(rows) -> str:
    cheap = RIVALS[:-1]
    signs = []
    for row in rows:
        of = {x: difference(row, x) for x in RIVALS if x in row["figures"]}
        signs.append({k: np.sign(m) * (abs(m) > 2 * e) for k, (m, e) in of.items()})
    better = [all(s[x] > 0 for x in cheap if x in s) for s in signs]
    worse = [any(s[x] < 0 for x in cheap if x in s) for s in signs]
    behind = [s.get("reference", 0) < 0 for s in signs]
    return (
        f"better than each rival by two standard errors: {sum(better)} of {len(rows)}; "
        f"worse than one: {sum(worse)}; worse than the reference: {sum(behind)}"
    )


def main(
    *,
    folder: pathlib.Path,
    seeds: int = 10,
    first: int = 0,
    recipe: str = "first",
    problems: str | None = None,
    json: str | None = None,
    figure: str | None = None,
) -> None:
    warnings.simplefilter("ignore")
    tasks, chosen_seeds = load(folder), range(first, first + seeds)
    chosen = problems.split(",") if problems else list(tasks)
    print(f"{'':18}{'hyper':>6}{'cost':>5}{'ours':>9}{'':8}", end="")
    print("".join(f"{x:>14} " for x in RIVALS))
    rows = []
    for name in chosen:
        rows.append(run(tasks[name], SETTINGS[recipe], chosen_seeds))
        print(show(rows[-1]), flush=True)
        write_json(json, rows)
    print(verdict(rows))
    if figure is not None:
        of = lambda row, x: difference(row, x) if x in row["figures"] else None
        found = {row["problem"]: [of(row, x) for x in RIVALS] for row in rows}
        differences(found, RIVALS, figure)


if __name__ == "__main__":
    command(main, __doc__, **FILES, recipe={"choices": SETTINGS}, problems="by commas")
