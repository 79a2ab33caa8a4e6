"""A learning rate that a short window gets wrong, and estimates that do not.

The two-parameter problem of Vicol et al. (ICML 2021, section 5 and the authors' script
`toy_regression.py`): gradient descent from (1, 1) for 100 steps on

    f(x) = sqrt(x0^2 + 5) - sqrt(5) + sin(x1)^2 exp(-5 x0^2) + |x1 - 100| / 4

with a learning rate that goes from exp(h0) to exp(h1) on a line. The objective is the
sum of f over the steps, and windows of ten steps are what an update of h sees. A short
window wants small rates, since large ones jump over the ditches of f along x1, at the
end of which f is low.
"""

import functools as ft
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax

from ..common import describe, mean_and_error, save, subplots, write_json


STEPS, WINDOW = 100, 10
START = (np.log(0.01), np.log(0.01))
PAIRS, SCALE = 50, 0.3
SIDE = (-7.0, 4.0)  # of the square in which the optimum is looked for


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
        "antithetic": es(estimator="antithetic"),
        "antithetic, 100 steps": es(window=STEPS, estimator="antithetic"),
        "persistent": es(estimator="persistent"),
        "noise_reuse": es(estimator="noise_reuse"),
    }


def run(algorithm, start, updates: int, key):
    """The log rates after each training from (1, 1)."""
    point, seen = eqx.nn.make_with_state(Point)()
    rates = tuple(hpo.Positive(jnp.exp(x)) for x in start)
    state = algorithm.init(point, rates, model_state=seen, key=key)
    arrays, static = eqx.partition(state, eqx.is_array)
    windows = STEPS // algorithm.inner_steps

    def step(arrays, key):
        state = algorithm.step(eqx.combine(arrays, static), None, None, key=key)
        return eqx.filter(state, eqx.is_array), None

    def episode(arrays, key):
        state = algorithm.restart(eqx.combine(arrays, static), point)
        arrays = eqx.filter(state, eqx.is_array)
        arrays, _ = lax.scan(step, arrays, jr.split(key, windows))
        hyperparams = eqx.combine(arrays, static).hyperparams
        return arrays, jnp.stack([h.raw for h in hyperparams])

    _, path = lax.scan(episode, arrays, jr.split(key, updates // windows))
    return jnp.concatenate([jnp.asarray(start)[None], path])


def paths(algorithm, start, updates: int, seeds):
    keys = jax.vmap(jr.key)(jnp.asarray(seeds))
    keys = keys if isinstance(algorithm, hpo.Evolution) else keys[:1]
    of_seed = lambda key: run(algorithm, start, updates, key)
    return np.asarray(jax.jit(jax.vmap(of_seed))(keys))


def main(args):
    count, updates = (41, 20) if args.quick else (601, 10_000)
    axis, values = map(np.asarray, surface(count))
    i, j = np.unravel_index(np.argmin(values), values.shape)
    best = (float(axis[i]), float(axis[j]))
    rows: list[dict[str, Any]] = [{"best": best, "loss": float(values[i, j])}]
    print(f"optimum of the grid: exp{best}, {values[i, j]:.1f}")
    seeds = range(args.first, args.first + args.seeds)
    drawn = {}
    for start in (START, best):
        print(f"from {np.exp(start)}: {float(whole(jnp.asarray(start))):.1f}")
        for name, algorithm in algorithms(PAIRS, SCALE).items():
            path = paths(algorithm, start, updates, seeds)
            drawn.setdefault(name, path[0])
            losses = np.array([float(whole(jnp.asarray(x))) for x in path[:, -1]])
            ends = path[:, -1].tolist()
            row = {"start": start, "name": name, "end": ends, "loss": losses.tolist()}
            rows.append(row)
            first, last = np.exp(path[:, -1].mean(0))
            print(f"{name:24}{show(losses):18} rates {first:.3f} {last:.3f}")
            write_json(args.json, rows)
    if args.figure is not None:
        draw(axis, values, best, drawn, args.figure)


def show(losses) -> str:
    if len(losses) == 1:
        return f"{losses[0]:.1f}"
    return describe(losses, ".1f", of=mean_and_error)


LINES = {
    "T1T2": "C0",
    "Unrolled, 10 steps": "C1",
    "Unrolled, 100 steps": "C2",
    "antithetic": "C3",
    "antithetic, 100 steps": "C4",
    "persistent": "C5",
    "noise_reuse": "C6",
}


def draw(axis, values, best, drawn, path):
    """The objective, and the ways of one seed through it."""
    from matplotlib import colors

    figure, axes = subplots((8, 5))
    norm = colors.LogNorm(values.min() / 2, values.max())
    mesh = axes.pcolormesh(axis, axis, values.T, norm=norm, cmap="Greys")
    figure.colorbar(mesh, label="sum of f over 100 steps", pad=0.01)
    for name, way in drawn.items():
        x, y = way.T
        axes.plot(x, y, color=LINES[name], linewidth=2, label=name)
        axes.plot(x[-1], y[-1], "o", color=LINES[name], markersize=7)
    axes.plot(*START, "ws", markeredgecolor="k", label="start")
    axes.plot(*best, "w*", markersize=15, markeredgecolor="k", label="best of a grid")
    axes.set(xlabel="log of the first rate", ylabel="log of the last rate")
    axes.set(xlim=(-5, 4), ylim=(-6, 3))
    figure.legend(loc="outside right upper")
    save(figure, path, dpi=120)
