r"""Ours beside other bilevel solvers, on the problems of benchopt's benchmark of them.

    taskset -c 0 python -m tests.benchmarks.solvers --folder DATA --figure solvers.png

`problems.py` says what the problems are, `by_hand.py` what the rivals are, and
`ours.py` which settings of the library stand against them. All batches are of 64. A
call is a gradient, or a product with a Hessian or with mixed derivatives, of one batch;
both partial gradients of one loss at one point and batch are one call. Step sizes are
the best of a grid (`--tune`, on seeds that are not reported) and lie in
`settings.json`. Seconds are those of the CPU, without compilation, and only mean
something on one core.

`DATA` holds `mnist.npz`; without `--folder` there are the quadratics alone. `--quick`
takes seconds and tells nothing.
"""

import argparse
import json
import pathlib

from . import figure, runs
from .problems import cleaning, Problem, quadratics


SHARES = (0.5, 0.7, 0.9)  # of the labels


def quick() -> Problem:
    """Small, and with the step sizes of the quadratics."""
    return quadratics(n=128, size=8, budget=20 * 4 * (3 * runs.STEPS + 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, help="that of mnist.npz")
    parser.add_argument("--problems", help="names, with commas between them")
    parser.add_argument("--solvers", help="names, with semicolons between them")
    parser.add_argument("--seeds", type=int, help="as many for each problem")
    parser.add_argument("--rounds", type=int, default=25, help="of timing")
    parser.add_argument("--tune", action="store_true", help="choose the step sizes")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", help="a file for all figures")
    parser.add_argument("--read", help="such a file, in place of runs")
    parser.add_argument("--figure", help="a file for the picture")
    args = parser.parse_args()
    problems = [quick() if args.quick else quadratics()]
    if args.folder is not None and not args.quick:
        problems += [cleaning(args.folder, share) for share in SHARES]
    if args.problems:
        chosen = args.problems.split(",")
        problems = [problem for problem in problems if problem.name in chosen]
    names = args.solvers.split(";") if args.solvers else list(runs.SOLVERS)
    if args.tune:
        runs.tune(problems, names)
        return
    rows = json.loads(pathlib.Path(args.read).read_text()) if args.read else []
    for row in rows:
        figure.show(row)
    for problem in [] if args.read else problems:
        seeds = range(2 if args.quick else args.seeds or problem.seeds)
        rounds = 2 if args.quick else args.rounds
        rows.append(runs.run(problem, names, seeds, rounds))
        figure.show(rows[-1])
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(rows))
    if args.figure:
        figure.draw(rows, args.figure)


if __name__ == "__main__":
    main()
