"""The rivals, each in a few lines of plain JAX, with batches drawn at each call.

Each is a function from a problem, a draw and the rates to `(carry, step, read)`:
`step(carry, t, key)` is update `t` of the hyperparameters, and `read(carry)` are
`(theta, lam)`. Batches are drawn with replacement, as `eqx_hpo.Minibatch` draws them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax

from .problems import BATCH, Draw, Problem


STEPS = 10  # of training, and of the linear system, where there are loops


class Rates(NamedTuple):
    """Both rates fall as a power of the number of updates, from what they start with.

    `extra` is the weight of the new term in the average of MA-SOBA, and the first
    strength of the penalty in F2SA.
    """

    inner: Any
    outer: Any
    exponent: Any
    extra: Any

    def inner_at(self, t):
        return self.inner * (1.0 + t) ** -self.exponent

    def outer_at(self, t):
        return self.outer * (1.0 + t) ** -self.exponent


def take(data, key):
    size = jtu.tree_leaves(data)[0].shape[0]
    rows = jr.randint(key, (BATCH,), 0, size)
    return jtu.tree_map(lambda x: x[rows], data)


def _read(carry):
    return carry[:2]


def _repeat(body, carry, key):
    """`body(carry, key)` as often as `STEPS` says."""
    keys = jr.split(key, STEPS)
    return lax.scan(lambda carry, key: (body(carry, key), None), carry, keys)[0]


def soba(problem: Problem, draw: Draw, rates: Rates, averaged: bool = False):
    gradient = jax.grad(problem.train_loss)
    val_gradient = jax.grad(problem.val_loss, argnums=(0, 1))
    v = jtu.tree_map(jnp.zeros_like, draw.theta)
    mean = jtu.tree_map(jnp.zeros_like, draw.lam) if averaged else None

    def step(carry, t, key):
        theta, lam, v, mean = carry
        train_key, val_key = jr.split(key)
        batch = take(draw.train, train_key)
        by_theta, pull = jax.vjp(lambda *at: gradient(*at, batch), theta, lam)
        product, cross = pull(v)
        val_by_theta, val_by_lam = val_gradient(theta, lam, take(draw.val, val_key))
        a, b = rates.inner_at(t), rates.outer_at(t)
        direction = val_by_lam + cross
        if averaged:
            mean = mean + rates.extra * (direction - mean)
            direction = mean
        v = v - a * (product + val_by_theta)
        return theta - a * by_theta, lam - b * direction, v, mean

    return (draw.theta, draw.lam, v, mean), step, _read


def ma_soba(problem: Problem, draw: Draw, rates: Rates):
    return soba(problem, draw, rates, averaged=True)


def _implicit(problem: Problem, draw: Draw, rates: Rates, solve):
    """Training, then a linear system by products with Hessians of fresh batches."""
    gradient = jax.grad(problem.train_loss)
    val_gradient = jax.grad(problem.val_loss, argnums=(0, 1))

    def step(carry, t, key):
        theta, lam, v = carry
        keys = jr.split(key, 4)
        a = rates.inner_at(t)

        def train(theta, key):
            return theta - a * gradient(theta, lam, take(draw.train, key))

        def product(v, key):
            batch = take(draw.train, key)
            at = lambda theta: gradient(theta, lam, batch)
            return jax.jvp(at, (theta,), (v,))[1]

        theta = _repeat(train, theta, keys[0])
        by_theta, by_lam = val_gradient(theta, lam, take(draw.val, keys[1]))
        v = solve(rates.inner, product, v, by_theta, keys[2])
        batch = take(draw.train, keys[3])
        pull = jax.vjp(lambda lam: gradient(theta, lam, batch), lam)[1]
        return theta, lam - rates.outer_at(t) * (by_lam - pull(v)[0]), v

    v = jtu.tree_map(jnp.zeros_like, draw.theta)
    return (draw.theta, draw.lam, v), step, _read


def amigo(problem: Problem, draw: Draw, rates: Rates):
    def solve(a, product, v, right, key):
        return _repeat(lambda v, key: v - a * (product(v, key) - right), v, key)

    return _implicit(problem, draw, rates, solve)


def stocbio(problem: Problem, draw: Draw, rates: Rates):
    def solve(a, product, v, right, key):
        def add(carry, key):
            term, total = carry
            term = term - a * product(term, key)
            return term, total + term

        return a * _repeat(add, (right, right), key)[1]

    return _implicit(problem, draw, rates, solve)


def f2sa(problem: Problem, draw: Draw, rates: Rates):
    gradient = jax.grad(problem.train_loss, argnums=(0, 1))
    val_gradient = jax.grad(problem.val_loss, argnums=(0, 1))

    def step(carry, t, key):
        z, lam, y = carry
        a, s = rates.inner_at(t), strength(rates, t)
        keys = jr.split(key, 4)

        def train(carry, key):
            y, z = carry
            y_key, z_key, val_key = jr.split(key, 3)
            by_y = gradient(y, lam, take(draw.train, y_key))[0]
            by_z = gradient(z, lam, take(draw.train, z_key))[0]
            val_by_y = val_gradient(y, lam, take(draw.val, val_key))[0]
            return y - a * (by_y + val_by_y / s), z - a * by_z

        y, z = _repeat(train, (y, z), keys[0])
        above = gradient(y, lam, take(draw.train, keys[1]))[1]
        below = gradient(z, lam, take(draw.train, keys[2]))[1]
        direct = val_gradient(y, lam, take(draw.val, keys[3]))[1]
        return z, lam - rates.outer_at(t) * (direct + s * (above - below)), y

    return (draw.theta, draw.lam, draw.theta), step, _read


def strength(rates: Rates, t):
    """Grows with the power that the theory of F2SA gives for noise at both levels."""
    return rates.extra * (1.0 + t) ** (1 / 7)
