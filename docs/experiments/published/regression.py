"""Rate, decay and momentum tuned in one training, from random starts.

The UCI regressions of Clarke, Oldewage and Hernandez-Lobato (ICLR 2022): a perceptron
with 50 hidden units, trained by gradient descent with momentum on the whole train set
for 4000 steps, starts with a rate, a decay and a momentum drawn at random. Every ten
steps Adam moves the three. What counts is the squared error on the test rows at the
end, over the random starts. Splits, ranges and settings are those of the authors' code.
"""

import functools as ft
import pathlib
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax

from ..common import bootstrap, mean_and_error, write_json


TRAINING, WINDOW = 4000, 10
LOW = {"log10 rate": -6.0, "log10 decay": -7.0, "momentum": 0.0}
HIGH = {"log10 rate": -1.0, "log10 decay": -2.0, "momentum": 1.0}
NAMES = ("log10 rate", "log10 decay", "logit momentum")
BOX = {"log10 rate": (-10.0, 0.0)}  # where the authors keep the rate
SHRINK = (0.95, 1.01)  # of the rate at each window, for "random x rate"
# Rows for training, validation and test.
SIZES = {
    "boston": (364, 91, 51),
    "concrete": (742, 185, 103),
    "energy": (614, 78, 76),
    "kin8nm": (5898, 1475, 819),
    "naval": (8593, 2148, 1193),
    "power": (6889, 1722, 957),
    "wine": (1151, 288, 160),
    "yacht": (222, 55, 31),
}


class Data(NamedTuple):
    train: Any
    val: Any
    both: Any
    test: Any
    scale: float  # of the outputs


def load(name: str, folder: pathlib.Path | None) -> Data:
    """The rows in the authors' order, standardised on all but the test."""
    if folder is None:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(120, 3))
        y, sizes = np.sin(x[:, :1]) + 0.1 * x[:, 1:2], (80, 20, 20)
    else:
        file = np.load(folder / "uci_regression.npz")
        x, y, sizes = file[f"{name}_x"], file[f"{name}_y"], SIZES[name]
    assert len(x) == sum(sizes)
    rest = sizes[0] + sizes[1]
    standard = lambda x: (x - x[:rest].mean(0)) / (x[:rest].std(0, ddof=1) + 1e-12)
    rows = [jnp.asarray(standard(v), jnp.float32) for v in (x, y)]
    cut = lambda start, stop: tuple(v[start:stop] for v in rows)
    return Data(
        cut(0, sizes[0]),
        cut(sizes[0], rest),
        cut(0, rest),
        cut(rest, len(x)),
        float(y[:rest].std(ddof=1)),
    )


def make_model(key, size: int):
    return eqx.nn.MLP(size, 1, 50, 1, key=key)


def error(model, batch):
    x, y = batch
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def loss(model, hyperparams, batch, key):
    return error(model, batch)


def inner(h):
    return optax.chain(
        optax.add_decayed_weights(10 ** h["log10 decay"]),
        optax.trace(jax.nn.sigmoid(h["logit momentum"])),
        optax.scale(-(10 ** h["log10 rate"])),
    )


def draw(key):
    """Hyperparameters at random."""
    keys = dict(zip(LOW, jr.split(key, len(LOW))))
    h = {k: jr.uniform(keys[k], minval=LOW[k], maxval=HIGH[k]) for k in LOW}
    momentum = h.pop("momentum")
    return h | {"logit momentum": jax.scipy.special.logit(momentum)}


def make_outer(only: str | None = None):
    """Adam on all three or on one, with the rate kept within a box."""
    mask = {k: only not in (None, k) for k in NAMES}
    box = [{k: BOX.get(k, (-jnp.inf, jnp.inf))[i] for k in NAMES} for i in (0, 1)]
    return optax.chain(
        optax.adam(0.05),
        optax.masked(optax.set_to_zero(), mask),
        hpo.project(optax.projections.projection_box, *box),
    )


def algorithms():
    make = lambda cls, only=None, **kwargs: cls(
        hpo.Problem(loss, loss), inner, make_outer(only), inner_steps=WINDOW, **kwargs
    )
    return {
        "T1T2": make(hpo.T1T2),
        "FixedPoint, decay alone": make(hpo.FixedPoint, "log10 decay", terms=4),
        "FixedPoint": make(hpo.FixedPoint, terms=4),
        "Unrolled, 5 of 10 steps": make(hpo.Unrolled, truncation=5),
        "Unrolled, 10 of 10 steps": make(hpo.Unrolled),
    }


class Result(NamedTuple):
    error: Any  # on the test, at the end
    ok: Any  # whether all went well
    hyperparams: Any


def tuned(algorithm, model, h, data: Data, windows: int) -> Result:
    arrays, static = eqx.partition(algorithm.init(model, h), eqx.is_array)

    def step(arrays, _):
        state = eqx.combine(arrays, static)
        state = algorithm.step(state, data.train, data.val)
        return eqx.filter(state, eqx.is_array), None

    arrays, _ = lax.scan(step, arrays, length=windows)
    state = eqx.combine(arrays, static)
    ok = state.total_skipped == 0
    return Result(error(state.model, data.test), ok, state.hyperparams)


def plain(rows: str, model, h, factor, data: Data, windows: int) -> Result:
    """Training without tuning; each window multiplies the rate by a factor."""
    batch = getattr(data, rows)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    value = lambda params: error(eqx.combine(params, static), batch)

    def step(carry, i):
        params, state = carry
        rate = h["log10 rate"] + i // WINDOW * jnp.log10(factor)
        transformation = inner(h | {"log10 rate": jnp.clip(rate, *BOX["log10 rate"])})
        updates, state = transformation.update(jax.grad(value)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, inner(h).init(params))
    (params, _), _ = lax.scan(step, carry, jnp.arange(windows * WINDOW))
    end = error(eqx.combine(params, static), data.test)
    return Result(end, jnp.isfinite(end), h)


def methods():
    found = {}
    for name, rows in (("random", "both"), ("random, no validation rows", "train")):
        found[name] = lambda model, h, factor, *args, rows=rows: plain(
            rows, model, h, 1.0, *args
        )
    found["random x rate"] = ft.partial(plain, "both")
    for name, algorithm in algorithms().items():
        found[name] = lambda model, h, factor, *args, algorithm=algorithm: tuned(
            algorithm, model, h, *args
        )
    return found


def starts(count: int, size: int, seed: int):
    """Models, hyperparameters and factors at random, with a leading axis."""
    keys = jax.vmap(lambda k: jr.split(k, 3))(jr.split(jr.key(seed), count))
    models = eqx.filter_vmap(lambda key: make_model(key, size))(keys[:, 0])
    low, high = SHRINK
    factors = jax.vmap(lambda k: jr.uniform(k, minval=low, maxval=high))(keys[:, 2])
    return models, jax.vmap(draw)(keys[:, 1]), factors


def run(method, data: Data, count: int, windows: int, seed: int) -> Result:
    models, h, factors = starts(count, data.train[0].shape[1], seed)
    axes = (eqx.if_array(0), 0, 0, None, None)
    mapped = eqx.filter_vmap(method, in_axes=axes)
    result = eqx.filter_jit(mapped)(models, h, factors, data, windows)
    return jax.tree.map(np.asarray, jax.block_until_ready(result))


def report(result: Result, scale: float) -> dict[str, Any]:
    """Figures of the test error in raw units. Runs that failed count as infinite for
    the median, and do not count for the mean, as in the paper."""
    ok = result.ok & np.isfinite(result.error)
    errors = np.where(ok, result.error, np.inf) * scale**2
    median = lambda x: np.median(x)
    return {
        "errors": errors.tolist(),
        "mean": mean_and_error(errors[ok]),
        "median": bootstrap(median, errors),
        "best": float(errors.min()),
        "failed": int(np.sum(~ok)),
    }


REFERENCE = "FixedPoint"


def against(row, other) -> tuple[float, float]:
    """100 log(error / error of the other), paired over the starts at which both went
    well: the mean and its standard error."""
    ours, theirs = np.array(row["errors"]), np.array(other["errors"])
    ok = np.isfinite(ours) & np.isfinite(theirs)
    return mean_and_error(100 * np.log(ours[ok] / theirs[ok]))


def main(args):
    count, windows = (3, 2) if args.quick else (args.starts, TRAINING // WINDOW)
    chosen = args.methods.split(",") if args.methods else list(methods())
    rows = []
    for name in ["none"] if args.quick else args.sets.split(","):
        data, first = load(name, None if args.quick else args.folder), len(rows)
        for method in chosen:
            result = run(methods()[method], data, count, windows, args.first)
            found = report(result, data.scale)
            rates = {k: v.tolist() for k, v in result.hyperparams.items()}
            row = {"set": name, "method": method} | found | {"hyperparams": rates}
            rows.append(row)
            print(show(row), flush=True)
            write_json(args.json, rows)
        of = {row["method"]: row for row in rows[first:]}
        for method in [x for x in of if x != REFERENCE and REFERENCE in of]:
            mean, error = against(of[method], of[REFERENCE])
            print(f"{name}, {method} against {REFERENCE}: {mean:+.1f} ± {error:.1f}")


def show(row) -> str:
    mean, error = row["mean"]
    median, low, high = row["median"]
    return (
        f"| {row['set']} | {row['method']} | {mean:.4g} ± {error:.2g} | {median:.4g} "
        f"({low:.4g}, {high:.4g}) | {row['best']:.4g} | {row['failed']} |"
    )
