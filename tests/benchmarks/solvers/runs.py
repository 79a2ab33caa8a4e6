"""Runs of the solvers, the choice of their step sizes, and their seconds and memory."""

import functools as ft
import itertools
import json
import pathlib
import random
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
from .problems import Draw, Problem


TUNING_SEEDS = (100, 101)
MARKS = 20  # points of a curve up to the budget
AFTER = 4  # points beyond it: how late one comes that comes later
SMOOTH = 4  # points of a running mean
FINALISTS = 4  # of a grid, which all seeds judge; the first one judges the rest
SETTINGS = pathlib.Path(__file__).parent / "settings.json"


class Solver(NamedTuple):
    make: Any  # of a problem, a draw and rates
    calls: int  # of each update of the hyperparameters
    extra: tuple[float, ...] = (0.0,)  # of the grid
    settings_of: str | None = None  # whose step sizes it has, if not its own


_LOOPS = 2 * STEPS + 2
RIVALS = {
    "SOBA": Solver(by_hand.soba, 4),
    "MA-SOBA": Solver(by_hand.ma_soba, 4, (0.01, 0.1)),
    "AmIGO": Solver(by_hand.amigo, _LOOPS),
    "StocBiO": Solver(by_hand.stocbio, _LOOPS),
    "F2SA": Solver(by_hand.f2sa, 3 * STEPS + 3, (1.0, 10.0)),
}
# `Implicit` has one call more than its rivals: it reports the norm of a gradient.
OURS = {
    "hpo.SOBA": Solver(ours.soba, 4),
    "hpo.SOBA, averaging": Solver(ours.averaged, 4, (0.01, 0.1)),
    "hpo.Implicit, warm": Solver(ours.warm, _LOOPS + 1),
    "hpo.Implicit, cold": Solver(ours.cold, _LOOPS + 1),
    "hpo.Penalty": Solver(ours.penalty, 3 * STEPS + 3, (1.0, 10.0)),
    "hpo.T1T2": Solver(ours.t1t2, STEPS + 2),
}
SOLVERS = RIVALS | OURS
# Timed, and no more: the same figures to rounding.
VARIANTS = {"hpo.SOBA, mixed mode": Solver(ours.mixed, 4, settings_of="hpo.SOBA")}
PAIRS = dict(zip(OURS, RIVALS))


def updates_of(solver: Solver, problem: Problem) -> int:
    """Of the hyperparameters, between two marks."""
    return max(problem.budget // MARKS // solver.calls, 1)


def calls_at(solver: Solver, problem: Problem) -> list[int]:
    each = updates_of(solver, problem) * solver.calls
    return [each * mark for mark in range(MARKS + AFTER + 1)]


def course(solver: Solver, problem: Problem, marks: int, draw: Draw, rates, key):
    """`(theta, lam)` at the start and at each mark."""
    carry, step, read = solver.make(problem, draw, rates)
    updates = updates_of(solver, problem)

    def update(carry, t):
        return step(carry, t, jr.fold_in(key, t)), None

    def part(carry, number):
        carry, _ = lax.scan(update, carry, number * updates + jnp.arange(updates))
        return carry, read(carry)

    _, points = lax.scan(part, carry, jnp.arange(marks))
    return jtu.tree_map(
        lambda x, y: jnp.concatenate([jnp.asarray(x)[None], y]), read(carry), points
    )


def smooth(curve: np.ndarray, is_log: bool) -> np.ndarray:
    """The running mean over the last points, of the first axis."""
    curve = np.log(curve) if is_log else curve
    means = [curve[max(0, i - SMOOTH + 1) : i + 1].mean(0) for i in range(len(curve))]
    return np.exp(means) if is_log else np.array(means)


# Step sizes


def grid(solver: Solver, problem: Problem) -> Rates:
    axes = problem.rates, problem.outer, problem.exponents, solver.extra
    return Rates(*np.array(list(itertools.product(*axes)), np.float32).T)


def ends(solver: Solver, problem: Problem, points: Rates, seed: int) -> np.ndarray:
    """The figure that counts at the end of each point of a grid, or its logarithm."""
    axes = None, Rates(0, 0, 0, 0), None
    one = ft.partial(course, solver, problem, MARKS)
    draw = problem.make(seed, True)
    thetas, lams = jax.jit(jax.vmap(one, axes))(draw, points, jr.key(seed))
    curves = [
        problem.report(draw, *map(np.asarray, x))[:, 0] for x in zip(thetas, lams)
    ]
    found = np.array([smooth(curve, problem.is_log)[-1] for curve in curves])
    found = np.where(np.isfinite(found), found, np.inf)
    return np.log(found) if problem.is_log else found


def choose(solver: Solver, problem: Problem, seeds) -> dict[str, Any]:
    """The point of the grid with the best end, on average over the seeds."""
    points, (first, *others) = grid(solver, problem), seeds
    scores = ends(solver, problem, points, first)
    kept = np.argsort(scores)[:FINALISTS]
    points = Rates(*(x[kept] for x in points))
    more = [ends(solver, problem, points, seed) for seed in others]
    means = np.mean([scores[kept], *more], axis=0)
    best = int(np.argmin(means))
    rates = {k: float(f"{x[best]:.6g}") for k, x in points._asdict().items()}
    end = np.exp(means[best]) if problem.is_log else means[best]
    return rates | {"tuned": float(f"{end:.4g}"), "of": len(scores)}


def tune(problems, names, seeds=TUNING_SEEDS) -> None:
    found = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    for problem, name in itertools.product(problems, names):
        start = time.perf_counter()
        rates = choose(SOLVERS[name], problem, seeds)
        found.setdefault(problem.name, {})[name] = rates
        SETTINGS.write_text(json.dumps(found, indent=1) + "\n")
        seconds = time.perf_counter() - start
        print(f"{problem.name:14}{name:20}{rates} {seconds:.0f} s", flush=True)


def settings_of(problem: Problem, name: str) -> Rates:
    name = (SOLVERS | VARIANTS)[name].settings_of or name
    found = json.loads(SETTINGS.read_text())[problem.name][name]
    return Rates(*(jnp.float32(found[k]) for k in Rates._fields))


# Figures


def curves(problem: Problem, name: str, seeds) -> np.ndarray:
    """An array over seeds, marks and figures."""
    solver = SOLVERS[name]
    one = jax.jit(ft.partial(course, solver, problem, MARKS + AFTER))
    rates = settings_of(problem, name)
    found = []
    for seed in seeds:
        draw = problem.make(seed, False)
        thetas, lams = map(np.asarray, one(draw, rates, jr.key(seed)))
        found.append(problem.report(draw, thetas, lams))
    return np.array(found)


def compile_part(problem: Problem, name: str, draw: Draw):
    """The run between two marks, with its first carry, and its memory in bytes."""
    solver = (SOLVERS | VARIANTS)[name]
    rates = settings_of(problem, name)
    updates = updates_of(solver, problem)

    def part(carry, draw, rates, key):
        _, step, _ = solver.make(problem, draw, rates)
        body = lambda carry, t: (step(carry, t, jr.fold_in(key, t)), None)
        return lax.scan(body, carry, jnp.arange(updates))[0]

    carry = jtu.tree_map(jnp.array, solver.make(problem, draw, rates)[0])
    args = draw, rates, jr.key(0)
    compiled = jax.jit(part, donate_argnums=0).lower(carry, *args).compile()
    memory: Any = compiled.memory_analysis()
    carried = sum(x.nbytes for x in jtu.tree_leaves(carry))
    memory = {"temporaries": memory.temp_size_in_bytes, "carried": carried}
    return lambda carry: compiled(carry, *args), carry, memory


def times(problem: Problem, names, rounds: int) -> dict[str, Any]:
    """CPU seconds of a call, one for each round, in which all take their turn."""
    draw = jax.device_put(problem.make(0, False))
    parts = {name: compile_part(problem, name, draw) for name in names}
    carries = {name: part[1] for name, part in parts.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            solver = (SOLVERS | VARIANTS)[name]
            start = time.process_time()
            carries[name] = jax.block_until_ready(parts[name][0](carries[name]))
            seconds = time.process_time() - start
            if number > 0:
                found[name].append(
                    seconds / (updates_of(solver, problem) * solver.calls)
                )
    return {"seconds": found, "memory": {name: x[2] for name, x in parts.items()}}


def run(problem: Problem, names, seeds, rounds: int) -> dict[str, Any]:
    row = {"problem": problem.name, "figures": problem.figures, "log": problem.is_log}
    row |= {"curves": {}, "calls": {}}
    for name in names:
        row["curves"][name] = curves(problem, name, seeds).tolist()
        row["calls"][name] = calls_at(SOLVERS[name], problem)
    variants = [name for name, x in VARIANTS.items() if x.settings_of in names]
    return row | times(problem, [*names, *variants], rounds)
