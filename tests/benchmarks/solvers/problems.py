"""The problems, after the benchmark of bilevel solvers of benchopt.

Quadratics: both levels are means of `n` quadratic terms in 100 variables each. Data
cleaning: softmax regression on 20,000 images of MNIST, of whose labels a share is drawn
anew at random, with a weight for each image and 5000 clean images for validation.
"""

import functools as ft
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


BATCH = 64


class Draw(NamedTuple):
    """What a seed decides on.

    The starts of both levels, their data, and what the figures need of all data.
    """

    theta: Any
    lam: Any
    train: Any
    val: Any
    whole: Any


class Problem(NamedTuple):
    """Losses `loss(theta, lam, batch)`; `make(seed, tuning)`, a `Draw`; and `report`.

    `report(draw, thetas, lams)` makes the figures of many points, one column for each
    of `figures`, of which the first is the one that counts. `rates` and `outer` are the
    grid of step sizes for the inner and the outer level.
    """

    name: str
    train_loss: Callable[[Any, Any, Any], Any]
    val_loss: Callable[[Any, Any, Any], Any]
    make: Callable[[int, bool], Draw]
    report: Callable[[Draw, Any, Any], np.ndarray]
    figures: tuple[str, ...]
    rates: tuple[float, ...]
    outer: tuple[float, ...]
    exponents: tuple[float, ...]  # by which both fall with the updates
    budget: int  # calls
    seeds: int
    is_log: bool  # means over seeds are geometric


# Quadratics


def _terms(rng: np.random.Generator, n: int, size: int):
    """Terms x (x' theta)^2 / 2 + (u' lam)^2 / 2 + (a' lam) (b' theta) + c' theta + e'
    lam, whose mean has eigenvalues from 0.1 to 1 in both variables, and singular values
    0.1 in their product."""
    rotation = lambda: np.linalg.qr(rng.normal(size=(size, size)))[0]
    white = lambda: np.linalg.qr(rng.normal(size=(n, size)))[0] * n**0.5
    roots = np.logspace(-0.5, 0, size)

    def factors():
        basis = rotation()
        return white() @ (basis * roots @ basis.T)

    product = white()
    terms = {
        "x": factors(),
        "u": factors(),
        "a": 0.1 * product @ rotation(),
        "b": product @ rotation(),
        "c": rng.normal(size=(n, size)),
        "e": rng.normal(size=(n, size)),
    }
    return {k: v.astype(np.float32) for k, v in terms.items()}


def _quadratic(theta, lam, terms):
    square = (terms["x"] @ theta) ** 2 + (terms["u"] @ lam) ** 2
    product = (terms["a"] @ lam) * (terms["b"] @ theta)
    return jnp.mean(square / 2 + product + terms["c"] @ theta + terms["e"] @ lam)


class Mean(NamedTuple):
    """The mean of the terms, in double precision."""

    by_theta: np.ndarray
    by_lam: np.ndarray
    cross: np.ndarray
    c: np.ndarray
    e: np.ndarray


def mean_of(terms) -> Mean:
    t = {k: np.asarray(v, np.float64) for k, v in terms.items()}
    n = len(t["x"])
    return Mean(
        t["x"].T @ t["x"] / n,
        t["u"].T @ t["u"] / n,
        t["a"].T @ t["b"] / n,
        t["c"].mean(axis=0),
        t["e"].mean(axis=0),
    )


def value_gradient(draw: Draw, lams) -> np.ndarray:
    """The gradient of lam -> f(theta*(lam), lam) in closed form, for rows of `lams`."""
    g, f = mean_of(draw.train), mean_of(draw.val)
    lams = np.asarray(lams, np.float64)
    theta = -np.linalg.solve(g.by_theta, (lams @ g.cross + g.c).T).T
    by_theta = theta @ f.by_theta + lams @ f.cross + f.c
    by_lam = lams @ f.by_lam + theta @ f.cross.T + f.e
    return by_lam - np.linalg.solve(g.by_theta, by_theta.T).T @ g.cross.T


def value_hessian(draw: Draw) -> np.ndarray:
    size = draw.lam.shape[0]
    rows = np.concatenate([np.eye(size), np.zeros((1, size))])
    gradients = value_gradient(draw, rows)
    return gradients[:-1] - gradients[-1]


def _make_quadratics(n: int, size: int, seed: int, tuning: bool) -> Draw:
    del tuning
    rng = np.random.default_rng(seed)
    for _ in range(20):
        theta, lam = np.zeros(size, np.float32), np.full(size, -2, np.float32)
        draw = Draw(theta, lam, _terms(rng, n, size), _terms(rng, n, size), None)
        if np.linalg.eigvalsh(value_hessian(draw))[0] > 0:
            return draw
    raise ValueError("No draw of 20 has a convex value function.")


def quadratics(n: int = 1024, size: int = 100, budget: int = 40_000) -> Problem:
    return Problem(
        name="quadratics",
        train_loss=_quadratic,
        val_loss=_quadratic,
        make=ft.partial(_make_quadratics, n, size),
        report=lambda draw, thetas, lams: np.sum(
            value_gradient(draw, lams) ** 2, axis=-1, keepdims=True
        ),
        figures=("squared gradient of the value",),
        rates=(0.03, 0.1, 0.3, 1.0),
        outer=(0.03, 0.1, 0.3, 1.0),
        exponents=(0.0, 0.5),
        budget=budget,
        seeds=30,
        is_log=True,
    )


# Data cleaning


ROWS, VAL_ROWS, TEST_ROWS, REGULARISATION = 20_000, 5000, 10_000, 0.2


def _entropies(theta, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ theta, y)


def _weighted(theta, lam, batch):
    x, y, number = batch
    losses = jax.nn.sigmoid(lam[number]) * _entropies(theta, x, y)
    return jnp.mean(losses) + REGULARISATION * jnp.sum(theta**2)


def _plain(theta, lam, batch):
    del lam
    return jnp.mean(_entropies(theta, *batch))


@ft.cache
def _mnist(folder: pathlib.Path):
    path = folder / "mnist.npz"
    if not path.exists():
        raise SystemExit(
            f"{path} is missing: data cleaning needs `train_images` (60000, 28, 28) "
            "and `train_labels` of MNIST in one NumPy archive."
        )
    with np.load(path) as arrays:
        x, y = arrays["train_images"], arrays["train_labels"]
    return x.reshape(len(x), -1).astype(np.float32), y.astype(np.int32)


def _make_cleaning(folder: pathlib.Path, share: float, seed: int, tuning: bool) -> Draw:
    """The last 10,000 images of the train set of MNIST are for the test alone. While
    step sizes are chosen, 10,000 others stand for them."""
    x, y = _mnist(folder)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y) - TEST_ROWS)
    train, val, rest = np.split(order, [ROWS, ROWS + VAL_ROWS])
    test = rest[:TEST_ROWS] if tuning else np.arange(len(y) - TEST_ROWS, len(y))
    wrong = rng.random(ROWS) < share
    labels = np.where(wrong, rng.integers(0, 10, ROWS), y[train]).astype(np.int32)
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    scaled = lambda rows: (x[rows] - mean) / np.where(deviation > 0, deviation, 1)
    clean = lambda rows: jax.device_put((scaled(rows), y[rows]))
    return Draw(
        np.zeros((x.shape[1], 10), np.float32),
        np.full(ROWS, -2, np.float32),
        jax.device_put((scaled(train), labels, np.arange(ROWS, dtype=np.int32))),
        clean(val),
        clean(test),
    )


@jax.jit
def _error_and_loss(draw: Draw, thetas):
    def each(theta):
        x, y = draw.whole
        error = 100 * jnp.mean(jnp.argmax(x @ theta, axis=1) != y)
        return jnp.stack([error, _plain(theta, None, draw.val)])

    return jax.lax.map(each, thetas)


def cleaning(folder: pathlib.Path, share: float, budget: int = 12_000) -> Problem:
    return Problem(
        name=f"cleaning {share:g}",
        train_loss=_weighted,
        val_loss=_plain,
        make=ft.partial(_make_cleaning, folder, share),
        report=lambda draw, thetas, lams: np.asarray(_error_and_loss(draw, thetas)),
        figures=("test error, %", "validation loss"),
        rates=(0.003, 0.01, 0.03, 0.1),
        outer=(300.0, 1000.0, 3000.0, 10_000.0),
        exponents=(0.0,),
        budget=budget,
        seeds=5,
        is_log=False,
    )
