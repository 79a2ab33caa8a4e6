"""How time and memory of a step grow with the number of hyperparameters: one weight
decay for each weight of a two-layer network, from a thousand of them to a million or
more, beside plain training of the same network.

    python -m docs.experiments.scale
    python -m docs.experiments.scale --largest 1e8 --rounds 3
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Scalar

from .common import command, Method, plain_training, save, subplots


INNER_STEPS, CALLS = 5, 3e5
# The scale is fitted in the first step and never again, over a short horizon.
ONE_FIT: Any = dict(horizon=5, estimation_period=10**6)
INNER, OUTER = optax.sgd(0.1), optax.adam(0.01)
PLAIN, T1T2, GREEDY, DISTILL = "plain", "T1T2", "Greedy", "HyperDistill"


class Model(NamedTuple):
    """The weights, or one weight decay for each."""

    hidden: Any
    output: Any


class Data(NamedTuple):
    x: Float[Array, "batch width"]
    y: Float[Array, " batch"]


class Row(NamedTuple):
    decays: int
    seconds: dict[str, np.ndarray]  # of CPU for an inner step, in each round
    megabytes: dict[str, float]


def val_loss(model: Model, decay: Any, data: Data, key: None) -> Scalar:
    guesses = jax.nn.relu(data.x @ model.hidden) @ model.output
    return jnp.mean((guesses - data.y) ** 2)


def train_loss(model: Model, decay: Model, data: Data, key: None) -> Scalar:
    penalty = jax.tree.map(lambda d, w: jnp.sum(d * w**2) / 2, decay, model)
    return val_loss(model, None, data, None) + penalty.hidden + penalty.output


def make_methods() -> dict[str, Method]:
    args = (hpo.Problem(train_loss, val_loss), INNER, OUTER)
    algorithms = {
        T1T2: hpo.T1T2(*args, inner_steps=INNER_STEPS),
        GREEDY: hpo.Greedy(*args, inner_steps=INNER_STEPS),
        DISTILL: hpo.HyperDistill(*args, inner_steps=INNER_STEPS, **ONE_FIT),
    }
    return {PLAIN: plain_training(train_loss, INNER, INNER_STEPS)} | {
        name: Method(wrap_init(algorithm), wrap_step(algorithm))
        for name, algorithm in algorithms.items()
    }


def wrap_init(algorithm: Any) -> Callable[..., Any]:
    return lambda model, decay, train: algorithm.init(model, decay, train=train)


def wrap_step(algorithm: Any) -> Callable[..., Any]:
    return lambda state, train, val: algorithm.step(state, train, val)


def make_data(width: int, batch: int, seed: int) -> tuple[Model, Data, Data]:
    keys = jr.split(jr.key(seed), 4)
    hidden = jr.normal(keys[0], (width, width)) / width**0.5
    model = Model(hidden, jr.normal(keys[1], (width,)) / width**0.5)
    x = jr.normal(keys[2], (2, batch, width)) / width**0.5
    y = jr.normal(keys[3], (2, batch))
    return model, Data(x[0], y[0]), Data(x[1], y[1])


def start(method: Method, model: Model, train: Data) -> Any:
    """Copies, since each method writes over the state that it is given, as `tune`
    does, and may write over no array twice."""
    decay = jax.tree.map(lambda w: hpo.Positive(jnp.full(w.shape, 1e-3)), model)
    return jax.tree.map(jnp.copy, method.init(model, decay, train))


def compile_step(method: Method, *arguments: Any) -> Any:
    return jax.jit(method.step, donate_argnums=0).lower(*arguments).compile()


def count_megabytes(step: Any) -> float:
    """What must be held at once, as XLA plans it: the state, the data and all that is
    temporary."""
    plan = step.memory_analysis()
    total = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    return (total + plan.output_size_in_bytes - plan.alias_size_in_bytes) / 1e6


def measure(count: float, batch: int, rounds: int) -> Row:
    """Interleaves the methods, so that what else the machine does hits all alike."""
    model, train, val = make_data(round(count**0.5), batch, 0)
    states, steps, seconds = {}, {}, {}
    calls = max(1, round(CALLS / count))  # more of the short ones
    for name, method in make_methods().items():
        states[name], seconds[name] = start(method, model, train), []
        steps[name] = compile_step(method, states[name], train, val)
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begin = time.process_time()
            for _ in range(calls):
                states[name] = jax.block_until_ready(step(states[name], train, val))
            spent = time.process_time() - begin
            seconds[name].append(spent / (calls * INNER_STEPS))
        assert all(jnp.isfinite(x.model.output).all() for x in states.values())
    # The first round fits the scale of `HyperDistill`.
    seconds = {name: np.array(x[1:]) for name, x in seconds.items()}
    megabytes = {name: count_megabytes(step) for name, step in steps.items()}
    return Row(sum(x.size for x in model), seconds, megabytes)


def print_row(row: Row) -> None:
    plain = row.seconds[PLAIN]
    print(f"{row.decays:>10}{1e3 * np.median(plain):12.3f}", end="")
    for name in (T1T2, GREEDY, DISTILL):
        times = row.seconds[name]
        cell = f"{1e3 * np.median(times):.3f} ({np.median(times / plain):.2f})"
        print(f"{cell:>20}", end="")
    print("  ", *(f"{x:10.2f}" for x in row.megabytes.values()), flush=True)


def print_head() -> None:
    print(f"{'':10}{'CPU ms for an inner step (over plain)':>72}", end="")
    print(f"{'MB for a step':>46}")
    print(f"{'H':>10}{PLAIN:>12}{T1T2:>20}{GREEDY:>20}{DISTILL:>20}  ", end="")
    print("", *(f"{x:>10}" for x in (PLAIN, T1T2, GREEDY)), f"{DISTILL:>13}")


def draw(rows: list[Row], path: str) -> None:
    figure, (times, memory) = subplots((10, 4.4), 1, 2)
    counts = np.array([row.decays for row in rows])
    for name in rows[0].seconds:
        seconds = [np.median(row.seconds[name]) for row in rows]
        times.plot(counts, seconds, "o-", label=name)
        megabytes = [row.megabytes[name] for row in rows]
        memory.plot(counts, megabytes, "o-", label=name)
    for axes, last in [(times, rows[-1].seconds), (memory, rows[-1].megabytes)]:
        line = counts / counts[-1] * np.median(last[PLAIN])
        axes.plot(counts, line, ":", color="grey", label="in proportion to H")
        axes.set(xscale="log", yscale="log", xlabel="hyperparameters H")
    times.set(ylabel="CPU seconds for an inner step")
    memory.set(ylabel="MB for a step")
    times.legend()
    save(figure, path, times, memory)


QUICK = dict(smallest=1e4, largest=1e5, rounds=1)


def main(
    *,
    smallest: float = 1e3,
    largest: float = 1e6,
    batch: int = 16,
    rounds: int = 9,
    figure: str = "scale.png",
) -> list[Row]:
    rows = []
    print_head()
    decades = round(np.log10(largest / smallest))
    for count in smallest * 10.0 ** np.arange(decades + 1):
        rows.append(measure(count, batch, rounds))
        print_row(rows[-1])
    draw(rows, figure)
    print(f"\nThe figure is in {figure}.")
    return rows


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        smallest="number of decays",
        largest="number of decays",
        batch="examples in each part",
        rounds="of which the median is",
    )
