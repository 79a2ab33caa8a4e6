"""The workloads of the benchmarks, each small enough for two cores.

| name | model | hyperparameters |
|---|---|---|
| C | MLP 784-256-10, full batch of 5000 | a weight for each example |
| P | MLP 784-1024-1024-10, batch of 256 | a log decay for each of 1.9 million weights |
| N | three convolutions and a linear layer, batch of 64 | a log decay for each array |
| T | transformer, four layers of width 128, Adam | log decay and rate of each matrix |
| S | linear regression with 16 features | a log decay for each feature |
| M | ten tasks of sine waves, MLP 1-40-40-1 | the two hidden layers |
| L | MLP of 10, 100 or 300 arrays of width 16 | a log decay for each array |
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax


@dataclasses.dataclass(frozen=True)
class Workload:
    """Losses of pure arrays, `loss(params, raw, batch)`, with their starts and data.

    `inner` is a function of the raw hyperparameters to an Optax transformation.
    """

    train_loss: Callable[[Any, Any, Any], Any]
    val_loss: Callable[[Any, Any, Any], Any]
    params: Any
    raw: Any
    train: Any
    val: Any
    inner: Callable[[Any], optax.GradientTransformation]
    outer: optax.GradientTransformation
    unroll: bool = False  # convolutions are slow in loops on CPUs


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _decay(raw, params):
    """Half the sum of squares of all weights, each array with its own log decays."""
    terms = jtu.tree_map(lambda r, p: jnp.sum(jnp.exp(r) * p**2), raw, params)
    return 0.5 * sum(jtu.tree_leaves(terms))


def _images(key, size):
    x_key, y_key = jr.split(key)
    return jr.normal(x_key, (size, 784)), jr.randint(y_key, (size,), 0, 10)


def _classifier(model, raw, train_loss, train, val, inner, unroll=False) -> Workload:
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def losses(params, batch):
        x, y = batch
        return _cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)

    return Workload(
        train_loss=lambda params, raw, batch: train_loss(losses, params, raw, batch),
        val_loss=lambda params, raw, batch: jnp.mean(losses(params, batch)),
        params=params,
        raw=raw,
        train=train,
        val=val,
        inner=lambda raw: inner,
        outer=optax.adam(0.01),
        unroll=unroll,
    )


def _with_decay(losses, params, raw, batch):
    return jnp.mean(losses(params, batch)) + _decay(raw, params)


def sample_weights() -> Workload:
    keys = jr.split(jr.key(0), 3)
    return _classifier(
        model=eqx.nn.MLP(784, 10, 256, 1, key=keys[0]),
        raw=jnp.full(5000, 0.5),
        train_loss=lambda losses, params, raw, batch: jnp.mean(
            raw * losses(params, batch)
        ),
        train=_images(keys[1], 5000),
        val=_images(keys[2], 500),
        inner=optax.sgd(0.1, momentum=0.9),
    )


def million_decays() -> Workload:
    keys = jr.split(jr.key(0), 3)
    model = eqx.nn.MLP(784, 10, 1024, 2, key=keys[0])
    params = eqx.filter(model, eqx.is_inexact_array)
    return _classifier(
        model=model,
        raw=jtu.tree_map(lambda x: jnp.full_like(x, -9.0), params),
        train_loss=_with_decay,
        train=_images(keys[1], 256),
        val=_images(keys[2], 256),
        inner=optax.sgd(0.1, momentum=0.9),
    )


class _ConvNet(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jr.split(key, 4)
        conv = lambda i, o, key: eqx.nn.Conv2d(i, o, 3, stride=2, padding=1, key=key)
        self.layers = [
            conv(1, 16, keys[0]),
            conv(16, 32, keys[1]),
            conv(32, 32, keys[2]),
            eqx.nn.Linear(32 * 4 * 4, 10, key=keys[3]),
        ]

    def __call__(self, x):
        x = x.reshape(1, 28, 28)
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x.ravel())


def convolutions() -> Workload:
    keys = jr.split(jr.key(0), 3)
    model = _ConvNet(keys[0])
    params = eqx.filter(model, eqx.is_inexact_array)
    return _classifier(
        model=model,
        raw=jtu.tree_map(lambda x: jnp.array(-9.0), params),
        train_loss=_with_decay,
        train=_images(keys[1], 64),
        val=_images(keys[2], 64),
        inner=optax.sgd(0.1, momentum=0.9),
        unroll=True,
    )


class _Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norms: list
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width, heads, key):
        keys = jr.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[2])

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask)
        y = jax.vmap(self.norms[1])(x)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(y)))


class _Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    positions: jax.Array
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, vocabulary, length, width, layers, heads, key):
        keys = jr.split(key, layers + 3)
        self.embedding = eqx.nn.Embedding(vocabulary, width, key=keys[-1])
        self.positions = 0.02 * jr.normal(keys[-2], (length, width))
        self.blocks = [_Block(width, heads, key) for key in keys[:layers]]
        self.head = eqx.nn.Linear(width, vocabulary, key=keys[-3])

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def transformer() -> Workload:
    keys = jr.split(jr.key(0), 3)
    params, static = eqx.partition(
        _Transformer(64, 32, 128, 4, 4, keys[0]), eqx.is_inexact_array
    )
    matrices = jtu.tree_map(lambda x: x if x.ndim == 2 else None, params)
    each = lambda value: jtu.tree_map(lambda x: jnp.array(value), matrices)

    def val_loss(params, raw, batch):
        logits = jax.vmap(eqx.combine(params, static))(batch[:, :-1])
        return jnp.mean(_cross_entropy(logits, batch[:, 1:]))

    def train_loss(params, raw, batch):
        matrices = jtu.tree_map(lambda x: x if x.ndim == 2 else None, params)
        return val_loss(params, raw, batch) + _decay(raw["decay"], matrices)

    def inner(raw):
        rates = jtu.tree_map(jnp.exp, raw["rate"])
        one = lambda x: jnp.array(1.0) if x.ndim != 2 else None
        rates = eqx.combine(rates, jtu.tree_map(one, params))

        def scale(updates, _):
            return jtu.tree_map(lambda r, u: r * u, rates, updates)

        return optax.chain(optax.adam(1e-3), optax.stateless(scale))

    return Workload(
        train_loss=train_loss,
        val_loss=val_loss,
        params=params,
        raw={"decay": each(-9.0), "rate": each(0.0)},
        train=jr.randint(keys[1], (16, 33), 0, 64),
        val=jr.randint(keys[2], (16, 33), 0, 64),
        inner=inner,
        outer=optax.adam(0.01),
    )


def ridge() -> Workload:
    keys = jr.split(jr.key(0), 2)
    truth = jnp.linspace(-1.0, 1.0, 16)
    data = [(x, x @ truth) for x in (jr.normal(key, (40, 16)) for key in keys)]

    def val_loss(params, raw, batch):
        return jnp.mean((batch[0] @ params - batch[1]) ** 2)

    return Workload(
        train_loss=lambda params, raw, batch: (
            val_loss(params, raw, batch) + _decay(raw, params)
        ),
        val_loss=val_loss,
        params=jnp.zeros(16),
        raw=jnp.full(16, -2.0),
        train=data[0],
        val=data[1],
        inner=lambda raw: optax.sgd(0.05),
        outer=optax.adam(0.01),
    )


def sine_waves(tasks=10) -> Workload:
    """`train` and `val` have a leading axis for the tasks."""
    keys = jr.split(jr.key(0), 5)
    model = eqx.nn.MLP(1, 1, 40, 2, key=keys[0])
    hidden = lambda m: (m.layers[0], m.layers[1])
    blank = eqx.tree_at(hidden, model, replace=(None, None))
    params, static = eqx.partition(blank, eqx.is_inexact_array)
    raw, static_layers = eqx.partition(hidden(model), eqx.is_inexact_array)
    height = jr.uniform(keys[1], (tasks, 1), minval=0.1, maxval=5.0)
    shift = jr.uniform(keys[2], (tasks, 1), maxval=jnp.pi)

    def sample(key):
        x = jr.uniform(key, (tasks, 10), minval=-5.0, maxval=5.0)
        return x[..., None], (height * jnp.sin(x - shift))[..., None]

    def loss(params, raw, batch):
        layers = eqx.combine(raw, static_layers)
        none = lambda x: x is None
        whole = eqx.combine(params, static)
        whole = eqx.tree_at(hidden, whole, layers, is_leaf=none)
        return jnp.mean((jax.vmap(whole)(batch[0]) - batch[1]) ** 2)

    return Workload(
        train_loss=loss,
        val_loss=loss,
        params=params,
        raw=raw,
        train=sample(keys[3]),
        val=sample(keys[4]),
        inner=lambda raw: optax.sgd(0.01, momentum=0.9),
        outer=optax.adam(1e-3),
    )


def deep(leaves: int) -> Workload:
    keys = jr.split(jr.key(0), 2)
    model = eqx.nn.MLP(16, 1, 16, leaves // 2 - 1, key=keys[0])
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jr.normal(keys[1], (32, 16))
    batch = (x, x[:, :1])

    def val_loss(params, raw, batch):
        return jnp.mean(
            (jax.vmap(eqx.combine(params, static))(batch[0]) - batch[1]) ** 2
        )

    return Workload(
        train_loss=lambda params, raw, batch: (
            val_loss(params, raw, batch) + _decay(raw, params)
        ),
        val_loss=val_loss,
        params=params,
        raw=jtu.tree_map(lambda p: jnp.array(-5.0), params),
        train=batch,
        val=batch,
        inner=lambda raw: optax.adam(1e-3),
        outer=optax.adam(1e-2),
    )
