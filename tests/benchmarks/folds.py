"""What five folds cost, beside five times a run of one.

    python -m tests.benchmarks.folds [name ...]

For each network and algorithm: milliseconds of a step of `MetaLearner` over five folds,
those of a step of each fold by itself, one after the other, and their ratio: medians
over interleaved repeats in one process. And how often XLA compiled the step of the
folds.

Dense networks gain: products of a batch of small matrices, and one call in place of
five. Convolutions lose on CPUs, where XLA has no quick code for a batch of kernels: the
derivative in the input takes up to eight times as long as one after the other.
"""

import statistics
import sys
import time

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax

from . import workloads


COUNT, ROWS, BATCH = 5, 320, 64


def _with_decay(model, raw, batch, key):
    params = eqx.filter(model, eqx.is_inexact_array)
    return _loss(model, raw, batch, key) + workloads._decay(raw, params)


def _loss(model, raw, batch, key):
    del raw, key
    x, y = batch
    return jnp.mean(workloads._cross_entropy(jax.vmap(model)(x), y))


def _networks():
    """Each with its inputs, and with a log decay for each array or each weight."""
    mlp = eqx.nn.MLP(64, 10, 128, 1, key=jr.key(0))
    conv = workloads._ConvNet(jr.key(0))
    array = lambda x: jnp.array(-9.0)
    weight = lambda x: jnp.full_like(x, -9.0)
    return {
        "mlp": (mlp, 64, array),
        "mlp, decay of each weight": (mlp, 64, weight),
        "conv": (conv, 784, array),
    }


def _algorithms():
    settings = (hpo.Problem(_with_decay, _loss), optax.sgd(0.1, momentum=0.9))
    settings = (*settings, optax.adam(0.01))
    return {
        "T1T2": hpo.T1T2(*settings),
        "Unrolled(10)": hpo.Unrolled(*settings, inner_steps=10),
    }


def measure(
    model, features, decay, algorithm, seconds: float = 5.0
) -> tuple[float, float, float, int]:
    """Milliseconds of a step of five folds and of five single steps, the median of
    their ratio, and the number of compilations."""
    keys = jr.split(jr.key(1))
    x, y = jr.normal(keys[0], (ROWS, features)), jr.randint(keys[1], (ROWS,), 0, 10)
    train, val = hpo.folds((x, y), COUNT)
    train = eqx.filter_vmap(lambda part: hpo.Minibatch(part, BATCH))(train)
    raw = jtu.tree_map(decay, eqx.filter(model, eqx.is_inexact_array))
    learner = hpo.MetaLearner(algorithm, COUNT)
    of = lambda tree, i: jtu.tree_map(lambda x: x[i] if eqx.is_array(x) else x, tree)
    parts = [(of(train, i), of(val, i)) for i in range(COUNT)]
    together = learner.init(model, raw)
    alone = [algorithm.init(model, raw) for _ in range(COUNT)]
    events: list[str] = []
    compiled, times, end = 0, [], None
    listen = lambda event, *_, **__: events.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    while end is None or time.perf_counter() < end:
        key = jr.fold_in(jr.key(2), len(times))
        task_keys = list(jr.split(key, COUNT))
        jax.block_until_ready(task_keys)
        events.clear()
        start = time.perf_counter()
        together = jax.block_until_ready(learner.step(together, train, val, key=key))
        middle = time.perf_counter()
        compiled += sum("backend_compile" in event for event in events)
        for i, part in enumerate(parts):
            state = algorithm.step(alone[i], *part, key=task_keys[i])
            alone[i] = jax.block_until_ready(state)
        times.append((middle - start, time.perf_counter() - middle))
        if len(times) == 3:
            end = time.perf_counter() + seconds
    times = [(1e3 * left, 1e3 * right) for left, right in times[3:]]
    left, right = (statistics.median(column) for column in zip(*times))
    ratio = statistics.median(x / y for x, y in times)
    return left, right, ratio, compiled


def main():
    print(f"{'':42}{'folds ms':>10}{'alone ms':>10}{'ratio':>8}{'compiled':>10}")
    for network, (model, features, decay) in _networks().items():
        if sys.argv[1:] and network.split(",")[0] not in sys.argv[1:]:
            continue
        for name, algorithm in _algorithms().items():
            left, right, ratio, count = measure(model, features, decay, algorithm)
            label = f"{network}: {name}"
            print(f"{label:42}{left:10.3f}{right:10.3f}{ratio:8.2f}{count:10}")


if __name__ == "__main__":
    main()
