"""One step many times over, in loops that reverse mode can go back through in little
memory."""

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def repeat_step(
    step: Callable[[Any], Any], carry: Any, count: int, depth: int, unroll: int
) -> Any:
    """Applies `step` `count` times, by `depth` nested scans over `jax.checkpoint`ed
    bodies.

    With `n` the smallest base in which `count` has `depth` digits, a body of level `i`
    stands for `n**i` steps, and each digit of `count` is a scan of its level. Reverse
    mode holds one level's carries at a time: about `depth * n` in all.
    """
    # A loop keeps XLA from merging the repeated computation with the first one.
    in_loop = unroll < count
    recompute = ft.partial(jax.checkpoint, prevent_cse=not in_loop)

    def scan(body, carry, length):
        unroll_ = min(unroll, length) if in_loop else length
        out, _ = lax.scan(
            lambda carry, _: (body(carry), None), carry, length=length, unroll=unroll_
        )
        return out

    if depth == 0:
        return scan(step, carry, count)
    base = 1
    while base**depth < count:
        base += 1
    bodies = [recompute(step)]
    for _ in range(depth - 1):
        below = bodies[-1]
        bodies.append(recompute(lambda carry, body=below: scan(body, carry, base)))
    for level in reversed(range(depth)):
        times, count = divmod(count, base**level)
        if times > 0:
            carry = scan(bodies[level], carry, times)
    return carry
