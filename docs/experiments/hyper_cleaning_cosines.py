r"""Cosines with the exact hypergradient along a run of data hyper-cleaning.

    python -m docs.experiments.hyper_cleaning_cosines
    python -m docs.experiments.hyper_cleaning_cosines --dataset fashion_mnist \
        --size 1000 --val-size 1000

The run is that of T1-T2 in `hyper_cleaning.py`, from the same start each time. In each
of its states that are looked at, all algorithms estimate the hypergradient of the same
ten inner steps. The figure shows means over the seeds.
"""

from typing import Any

import eqx_hpo as hpo
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Float

from .common import command, save, subplots
from .hyper_cleaning import (
    INNER_STEPS,
    make_net,
    make_problem,
    Problem,
    train_loss,
    val_loss,
)


def make_methods() -> dict[str, hpo.AbstractBilevelOptimizer]:
    inner, outer = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
    args = (hpo.Problem(train_loss, val_loss), inner, outer)
    options: dict[str, Any] = dict(inner_steps=INNER_STEPS)
    # The validation loss has no direct term here, so the scale changes no cosine.
    distill: dict[str, Any] = dict(scale=1.0, **options)
    return {
        "T1-T2": hpo.T1T2(*args, **options),
        "Greedy 0.9": hpo.Greedy(*args, **options, discount=0.9),
        "HyperDistill 0.5": hpo.HyperDistill(*args, **distill, discount=0.5),
        "HyperDistill 0.9": hpo.HyperDistill(*args, **distill, discount=0.9),
        "DrMAD": hpo.DrMAD(*args, **options),
        "exact": hpo.Unrolled(*args, **options),
    }


def run(
    methods: dict[str, hpo.AbstractBilevelOptimizer],
    problem: Problem,
    steps: list[int],
    seed: int,
) -> Float[np.ndarray, "methods steps"]:
    """The cosines of all methods but the exact one."""
    data = (problem.train, problem.val)
    start = make_net(problem.train, jr.key(seed))
    weights = jnp.zeros(problem.changed.shape)
    leader = methods["T1-T2"]
    state = leader.init(start, weights)
    rows = []
    for step in range(steps[-1] + 1):
        state = leader.restart(state, start)
        if step in steps:
            found = []
            for method in methods.values():
                other = method.init(start, state.hyperparams, train=problem.train)
                found.append(method.compute_hypergradient(other, *data))
            units = np.array([x / jnp.linalg.norm(x) for x in found])
            rows.append(units[:-1] @ units[-1])
        state = leader.step(state, *data)
    return np.array(rows).T


QUICK = dict(size=20, val_size=20, steps=1, seeds=1)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    corrupt: float = 0.3,
    size: int = 300,
    val_size: int = 300,
    steps: int = 50,
    seeds: int = 3,
    figure: str = "hyper_cleaning_cosines.png",
) -> dict[str, Float[np.ndarray, " steps"]]:
    methods, looked_at = make_methods(), list(range(0, steps + 1, max(1, steps // 5)))
    cosines = []
    for seed in range(seeds):
        problem = make_problem(dataset, folder, corrupt, size, val_size, seed)
        cosines.append(run(methods, problem, looked_at, seed))
    means = dict(zip(methods, np.mean(cosines, axis=0)))
    print(f"{'update':18}" + "".join(f"{step:7}" for step in looked_at))
    drawing, axes = subplots((5.5, 3.8))
    for name, values in means.items():
        print(f"{name:18}" + "".join(f"{x:7.2f}" for x in values))
        axes.plot(looked_at, values, "o-", label=name)
    axes.set(xlabel="update", ylabel="cosine with the exact hypergradient")
    axes.set_ylim(-0.05, 1.05)
    axes.legend()
    save(drawing, figure, axes)
    print(f"\nThe cosines are in {figure}.")
    return means


if __name__ == "__main__":
    command(main, __doc__, QUICK, corrupt="share of labels", steps="updates")
