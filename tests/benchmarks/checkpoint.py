"""Temporary memory of a step of `Unrolled` by what it keeps of the inner steps, and its
time in plain training steps for each inner step.

    python tests/benchmarks/checkpoint.py

The first workload is that of `algorithms.py`, with 50 inner steps; the second an MLP
with six hidden layers of 256 and tanh, a batch of 1024, SGD and 64 inner steps.
"""

import argparse
import itertools
import math
import statistics

import algorithms
import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax


RULES = {
    "reverse over reverse": hpo.ReverseOverReverse(),
    "forward over reverse": hpo.ForwardOverReverse(),
}
CHECKPOINTS = (None, "step", "nested")


def make_deep_workload():
    keys = jr.split(jr.key(0), 4)
    model = eqx.nn.MLP(256, 10, 256, 6, activation=jnp.tanh, key=keys[0])
    x = jr.normal(keys[1], (1024, 256))
    batch = (x, jr.randint(keys[2], (1024,), 0, 10))
    return model, jnp.full(1024, 0.5), batch, batch


def make_algorithm(inner, inner_steps, rule, checkpoint) -> hpo.Unrolled:
    return hpo.Unrolled(
        algorithms.PROBLEM,
        inner,
        algorithms.OUTER,
        RULES[rule],
        inner_steps=inner_steps,
        checkpoint=checkpoint,
    )


def compile_by_hand(workload, inner, inner_steps, checkpoint):
    """The hypergradient and the trained model, as one would write it for a single
    problem."""
    model, hyperparams, train, val = workload
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def train_loss(params, weights, train):
        return algorithms.train_loss(eqx.combine(params, static), weights, train, None)

    def reach(carry, weights, train):
        def body(carry, _):
            params, opt_state = carry
            grads = jax.grad(train_loss)(params, weights, train)
            updates, opt_state = inner.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        if checkpoint is not None:
            body = jax.checkpoint(body, prevent_cse=False)

        def scan(carry, length):
            return jax.lax.scan(body, carry, length=length)[0]

        if checkpoint == "nested":
            length = math.isqrt(inner_steps)
            segment = lambda carry, _: (scan(carry, length), None)
            segment = jax.checkpoint(segment, prevent_cse=False)
            carry, _ = jax.lax.scan(segment, carry, length=inner_steps // length)
            inner_rest = inner_steps % length
            return scan(carry, inner_rest) if inner_rest > 0 else carry
        return scan(carry, inner_steps)

    def loss(weights, carry, train, val):
        params, opt_state = reach(carry, weights, train)
        model = eqx.combine(params, static)
        return algorithms.val_loss(model, weights, val, None), (params, opt_state)

    arguments = (hyperparams, (params, inner.init(params)), train, val)
    fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return fn.lower(*arguments).compile(), arguments


def main(repeats: int = 5) -> None:
    wide = algorithms.make_workload()
    deep = make_deep_workload()
    print(f"{'':44}{'MB':>9}{'MiB':>9}{'time':>7}")
    plain, carry = algorithms.compile_training(50)
    for checkpoint in CHECKPOINTS:
        step, _ = compile_by_hand(wide, algorithms.INNER, 50, checkpoint)
        print_row("784-256-10, 50 steps", "by hand", checkpoint, step, "")
    for checkpoint in CHECKPOINTS:
        step, _ = compile_by_hand(deep, optax.sgd(0.1), 64, checkpoint)
        print_row("6x256, 64 steps", "by hand", checkpoint, step, "")
    for rule, checkpoint in itertools.product(RULES, CHECKPOINTS):
        algorithm = make_algorithm(algorithms.INNER, 50, rule, checkpoint)
        step, arguments, _ = algorithms.compile_step(algorithm, wide)
        ratios = [
            algorithms.seconds(step, arguments) / algorithms.seconds(plain, carry)
            for _ in range(repeats)
        ]
        time = f"{statistics.median(ratios):7.2f}" if ratios else ""
        print_row("784-256-10, 50 steps", rule, checkpoint, step, time)
    for rule, checkpoint in itertools.product(RULES, CHECKPOINTS):
        algorithm = make_algorithm(optax.sgd(0.1), 64, rule, checkpoint)
        step, _, _ = algorithms.compile_step(algorithm, deep)
        print_row("6x256, 64 steps", rule, checkpoint, step, "")


def print_row(workload, rule, checkpoint, compiled, time) -> None:
    megabytes = algorithms.temporaries(compiled)
    name = f"{workload}, {rule}, {checkpoint}"
    print(f"{name:52}{megabytes:9.1f}{megabytes * 1e6 / 2**20:9.1f}{time}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="0: memory alone")
    main(**vars(parser.parse_args()))
