"""What the library adds to the time of the numbers themselves.

    python -m tests.benchmarks.overhead

The time of a call of `step` from Python beside `eqx.filter_jit` of the same function,
by the number of arrays of the model; of a step inside `tune` beside a bare `lax.scan`,
on the 16 features of workload S; and what many short episodes cost from start to end.
"""

import statistics
import time

import equinox as eqx
import eqx_hpo as hpo
import jax
import optax
from jax import lax

from . import workloads


EPISODES, INNER_STEPS = 30, 20


def as_problem(workload: workloads.Workload) -> hpo.Problem:
    return hpo.Problem(
        lambda params, raw, batch, key: workload.train_loss(params, raw, batch),
        lambda params, raw, batch, key: workload.val_loss(params, raw, batch),
    )


def call_times(leaves: int, repeats: int = 200) -> tuple[float, float]:
    """Microseconds of a call of `step`, and of `eqx.filter_jit` of the same function.
    The model computes next to nothing: the time is that of the call."""
    params = [jax.numpy.ones(2) for _ in range(leaves)]
    train_loss = lambda params, raw, batch, key: raw * sum(x[0] for x in params[:2])
    val_loss = lambda params, raw, batch, key: params[0][0] ** 2
    problem = hpo.Problem(train_loss, val_loss)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1))
    state = algorithm.init(params, 0.1)
    fn = lambda algorithm, state: algorithm.step(state, None, None)
    compiled = eqx.filter_jit(fn)
    calls = (
        lambda: algorithm.step(state, None, None),
        lambda: compiled(algorithm, state),
    )
    seconds = [[], []]
    for _ in range(repeats):
        for call, times in zip(calls, seconds):
            start = time.perf_counter()
            jax.block_until_ready(call().step)
            times.append(time.perf_counter() - start)
    ours, theirs = (1e6 * statistics.median(times[10:]) for times in seconds)
    return ours, theirs


def step_times(low: int = 2000, high: int = 20_000) -> tuple[float, float]:
    """Microseconds of a step inside `tune` and inside a bare scan over `step`, from the
    difference between a long and a short run."""
    workload = workloads.ridge()
    problem, data = as_problem(workload), (workload.train, workload.val)
    algorithm = hpo.T1T2(problem, optax.sgd(0.05), workload.outer)
    first = algorithm.init(workload.params, workload.raw)

    def tune(steps):
        hpo.tune(algorithm, workload.params, workload.raw, *data, steps=steps, key=None)

    @eqx.filter_jit
    def scanned(state, data, steps):
        body = lambda state, _: (algorithm.step(state, *data), None)
        return lax.scan(body, state, length=steps)[0]

    def scan(steps):
        jax.block_until_ready(scanned(first, data, steps).step)

    def seconds(run, steps):
        start = time.perf_counter()
        run(steps)
        return time.perf_counter() - start

    times = []
    for run in (tune, scan):
        run(low), run(high)
        rounds = [seconds(run, high) - seconds(run, low) for _ in range(7)]
        times.append(1e6 * statistics.median(rounds) / (high - low))
    return times[0], times[1]


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
    workload = workloads.ridge()
    algorithm = hpo.Unrolled(
        as_problem(workload), optax.sgd(0.05), workload.outer, inner_steps=INNER_STEPS
    )
    state = algorithm.init(workload.params, workload.raw)
    for _ in range(EPISODES):
        state = algorithm.restart(state, workload.params)
        state = algorithm.step(state, workload.train, workload.val)
    jax.block_until_ready(state.model)
    return time.perf_counter() - start, compilations


def main():
    seconds, compilations = episodes()
    print(f"{EPISODES} episodes of {INNER_STEPS} inner steps, by `step`:")
    print(f"  {seconds:.2f} s with start-up, {compilations} compilation(s) of `step`")
    for leaves in (10, 200, 600):
        ours, theirs = call_times(leaves)
        print(f"a call of `step`, {leaves} arrays: {ours:.0f} microseconds")
        print(f"  by `eqx.filter_jit` of the same function: {theirs:.0f}")
    in_tune, in_scan = step_times()
    print(f"a step inside `tune`: {in_tune:.2f} microseconds")
    print(
        f"  inside a bare scan: {in_scan:.2f}, a difference of {in_tune - in_scan:.2f}"
    )


if __name__ == "__main__":
    main()
