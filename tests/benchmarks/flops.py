"""Floating-point operations and temporary memory of one `T1T2` step, as XLA counts
them, over those of one training and one validation gradient.

    python -m tests.benchmarks.flops
"""

from collections.abc import Callable

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax


BATCH = 256
KEY = jr.key(3)
RULES = [
    hpo.ReverseOverReverse(),
    hpo.ForwardOverReverse(),
    hpo.FiniteDifference(),
]


class ConvNet(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.layers = [
            eqx.nn.Conv2d(1, 16, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.Conv2d(16, 32, 3, stride=2, padding=1, key=keys[1]),
            eqx.nn.Conv2d(32, 32, 3, stride=2, padding=1, key=keys[2]),
            eqx.nn.Linear(32 * 4 * 4, 10, key=keys[3]),
        ]

    def __call__(self, x):
        x = x.reshape(1, 28, 28)
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x.ravel())


def cross_entropy(model, x, y):
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def val_loss(model, hyperparams, batch, key):
    del hyperparams, key
    return jnp.mean(cross_entropy(model, *batch))


def weight_decay(model, hyperparams, batch, key):
    params = eqx.filter(model, eqx.is_inexact_array)
    squares = jtu.tree_map(lambda d, p: jnp.sum(d * p**2), hyperparams, params)
    return val_loss(model, None, batch, key) + sum(jtu.tree_leaves(squares))


def sample_weights(model, hyperparams, batch, key):
    del key
    return jnp.mean(hyperparams * cross_entropy(model, *batch))


def input_noise(model, hyperparams, batch, key):
    x, y = batch
    return val_loss(model, None, (x + hyperparams * jr.normal(key, x.shape), y), key)


def problems(model) -> dict[str, tuple[Callable, object]]:
    decays = jtu.tree_map(
        lambda x: jnp.full_like(x, 1e-4), eqx.filter(model, eqx.is_inexact_array)
    )
    return {
        "weight decay": (weight_decay, decays),
        "sample weights": (sample_weights, jnp.full(BATCH, 0.5)),
        "input noise": (input_noise, jnp.array(0.1)),
    }


def data(key):
    x_key, y_key = jr.split(key)
    x = jr.normal(x_key, (BATCH, 784))
    return x, jr.randint(y_key, (BATCH,), 0, 10)


def cost(fn, *args) -> tuple[float, int, int]:
    """The flops of a function, its bytes of temporary memory and of output."""
    arrays, static = eqx.partition(args, eqx.is_array)

    def traced(arrays):
        return eqx.filter(fn(*eqx.combine(arrays, static)), eqx.is_array)

    compiled = jax.jit(traced).lower(arrays).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and costs is not None
    return costs["flops"], memory.temp_size_in_bytes, memory.output_size_in_bytes


def gradient_cost(model, loss, hyperparams) -> tuple[float, int, int]:
    gradient = lambda model, hyperparams, batch: eqx.filter_grad(loss)(
        model, hyperparams, batch, KEY
    )
    return cost(gradient, model, hyperparams, data(jr.key(1)))


def step_cost(model, train_loss, hyperparams, second_order) -> tuple[float, int, int]:
    algorithm = hpo.T1T2(
        hpo.Problem(train_loss, val_loss),
        inner=optax.sgd(0.1),
        outer=optax.sgd(0.1),
        second_order=second_order,
    )
    state = algorithm.init(model, hyperparams)
    step = lambda state, train, val: algorithm.step(state, train, val, key=KEY)
    return cost(step, state, data(jr.key(1)), data(jr.key(2)))


def ratios(model, rules):
    """For each hyperparameter and rule, the flops of a step over those of the two
    gradients, and its temporary memory over that of the training gradient, which is
    the activations and the gradient itself."""
    val_flops, *_ = gradient_cost(model, val_loss, None)
    for name, (train_loss, hyperparams) in problems(model).items():
        flops, *memory = gradient_cost(model, train_loss, hyperparams)
        for rule in rules:
            step_flops, step_memory, _ = step_cost(model, train_loss, hyperparams, rule)
            flops_ratio = step_flops / (flops + val_flops)
            yield name, rule, flops_ratio, step_memory / sum(memory)


def main():
    models = {
        "MLP 784-256-256-10": eqx.nn.MLP(784, 10, 256, 2, key=jr.key(0)),
        "CNN 16-32-32": ConvNet(jr.key(0)),
    }
    print(f"{'model':20}{'hyperparameter':16}{'rule':20}{'flops':>8}{'memory':>8}")
    for model_name, model in models.items():
        for name, rule, flops, memory in ratios(model, RULES):
            row = f"{model_name:20}{name:16}{type(rule).__name__:20}"
            print(f"{row}{flops:8.3f}{memory:8.2f}")


if __name__ == "__main__":
    main()
