"""Finds the k largest of many scores exactly, without a sort.

The bits of non-negative floats, read as unsigned integers, have the same order as the
floats. So the largest threshold that at least k scores reach is found bit by bit, from
the highest down. Each bit costs one count over all scores. This is cheap, and under
sharding it only needs the sum of the counts of the devices.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped, UInt


Bits = UInt[Array, "..."]


def top_k_masks(
    scores: list[Float[Array, "..."]],
    k: int,
    first: UInt[Array, ""],
    window: int,
) -> list[Bool[Array, "..."]]:
    """Marks the `k` largest of all `scores`. Of equal scores it marks those that come
    first, in the order of the list and, within an array, of the flat index.

    **Arguments:**

    - `scores`: arrays of non-negative numbers, at least `k` in all. NaN counts as the
        largest.
    - `first`, `window`: `window` scores from number `first` on are always marked. The
        count wraps around at the end.

    **Returns:** a mask for each array.
    """
    dtype = ft.reduce(jnp.promote_types, [x.dtype for x in scores], jnp.float32)
    unsigned = jnp.uint64 if dtype == jnp.float64 else jnp.uint32
    width = jnp.iinfo(unsigned).bits
    bits = [lax.bitcast_convert_type(x.astype(dtype), unsigned) for x in scores]
    size = sum(x.size for x in scores)
    if window > 0:
        chosen = [(i + (size - first)) % size < window for i in _indices(scores)]
        largest = jnp.array(jnp.iinfo(unsigned).max, unsigned)
        bits = [jnp.where(c, largest, b) for c, b in zip(chosen, bits)]

    reached = lambda x: [b >= x for b in bits]
    count = lambda x: _count(reached(x))
    threshold = _bisect(count, k, jnp.greater_equal, unsigned, width)

    def first_ties():
        # Those above the threshold are fewer than k; of those on it come the first.
        above = [b > threshold for b in bits]
        missing = k - _count(above)
        ties, indices = [b == threshold for b in bits], _indices(scores)
        before = lambda n: [t & (i < n) for t, i in zip(ties, indices)]
        count = lambda n: _count(before(n))
        n = _bisect(count, missing, jnp.less_equal, jnp.uint32, size.bit_length())
        return [a | t for a, t in zip(above, before(n))]

    return lax.cond(count(threshold) == k, lambda: reached(threshold), first_ties)


def _bisect(
    count: Callable[[Bits], Bits],
    target: int | Bits,
    fits: Callable[[Bits, int | Bits], Bool[Array, ""]],
    dtype: Any,
    width: int,
) -> Bits:
    """Finds the largest `x` of `width` bits for which `count(x)` fits `target`, bit by
    bit from the highest down. It stops early at an `x` for which the count equals
    `target`."""
    one = jnp.ones((), dtype)
    highest = jnp.array(width - 1, dtype)

    def body(carry):
        x, bit, _ = carry
        candidate = x | (one << bit)
        number = count(candidate)
        x = jnp.where(fits(number, target), candidate, x)
        return x, bit - one, number == target

    def proceed(carry):
        _, bit, done = carry
        return (bit <= highest) & ~done  # below zero it wraps round

    start = (jnp.zeros((), dtype), highest, jnp.array(False))
    return lax.while_loop(proceed, body, start)[0]


def _count(masks: list[Bool[Array, "..."]]) -> UInt[Array, ""]:
    return sum(
        (jnp.sum(m, dtype=jnp.uint32) for m in masks), start=jnp.zeros((), jnp.uint32)
    )


def _indices(arrays: list[Shaped[Array, "..."]]) -> list[UInt[Array, "..."]]:
    """Makes the flat index of each entry within the whole list. It uses iotas, which
    need no communication under sharding."""
    out, offset = [], 0
    for x in arrays:
        index = jnp.full(x.shape, offset, jnp.uint32)
        for axis in range(x.ndim):
            stride = math.prod(x.shape[axis + 1 :])
            index += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride
        out.append(index)
        offset += x.size
    return out
