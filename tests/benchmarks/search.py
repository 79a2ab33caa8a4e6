"""What trials side by side gain in a random search, on one core.

    taskset -c 0 python -m tests.benchmarks.search

CPU seconds of `search` with 64 trials at once over those one after the other, without
compilation: medians over repeats, in turns. The model is a perceptron with one hidden
layer; each trial takes 300 steps of SGD, its rate and decay searched.
"""

import statistics
import time
import warnings

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax


STEPS, AT_ONCE = 300, 64


def val_loss(model, values, batch, key):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2)


def train_loss(model, values, batch, key):
    weights = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    penalty = values["decay"] * sum(jnp.sum(w**2) for w in weights)
    return val_loss(model, values, batch, key) + penalty


ALGORITHM = hpo.T1T2(
    hpo.Problem(train_loss, val_loss),
    lambda values: optax.sgd(values["rate"]),
    optax.adam(0.1),
)


def measure(width: int, batch: int, trials: int, repeats: int = 3) -> list[float]:
    """Seconds one after the other, and at once."""
    x = jr.normal(jr.key(0), (128, 8))
    val = (x, jnp.sin(x[:, 0]))
    model = eqx.nn.MLP(8, 1, width, 1, key=jr.key(1))
    make = lambda decay, rate: {
        "decay": hpo.Positive(decay),
        "rate": hpo.Positive(rate),
    }
    args = (ALGORITHM, model, make(1e-5, 1e-3), make(1.0, 0.3))

    def seconds(parallel):
        start = time.process_time()
        hpo.search(
            *args,
            hpo.Minibatch(val, batch),
            val,
            trials=trials,
            steps=STEPS,
            key=jr.key(2),
            sampler="random",
            parallel=parallel,
            progress=False,
        )
        return time.process_time() - start

    rounds = [(seconds(1), seconds(AT_ONCE)) for _ in range(repeats + 1)]
    return [statistics.median(x) for x in zip(*rounds[1:])]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(f"{'width, batch, trials':24}{'alone s':>10}{'at once s':>10}{'ratio':>8}")
    for width, batch in ((4, 8), (4, 32), (16, 8), (16, 32), (64, 32)):
        for trials in (64, 640):
            alone, at_once = measure(width, batch, trials)
            name = f"{width}, {batch}, {trials}"
            print(f"{name:24}{alone:10.3f}{at_once:10.3f}{alone / at_once:8.2f}")
