"""How much should a language model learn from each source of text, where two of them
are noise and the one that counts is small?"""

import inspect
import pydoc_data.topics
import tarfile

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax


# --8<-- [start:data]
SIZE, CONTEXT, STEPS, LETTERS = 60_000, 8, 1500, 96
rng = np.random.default_rng(0)


def encode(text):
    codes = np.frombuffer(text.encode("ascii", "ignore"), np.uint8).astype(int)
    return jnp.asarray(np.where(codes < 32, 0, codes - 31).clip(max=95))


manual = encode("\n".join(pydoc_data.topics.topics.values()))
val, test = manual[20_000:28_000], manual[28_000:68_000]
docstrings = [getattr(np, name).__doc__ or "" for name in sorted(np.__all__)]
sources = {
    "manual": jnp.tile(manual[:20_000], 3),  # of Python: the target
    "docstrings": encode("\n".join(docstrings))[:SIZE],
    "code": encode(inspect.getsource(tarfile))[:SIZE],
    "cipher": jnp.asarray(rng.permutation(LETTERS))[manual[-SIZE:]],
    "random": jnp.asarray(rng.integers(0, LETTERS, SIZE)),
}
# --8<-- [end:data]


# --8<-- [start:rest]
class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jr.split(key)
        self.embedding = eqx.nn.Embedding(LETTERS, 16, key=keys[0])
        self.mlp = eqx.nn.MLP(16 * CONTEXT, LETTERS, 128, 1, key=keys[1])

    def __call__(self, context):
        return self.mlp(jax.vmap(self.embedding)(context).ravel())


def loss(model, text, starts):
    windows = text[starts[:, None] + jnp.arange(CONTEXT + 1)]
    logits, letters = jax.vmap(model)(windows[:, :-1]), windows[:, -1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, letters).mean()


def train_loss(model, weights, texts, key):
    starts = jr.randint(key, (len(texts), 32), 0, SIZE - CONTEXT)
    return weights @ jax.vmap(loss, (None, 0, 0))(model, texts, starts)


def val_loss(model, weights, text, key):
    return loss(model, text, jr.randint(key, (128,), 0, len(text) - CONTEXT))


whole_loss = eqx.filter_jit(lambda m, x: loss(m, x, jnp.arange(len(x) - CONTEXT)))


problem = hpo.Problem(train_loss, val_loss)
algorithm = hpo.T1T2(problem, optax.adam(2e-3), optax.adam(0.02))
model, texts = Model(jr.key(0)), jnp.stack(list(sources.values()))
equal, manual_alone = jnp.full(5, 0.2), jnp.eye(5)[0]
run = (algorithm, model, hpo.Simplex(equal), texts, val)
history = hpo.tune(*run, steps=STEPS, key=jr.key(1)).history
tuned = history.hyperparams[len(history.step) // 2 :].mean(axis=0)

monitor = hpo.Monitor(lambda s: whole_loss(s.model, val), every=100)
ways = {"equal weights": equal, "manual alone": manual_alone, "tuned": tuned}
for name, weights in ways.items():
    run = (algorithm, model, jnp.asarray(weights), texts)
    fitted = hpo.fit(*run, steps=STEPS, key=jr.key(2), monitor=monitor).model
    print(f"{name:14} {whole_loss(fitted, test):.3f}")
# --8<-- [end:rest]
print("weights: " + ", ".join(f"{k} {w:.2f}" for k, w in zip(sources, tuned)))

axes = plt.subplots(layout="constrained")[1]
axes.plot(history.step, history.hyperparams, label=list(sources))
axes.set(xlabel="step", ylabel="weight of the source", yscale="log")
axes.legend()
plt.savefig("mixing_sources.png")
