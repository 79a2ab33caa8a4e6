"""Time to select the 5% largest of a million coordinates, against a sort and
`jax.lax.top_k`.

    python -m tests.benchmarks.selection
"""

import statistics
import time

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr


SIZE = 1_000_000
COUNT = SIZE // 20


def by_threshold(x):
    select = hpo.select_top_k(COUNT)
    return jnp.asarray(select.update(x, select.init(x))[0])


def by_sort(x):
    threshold = jnp.sort(jnp.abs(x))[-COUNT]
    return jnp.where(jnp.abs(x) >= threshold, x, 0)


def by_top_k(x):
    _, indices = jax.lax.top_k(jnp.abs(x), COUNT)
    return jnp.zeros_like(x).at[indices].set(x[indices])


def median_ms(fn, x, repeats: int = 15) -> float:
    fn = jax.jit(fn)
    fn(x).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    x = jr.normal(jr.key(0), (SIZE,))
    assert jnp.array_equal(by_threshold(x), by_sort(x))
    cases = {"normal": x, "rounded, with ties": jnp.round(4 * x)}
    for name, values in cases.items():
        print(f"{name}: select_top_k {median_ms(by_threshold, values):.1f} ms")
    print(f"jax.lax.top_k {median_ms(by_top_k, x):.0f} ms")
    print(f"sort {median_ms(by_sort, x):.0f} ms")


if __name__ == "__main__":
    main()
