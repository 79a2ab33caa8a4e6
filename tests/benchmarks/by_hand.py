"""Each algorithm as one would write it by hand for a single problem, guard included.

A step maps `(carry, train, val)` to a new carry. They are the yardstick of the library:
plain JAX and Optax, no options, the same mathematics.
"""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax

from .workloads import Workload


def make_gradient(loss, rule):
    """`jax.value_and_grad(loss)`, whose reverse mode follows a second-order rule."""
    plain = jax.value_and_grad(loss)
    if rule == "reverse":
        return plain

    @jax.custom_vjp
    def gradient(params, raw, batch):
        return plain(params, raw, batch)

    def forward(params, raw, batch):
        return plain(params, raw, batch), (params, raw, batch)

    def backward(residuals, cotangents):
        params, raw, batch = residuals
        _, v = cotangents
        at = lambda p: jax.grad(loss, argnums=(0, 1))(p, raw, batch)
        if rule == "mixed":
            products = jax.jvp(at, (params,), (v,))[1]
        else:
            norm = optax.tree.norm(v)
            size = 0.01 / jnp.where(norm > 0, norm, 1)
            move = lambda s: at(jtu.tree_map(lambda p, x: p + s * x, params, v))
            scale = norm / 0.02
            products = jtu.tree_map(
                lambda u, d: (u - d) * scale, move(size), move(-size)
            )
        return *products, None

    gradient.defvjp(forward, backward)
    return gradient


def add(left, right):
    return jtu.tree_map(jnp.add, left, right)


def all_finite(tree):
    leaves = [x for x in jtu.tree_leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    flags = jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])
    return lax.optimization_barrier(jnp.all(lax.optimization_barrier(flags)))


class Hand:
    """What all hand-written steps of a workload have in common."""

    def __init__(self, workload: Workload, rule: str = "mixed"):
        self.w = workload
        self.gradient = make_gradient(workload.train_loss, rule)

    def start(self, memory=None):
        w = self.w
        inner_state = w.inner(w.raw).init(w.params)
        inner = (w.params, inner_state)
        counters = (jnp.zeros((), int), jnp.zeros((), int))
        metrics = jnp.zeros(3)
        return inner, (w.raw, w.outer.init(w.raw)), memory, counters, metrics

    def move(self, inner, raw, batch):
        params, state = inner
        loss, grads = self.gradient(params, raw, batch)
        updates, state = self.w.inner(raw).update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def run(self, inner, raw, batch, steps):
        if steps == 0:
            return inner
        body = lambda inner, _: (self.move(inner, raw, batch)[0], None)
        return lax.scan(body, inner, length=steps)[0]

    def validate(self, inner, raw, val):
        return jax.value_and_grad(self.w.val_loss, (0, 1))(inner[0], raw, val)

    def pulled(self, reach, raw):
        """What `reach(raw)` leads to, and the pull-back from its weights."""

        def fn(raw):
            (params, state), loss = reach(raw)
            return params, (state, loss)

        params, pullback, (state, loss) = jax.vjp(fn, raw, has_aux=True)
        return (params, state), pullback, loss

    def finish(self, carry, inner, memory, hypergradient, losses):
        old_inner, (raw, outer_state), old_memory, (step, skipped), _ = carry
        norm = optax.tree.norm(hypergradient)
        old = (old_inner, (raw, outer_state), old_memory)
        updates, outer_state = self.w.outer.update(hypergradient, outer_state, raw)
        new = (inner, (optax.apply_updates(raw, updates), outer_state), memory)
        ok = all_finite((new, losses, norm))
        kept = jtu.tree_map(lambda n, o: jnp.where(ok, n, o), new, old)
        counters = (step + 1, jnp.where(ok, 0, skipped + 1))
        return *kept, counters, jnp.stack([*losses, norm])


def t1t2(workload, rule="mixed", inner_steps=1):
    hand = Hand(workload, rule)

    def step(carry, train, val):
        inner, (raw, _), *_ = carry
        before = hand.run(inner, raw, train, inner_steps - 1)
        after, pullback, loss = hand.pulled(
            lambda raw: hand.move(before, raw, train), raw
        )
        val_loss, (alpha, direct) = hand.validate(after, raw, val)
        total = add(direct, pullback(alpha)[0])
        return hand.finish(carry, after, None, total, (loss, val_loss))

    return step, hand.start()


def unrolled(workload, rule="mixed", inner_steps=4):
    hand = Hand(workload, rule)

    def step(carry, train, val):
        inner, (raw, _), *_ = carry

        def reach(raw):
            body = lambda inner, _: hand.move(inner, raw, train)
            inner_end, losses = lax.scan(body, inner, length=inner_steps)
            return inner_end, losses[-1]

        after, pullback, loss = hand.pulled(reach, raw)
        val_loss, (alpha, direct) = hand.validate(after, raw, val)
        total = add(direct, pullback(alpha)[0])
        return hand.finish(carry, after, None, total, (loss, val_loss))

    return step, hand.start()


def greedy(workload, rule="mixed", inner_steps=4, discount=0.9):
    hand = Hand(workload, rule)

    def step(carry, train, val):
        inner, (raw, _), *_ = carry

        def advance(inner, total):
            inner, pullback, loss = hand.pulled(
                lambda raw: hand.move(inner, raw, train), raw
            )
            val_loss, (alpha, direct) = hand.validate(inner, raw, val)
            (product,) = pullback(alpha)
            total = jtu.tree_map(lambda s, p: discount * s + p, total, product)
            return inner, total, direct, (loss, val_loss)

        body = lambda x, _: (advance(*x)[:2], None)
        start = (inner, jtu.tree_map(jnp.zeros_like, raw))
        before, total = lax.scan(body, start, length=inner_steps - 1)[0]
        inner, total, direct, losses = advance(before, total)
        return hand.finish(carry, inner, None, add(total, direct), losses)

    return step, hand.start()


def hyperdistill(workload, rule="mixed", discount=0.9, scale=1.0):
    hand = Hand(workload, rule)

    def step(carry, train, val):
        (params, state), (raw, _), (average, mass), *_ = carry
        mass = 1 + discount * mass
        keep = 1 - 1 / mass
        average = jtu.tree_map(lambda a, p: keep * a + (1 - keep) * p, average, params)
        after, loss = hand.move((params, state), raw, train)
        _, pullback, _ = hand.pulled(
            lambda raw: hand.move((average, state), raw, train), raw
        )
        val_loss, (alpha, direct) = hand.validate(after, raw, val)
        (product,) = pullback(alpha)
        total = jtu.tree_map(lambda d, p: d + scale * mass * p, direct, product)
        return hand.finish(carry, after, (average, mass), total, (loss, val_loss))

    memory = (jtu.tree_map(jnp.zeros_like, workload.params), jnp.zeros(()))
    return step, hand.start(memory)


def drmad(workload, rule="mixed", inner_steps=4):
    hand = Hand(workload, rule)

    def step(carry, train, val):
        first, (raw, _), *_ = carry
        body = lambda inner, _: hand.move(inner, raw, train)
        last, losses = lax.scan(body, first, length=inner_steps)
        val_loss, (alpha, direct) = hand.validate(last, raw, val)

        def mix(x, y, index):
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return x + (y - x) * index // inner_steps
            share = index / inner_steps
            return (1 - share) * x + share * y

        def back(carry, _):
            index, cotangent, total = carry
            point = jtu.tree_map(lambda x, y: mix(x, y, index), first, last)
            floats, treedef = jtu.tree_flatten(point)
            exact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in floats]

            def move(moving, raw):
                rest = iter(moving)
                leaves = [next(rest) if e else x for e, x in zip(exact, floats)]
                new = hand.move(jtu.tree_unflatten(treedef, leaves), raw, train)[0]
                return [x for x, e in zip(jtu.tree_leaves(new), exact) if e]

            moving = [x for x, e in zip(floats, exact) if e]
            _, pullback = jax.vjp(move, moving, raw)
            cotangent, product = pullback(cotangent)
            return (index - 1, cotangent, add(total, product)), None

        zeros = jtu.tree_map(jnp.zeros_like, last[1])
        end = [
            x
            for x in jtu.tree_leaves((alpha, zeros))
            if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        start = (jnp.array(inner_steps - 1), end, direct)
        (_, _, total), _ = lax.scan(back, start, length=inner_steps)
        return hand.finish(carry, last, None, total, (losses[-1], val_loss))

    return step, hand.start()


def first_order(workload, inner_steps=1):
    hand = Hand(workload, "reverse")

    def step(carry, train, val):
        inner, (raw, _), *_ = carry
        before = hand.run(inner, raw, train, inner_steps - 1)
        after, loss = hand.move(before, raw, train)
        val_loss, direct = jax.value_and_grad(workload.val_loss, 1)(after[0], raw, val)
        return hand.finish(carry, after, None, direct, (loss, val_loss))

    return step, hand.start()


def training(workload, inner_steps=1):
    """Plain training steps, for ratios to them."""
    hand = Hand(workload, "reverse")

    def step(inner, train, val):
        del val
        return hand.run(inner, workload.raw, train, inner_steps)

    return step, hand.start()[0]
