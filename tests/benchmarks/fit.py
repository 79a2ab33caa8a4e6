"""What a step of `fit` costs, in steps of a plain training loop of JAX and Optax.

    taskset -c 0 python -m tests.benchmarks.fit --workloads C,P,T,L100

Both train for n and for 2n steps, in turns, and what n steps more take is compared: CPU
seconds, medians over repeats. The plain loop is a `fori_loop` that carries weights and
optimiser state and computes no loss; `fit` computes and records one in fifty.
`workloads.py` says what the letters stand for.
"""

import argparse
import statistics
import time
import warnings

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
from jax import lax

from . import by_hand
from .__main__ import WORKLOADS


RECORD = 50  # steps between two records
STEPS = {"C": 60, "P": 200, "T": 100, "S": 200_000, "L": 10_000}


def measure(letter: str, repeats: int) -> tuple[float, float]:
    """Milliseconds of a plain step, and the ratio."""
    workload, steps = WORKLOADS[letter](), STEPS[letter[0]]
    problem = hpo.Problem(
        lambda params, raw, batch, key: workload.train_loss(params, raw, batch),
        lambda params, raw, batch, key: workload.val_loss(params, raw, batch),
    )
    algorithm = hpo.T1T2(problem, workload.inner, workload.outer)
    step, start = by_hand.training(workload)

    @jax.jit
    def loop(carry, data, count):
        return lax.fori_loop(0, count, lambda _, carry: step(carry, data, None), carry)

    def by_loop(count):
        jax.block_until_ready(loop(start, workload.train, jnp.asarray(count)))

    def by_fit(count):
        args = (algorithm, workload.params, workload.raw, workload.train)
        solution = hpo.fit(
            *args, steps=count, key=None, progress=False, record_every=RECORD
        )
        jax.block_until_ready(solution.model)

    def seconds(run, count):
        begun = time.process_time()
        run(count)
        return time.process_time() - begun

    rounds = []
    for number in range(repeats + 1):
        order = (by_loop, by_fit)[:: 1 - 2 * (number % 2)]
        more = {x: seconds(x, 2 * steps) - seconds(x, steps) for x in order}
        rounds.append((more[by_loop] / steps, more[by_fit] / more[by_loop]))
    plain, ratio = (statistics.median(x) for x in zip(*rounds[1:]))
    return 1e3 * plain, ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default="C,P,T,S,L10,L100")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'':8}{'ms, plain':>12}{'fit':>8}")
    for letter in args.workloads.split(","):
        plain, ratio = measure(letter, args.repeats)
        print(f"{letter:8}{plain:12.4f}{ratio:8.3f}", flush=True)
