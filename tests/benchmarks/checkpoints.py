"""What checkpoints cost a run of `tune`: its time with them over its time without.

    python -m tests.benchmarks.checkpoints --workloads C,T,L10,64MB

Both kinds of run take the same steps, in turns; wall-clock seconds of the second half
of a run, medians over repeats. `64MB` is a perceptron whose state has 64 MB; the other
letters are those of `workloads.py`.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
import warnings
from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax

from .__main__ import WORKLOADS
from .workloads import Workload


STEPS = {"C": 200, "T": 200, "P": 200, "S": 200_000, "L10": 4000, "64MB": 200}


def large() -> Workload:
    """A perceptron with a log decay for each of eight million weights."""
    sizes = [(256, 2600), (2600, 2600), (2600, 10)]
    params = [0.01 * jr.normal(jr.key(i), size) for i, size in enumerate(sizes)]
    data = jr.normal(jr.key(3), (128, 256)), jr.normal(jr.key(4), (128, 10))

    def val_loss(params, raw, batch):
        del raw
        hidden = jnp.tanh(jnp.tanh(batch[0] @ params[0]) @ params[1])
        return jnp.mean((hidden @ params[2] - batch[1]) ** 2)

    def train_loss(params, raw, batch):
        terms = jtu.tree_map(lambda r, p: jnp.sum(jnp.exp(r) * p**2), raw, params)
        return val_loss(params, raw, batch) + sum(terms)

    raw = [jnp.full(size, -7.0) for size in sizes]
    inner = lambda raw: optax.sgd(0.1)
    return Workload(
        train_loss, val_loss, params, raw, data, data, inner, optax.sgd(0.1)
    )


def measure(name: str, every: int, repeats: int, backend: str) -> tuple[float, float]:
    """Milliseconds of a step, and the ratio."""
    workload = large() if name == "64MB" else WORKLOADS[name]()
    problem = hpo.Problem(
        lambda params, raw, batch, key: workload.train_loss(params, raw, batch),
        lambda params, raw, batch, key: workload.val_loss(params, raw, batch),
    )
    algorithm = hpo.T1T2(problem, workload.inner, workload.outer)
    steps = STEPS[name]

    def seconds(checkpoint: Any) -> float:
        stamps = []

        def metric(state):
            jax.block_until_ready(state)
            stamps.append(time.perf_counter())
            return 0.0

        hpo.tune(
            algorithm,
            workload.params,
            workload.raw,
            workload.train,
            workload.val,
            steps=steps,
            key=None,
            progress=False,
            monitor=hpo.Monitor(metric, every=steps // 2),
            checkpoint=checkpoint,
        )
        return stamps[2] - stamps[1]

    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats + 1):
            place = str(pathlib.Path(folder) / str(number))
            saving = hpo.Checkpoints(place, every=every, backend=backend)
            taken = {x: seconds(x) for x in (None, saving)[:: 1 - 2 * (number % 2)]}
            rounds.append((taken[None] / steps * 2, taken[saving] / taken[None]))
    plain, ratio = (statistics.median(x) for x in zip(*rounds[1:]))
    return 1e3 * plain, ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", default="C,T,L10,64MB")
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backend", default="file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'':8}{'ms a step':>12}{'with / without':>16}")
    for name in args.workloads.split(","):
        plain, ratio = measure(name, args.every, args.repeats, args.backend)
        print(f"{name:8}{plain:12.3f}{ratio:16.3f}", flush=True)
