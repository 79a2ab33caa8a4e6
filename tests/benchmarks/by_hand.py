"""Each algorithm as one would write it by hand for a single problem, guard included.

They are the yardstick of the library: plain JAX and Optax, few options, the same
mathematics. `assemble` makes a step of them, from `(carry, train, val)` to a new carry.
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
    """The pieces that all hand-written algorithms of a workload share."""

    def __init__(self, workload: Workload, rule: str = "mixed"):
        self.w = workload
        self.gradient = make_gradient(workload.train_loss, rule)

    def scan(self, body, carry, length):
        unroll = length if self.w.unroll else 1
        return lax.scan(body, carry, length=length, unroll=unroll)

    def start(self):
        return self.w.params, self.w.inner(self.w.raw).init(self.w.params)

    def move(self, inner, raw, batch):
        params, state = inner
        loss, grads = self.gradient(params, raw, batch)
        updates, state = self.w.inner(raw).update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def run(self, inner, raw, batch, steps):
        if steps == 0:
            return inner
        if steps == 1:
            return self.move(inner, raw, batch)[0]
        body = lambda inner, _: (self.move(inner, raw, batch)[0], None)
        return self.scan(body, inner, steps)[0]

    def validate(self, inner, raw, val):
        return jax.value_and_grad(self.w.val_loss, (0, 1))(inner[0], raw, val)

    def pulled(self, reach, raw):
        """Where `reach(raw)` leads, and the pull-back from its weights."""

        def fn(raw):
            (params, state), loss = reach(raw)
            return params, (state, loss)

        params, pullback, (state, loss) = jax.vjp(fn, raw, has_aux=True)
        return (params, state), pullback, loss


def assemble(workload, estimate, inner, memory=None):
    """Makes a step of an estimate: outer update, guard, counters. Returns the step and
    the first carry."""

    def step(carry, train, val):
        old_inner, (raw, outer_state), old_memory, (step, skipped), _ = carry
        inner, memory, gradient, losses = estimate(
            old_inner, raw, old_memory, train, val
        )
        norm = optax.tree.norm(gradient)
        updates, new_outer_state = workload.outer.update(gradient, outer_state, raw)
        new_raw = optax.apply_updates(raw, updates)
        old = (old_inner, (raw, outer_state), old_memory)
        new = (inner, (new_raw, new_outer_state), memory)
        ok = all_finite((new, losses, norm))
        kept = jtu.tree_map(lambda n, o: jnp.where(ok, n, o), new, old)
        counters = (step + 1, jnp.where(ok, 0, skipped + 1))
        return *kept, counters, jnp.stack([*losses, norm])

    counters = (jnp.zeros((), int), jnp.zeros((), int))
    outer = (workload.raw, workload.outer.init(workload.raw))
    return step, (inner, outer, memory, counters, jnp.zeros(3))


def over_tasks(workload, algorithm, tasks, **options):
    """The mean of an algorithm's estimates over the leading axis of the data."""
    estimate, inner, memory = algorithm(workload, **options)

    def mean_estimate(inner, raw, memory, train, val):
        mapped = jax.vmap(estimate, in_axes=(0, None, 0, 0, 0))
        inner, memory, gradients, losses = mapped(inner, raw, memory, train, val)
        mean = lambda tree: jtu.tree_map(lambda x: jnp.mean(x, axis=0), tree)
        return inner, memory, mean(gradients), mean(losses)

    copy = lambda x: jnp.broadcast_to(x, (tasks, *x.shape))
    inner, memory = jtu.tree_map(copy, (inner, memory))
    return assemble(workload, mean_estimate, inner, memory)


# Each algorithm: an estimate, with the inner state and the memory that it starts from.


def t1t2(workload, rule="mixed", inner_steps=1):
    hand = Hand(workload, rule)

    def estimate(inner, raw, memory, train, val):
        before = hand.run(inner, raw, train, inner_steps - 1)
        after, pullback, loss = hand.pulled(
            lambda raw: hand.move(before, raw, train), raw
        )
        val_loss, (alpha, direct) = hand.validate(after, raw, val)
        return after, memory, add(direct, pullback(alpha)[0]), (loss, val_loss)

    return estimate, hand.start(), None


def unrolled(workload, rule="mixed", inner_steps=4):
    hand = Hand(workload, rule)

    def estimate(inner, raw, memory, train, val):
        def reach(raw):
            body = lambda inner, _: hand.move(inner, raw, train)
            end, losses = hand.scan(body, inner, inner_steps)
            return end, losses[-1]

        after, pullback, loss = hand.pulled(reach, raw)
        val_loss, (alpha, direct) = hand.validate(after, raw, val)
        return after, memory, add(direct, pullback(alpha)[0]), (loss, val_loss)

    return estimate, hand.start(), None


def greedy(workload, rule="mixed", inner_steps=4, discount=0.9):
    hand = Hand(workload, rule)

    def estimate(inner, raw, memory, train, val):
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
        before, total = hand.scan(body, start, inner_steps - 1)[0]
        inner, total, direct, losses = advance(before, total)
        return inner, memory, add(total, direct), losses

    return estimate, hand.start(), None


def hyperdistill(workload, rule="mixed", discount=0.9, scale=1.0):
    hand = Hand(workload, rule)

    def estimate(inner, raw, memory, train, val):
        (params, state), (average, mass) = inner, memory
        mass = 1 + discount * mass
        keep = 1 - 1 / mass
        average = jtu.tree_map(lambda a, p: keep * a + (1 - keep) * p, average, params)
        after, loss = hand.move(inner, raw, train)
        _, pullback, _ = hand.pulled(
            lambda raw: hand.move((average, state), raw, train), raw
        )
        val_loss, (alpha, direct) = hand.validate(after, raw, val)
        (product,) = pullback(alpha)
        total = jtu.tree_map(lambda d, p: d + scale * mass * p, direct, product)
        return after, (average, mass), total, (loss, val_loss)

    memory = (jtu.tree_map(jnp.zeros_like, workload.params), jnp.zeros(()))
    return estimate, hand.start(), memory


def drmad(workload, rule="mixed", inner_steps=4):
    hand = Hand(workload, rule)
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)

    def estimate(first, raw, memory, train, val):
        body = lambda inner, _: hand.move(inner, raw, train)
        last, losses = hand.scan(body, first, inner_steps)
        val_loss, (alpha, direct) = hand.validate(last, raw, val)

        def mix(x, y, index):
            if not is_float(x):
                return x + (y - x) * index // inner_steps
            share = index / inner_steps
            return (1 - share) * x + share * y

        def back(carry, _):
            index, cotangent, total = carry
            point = jtu.tree_map(lambda x, y: mix(x, y, index), first, last)
            leaves, treedef = jtu.tree_flatten(point)

            def move(moving, raw):
                rest = iter(moving)
                moved = [next(rest) if is_float(x) else x for x in leaves]
                new = hand.move(jtu.tree_unflatten(treedef, moved), raw, train)[0]
                return [x for x in jtu.tree_leaves(new) if is_float(x)]

            moving = [x for x in leaves if is_float(x)]
            _, pullback = jax.vjp(move, moving, raw)
            cotangent, product = pullback(cotangent)
            return (index - 1, cotangent, add(total, product)), None

        zeros = jtu.tree_map(jnp.zeros_like, last[1])
        end = [x for x in jtu.tree_leaves((alpha, zeros)) if is_float(x)]
        start = (jnp.array(inner_steps - 1), end, direct)
        (_, _, total), _ = hand.scan(back, start, inner_steps)
        return last, memory, total, (losses[-1], val_loss)

    return estimate, hand.start(), None


def soba(workload, linear_rate=0.1, averaging=0.0):
    hand = Hand(workload)
    gradients = jax.value_and_grad(workload.train_loss, (0, 1))

    def estimate(inner, raw, memory, train, val):
        (params, state), (v, average) = inner, memory
        at = lambda params: gradients(params, raw, train)
        (loss, (grads, _)), (_, (along, mixed)) = jax.jvp(at, (params,), (v,))
        val_loss, (alpha, direct) = hand.validate(inner, raw, val)
        v = jtu.tree_map(lambda v, h, a: v - linear_rate * (h + a), v, along, alpha)
        total = add(direct, mixed)
        if averaging > 0:
            mix = lambda h, d: (1 - averaging) * h + averaging * d
            total = average = jtu.tree_map(mix, average, total)
        updates, state = workload.inner(raw).update(grads, state, params)
        inner = (optax.apply_updates(params, updates), state)
        return inner, (v, average), total, (loss, val_loss)

    zeros = lambda tree: jtu.tree_map(jnp.zeros_like, tree)
    average = zeros(workload.raw) if averaging > 0 else None
    return estimate, hand.start(), (zeros(workload.params), average)


def penalty(workload, strength=10.0):
    hand = Hand(workload, "reverse")

    def estimate(inner, raw, memory, train, val):
        params, state = memory
        loss = lambda params: (
            workload.train_loss(params, raw, train)
            + workload.val_loss(params, raw, val) / strength
        )
        updates, state = workload.inner(raw).update(jax.grad(loss)(params), state)
        penalised = (optax.apply_updates(params, updates), state)
        inner, loss = hand.move(inner, raw, train)

        def difference(raw):
            at = lambda inner: workload.train_loss(inner[0], raw, train)
            val_loss = workload.val_loss(penalised[0], raw, val)
            return val_loss + strength * (at(penalised) - at(inner))

        val_loss = workload.val_loss(inner[0], raw, val)
        return inner, penalised, jax.grad(difference)(raw), (loss, val_loss)

    return estimate, hand.start(), jtu.tree_map(jnp.copy, hand.start())


def fixed_point(workload, inner_steps=10, terms=5):
    hand = Hand(workload, "reverse")
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)

    def estimate(inner, raw, memory, train, val):
        before = hand.run(inner, raw, train, inner_steps - 1)
        leaves, treedef = jtu.tree_flatten(before)

        def move(moving, raw):
            rest = iter(moving)
            moved = [next(rest) if is_float(x) else x for x in leaves]
            new, loss = hand.move(jtu.tree_unflatten(treedef, moved), raw, train)
            return [x for x in jtu.tree_leaves(new) if is_float(x)], (new, loss)

        moving = [x for x in leaves if is_float(x)]
        _, pullback, (last, loss) = jax.vjp(move, moving, raw, has_aux=True)
        val_loss, (alpha, total) = hand.validate(last, raw, val)
        zeros = jtu.tree_map(jnp.zeros_like, last[1])
        cotangent = [x for x in jtu.tree_leaves((alpha, zeros)) if is_float(x)]
        for _ in range(terms + 1):
            cotangent, product = pullback(cotangent)
            total = add(total, product)
        return last, memory, total, (loss, val_loss)

    return estimate, hand.start(), None


def first_order(workload, inner_steps=1):
    hand = Hand(workload, "reverse")

    def estimate(inner, raw, memory, train, val):
        before = hand.run(inner, raw, train, inner_steps - 1)
        after, loss = hand.move(before, raw, train)
        val_loss, direct = jax.value_and_grad(workload.val_loss, 1)(after[0], raw, val)
        return after, memory, direct, (loss, val_loss)

    return estimate, hand.start(), None


def training(workload, inner_steps=1):
    """Plain training steps, and the inner state that they start from."""
    hand = Hand(workload, "reverse")

    def step(inner, train, val):
        del val
        return hand.run(inner, workload.raw, train, inner_steps)

    return step, hand.start()
