"""Time, compile time and temporary memory of a step of each algorithm, against plain
training.

    python tests/benchmarks/algorithms.py

An MLP 784-256-10 with one weight for each of 5000 examples, full batches, momentum, and
500 validation examples. Time is in plain training steps for each inner step.
"""

import statistics
import time

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import PyTree


EXAMPLES, VAL_EXAMPLES = 5000, 500
INNER = optax.sgd(0.1, momentum=0.9)
OUTER = optax.adam(0.1)


def cross_entropy(model, batch):
    x, y = batch
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def train_loss(model, hyperparams, batch, key):
    del key
    return jnp.mean(hyperparams * cross_entropy(model, batch))


def val_loss(model, hyperparams, batch, key):
    del hyperparams, key
    return jnp.mean(cross_entropy(model, batch))


PROBLEM = hpo.Problem(train_loss, val_loss)


def make_workload() -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """The model, the hyperparameters, the train and the validation data."""
    keys = jr.split(jr.key(0), 5)
    model = eqx.nn.MLP(784, 10, 256, 1, key=keys[0])

    def sample(x_key, y_key, size):
        return jr.normal(x_key, (size, 784)), jr.randint(y_key, (size,), 0, 10)

    train = sample(keys[1], keys[2], EXAMPLES)
    val = sample(keys[3], keys[4], VAL_EXAMPLES)
    return model, jnp.full(EXAMPLES, 0.5), train, val


def compile_step(algorithm: hpo.AbstractBilevelOptimizer, workload: tuple):
    """A step, compiled, with its arguments and the seconds that this took."""
    model, hyperparams, train, val = workload
    state = algorithm.init(model, hyperparams, train=train)
    arrays, static = eqx.partition((algorithm, state, train, val), eqx.is_array)

    def step(arrays):
        algorithm, state, train, val = eqx.combine(arrays, static)
        return eqx.filter(algorithm.step(state, train, val), eqx.is_array)

    start = time.perf_counter()
    compiled = jax.jit(step).lower(arrays).compile()
    return compiled, arrays, time.perf_counter() - start


def compile_training(inner_steps: int):
    """Plain training steps, likewise."""
    model, hyperparams, train, _ = make_workload()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def run(carry):
        def body(carry, _):
            params, opt_state = carry
            loss = lambda p: train_loss(
                eqx.combine(p, static), hyperparams, train, None
            )
            updates, opt_state = INNER.update(jax.grad(loss)(params), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(body, carry, length=inner_steps)[0]

    carry = (params, INNER.init(params))
    return jax.jit(run).lower(carry).compile(), carry


def seconds(compiled, arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(arguments))
    return time.perf_counter() - start


def make_algorithms() -> dict[str, hpo.AbstractBilevelOptimizer]:
    args = (PROBLEM, INNER, OUTER)
    return {
        "T1T2, 1": hpo.T1T2(*args),
        "T1T2, 10": hpo.T1T2(*args, inner_steps=10),
        "Greedy, 10": hpo.Greedy(*args, inner_steps=10),
        "Greedy, 1000": hpo.Greedy(*args, inner_steps=1000),
        "HyperDistill, 1": hpo.HyperDistill(*args, scale=1.0),
        "DrMAD, 10": hpo.DrMAD(*args, inner_steps=10),
        "DrMAD, 1000": hpo.DrMAD(*args, inner_steps=1000),
        "Unrolled, 10": hpo.Unrolled(*args, inner_steps=10),
    }


def main(repeats: int = 9) -> None:
    print(f"{'algorithm, inner steps':26}{'time':>8}{'MB':>8}{'compile, s':>12}")
    training, carry = compile_training(1)
    print(f"{'':26}{1:8.2f}{temporaries(training):8.1f}")
    for name, algorithm in make_algorithms().items():
        step, arguments, elapsed = compile_step(algorithm, make_workload())
        line = f"{name:26}{{:>8}}{temporaries(step):8.1f}{elapsed:12.2f}"
        if algorithm.inner_steps > 10:
            print(line.format(""))
            continue
        plain, carry = compile_training(algorithm.inner_steps)
        ratios = [
            seconds(step, arguments) / seconds(plain, carry) for _ in range(repeats)
        ]
        print(line.format(f"{statistics.median(ratios):.2f}"))


def temporaries(compiled) -> float:
    """In megabytes."""
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


if __name__ == "__main__":
    main()
