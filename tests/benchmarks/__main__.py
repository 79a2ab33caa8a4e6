"""Each algorithm beside hand-written JAX of the same mathematics, guard included.

    python -m tests.benchmarks --workloads CPNTML --json table.json

Columns: milliseconds of a step, by hand and by the library; the median ratio of the
two, over repeats in which they take turns; the same step in plain training steps for
each inner step; megabytes of XLA's temporaries, and of all that a donated step holds
but for the data; and CPU seconds to trace, lower and compile. `workloads.py` says what
the letters stand for; `by_hand.py` holds the other side.
"""

import argparse
import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.tree_util as jtu

from . import by_hand, workloads


def _at_start(problem, inner, outer):
    """Fixes the hyperparameters of `inner`, for algorithms that look at the loss."""
    return problem, inner(None), outer


LEAVES = (10, 100, 300)
WORKLOADS: dict[str, Callable[[], workloads.Workload]] = {
    "C": workloads.sample_weights,
    "P": workloads.million_decays,
    "N": workloads.convolutions,
    "T": workloads.transformer,
    "S": workloads.ridge,
    "M": workloads.sine_waves,
    **{f"L{n}": lambda n=n: workloads.deep(n) for n in LEAVES},
}
# The hand-written one, its options, and the library's; and how many inner steps.
ALGORITHMS: dict[str, tuple[Callable, dict[str, Any], Callable, int]] = {
    "FirstOrder": (by_hand.first_order, {}, hpo.FirstOrder, 1),
    "T1T2": (by_hand.t1t2, {}, hpo.T1T2, 1),
    "T1T2 reverse": (
        by_hand.t1t2,
        {"rule": "reverse"},
        lambda *args: hpo.T1T2(*args, second_order=hpo.ReverseOverReverse()),
        1,
    ),
    "T1T2 difference": (
        by_hand.t1t2,
        {"rule": "difference"},
        lambda *args: hpo.T1T2(*args, second_order=hpo.FiniteDifference()),
        1,
    ),
    "Greedy": (by_hand.greedy, {}, lambda *a: hpo.Greedy(*a, inner_steps=4), 4),
    "HyperDistill": (
        by_hand.hyperdistill,
        {},
        lambda *args: hpo.HyperDistill(*args, scale=1.0),
        1,
    ),
    "DrMAD": (by_hand.drmad, {}, lambda *a: hpo.DrMAD(*a, inner_steps=4), 4),
    "Unrolled": (by_hand.unrolled, {}, lambda *a: hpo.Unrolled(*a, inner_steps=4), 4),
    "SOBA": (
        by_hand.soba,
        {},
        lambda *args: hpo.SOBA(*_at_start(*args), linear_rate=0.1),
        1,
    ),
    "MA-SOBA": (
        by_hand.soba,
        {"averaging": 0.1},
        lambda *args: hpo.SOBA(*_at_start(*args), linear_rate=0.1, averaging=0.1),
        1,
    ),
    "Penalty": (
        by_hand.penalty,
        {},
        lambda *args: hpo.Penalty(*_at_start(*args), strength=10.0),
        1,
    ),
    "FixedPoint": (
        by_hand.fixed_point,
        {},
        lambda *args: hpo.FixedPoint(*args, inner_steps=10),
        10,
    ),
}
FOR_COMPILATION = ("T1T2", "Greedy", "HyperDistill", "Unrolled")
TASKS = 10


@dataclasses.dataclass
class Step:
    """A compiled step with its first carry, and what it costs to make."""

    compiled: Any
    carry: Any
    train: Any
    val: Any
    seconds: tuple[float, float, float]  # to trace, to lower, to compile

    def temporaries(self) -> float:
        return self.compiled.memory_analysis().temp_size_in_bytes / 1e6

    def held(self) -> float:
        x = self.compiled.memory_analysis()
        data = sum(a.nbytes for a in jtu.tree_leaves((self.train, self.val)))
        held = x.argument_size_in_bytes + x.output_size_in_bytes
        return (held - x.alias_size_in_bytes + x.temp_size_in_bytes - data) / 1e6

    def run(self) -> float:
        # Not donated: a carry serves for all repeats.
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(self.carry, self.train, self.val))
        return time.perf_counter() - start


def compile_step(step, carry, train, val, donate=False) -> Step:
    ticks = [time.process_time()]
    donated = 0 if donate else ()
    traced = jax.jit(step, donate_argnums=donated).trace(carry, train, val)
    ticks.append(time.process_time())
    lowered = traced.lower()
    ticks.append(time.process_time())
    compiled = lowered.compile()
    ticks.append(time.process_time())
    seconds = tuple(b - a for a, b in zip(ticks, ticks[1:]))
    return Step(compiled, carry, train, val, seconds)  # pyright: ignore


def hand_step(name: str, workload: workloads.Workload, tasks: int | None):
    make, options, _, _ = ALGORITHMS[name]
    if tasks is not None:
        return by_hand.over_tasks(workload, make, tasks, **options)
    return by_hand.assemble(workload, *make(workload, **options))


def library_step(name: str, workload: workloads.Workload, tasks: int | None):
    problem = hpo.Problem(
        lambda params, raw, batch, key: workload.train_loss(params, raw, batch),
        lambda params, raw, batch, key: workload.val_loss(params, raw, batch),
    )
    algorithm = ALGORITHMS[name][2](problem, workload.inner, workload.outer)
    if tasks is not None:
        algorithm = hpo.MetaLearner(algorithm, tasks)
    state = algorithm.init(workload.params, workload.raw, train=workload.train)
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(arrays, train, val):
        state = algorithm.step(eqx.combine(arrays, static), train, val)
        return eqx.filter(state, eqx.is_array)

    return step, arrays


def measure(letter: str, name: str, repeats: int) -> dict[str, Any]:
    workload = WORKLOADS[letter]()
    data = (workload.train, workload.val)
    tasks = TASKS if letter == "M" else None
    hand, ours = (
        compile_step(*make(name, workload, tasks), *data)
        for make in (hand_step, library_step)
    )
    held: list[float | None] = [None, None]
    if letter[0] != "L":  # which compiles for long
        held = [
            compile_step(*make(name, workload, tasks), *data, donate=True).held()
            for make in (hand_step, library_step)
        ]
    inner_steps = ALGORITHMS[name][3]
    plain = None
    if tasks is None:
        plain = compile_step(*by_hand.training(workload, inner_steps), *data)
    steps = [x for x in (hand, ours, plain) if x is not None]
    for step in steps:
        step.run()
    # In turns, and each first as often as last.
    rounds = [
        [x.run() for x in (steps if i % 2 == 0 else steps[::-1])][:: 1 - 2 * (i % 2)]
        for i in range(repeats)
    ]
    median = lambda values: statistics.median(list(values))
    return {
        "workload": letter,
        "algorithm": name,
        "ms by hand": 1e3 * median(x[0] for x in rounds),
        "ms": 1e3 * median(x[1] for x in rounds),
        "ratio": median(x[1] / x[0] for x in rounds),
        "plain steps": median(x[1] / x[-1] for x in rounds) if plain else None,
        "temporaries by hand": hand.temporaries(),
        "temporaries": ours.temporaries(),
        "held by hand": held[0],
        "held": held[1],
        "trace, lower, compile by hand": hand.seconds,
        "trace, lower, compile": ours.seconds,
    }


def show(row: dict[str, Any]) -> str:
    of = lambda key, digits: (
        f"{row[key]:{9 if digits else 8}.{digits}f}"
        if row[key] is not None
        else " " * 9
    )
    by_hand_total, total = (
        sum(row[f"trace, lower, compile{x}"]) for x in (" by hand", "")
    )
    parts = " ".join(f"{x:5.1f}" for x in row["trace, lower, compile"])
    return (
        f"{row['workload']:5}{row['algorithm']:16}"
        + of("ms by hand", 2)
        + of("ms", 2)
        + of("ratio", 3)
        + of("plain steps", 2)
        + of("temporaries by hand", 2)
        + of("temporaries", 2)
        + of("held by hand", 2)
        + of("held", 2)
        + f"{by_hand_total:8.1f}{total:7.1f} ({parts}){total / by_hand_total:6.2f}"
    )


def main(letters: str, names: str | None, repeats: int, path: str | None) -> None:
    print(
        f"{'':21}{'ms':>9}{'ms':>9}{'ratio':>9}{'plain':>9}{'temp MB':>9}{'temp MB':>9}"
        f"{'held MB':>9}{'held MB':>9}{'compile s':>15}\n"
        f"{'':21}{'hand':>9}{'ours':>9}{'':>9}{'steps':>9}{'hand':>9}{'ours':>9}"
        f"{'hand':>9}{'ours':>9}{'hand':>8}{'ours':>7}{'ratio':>26}"
    )
    rows = []
    for letter in letters:
        for workload in [x for x in WORKLOADS if x[0] == letter]:
            chosen = FOR_COMPILATION if letter == "L" else ALGORITHMS
            chosen = names.split(",") if names else chosen
            for name in chosen:
                rows.append(measure(workload, name, repeats))
                print(show(rows[-1]), flush=True)
    if path is not None:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default="CPNTML", help="their letters")
    parser.add_argument("--algorithms", help="names, with commas between them")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="a file for the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    main(args.workloads, args.algorithms, args.repeats, args.json)
