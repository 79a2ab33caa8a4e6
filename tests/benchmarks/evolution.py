"""`Evolution` tunes the share of errors itself, beside a random search; and its cost.

    taskset -c 0 python -m tests.benchmarks.evolution errors
    taskset -c 0 python -m tests.benchmarks.evolution cost

`errors`: the share of wrong digits of scikit-learn's on validation images is the
validation loss, which has no slope anywhere. The rate and the decay of a perceptron
start where it learns nothing. Test errors of the random search with `TRIALS` trainings
and of `Evolution` with a quarter of them, over seeds. Settings were chosen on the seeds
from 100 on.

`cost`: seconds of a call with `PAIRS` pairs over those of plain training, on one core,
medians over repeats in turns.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from sklearn.datasets import load_digits


TRIALS, LENGTH, WINDOW, PAIRS = 256, 200, 20, 16
TRAIN, VAL = 300, 500  # images; the others are for the test
LOW = {"rate": hpo.Positive(1e-5), "decay": hpo.Positive(1e-6)}
HIGH = {"rate": hpo.Positive(10.0), "decay": hpo.Positive(10.0)}
START = {"rate": hpo.Positive(3e-3), "decay": hpo.Positive(0.03)}


def train_loss(model, h, batch, key):
    x, y = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y)
    weights = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    return jnp.mean(losses) + h["decay"] * sum(jnp.sum(w**2) for w in weights)


def errors(model, h, batch, key):
    x, y = batch
    return jnp.mean(jnp.argmax(jax.vmap(model)(x), axis=1) != y)


PROBLEM = hpo.Problem(train_loss, errors)
INNER = lambda h: optax.sgd(h["rate"], momentum=0.9)


def data_of(seed: int):
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    cut = lambda a, b: (x[a:b], y[a:b])
    return cut(0, TRAIN), cut(TRAIN, TRAIN + VAL), cut(TRAIN + VAL, len(x))


def make(pairs: int, scale: float, rate: Any, window: int) -> hpo.Evolution:
    return hpo.Evolution(
        PROBLEM, INNER, optax.adam(rate), inner_steps=window, pairs=pairs, scale=scale
    )


def compare(seed: int, pairs: int, scale: float, outer: float) -> dict[str, float]:
    """Test errors, in percent, and the numbers of trainings."""
    train, val, test = data_of(seed)
    model = eqx.nn.MLP(64, 10, 32, 1, key=jr.key(seed))
    key, windows = jr.key(seed), LENGTH // WINDOW
    # Two trainings for each pair, that of the model, and one at the end.
    episodes = (TRIALS // 4 - 1) // (2 * pairs + 1)
    # The noise of the estimate stays, so the steps have to shrink.
    rate = optax.cosine_decay_schedule(outer, episodes * windows)
    algorithm = make(pairs, scale, rate, WINDOW)
    tuned = hpo.tune(
        algorithm,
        model,
        START,
        train,
        val,
        steps=episodes * windows,
        restart_every=windows,
        key=key,
        progress=False,
    )
    plain = hpo.FirstOrder(PROBLEM, INNER, optax.sgd(0.0))
    common = {"key": key, "progress": False}
    fitted = hpo.fit(plain, model, tuned.values, train, steps=LENGTH, **common)
    found = hpo.search(
        hpo.FirstOrder(PROBLEM, INNER, optax.sgd(0.0)),
        model,
        LOW,
        HIGH,
        train,
        val,
        trials=TRIALS,
        steps=LENGTH,
        sampler="random",
        parallel=64,
        **common,
    )
    untuned = hpo.fit(plain, model, START, train, steps=LENGTH, **common)
    of = lambda solution: 100 * float(errors(solution.model, None, test, None))
    return {
        "start": of(untuned),
        "random": of(found),
        "evolution": of(fitted),
        "trainings": episodes * (2 * pairs + 1) + 1,
        "rate": float(tuned.values["rate"]),
        "decay": float(tuned.values["decay"]),
    }


def show_errors(seeds: range, pairs: int, scale: float, outer: float) -> None:
    rows = []
    for seed in seeds:
        rows.append(compare(seed, pairs, scale, outer))
        print(seed, {x: float(f"{y:.3g}") for x, y in rows[-1].items()}, flush=True)
    for name in ("start", "random", "evolution"):
        values = np.array([row[name] for row in rows])
        print(f"{name:10} {values.mean():6.2f} spread {values.std(ddof=1):.2f}")
    gap = np.array([row["evolution"] - row["random"] for row in rows])
    print(f"difference {gap.mean():6.2f} +- {gap.std(ddof=1) / len(gap) ** 0.5:.2f}")


def show_cost(repeats: int = 9) -> None:
    """Windows of one whole training each, so that nothing but training counts."""
    for width, batch in ((32, 32), (32, 128), (64, 32)):
        train, val, _ = data_of(0)
        train = jtu.tree_map(lambda x, n=batch: x[:n], train)
        model = eqx.nn.MLP(64, 10, width, 1, key=jr.key(0))
        algorithms = [
            make(PAIRS, 0.1, 0.01, LENGTH),
            hpo.FirstOrder(PROBLEM, INNER, optax.adam(0.01), inner_steps=LENGTH),
        ]
        states = [x.init(model, START) for x in algorithms]

        def seconds(i):
            start = time.perf_counter()
            key = jr.key(0)
            jax.block_until_ready(algorithms[i].step(states[i], train, val, key=key))
            return time.perf_counter() - start

        rounds = [(seconds(0), seconds(1)) for _ in range(repeats + 1)][1:]
        ours, plain = (statistics.median(x) for x in zip(*rounds))
        ratio = statistics.median(x / y for x, y in rounds)
        print(f"width {width}, batch {batch}: {ours:.3f} s, {plain:.4f} s, {ratio:.1f}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["errors", "cost"])
    parser.add_argument("--first", type=int, default=10, help="the first seed")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--outer", type=float, default=0.3)
    args = parser.parse_args()
    if args.what == "cost":
        show_cost()
    else:
        seeds = range(args.first, args.first + args.seeds)
        show_errors(seeds, args.pairs, args.scale, args.outer)
