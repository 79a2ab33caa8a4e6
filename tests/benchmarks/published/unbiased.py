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
import json
import pathlib

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


def is_random(algorithm) -> bool:
    return isinstance(algorithm, hpo.Evolution)


def paths(algorithm, start, updates: int, seeds):
    keys = jax.vmap(jr.key)(jnp.asarray(seeds))
    keys = keys if is_random(algorithm) else keys[:1]
    return np.asarray(
        jax.jit(jax.vmap(lambda k: run(algorithm, start, updates, k)))(keys)
    )


def main(args):
    count, updates = (41, 20) if args.quick else (601, 10_000)
    axis, values = map(np.asarray, surface(count))
    i, j = np.unravel_index(np.argmin(values), values.shape)
    best = (float(axis[i]), float(axis[j]))
    rows = [{"start": "grid", "end": [*best], "loss": float(values[i, j])}]
    print(f"optimum of the grid: exp{best}, {values[i, j]:.1f}")
    seeds = range(args.first, args.first + args.seeds)
    drawn = {}
    for start_name, start in (("paper", START), ("optimum", best)):
        print(f"start {np.exp(start)}: {float(whole(jnp.asarray(start))):.1f}")
        for name, algorithm in algorithms(PAIRS, SCALE).items():
            path = paths(algorithm, start, updates, seeds)
            if start_name == "paper":
                drawn[name] = path
            ends = path[:, -1]
            losses = np.array([float(whole(jnp.asarray(x))) for x in ends])
            row = {"start": start_name, "name": name, "end": ends.tolist()}
            rows.append(row | {"loss": losses.tolist()})
            rates = np.exp(ends.mean(0))
            print(f"{name:24}{show(losses):18} rates {rates[0]:.3f} {rates[1]:.3f}")
            if args.json is not None:
                pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))
    if args.figure is not None:
        draw(axis, values, best, drawn, args.figure)
    return rows


def show(losses) -> str:
    if len(losses) == 1:
        return f"{losses[0]:.1f}"
    mean, error = mean_and_error(losses)
    return f"{mean:.1f} +- {error:.1f}"


def draw(axis, values, best, drawn, path):
    """The objective, and the ways of one seed through it."""
    from matplotlib import colors
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    norm = colors.LogNorm(values.min(), values.max())
    mesh = axes.pcolormesh(
        axis, axis, values.T, norm=norm, cmap="Greys", rasterized=True
    )
    figure.colorbar(mesh, label="sum of f over 100 steps")
    for number, (name, path_of) in enumerate(drawn.items()):
        x, y = path_of[0].T
        axes.plot(x, y, color=f"C{number}", linewidth=1.8, label=name)
        axes.plot(x[-1], y[-1], "o", color=f"C{number}", markersize=6)
    axes.plot(*START, "ks", label="start")
    axes.plot(*best, "k*", markersize=12, label="optimum of the grid")
    axes.set(xlabel="log of the first rate", ylabel="log of the last rate")
    axes.set(xlim=SIDE, ylim=SIDE)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=150)
