"""Memory and time of long trajectories by `Unrolled(recompute=d)`, on an MLP of 26,122
weights with momentum and 50 example weights.

    python -m tests.benchmarks.recompute --steps 100000 --recompute 5

Prints the megabytes of XLA's temporaries, the time in plain trainings of as many steps,
and the relative difference to forward mode along a random direction, in double
precision.
"""

import argparse
import time

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax


EXAMPLES = 50
INNER = optax.sgd(0.01, momentum=0.9)


def make_problem(dtype):
    keys = jr.split(jr.key(0), 3)
    model = eqx.nn.MLP(64, 10, 128, 2, key=keys[0], dtype=dtype)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jr.normal(keys[1], (EXAMPLES, 64), dtype)
    y = jr.randint(keys[2], (EXAMPLES,), 0, 10)

    def losses(params):
        logits = jax.vmap(eqx.combine(params, static))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def train_loss(params, raw, batch, key):
        return jnp.mean(jax.nn.sigmoid(raw) * losses(params))

    def val_loss(params, raw, batch, key):
        return jnp.mean(losses(params)[::2])

    return hpo.Problem(train_loss, val_loss), params


def train(problem, params, raw, steps):
    def body(_, carry):
        params, opt_state = carry
        grads = jax.grad(problem.train_loss)(params, raw, None, None)
        updates, opt_state = INNER.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    return lax.fori_loop(0, steps, body, (params, INNER.init(params)))[0]


def measure(steps: int, recompute: int) -> tuple[float, float]:
    """Megabytes, and plain trainings of time."""
    problem, params = make_problem(jnp.float32)
    raw = jnp.zeros(EXAMPLES)
    algorithm = hpo.Unrolled(
        problem, INNER, optax.sgd(0.1), inner_steps=steps, recompute=recompute
    )
    state = algorithm.init(params, raw)
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(arrays):
        state = algorithm.step(eqx.combine(arrays, static), None, None)
        return eqx.filter(state, eqx.is_array)

    compiled = jax.jit(step).lower(arrays).compile()
    plain = jax.jit(lambda raw: train(problem, params, raw, steps)).lower(raw).compile()
    seconds = []
    for run in (lambda: plain(raw), lambda: compiled(arrays)):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes / 1e6, seconds[1] / seconds[0]


def difference(steps: int, recompute: int) -> float:
    """To forward mode along a random direction, relative, in double precision."""
    with jax.enable_x64(True):
        problem, params = make_problem(jnp.float64)
        raw, direction = jnp.zeros(EXAMPLES), jr.normal(jr.key(3), (EXAMPLES,))
        algorithm = hpo.Unrolled(
            problem, INNER, optax.sgd(0.1), inner_steps=steps, recompute=recompute
        )
        state = algorithm.init(params, raw)
        got = algorithm.compute_hypergradient(state, None, None) @ direction

        def loss(raw):
            return problem.val_loss(train(problem, params, raw, steps), raw, None, None)

        _, expected = jax.jit(lambda raw: jax.jvp(loss, (raw,), (direction,)))(raw)
        return float(abs(got - expected) / abs(expected))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--recompute", type=int, default=4)
    args = parser.parse_args()
    megabytes, trainings = measure(args.steps, args.recompute)
    print(f"{args.steps} steps, recompute={args.recompute}: {megabytes:.2f} MB")
    print(f"time: {trainings:.2f} plain trainings")
    error = difference(args.steps, args.recompute)
    print(f"difference to forward mode: {error:.1e}")
