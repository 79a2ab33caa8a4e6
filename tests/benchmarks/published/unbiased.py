"""A learning rate that a short window gets wrong, and estimates that do not.

The two-parameter problem of Vicol et al. (ICML 2021, section 5 and the authors' script
`toy_regression.py`): gradient descent from (1, 1) for 100 steps on

    f(x) = sqrt(x0^2 + 5) - sqrt(5) + sin(x1)^2 exp(-5 x0^2) + |x1 - 100| / 4

with a learning rate that goes from exp(h0) to exp(h1) on a line. The objective is the
sum of f over the steps, and windows of ten steps are what an update of h sees. A short
window wants small rates, since large ones jump over the ditches of f along x1, at the
end of which f is low.
"""

import argparse
import functools as ft
import pathlib
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax

from .table import mean_and_error


STEPS, WINDOW = 100, 10
START = (np.log(0.01), np.log(0.01))
SIDE = (-10.0, 5.0)  # of the square in which the optimum is looked for


class Point(eqx.Module):
    """A point, and within a window the number of steps and the sum of f so far."""

    x: jax.Array
    seen: eqx.nn.StateIndex

    def __init__(self):
        self.x = jnp.ones(2)
        self.seen = eqx.nn.StateIndex((jnp.array(0), jnp.array(0.0)))


def loss(x):
    ditches = jnp.sin(x[1]) ** 2 * jnp.exp(-5 * x[0] ** 2)
    slope = jnp.abs(x[1] - 100) / 4
    return jnp.sqrt(x[0] ** 2 + 5) - jnp.sqrt(5) + ditches + slope


def make_problem(window: int):
    def train_loss(model, rates, batch, key):
        """Notes f of the points between the first and the last of a window."""
        point, state = model
        value = loss(point.x)
        step, total = state.get(point.seen)
        total = jnp.where(step % window == 0, 0.0, total + value)
        return value, state.set(point.seen, (step + 1, total))

    def val_loss(model, rates, batch, key):
        """The sum of f over the window, without its first point and with its last."""
        point, state = model
        return state.get(point.seen)[1] + loss(point.x)

    return hpo.Problem(train_loss, val_loss)


def inner(rates):
    first, last = rates
    on_a_line = lambda step: (first * (STEPS - step) + last * step) / STEPS
    return optax.sgd(on_a_line)


def whole(log_rates):
    """The objective: the sum of f over a training."""
    first, last = jnp.exp(log_rates)

    def step(x, i):
        x = x - (first * (STEPS - i) + last * i) / STEPS * jax.grad(loss)(x)
        return x, loss(x)

    _, values = lax.scan(step, jnp.ones(2), jnp.arange(STEPS))
    return jnp.sum(values)


def smoothed(log_rates, scale, count, key):
    """The objective that differences at random points descend."""
    points = log_rates + scale * jr.normal(key, (count, 2))
    return jnp.mean(jax.vmap(whole)(points))


@ft.partial(jax.jit, static_argnums=0)
def surface(count: int):
    axis = jnp.linspace(*SIDE, count)
    row = lambda first: jax.vmap(lambda last: whole(jnp.stack([first, last])))(axis)
    return axis, lax.map(row, axis)


def algorithms(pairs: int, scale: float):
    outer = optax.adam(0.01, b1=0.99)

    def make(cls, window=WINDOW, **kwargs):
        return cls(make_problem(window), inner, outer, inner_steps=window, **kwargs)

    es = ft.partial(make, hpo.Evolution, pairs=pairs, scale=scale)
    return {
        "T1T2": make(hpo.T1T2),
        "Unrolled, 10 steps": make(hpo.Unrolled),
        "Unrolled, 100 steps": make(hpo.Unrolled, STEPS),
        "Evolution, antithetic": es(estimator="antithetic"),
        "Evolution, persistent": es(estimator="persistent"),
        "Evolution, noise_reuse": es(estimator="noise_reuse"),
    }


def run(algorithm, start, episodes: int, key):
    """The log rates after each training from (1, 1)."""
    point, seen = eqx.nn.make_with_state(Point)()
    rates = tuple(hpo.Positive(jnp.exp(x)) for x in start)
    state = algorithm.init(point, rates, model_state=seen, key=key)
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(arrays, key):
        state = algorithm.step(eqx.combine(arrays, static), None, None, key=key)
        return eqx.filter(state, eqx.is_array), None

    def episode(arrays, key):
        state = algorithm.restart(eqx.combine(arrays, static), point)
        keys = jr.split(key, STEPS // algorithm.inner_steps)
        arrays, _ = lax.scan(step, eqx.filter(state, eqx.is_array), keys)
        hyperparams = eqx.combine(arrays, static).hyperparams
        return arrays, jnp.stack([h.raw for h in hyperparams])

    _, path = lax.scan(episode, arrays, jr.split(key, episodes))
    return jnp.concatenate([jnp.asarray(start)[None], path])
