"""How well the forms of `Greedy` agree with the exact hypergradient over the same inner
steps: their cosine, on linear regressions drawn at random with one log-penalty for each
feature.

    python -m docs.experiments.greedy_cosines

With momentum a training gradient acts for many steps, which the discount of `Greedy`
does not know. And the weights pass the minimum of the validation loss and swing back,
so that its gradient early on the way points elsewhere than at the end.

The forms: `greedy` is plain, `momentum` has the option of that name, `final` has
`final_gradient=True`, `both` has the two.
"""

from typing import NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .common import command


EXAMPLES, FEATURES, NOISE = 100, 10, 1.0
PENALTY = -2.0  # the logarithm of each
DISCOUNT, MOMENTUM = 0.9, 0.9
INNERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=MOMENTUM),
    "nesterov": optax.sgd(0.1, momentum=MOMENTUM, nesterov=True),
    "adam": optax.adam(0.1),
}


class Data(NamedTuple):
    x: Float[Array, "examples features"]
    y: Float[Array, " examples"]


class Task(NamedTuple):
    weights: Float[Array, " features"]  # at the start
    train: Data
    val: Data


def val_loss(
    weights: Float[Array, " features"],
    penalty: Float[Array, " features"],
    batch: Data,
    key: None,
) -> Scalar:
    del penalty, key
    return 0.5 * jnp.mean((batch.x @ weights - batch.y) ** 2)


def train_loss(
    weights: Float[Array, " features"],
    penalty: Float[Array, " features"],
    batch: Data,
    key: None,
) -> Scalar:
    decay = 0.5 * jnp.sum(jnp.exp(penalty) * weights**2)
    return val_loss(weights, penalty, batch, key) + decay


def draw_task(key: PRNGKeyArray) -> Task:
    truth_key, start_key, train_key, val_key = jr.split(key, 4)
    truth = jr.normal(truth_key, (FEATURES,))

    def draw_data(key):
        x_key, noise_key = jr.split(key)
        x = jr.normal(x_key, (EXAMPLES, FEATURES))
        return Data(x, x @ truth + NOISE * jr.normal(noise_key, (EXAMPLES,)))

    start = jr.normal(start_key, (FEATURES,))
    return Task(start, draw_data(train_key), draw_data(val_key))


def make_methods(
    inner: optax.GradientTransformation, inner_steps: int
) -> dict[str, hpo.AbstractBilevelOptimizer]:
    args = (hpo.Problem(train_loss, val_loss), inner, optax.sgd(0.1))

    # A momentum of 0 is none, and compiles to the same as any other.
    def greedy(momentum, final_gradient=False):
        return hpo.Greedy(
            *args,
            inner_steps=inner_steps,
            discount=DISCOUNT,
            momentum=momentum,
            final_gradient=final_gradient,
        )

    return {
        "exact": hpo.Unrolled(*args, inner_steps=inner_steps),
        "T1-T2": hpo.T1T2(*args, inner_steps=inner_steps),
        "greedy": greedy(0.0),
        "momentum": greedy(MOMENTUM),
        "final": greedy(0.0, final_gradient=True),
        "both": greedy(MOMENTUM, final_gradient=True),
    }


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0))
def hypergradient(
    algorithm: hpo.AbstractBilevelOptimizer, task: Task
) -> Float[Array, " features"]:
    state = algorithm.init(task.weights, jnp.full(FEATURES, PENALTY))
    return algorithm.compute_hypergradient(state, task.train, task.val)


def compute_cosines(
    inner: optax.GradientTransformation, inner_steps: int, tasks: Task
) -> dict[str, np.ndarray]:
    methods = make_methods(inner, inner_steps)
    gradients = {name: hypergradient(method, tasks) for name, method in methods.items()}
    units = {
        name: np.asarray(x / jnp.linalg.norm(x, axis=1, keepdims=True))
        for name, x in gradients.items()
    }
    exact = units.pop("exact")
    return {name: np.sum(unit * exact, axis=1) for name, unit in units.items()}


QUICK = dict(inner_steps=(5,), tasks=20)


def main(
    *, inner_steps: tuple[int, ...] = (5, 20), tasks: int = 100, seed: int = 0
) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    drawn = eqx.filter_vmap(draw_task)(jr.split(jr.key(seed), tasks))
    names = list(make_methods(INNERS["sgd"], 1))[1:]
    print(
        f"cosine with the exact hypergradient: mean and lowest of {tasks} regressions"
    )
    print(f"{'inner':10}{'T':>3}" + "".join(f"{name:>14}" for name in names))
    results = {}
    for inner_name, inner in INNERS.items():
        for count in inner_steps:
            cosines = compute_cosines(inner, count, drawn)
            results[inner_name, count] = cosines
            cells = (f"{np.mean(x):8.2f}{np.min(x):6.2f}" for x in cosines.values())
            print(f"{inner_name:10}{count:3}" + "".join(cells), flush=True)
    return results


if __name__ == "__main__":
    command(main, __doc__, QUICK, tasks="regressions to draw")
