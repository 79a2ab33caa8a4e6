"""A small language model as users train it: a transformer over characters, AdamW by
groups, warm-up and cosine decay, clipping by global norm; with a decay and a multiplier
of the rate for each group, and the weights of three sources of text of which two are
noise."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

from .helpers import ROOT


LENGTH, WIDTH, STEPS = 16, 32, 500
GROUPS = ("embedding", "attention", "mlp", "head")


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]

    def __init__(self, size, dtype, key):
        keys = jr.split(key, 4)
        self.embedding = eqx.nn.Embedding(size, WIDTH, dtype=dtype, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, dtype=dtype, key=keys[1])
        self.mlp = eqx.nn.MLP(
            WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, dtype=dtype, key=keys[2]
        )
        self.head = eqx.nn.Linear(WIDTH, size, dtype=dtype, key=keys[3])
        norm = eqx.nn.LayerNorm(WIDTH, dtype=dtype)
        self.norms = norm, norm

    def __call__(self, tokens):
        x = jax.vmap(self.embedding)(tokens)
        normed = jax.vmap(self.norms[0])(x)
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = x + self.attention(normed, normed, normed, mask=mask)
        x = x + jax.vmap(lambda z: self.mlp(self.norms[1](z)))(x)
        return jax.vmap(self.head)(x)


def _cross_entropy(model, text):
    logits = jax.vmap(model)(text[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return jnp.mean(losses)


def _train_loss(model, h, batch, key):
    del key
    losses = jnp.stack([_cross_entropy(model, text) for text in batch])
    return jnp.sum(h["mixture"] * losses)


def _val_loss(model, h, batch, key):
    del h, key
    return _cross_entropy(model, batch)


def _labels(params):
    parts = (*GROUPS, "embedding")
    where = lambda x: (*(getattr(x, name) for name in GROUPS), x.norms)
    return eqx.tree_at(where, params, parts)


def _inner(h):
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 50, STEPS)

    def group(name):
        rate = lambda step: 3e-3 * h["multipliers"][name] * shape(step)
        return optax.adamw(rate, weight_decay=h["decays"][name])

    groups = optax.multi_transform({name: group(name) for name in GROUPS}, _labels)
    return optax.chain(optax.clip_by_global_norm(1.0), groups)


def _windows(text, count, seed):
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH - 1, count)
    return jnp.asarray(text[starts[:, None] + np.arange(LENGTH + 1)])


def _data():
    pages = sorted((ROOT / "docs").rglob("*.md"))
    text = "".join(page.read_text() for page in pages)[:100_000]
    letters, text = np.unique(list(text), return_inverse=True)
    text = text.astype(np.int32)
    rng = np.random.default_rng(0)
    random = rng.integers(0, len(letters), len(text)).astype(np.int32)
    sources = (text[:80_000], random, rng.permutation(text))
    train = tuple(_windows(source, 1000, i) for i, source in enumerate(sources))
    return len(letters), train, _windows(text[80_000:], 500, 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "rule", [hpo.ForwardOverReverse(), hpo.FiniteDifference()], ids=["exact", "darts"]
)
def test_500_steps_without_a_skipped_one(rule, dtype):
    size, train, val = _data()
    single = lambda x: jnp.asarray(x, jnp.float32)
    hyperparams = {
        "mixture": hpo.Simplex(single([1 / 3] * 3)),
        "decays": {name: hpo.Positive(single(1e-2)) for name in GROUPS},
        "multipliers": {name: hpo.Positive(single(1.0)) for name in GROUPS},
    }
    outer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-2))
    algorithm = hpo.T1T2(hpo.Problem(_train_loss, _val_loss), _inner, outer, rule)
    solution = hpo.tune(
        algorithm,
        Transformer(size, dtype, jr.key(0)),
        hyperparams,
        hpo.Minibatch(train, 16),
        hpo.Minibatch(val, 16),
        steps=STEPS,
        key=jr.key(1),
        progress=False,
    )
    assert solution.result == hpo.RESULTS.successful
    assert int(solution.state.total_skipped) == 0
    weights = jtu.tree_leaves(eqx.filter(solution.model, eqx.is_inexact_array))
    assert all(x.dtype == dtype for x in weights)
    losses = solution.history.val_loss
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:3])
    mixture = solution.values["mixture"]
    assert mixture[0] > 0.8 and mixture[0] == jnp.max(mixture)
