"""Peak resident memory of `tune` beside that of a loop that donates its state, in
copies of the weights, with as many hyperparameters as weights.

    python -m tests.benchmarks.peak --weights 10000000

Each runs in a process of its own, for a peak of its own.
"""

import argparse
import subprocess
import sys

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax


STEPS = 20


def resident(field: str) -> float:
    """Bytes, as Linux counts them: `VmRSS` now, `VmHWM` at the peak."""
    with open("/proc/self/status") as file:
        (line,) = [x for x in file if x.startswith(field)]
    return 1024.0 * int(line.split()[1])


def val_loss(weights, decays, batch, key):
    return jnp.mean((batch @ weights[:8] - 1) ** 2)


def train_loss(weights, decays, batch, key):
    return val_loss(weights, decays, batch, key) + jnp.sum(decays * weights**2)


def run(which: str, size: int) -> None:
    """Prints what the caller's own arrays take, and what the run takes at its peak."""
    before = resident("VmRSS")
    weights, decays = jnp.zeros(size), hpo.Positive(jnp.full(size, 0.1))
    jax.block_until_ready((weights, decays.raw))
    own = resident("VmRSS") - before
    batch = jnp.ones((2, 8))
    problem = hpo.Problem(train_loss, val_loss)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.adam(0.1))
    if which == "tune":
        hpo.tune(algorithm, weights, decays, batch, batch, steps=STEPS, key=None)
    else:
        state = algorithm.init(weights, decays)
        arrays, static = eqx.partition(state, eqx.is_array)
        del state
        arrays = jtu.tree_map(jnp.copy, arrays)

        def step(arrays):
            state = algorithm.step(eqx.combine(arrays, static), batch, batch)
            return eqx.filter(state, eqx.is_array)

        donating = jax.jit(step, donate_argnums=0)
        for _ in range(STEPS):
            arrays = donating(arrays)
        jax.block_until_ready(arrays)
    unit = 4.0 * size
    peak = resident("VmHWM") - before
    print(f"{own / unit:.2f} {peak / unit:.2f}")


def main(size: int) -> None:
    for which in ("loop", "tune"):
        command = [sys.executable, "-m", "tests.benchmarks.peak", which]
        command += ["--weights", str(size)]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        own, peak = map(float, out.stdout.split())
        print(f"{which}: {peak - own:.2f} copies, beside {own:.2f} of the caller's own")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", nargs="?", choices=("loop", "tune"))
    parser.add_argument("--weights", type=int, default=10_000_000)
    args = parser.parse_args()
    main(args.weights) if args.which is None else run(args.which, args.weights)
