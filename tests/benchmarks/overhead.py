"""What the library adds to the time of the numbers themselves, on a 16-weight ridge,
and what a run of many short episodes costs from start to end.

    python tests/benchmarks/overhead.py
"""

import time

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax


EPISODES, INNER_STEPS = 30, 20


def ridge(features):
    keys = jr.split(jr.key(0), 2)
    x, x_val = jr.normal(keys[0], (40, features)), jr.normal(keys[1], (40, features))
    truth = jnp.linspace(-1.0, 1.0, features)

    def val_loss(model, hyperparams, batch, key):
        return jnp.mean((batch[0] @ model - batch[1]) ** 2)

    def train_loss(model, hyperparams, batch, key):
        penalty = jnp.sum(hyperparams * model**2)
        return val_loss(model, hyperparams, batch, key) + penalty

    data = (x, x @ truth), (x_val, x_val @ truth)
    hyperparams = hpo.Positive(jnp.full(features, 0.1))
    return hpo.Problem(train_loss, val_loss), jnp.zeros(features), hyperparams, *data


def microseconds(fn, repeats=1000, rounds=9) -> float:
    """The fastest of some rounds, for each call."""
    fn()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            fn()
        times.append((time.perf_counter() - start) / repeats)
    return 1e6 * min(times)


def step_times() -> tuple[float, float]:
    """Of a warm `step`, and of a plain `jax.jit` call of the same computation on the
    same arrays."""
    problem, model, hyperparams, train, val = ridge(16)
    inner = optax.sgd(0.05, momentum=0.9)
    algorithm = hpo.T1T2(problem, inner, optax.adam(1e-2))
    state = algorithm.init(model, hyperparams)
    leaves, treedef = jtu.tree_flatten(state)

    @jax.jit
    def plain(leaves, train, val):
        state = jtu.tree_unflatten(treedef, leaves)
        return jtu.tree_leaves(algorithm.step(state, train, val))

    def step():
        nonlocal state
        state = algorithm.step(state, train, val)

    def plain_step():
        nonlocal leaves
        leaves = plain(leaves, train, val)

    return microseconds(step), microseconds(plain_step)


def tune_time(steps=100_000) -> float:
    """Of a step inside `tune`, start-up left out."""
    problem, model, hyperparams, train, val = ridge(16)
    algorithm = hpo.T1T2(problem, optax.sgd(0.05, momentum=0.9), optax.adam(1e-2))
    run = lambda steps: hpo.tune(
        algorithm, model, hyperparams, train, val, steps=steps, key=None
    )
    run(10)
    start = time.perf_counter()
    run(steps)
    return 1e6 * (time.perf_counter() - start) / steps


def episodes() -> tuple[float, int]:
    """Seconds and compilations of `step` for 30 episodes of 20 inner steps, from
    nothing."""
    compilations = 0

    def count(event, *_, **kwargs):
        nonlocal compilations
        is_step = kwargs.get("fun_name") == "jit(step)"
        compilations += is_step and event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(count)
    start = time.perf_counter()
    problem, model, hyperparams, train, val = ridge(10)
    algorithm = hpo.Unrolled(
        problem, optax.sgd(0.05), optax.adam(1e-2), inner_steps=INNER_STEPS
    )
    state = algorithm.init(model, hyperparams)
    for _ in range(EPISODES):
        state = algorithm.restart(state, model)
        state = algorithm.step(state, train, val)
    jax.block_until_ready(state.model)
    return time.perf_counter() - start, compilations


def main():
    seconds, compilations = episodes()
    print(f"{EPISODES} episodes of {INNER_STEPS} inner steps, by `step`:")
    print(f"  {seconds:.2f} s with start-up, {compilations} compilation(s) of `step`")
    step, plain = step_times()
    print(f"a warm `step`:          {step:7.1f} microseconds")
    print(f"the same by `jax.jit`:  {plain:7.1f} microseconds")
    print(f"difference:             {step - plain:7.1f} microseconds")
    print(f"a step inside `tune`:   {tune_time():7.1f} microseconds")


if __name__ == "__main__":
    main()
