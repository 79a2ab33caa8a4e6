"""Rate, decay and momentum tuned in one training, from random starts.

The UCI regressions of Clarke, Oldewage and Hernandez-Lobato (ICLR 2022): a perceptron
with 50 hidden units, trained by gradient descent with momentum on the whole train set
for 4000 steps, starts with a rate, a decay and a momentum drawn at random. Every ten
steps Adam moves the three. What counts is the squared error on the test rows at the
end, over the random starts. Splits, ranges and settings are those of the authors' code.
"""

import argparse
import functools as ft
import json
import pathlib
import time
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax

from .table import bootstrap, markdown


TRAINING, WINDOW = 4000, 10
LOW = {"log10 rate": -6.0, "log10 decay": -7.0, "momentum": 0.0}
HIGH = {"log10 rate": -1.0, "log10 decay": -2.0, "momentum": 1.0}
BOX = {"log10 rate": (-10.0, 0.0)}  # where the authors keep the rate
SHRINK = (0.95, 1.01)  # of the rate at each window, for "random x rate"
# Rows for training, validation and test.
SIZES = {
    "energy": (614, 78, 76),
    "kin8nm": (5898, 1475, 819),
    "power": (6889, 1722, 957),
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


def outer():
    low, high = ({k: -jnp.inf, "x": 0}[k] for k in ()), None
    return None
