"""A step of `T1T2` with a decay for each weight, as many as the memory takes: what XLA
plans to hold, before anything is allocated, and then the time, the page faults and the
peak of each step.

    python -m tests.benchmarks.scale --decays 1e9 --plan
    python -m tests.benchmarks.scale --decays 1e8

The two optimisers are plain SGD, and each step writes over the state before it. The
network has two layers, of as many inputs as hidden units, and one output.
"""

import argparse
import resource
import time

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

from .peak import resident


BATCH = 16


def val_loss(model, decays, batch, key):
    hidden, output = model
    x, y = batch
    return jnp.mean((jax.nn.relu(x @ hidden) @ output - y) ** 2)


def train_loss(model, decays, batch, key):
    penalties = [jnp.sum(d * w**2) for d, w in zip(decays, model)]
    return val_loss(model, decays, batch, key) + sum(penalties)


def start(algorithm, width, dtype):
    """Makes the first state. Traced as one function it holds no arrays on the way."""
    places = jax.lax.broadcasted_iota(dtype, (width, width), 1)
    model = (jnp.cos(places) / width**0.5, jnp.full(width, width**-0.5, dtype))
    decays = [hpo.Positive(jnp.full(w.shape, 1e-3, dtype)) for w in model]
    return algorithm.init(model, decays)


def compile_step(algorithm, width, dtype):
    state = eqx.filter_eval_shape(start, algorithm, width, dtype)
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    batch = (struct(BATCH, width), struct(BATCH))
    step = lambda state, train, val: algorithm.step(state, train, val)
    return jax.jit(step, donate_argnums=0).lower(state, batch, batch).compile()


def planned(step) -> int:
    plan = step.memory_analysis()
    held = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    return held + plan.output_size_in_bytes - plan.alias_size_in_bytes


def available() -> float:
    with open("/proc/meminfo") as file:
        (line,) = [x for x in file if x.startswith("MemAvailable")]
    return 1024.0 * int(line.split()[1])


def run(algorithm, step, width, dtype, steps, unit) -> None:
    init = jax.jit(lambda: start(algorithm, width, dtype))
    batches = []
    for key in jr.split(jr.key(0)):
        x = jr.normal(key, (BATCH, width), dtype) / width**0.5
        batches.append((x, jnp.sin(jnp.arange(BATCH, dtype=dtype))))
    before = resident("VmRSS")
    state = jax.block_until_ready(init())
    for _ in range(steps):
        old, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        state = jax.block_until_ready(step(state, *batches))
        wall, new = time.perf_counter() - begin, resource.getrusage(0)
        peak = (resident("VmHWM") - before) / unit
        print(
            f"{wall:.2f} s, of CPU {new.ru_utime - old.ru_utime:.2f} s and "
            f"{new.ru_stime - old.ru_stime:.2f} s in the kernel; "
            f"{new.ru_minflt - old.ru_minflt} page faults; peak {peak:.2f} copies; "
            f"losses {state.metrics.train_loss:.4f}, {state.metrics.val_loss:.4f}",
            flush=True,
        )
    assert int(state.total_skipped) == 0


def main(decays, inner_steps, steps, margin, plan, half) -> None:
    width, dtype = round(decays**0.5), jnp.bfloat16 if half else jnp.float32
    algorithm = hpo.T1T2(
        hpo.Problem(train_loss, val_loss),
        optax.sgd(0.1),
        optax.sgd(0.1),
        inner_steps=inner_steps,
    )
    step = compile_step(algorithm, width, dtype)
    unit, held = (width**2 + width) * jnp.dtype(dtype).itemsize, planned(step)
    print(f"{width**2 + width} decays: plan {held / 1e9:.2f} GB", end="")
    print(f" = {held / unit:.2f} copies; available {available() / 1e9:.1f} GB")
    if plan:
        return
    if held + 1e9 * margin > available():
        raise SystemExit(f"That is not {margin} GB less than what is available.")
    run(algorithm, step, width, dtype, steps, unit)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decays", type=float, default=1e7)
    parser.add_argument("--inner-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--margin", type=float, default=2, help="GB to leave free")
    parser.add_argument("--plan", action="store_true", help="allocate nothing")
    parser.add_argument("--half", action="store_true", help="bfloat16 throughout")
    main(**vars(parser.parse_args()))
