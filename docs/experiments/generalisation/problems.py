"""The problems. Each draws its rows, its wrong labels and its first weights by a seed.

UCI regressions with few rows: Gaussian processes' means (kernel ridge) with a length
scale a feature and a ridge. Digits and MNIST: multilayer perceptrons with a decay a
layer and input noise, and a softmax with a decay a weight. Cleaning: a weight for each
of 1000 images with wrong labels, and few clean ones. Rare classes: a weight an image,
at 1 to 100. Sources: a weight for each of five, of which some are noisy.
"""

import dataclasses
import functools as ft
import math
import pathlib

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy as jsp
import numpy as np
import optax
from jax import lax

from .task import Data, Task


UCI = {
    "boston": 200,
    "wine": 300,
    "concrete": 200,
    "energy": 100,
    "naval": 150,
    "yacht": 100,
    "power": 150,
    "kin8nm": 300,
}
TEST_ROWS = 2000
DECAYS = (math.log(1e-6), math.log(0.1))


# Regression


def _regression_rows(path: pathlib.Path, name: str, rows: int, seed: int) -> Data:
    arrays = np.load(path)
    x, y = arrays[f"{name}_x"], arrays[f"{name}_y"][:, 0]
    order = np.random.default_rng(seed).permutation(len(y))
    train, test = order[:rows], order[rows : rows + TEST_ROWS]
    scale = lambda a: (a - a[train].mean(0)) / np.maximum(a[train].std(0), 1e-8)
    x, y = np.clip(scale(x), -5, 5), scale(y)
    return Data((), (), (x[train], y[train]), (x[test], y[test]))


def _kernel(h, a, b):
    weights = jnp.exp(-2 * h["log length"])
    squares = lambda x: jnp.sum(weights * x**2, axis=-1)
    distance = squares(a)[:, None] + squares(b)[None] - 2 * (a * weights) @ b.T
    return jnp.exp(-0.5 * distance)


def _kernel_ridge(h, train):
    x, y = train[1]
    ridge = jnp.exp(h.get("log ridge", math.log(0.1)))
    matrix = _kernel(h, x, x) + ridge * jnp.eye(len(y))
    factor = jsp.linalg.cho_factor(lax.stop_gradient(matrix))
    # The derivative is one more solve with the same factor.
    dual = lax.custom_linear_solve(
        lambda v: matrix @ v,
        y - jnp.mean(y),
        lambda _, v: jsp.linalg.cho_solve(factor, v),
        symmetric=True,
    )
    return h, x, dual, jnp.mean(y)


def _kernel_loss(model, rows):
    h, x, dual, mean = model
    return jnp.mean((_kernel(h, rows[0], x) @ dual + mean - rows[1]) ** 2)


def _twice(loss):
    def report(model, rows):
        value = loss(model, rows)
        return jnp.stack([value, value])

    return report


def one_length(folder: pathlib.Path, name: str) -> Task:
    """One hyperparameter: the length scale of all features, at the default ridge."""
    task = kernel(folder, name)
    default = {"log length": task.default["log length"][:1]}
    return dataclasses.replace(task, name=f"{name}, one length", default=default)


def kernel(folder: pathlib.Path, name: str) -> Task:
    path = folder / "uci_regression.npz"
    features = np.load(path)[f"{name}_x"].shape[1]
    middle = 0.5 * math.log(features)
    return Task(
        name=name,
        make=ft.partial(_regression_rows, path, name, UCI[name]),
        default={
            "log length": np.full(features, middle),
            "log ridge": np.array(math.log(0.1)),
        },
        low={"log length": middle - 2.5, "log ridge": math.log(1e-6)},
        high={"log length": middle + 3.5, "log ridge": math.log(10.0)},
        loss=_kernel_loss,
        report=_twice(_kernel_loss),
        metric="error",
        solve=_kernel_ridge,
    )


# Classification


@ft.cache
def _images(path: pathlib.Path):
    """Means of 2x2 pixels of the middle 20x20."""
    arrays = np.load(path)
    small = lambda x: (
        x.reshape(-1, 28, 28)[:, 4:24, 4:24]
        .reshape(-1, 10, 2, 10, 2)
        .mean((2, 4), dtype=np.float32)
        .reshape(-1, 100)
        / 255
    )
    parts = [
        (small(arrays[f"{x}_images"]), arrays[f"{x}_labels"].astype(np.int32))
        for x in ("train", "test")
    ]
    return parts


def _logits(params, x):
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        if i < len(params) - 1:
            x = jax.nn.relu(x)
    return x


def _mlp(sizes, key):
    pairs = list(zip(sizes, sizes[1:]))
    return [
        (jr.normal(k, (m, n)) * math.sqrt(2 / m), jnp.zeros(n))
        for k, (m, n) in zip(jr.split(key, len(pairs)), pairs)
    ]


def _each(params, rows):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(_logits(params, rows[0]), rows[1])


def _entropy(params, rows):
    return jnp.mean(_each(params, rows))


def _calibrated(params, rows):
    """The cross-entropy at the temperature that suits these rows best. Labels with
    noise make a model cautious, which costs cross-entropy and no accuracy; without a
    temperature, tuning would first of all make it bold."""
    logits, losses = _logits(params, rows[0]), _at_temperature(rows[1])
    fixed = lax.stop_gradient(logits)

    def halve(i, ends):
        middle = jnp.mean(ends)
        rises = jax.grad(losses)(middle, fixed) > 0
        return jnp.where(rises, ends.at[1].set(middle), ends.at[0].set(middle))

    ends = lax.fori_loop(0, 20, halve, jnp.log(jnp.array([0.05, 20.0])))
    return losses(jnp.mean(ends), logits)  # the derivative by the temperature is zero


def _at_temperature(labels):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return lambda log, logits: jnp.mean(losses(jnp.exp(log) * logits, labels))


def _accuracy(params, rows):
    right = jnp.argmax(_logits(params, rows[0]), axis=1) == rows[1]
    return jnp.stack([100 * jnp.mean(right), _calibrated(params, rows)])


def _penalty(params, h):
    return 0.5 * sum(
        jnp.sum(jnp.exp(d) * w**2) for d, (w, _) in zip(h["log decay"], params)
    )


def _noisy_input_loss(params, h, train, key):
    x, y = train[1]
    noisy = x + jnp.exp(h["log noise"]) * jr.normal(key, x.shape, x.dtype)
    return _entropy(params, (noisy, y)) + _penalty(params, h)


def _perceptron(name, make, layers: int, steps: int) -> Task:
    return Task(
        name=name,
        make=make,
        default={
            "log decay": np.full(layers, math.log(1e-4), np.float32),
            "log noise": np.array(math.log(0.1), np.float32),
        },
        low={"log decay": DECAYS[0], "log noise": math.log(0.01)},
        high={"log decay": DECAYS[1], "log noise": math.log(1.0)},
        loss=_calibrated,
        report=_accuracy,
        metric="accuracy",
        train_loss=_noisy_input_loss,
        inner=optax.adam(1e-2),
        steps=steps,
    )


def _digits_rows(rows: int, seed: int) -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.data / 16).astype(np.float32)  # pyright: ignore
    y = bunch.target.astype(np.int32)  # pyright: ignore
    order = np.random.default_rng(seed).permutation(len(y))
    train, test = order[:rows], order[rows : rows + TEST_ROWS]
    model = _mlp((64, 64, 64, 10), jr.key(seed))
    return Data(model, (), (x[train], y[train]), (x[test], y[test]))


def digits(folder: pathlib.Path, rows: int) -> Task:
    return _perceptron(f"digits {rows}", ft.partial(_digits_rows, rows), 3, 100)


def _draw(path, seed, rows, test_rows=3000):
    """Random rows of the train split, and of the test split."""
    rng = np.random.default_rng(seed)
    (x, y), (tx, ty) = _images(path)
    i, j = rng.permutation(len(y))[:rows], rng.permutation(len(ty))[:test_rows]
    return (x[i], y[i]), (tx[j], ty[j]), rng


def _mnist_rows(path, sizes, rows: int, seed: int) -> Data:
    pool, test, _ = _draw(path, seed, rows)
    model = _mlp(sizes, jr.key(seed))
    if len(sizes) == 2:
        model = jax.tree_util.tree_map(jnp.zeros_like, model)
    return Data(model, (), pool, test)


def mnist(folder: pathlib.Path) -> Task:
    make = ft.partial(_mnist_rows, folder / "mnist.npz", (100, 32, 10), 1000)
    return _perceptron("mnist 1000", make, 2, 100)


def _decay_loss(params, h, train, key):
    del key
    return _entropy(params, train[1]) + _penalty(params, h)


def softmax(folder: pathlib.Path) -> Task:
    make = ft.partial(_mnist_rows, folder / "mnist.npz", (100, 10), 500)
    return Task(
        name="decays 1000",
        make=make,
        default={"log decay": np.full((1, 100, 10), math.log(1e-4), np.float32)},
        low={"log decay": DECAYS[0]},
        high={"log decay": DECAYS[1]},
        loss=_calibrated,
        report=_accuracy,
        metric="accuracy",
        train_loss=_decay_loss,
        inner=optax.sgd(0.5, momentum=0.9),
        steps=100,
    )


# Weights of examples


def _weights(h, groups):
    """Weights from 0 to 2, that of index i of `groups` in the order of the arrays."""
    raw = [jnp.atleast_1d(h[name]) for name in sorted(h) if name.startswith("weight")]
    return 2 * jax.nn.sigmoid(jnp.concatenate(raw))[groups]


def _weighted_loss(params, h, train, key):
    del key
    (x, y, groups), clean = train
    total = jnp.sum(_weights(h, groups) * _each(params, (x, y)))
    total = total + jnp.sum(_each(params, clean))
    return total / (len(y) + len(clean[1])) + _penalty(params, h)


def _weighted(name, make, weights) -> Task:
    names = [*weights, "log decay"]
    return Task(
        name=name,
        make=make,
        default={
            **weights,
            "log decay": np.full(1, math.log(1e-4), np.float32),
        },
        low={x: -6.0 if x in weights else DECAYS[0] for x in names},
        high={x: 6.0 if x in weights else DECAYS[1] for x in names},
        loss=_calibrated,
        report=_accuracy,
        metric="accuracy",
        train_loss=_weighted_loss,
        inner=optax.sgd(0.5, momentum=0.9),
        steps=100,
    )


def _zeros():
    return [(jnp.zeros((100, 10)), jnp.zeros(10))]


def _wrong(y, share, rng):
    """Replaces labels by a random class with the probability `share`."""
    wrong = rng.random(len(y)) < share
    return np.where(wrong, rng.integers(0, 10, len(y)), y).astype(np.int32)


def _cleaning_rows(path, share: float, clean: int, seed: int) -> Data:
    (x, y), test, rng = _draw(path, seed, 1000 + clean)
    fixed = (x[:1000], _wrong(y[:1000], share, rng), np.arange(1000))
    return Data(_zeros(), fixed, (x[1000:], y[1000:]), test)


def cleaning(folder: pathlib.Path, share: float, clean: int) -> Task:
    make = ft.partial(_cleaning_rows, folder / "fashion_mnist.npz", share, clean)
    weights = {"weight": np.zeros(1000, np.float32)}
    return _weighted(f"cleaning {share:.0%} {clean}", make, weights)


SHARES = (0.0, 0.3, 0.5, 0.8, 1.0)  # of random labels in each source


def _source_rows(path, clean: int, seed: int) -> Data:
    (x, y), test, rng = _draw(path, seed, 1000 + clean)
    groups = np.repeat(np.arange(5), 200)
    labels = [_wrong(y[:1000][groups == i], s, rng) for i, s in enumerate(SHARES)]
    fixed = (x[:1000], np.concatenate(labels), groups)
    return Data(_zeros(), fixed, (x[1000:], y[1000:]), test)


def sources(folder: pathlib.Path) -> Task:
    make = ft.partial(_source_rows, folder / "fashion_mnist.npz", 100)
    return _weighted("sources", make, {"weight": np.zeros(5, np.float32)})


RARE = 10


def _rare_rows(path, seed: int) -> Data:
    rng = np.random.default_rng(seed)
    (x, y), _ = _images(path)
    rows = [rng.permutation(np.flatnonzero(y == c)) for c in (4, 9)]
    i = np.concatenate([rows[0][: 100 * RARE], rows[1][:RARE]])
    # Both classes in turn, 20 each.
    j = np.stack([rows[0][-20:], rows[1][-20:]], axis=1).reshape(-1)
    k = np.concatenate([r[100 * RARE : 200 * RARE] for r in rows])
    label = lambda y: (y == 9).astype(np.int32)
    fixed = (x[i], label(y[i]), np.arange(len(i)))
    model = [(jnp.zeros((100, 2)), jnp.zeros(2))]
    return Data(model, fixed, (x[j], label(y[j])), (x[k], label(y[k])))


def _rare_loss(params, h, train, key):
    del key
    (x, y, groups), clean = train
    raw = jnp.concatenate([h["weight 4"], h["weight 9"]])
    total = jnp.sum(jnp.exp(raw)[groups] * _each(params, (x, y)))
    total = total + jnp.sum(_each(params, clean))
    return total / (len(y) + len(clean[1])) + _penalty(params, h)


def rare(folder: pathlib.Path) -> Task:
    # The usual default: the inverse of the frequency, with a mean of one.
    of = lambda count: np.full(count, math.log(101 * RARE / 2 / count), np.float32)
    return Task(
        name="rare 1:100",
        make=ft.partial(_rare_rows, folder / "mnist.npz"),
        default={
            "weight 4": of(100 * RARE),
            "weight 9": of(RARE),
            "log decay": np.full(1, math.log(1e-4), np.float32),
        },
        axes=("weight 9", "log decay"),
        low={"weight 4": -4.0, "weight 9": 0.0, "log decay": DECAYS[0]},
        high={"weight 4": 3.0, "weight 9": 6.0, "log decay": DECAYS[1]},
        loss=_calibrated,
        report=_accuracy,
        metric="accuracy",
        train_loss=_rare_loss,
        inner=optax.sgd(0.5, momentum=0.9),
        steps=100,
    )


def load(folder: pathlib.Path) -> dict[str, Task]:
    """All problems whose data are there."""
    has = lambda name: (folder / f"{name}.npz").exists()
    tasks = []
    if has("uci_regression"):
        tasks += [kernel(folder, name) for name in UCI]
    tasks += [digits(folder, rows) for rows in (300, 600)]
    if has("mnist"):
        tasks += [mnist(folder), softmax(folder), rare(folder)]
    if has("fashion_mnist"):
        tasks += [cleaning(folder, s, c) for c in (300, 100, 1000) for s in (0.3, 0.5)]
        tasks += [sources(folder)]
    return {task.name: task for task in tasks}
