r"""Ours beside other bilevel solvers, on the problems of benchopt's benchmark of them.

    python -m tests.benchmarks.solvers --folder DATA --json solvers.json --figure x.png

`problems.py` says what the problems are, `by_hand.py` what the rivals are, and
`ours.py` which settings of the library stand against them. All batches are of 64. A
call is a gradient, a product with a Hessian or with a mixed derivative, of one batch;
both partial gradients of one loss at one batch are one call. Step sizes are the best of
a grid (`--tune`, on seeds that are not reported) and lie in `settings.json`.

`--problems quadratics` needs no data. `--quick` takes seconds and means nothing.
"""

import argparse
import functools as ft
import itertools
import json
import pathlib
import random
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax

from . import by_hand, ours
from .by_hand import Rates, STEPS
from .problems import cleaning, Draw, Problem, quadratics


TUNING_SEEDS = range(100, 101)
MARKS = 20  # points of a curve up to the budget
AFTER = 4  # points beyond it: how late one comes that comes later
SMOOTH = 4  # points of a running mean
SETTINGS = pathlib.Path(__file__).parent / "settings.json"


class Solver(NamedTuple):
    make: Any  # of a problem, a draw and rates
    calls: int  # of each update of the hyperparameters
    extra: tuple[float, ...] = (0.0,)  # of the grid


LOOP = 2 * STEPS + 2
RIVALS = {
    "SOBA": Solver(by_hand.soba, 4),
    "MA-SOBA": Solver(by_hand.ma_soba, 4, (0.01, 0.1)),
    "AmIGO": Solver(by_hand.amigo, LOOP),
    "StocBiO": Solver(by_hand.stocbio, LOOP),
    "F2SA": Solver(by_hand.f2sa, 3 * STEPS + 3, (1.0, 10.0)),
}
OURS = {
    "hpo.SOBA": Solver(ours.soba, 4),
    "hpo.SOBA, averaging": Solver(ours.averaged, 4, (0.01, 0.1)),
    # One more call than AmIGO and StocBiO: the report has the norm of a gradient.
    "hpo.Implicit, warm": Solver(ours.warm, LOOP + 1),
    "hpo.Implicit, cold": Solver(ours.cold, LOOP + 1),
    "hpo.Penalty": Solver(ours.penalty, 3 * STEPS + 3, (1.0, 10.0)),
    "hpo.T1T2": Solver(ours.t1t2, STEPS + 2),
}
SOLVERS = RIVALS | OURS


def course(solver: Solver, problem: Problem, marks: int, draw: Draw, rates, key):
    """`(theta, lam)` after each part of the run, one more than there are `marks`."""
    carry, step, read = solver.make(problem, draw, rates)
    updates = updates_of(solver, problem)

    def update(carry, t):
        return step(carry, t, jr.fold_in(key, t)), None

    def part(carry, number):
        carry, _ = lax.scan(update, carry, number * updates + jnp.arange(updates))
        return carry, read(carry)

    _, points = lax.scan(part, carry, jnp.arange(marks))
    first = jtu.tree_map(lambda x: x[None], read(carry))
    return jtu.tree_map(lambda x, y: jnp.concatenate([x, y]), first, points)


def updates_of(solver: Solver, problem: Problem) -> int:
    """Between two marks."""
    return max(problem.budget // MARKS // solver.calls, 1)


def calls_at(solver: Solver, problem: Problem) -> np.ndarray:
    each = updates_of(solver, problem) * solver.calls
    return each * np.arange(MARKS + AFTER + 1)


# Step sizes


def grid(solver: Solver, problem: Problem) -> Rates:
    axes = problem.rates, problem.outer, (0.0, 0.5), solver.extra
    points = np.array(list(itertools.product(*axes)), np.float32)
    return Rates(*points.T)


def smooth(curve: np.ndarray, is_log: bool) -> np.ndarray:
    """The running mean over the last points, of the first axis."""
    curve = np.log(curve) if is_log else curve
    means = [curve[max(0, i - SMOOTH + 1) : i + 1].mean(0) for i in range(len(curve))]
    return np.exp(means) if is_log else np.array(means)


def choose(solver: Solver, problem: Problem, seeds) -> dict[str, Any]:
    """The point of the grid with the best end, on average over the seeds."""
    points = grid(solver, problem)
    run = jax.jit(
        jax.vmap(ft.partial(course, solver, problem, MARKS), (None, Rates(0, 0, 0, 0), None))
    )
    ends = []
    for seed in seeds:
        draw = problem.make(seed, True)
        thetas, lams = (np.asarray(x) for x in run(draw, points, jr.key(seed)))
        curves = [problem.report(draw, *x)[:, 0] for x in zip(thetas, lams)]
        ends.append([smooth(curve, problem.is_log)[-1] for curve in curves])
    scores = np.nan_to_num(np.array(ends), nan=np.inf)
    scores = np.mean(np.log(scores) if problem.is_log else scores, axis=0)
    best = int(np.argmin(scores))
    rates = {k: float(f"{x[best]:.6g}") for k, x in points._asdict().items()}
    tuned = np.exp(scores[best]) if problem.is_log else scores[best]
    return rates | {"tuned": float(f"{tuned:.4g}"), "of": len(scores)}


def tune(problems, names, seeds) -> None:
    found = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    for problem, name in itertools.product(problems, names):
        start = time.perf_counter()
        rates = choose(SOLVERS[name], problem, seeds)
        found.setdefault(problem.name, {})[name] = rates
        SETTINGS.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{problem.name:14}{name:20}{rates} {time.perf_counter() - start:.0f} s")


def settings_of(problem: Problem, name: str) -> Rates:
    rates = json.loads(SETTINGS.read_text())[problem.name][name]
    return Rates(*(jnp.float32(rates[k]) for k in Rates._fields))


# Figures


def curves(problem: Problem, name: str, seeds) -> np.ndarray:
    """An array over seeds, marks and figures."""
    solver = SOLVERS[name]
    run = jax.jit(ft.partial(course, solver, problem, MARKS + AFTER))
    rates = settings_of(problem, name)
    found = []
    for seed in seeds:
        draw = problem.make(seed, False)
        thetas, lams = (np.asarray(x) for x in run(draw, rates, jr.key(seed)))
        found.append(problem.report(draw, thetas, lams))
    return np.array(found)


def compile_part(problem: Problem, name: str, draw: Draw):
    """The run between two marks, compiled for a carry that it takes and returns."""
    solver = SOLVERS[name]
    rates = settings_of(problem, name)
    updates = updates_of(solver, problem)
    start, _, _ = solver.make(problem, draw, rates)

    def part(carry, draw, rates, key):
        _, step, _ = solver.make(problem, draw, rates)
        body = lambda carry, t: (step(carry, t, jr.fold_in(key, t)), None)
        return lax.scan(body, carry, jnp.arange(updates))[0]

    start = jtu.tree_map(jnp.array, start)
    args = draw, rates, jr.key(0)
    compiled = jax.jit(part, donate_argnums=0).lower(start, *args).compile()
    memory = compiled.memory_analysis()
    carried = sum(x.nbytes for x in jtu.tree_leaves(start))
    memory = {"temporaries": memory.temp_size_in_bytes, "carried": carried}
    return compiled, start, args, updates * solver.calls, memory


def times(problem: Problem, names, rounds: int) -> dict[str, Any]:
    """Seconds of a call, one for each round, in which all take their turn."""
    draw = jax.device_put(problem.make(0, False))
    parts = {name: compile_part(problem, name, draw) for name in names}
    carries = {name: part[1] for name, part in parts.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            compiled, _, args, calls, _ = parts[name]
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(compiled(carries[name], *args))
            if number > 0:
                found[name].append((time.perf_counter() - start) / calls)
    return {"seconds": found, "memory": {name: x[4] for name, x in parts.items()}}


def run(problem: Problem, names, seeds, rounds: int) -> dict[str, Any]:
    row = {"problem": problem.name, "figures": problem.figures, "log": problem.is_log}
    row |= {"seeds": len(seeds), "curves": {}, "calls": {}}
    for name in names:
        row["curves"][name] = curves(problem, name, seeds).tolist()
        row["calls"][name] = calls_at(SOLVERS[name], problem).tolist()
    return row | times(problem, names, rounds)


# Reading them


def mean_curve(row, name: str, figure: int = 0) -> np.ndarray:
    curve = np.array(row["curves"][name])[:, :, figure].T
    curve = smooth(curve, row["log"])
    return np.exp(np.log(curve).mean(1)) if row["log"] else curve.mean(1)


def end_with_error(row, name: str, figure: int = 0) -> tuple[float, float]:
    """The end at the budget, and its standard error over seeds (relative for a
    geometric mean)."""
    curve = smooth(np.array(row["curves"][name])[:, :, figure].T, row["log"])[MARKS]
    values = np.log(curve) if row["log"] else curve
    error = values.std(ddof=1) / len(values) ** 0.5
    mean = np.exp(values.mean()) if row["log"] else values.mean()
    return mean, error


def reached(row, name: str, value: float, figure: int = 0) -> float:
    """The calls that the mean curve takes to come down to `value`."""
    below = mean_curve(row, name, figure) <= value
    return row["calls"][name][int(np.argmax(below))] if below.any() else np.inf


def seconds_of(row, name: str) -> float:
    return statistics.median(row["seconds"][name])


def best(row, names, figure: int = 0) -> str:
    return min(names, key=lambda name: end_with_error(row, name, figure)[0])


def show(row) -> None:
    rivals = [name for name in row["curves"] if name in RIVALS]
    for figure, title in enumerate(row["figures"]):
        champion = best(row, rivals, figure)
        value = end_with_error(row, champion, figure)[0]
        calls = reached(row, champion, value, figure)
        print(f"{row['problem']}: {title}; the best rival is {champion} ({value:.4g})")
        for name in row["curves"]:
            end, error = end_with_error(row, name, figure)
            mine = reached(row, name, value, figure)
            ratio = statistics.median(
                x / y for x, y in zip(row["seconds"][name], row["seconds"][champion])
            )
            memory = row["memory"][name]
            print(
                f"  {name:20}{end:10.4g} ± {error:.2g}  calls {mine / calls:6.2f}  "
                f"time {mine / calls * ratio:6.2f}  µs a call "
                f"{1e6 * seconds_of(row, name):7.1f}  "
                f"MB {sum(memory.values()) / 1e6:.2f}",
                flush=True,
            )


def small() -> list[Problem]:
    return [quadratics(128, 8, 4000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, help="that of mnist.npz")
    parser.add_argument("--problems", help="names, with commas between them")
    parser.add_argument("--solvers", help="names, with semicolons between them")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--tune", action="store_true", help="choose the step sizes")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", help="a file for all figures")
    parser.add_argument("--figure", help="a file for the picture")
    args = parser.parse_args()
    shares = (0.5, 0.7, 0.9)
    problems = [quadratics()]
    if args.folder is not None:
        problems += [cleaning(args.folder, share) for share in shares]
    if args.problems:
        chosen = args.problems.split(",")
        problems = [problem for problem in problems if problem.name in chosen]
    names = args.solvers.split(";") if args.solvers else list(SOLVERS)
    if args.tune:
        tune(problems, names, TUNING_SEEDS)
        return
    rows = []
    for problem in problems:
        rows.append(run(problem, names, range(args.seeds), args.rounds))
        show(rows[-1])
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
