"""The two-dimensional toy of Generalized Greedy (section 5.2), in which the train loss
pulls the weights to where the hyperparameters are and the validation loss has its
minimum at zero with other valleys around it:

    C2(w) = |w|^2 + 10 |sin w|^2,    C1(w, a) = 0.5 (w - a)^T diag(1, 0.5) (w - a)

Either the weights go on from one update of `a` to the next (warm start), or they are
put back to (2, 2) before each (restart).

    python -m docs.experiments.greedy_toy
"""

from typing import Any, NamedTuple

import eqx_hpo as hpo
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Scalar

from .common import command, save, subplots


READINGS = {"warm start": None, "restart": 1}
EARLY = 20  # updates after which the table reads the loss a first time


class Run(NamedTuple):
    reading: str
    inner_steps: int
    method: str


def train_loss(
    weights: Float[Array, "2"], target: Float[Array, "2"], batch: None, key: None
) -> Scalar:
    del batch, key
    return 0.5 * jnp.sum(jnp.array([1.0, 0.5]) * (weights - target) ** 2)


def val_loss(
    weights: Float[Array, "2"], target: Float[Array, "2"], batch: None, key: None
) -> Scalar:
    del target, batch, key
    return jnp.sum(weights**2) + 10 * jnp.sum(jnp.sin(weights) ** 2)


def make_methods(inner_steps: int) -> dict[str, hpo.AbstractBilevelOptimizer]:
    sgd = optax.sgd(0.1)
    args = (hpo.Problem(train_loss, val_loss), sgd, sgd)
    options: dict[str, Any] = dict(inner_steps=inner_steps)
    final = hpo.Greedy(*args, **options, discount=0.9, final_gradient=True)
    return {
        "T1-T2": hpo.T1T2(*args, **options),
        "greedy 0.3": hpo.Greedy(*args, **options, discount=0.3),
        "greedy 0.9": hpo.Greedy(*args, **options, discount=0.9),
        "greedy 0.9, final gradient": final,
        "exact": hpo.Unrolled(*args, **options),
    }


def run_all(inner_steps: tuple[int, ...], steps: int) -> dict[Run, hpo.History]:
    start, target = jnp.full(2, 2.0), jnp.ones(2)
    histories = {}
    for count in inner_steps:
        for method, algorithm in make_methods(count).items():
            for reading, restart in READINGS.items():
                solution = hpo.tune(
                    algorithm,
                    start,
                    target,
                    None,
                    None,
                    steps=steps,
                    key=None,
                    restart_every=restart,
                    record_every=1,
                )
                histories[Run(reading, count, method)] = solution.history
    return histories


def print_table(histories: dict[Run, hpo.History], inner_steps: tuple[int, ...]):
    steps = len(next(iter(histories.values())).step)
    early = min(EARLY, steps - 1)
    for reading in READINGS:
        print(f"\n{reading}: validation loss after {early} and {steps - 1} updates")
        print(f"{'':28}" + "".join(f"{f'T = {count}':>20}" for count in inner_steps))
        for method in methods_of(histories):
            print(f"{method:28}", end="")
            for count in inner_steps:
                loss = histories[Run(reading, count, method)].val_loss
                # The loss of a step is that before its update.
                print(f"{loss[early]:10.3f}{loss[-1]:10.3f}", end="")
            print()


def methods_of(histories: dict[Run, hpo.History]) -> list[str]:
    return list(dict.fromkeys(run.method for run in histories))


def draw(
    histories: dict[Run, hpo.History], inner_steps: tuple[int, ...], path: str
) -> None:
    figure, grid = subplots(
        (10, 5.6), 2, len(inner_steps), sharex=True, sharey=True, squeeze=False
    )
    methods = methods_of(histories)
    for row, reading in zip(grid, READINGS):
        for axes, count in zip(row, inner_steps):
            for number, method in enumerate(methods):
                history = histories[Run(reading, count, method)]
                style = ("-", "--", "-", "--", ":")[number]
                axes.plot(history.step, history.val_loss, style, label=method)
            # Linear below: some of the losses reach zero.
            axes.set_yscale("symlog", linthresh=1e-2)
            axes.set(title=f"{reading}, T = {count}", xscale="log")
        row[0].set_ylabel("validation loss")
    for axes in grid[-1]:
        axes.set_xlabel("outer step")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    save(figure, path, *grid.flat, dpi=90)


QUICK = dict(inner_steps=(5,), steps=22)


def main(
    *,
    inner_steps: tuple[int, ...] = (5, 10, 20),
    steps: int = 301,
    figure: str = "greedy_toy.png",
) -> dict[Run, hpo.History]:
    histories = run_all(inner_steps, steps)
    print_table(histories, inner_steps)
    draw(histories, inner_steps, figure)
    print(f"\nThe course of the runs is in {figure}.")
    return histories


if __name__ == "__main__":
    command(main, __doc__, QUICK, steps="outer steps")
