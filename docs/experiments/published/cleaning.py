"""Which labels of MNIST are wrong, by weights of the examples.

The problem of Shen and Chen (ICML 2023) and of the authors' code: of 5000 train images
half have a random label, 5000 validation images and 10000 test images are clean. The
model is softmax regression, and each train image has a weight, the sigmoid of a number
that starts at 0. All batches are full.

`published` are their settings; `tuned` are settings under which the weights move.
"""

import pathlib
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.metrics import roc_auc_score

from ..common import mean_and_error, write_json


class Data(NamedTuple):
    """Images with the examples last, twice as fast here as the examples first."""

    train: Any
    val: Any
    test: Any
    clean: np.ndarray  # which train labels were not drawn at random


def load(folder: pathlib.Path | None, seed: int) -> Data:
    rng = np.random.default_rng(seed)
    if folder is None:
        sizes, labels = (60, 60, 100), rng.integers(0, 10, 220)
        images = rng.normal(size=(10, 784))[labels] + rng.normal(size=(220, 784))
    else:
        sizes, file = (5000, 5000, 10000), np.load(folder / "mnist.npz")
        chosen = rng.permutation(len(file["train_images"]))[: sum(sizes)]
        images, labels = file["train_images"][chosen] / 255, file["train_labels"]
        labels = labels[chosen].astype(int)
    pixels = images.reshape(len(images), -1).astype(np.float32).T
    count = sizes[0]
    drawn = rng.permutation(count)[: count // 2]
    labels[drawn] = rng.integers(0, 10, len(drawn))
    ends = np.cumsum([0, *sizes])
    cut = lambda i: (pixels[:, ends[i] : ends[i + 1]], labels[ends[i] : ends[i + 1]])
    parts = [tuple(map(jnp.asarray, cut(i))) for i in range(3)]
    return Data(*parts, clean=~np.isin(np.arange(count), drawn))


def make_model(seed: int):
    rng, bound = np.random.default_rng([seed, 1]), 784**-0.5
    draw = lambda *shape: jnp.asarray(rng.uniform(-bound, bound, shape), jnp.float32)
    return draw(10, 784), draw(10)


def logits(model, x):
    weight, bias = model
    return weight @ x + bias[:, None]


def losses(model, batch):
    x, y = batch
    scores = logits(model, x)
    right = jnp.sum(scores * jax.nn.one_hot(y, 10, axis=0), axis=0)
    return jax.nn.logsumexp(scores, axis=0) - right


def train_loss(model, weights, batch, key):
    return jnp.mean(jax.nn.sigmoid(weights) * losses(model, batch))


def val_loss(model, weights, batch, key):
    return jnp.mean(losses(model, batch))


problem = hpo.Problem(train_loss, val_loss)


@jax.jit
def accuracy(model, batch):
    x, y = batch
    return 100 * jnp.mean(jnp.argmax(logits(model, x), axis=0) == y)


def detection(weights, clean):
    """The F1 score, in percent, of "clean is what has a weight of at least one half",
    and the area under the curve of the weights."""
    weights = np.asarray(weights)
    chosen = weights >= 0
    f1 = 200 * np.sum(chosen & clean) / (np.sum(chosen) + np.sum(clean))
    return float(f1), float(roc_auc_score(clean, weights))


@eqx.filter_jit
def steps_of(algorithm, state, train, val, count):
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(i, arrays):
        state = algorithm.step(eqx.combine(arrays, static), train, val)
        return eqx.filter(state, eqx.is_array)

    return eqx.combine(lax.fori_loop(0, count, step, arrays), static)


@eqx.filter_jit
def descend(loss, model, rate, count):
    """Plain training: gradient descent on a function of the model."""
    move = lambda x, g: x - rate * g
    step = lambda i, model: jax.tree.map(move, model, jax.grad(loss)(model))
    return lax.fori_loop(0, count, step, model)


# --- The authors' settings ---

RAMP, STRENGTH = 30_000, 0.2


def v_pbgd():
    """Their rate of `y` is 0.1 along the gradient of C2 + s C1, which is `s` times ours
    along that of C1 + C2 / s. `z` has the same rate here; theirs is 0.01 throughout,
    which is the mean of ours while the strength rises."""
    strength = lambda step: STRENGTH * jnp.clip((step + 1) / RAMP, max=1)
    inner = optax.sgd(lambda step: 0.1 * strength(step))
    return hpo.Penalty(problem, inner, optax.sgd(0.1), strength=strength)


def published(data: Data, seed: int, total: int, note):
    """The first `total` steps of theirs."""
    train, val, test, clean = data
    algorithm = v_pbgd()
    state = algorithm.init(make_model(seed), jnp.zeros(len(clean)))
    marks = min(total, 2000)
    for step in range(0, total, marks):
        state = steps_of(algorithm, state, train, val, marks)
        penalised = state.memory.episode[0].params
        f1, auc = detection(state.hyperparams, clean)
        note(
            "Penalty, V-PBGD's settings",
            steps=step + marks,
            y=accuracy(penalised, test),
            z=accuracy(state.model, test),
            f1=f1,
            auc=auc,
            lowest=jnp.min(state.hyperparams),
            highest=jnp.max(state.hyperparams),
        )


def plain(data: Data, model, steps: int, note):
    """What the accuracies are where nothing is tuned."""
    train, val, test, clean = data
    weights = jnp.zeros(len(clean))
    on_val = lambda model: val_loss(model, None, val, None)
    on_train = lambda model: train_loss(model, weights, train, None)
    on_both = lambda model: on_val(model) + STRENGTH * on_train(model)
    losses = {"C1": on_train, "C2": on_val, "C2 + 0.2 C1": on_both}
    for name, loss in losses.items():
        end = descend(loss, model, 0.1, steps)
        note(f"{name} alone", steps=steps, accuracy=accuracy(end, test))


def rhg(data: Data, model, note, steps: int, updates: int):
    """The reverse hypergradient: 500 steps from a new model, then a step of 0.001 along
    it, 100 times. The weights move so little that a few times tell all."""
    train, val, test, clean = data
    algorithm = hpo.Unrolled(
        problem, optax.sgd(0.1), optax.sgd(0.001), inner_steps=steps, recompute=2
    )
    state = algorithm.init(model, jnp.zeros(len(clean)))
    for _ in range(updates):
        state = algorithm.step(algorithm.restart(state, model), train, val)
    f1, auc = detection(state.hyperparams, clean)
    note(
        "Unrolled, RHG's settings",
        steps=steps * updates,
        z=accuracy(state.model, test),
        f1=f1,
        auc=auc,
        lowest=jnp.min(state.hyperparams),
        highest=jnp.max(state.hyperparams),
    )


# --- Settings under which the weights move, chosen on seed 100 ---


def algorithms():
    def make(cls, outer=0.05, **kwargs):
        return cls(problem, optax.sgd(0.5), optax.adam(outer), **kwargs)

    return {
        "T1T2": make(hpo.T1T2),
        "SOBA": make(hpo.SOBA, linear_rate=0.5),
        "Penalty": make(hpo.Penalty, strength=5.0),
        "Unrolled, 10 steps": make(hpo.Unrolled, 0.2, inner_steps=10),
    }


def afresh(data: Data, seed: int, weights, steps: int) -> dict[str, Any]:
    """The accuracies on the test of two new models, trained at fixed weights on the
    train images, and on these and the validation images."""
    train, val, test, _ = data
    on_train = lambda model: train_loss(model, weights, train, None)
    on_both = lambda model: on_train(model) + val_loss(model, None, val, None)
    fit = lambda loss: accuracy(descend(loss, make_model(seed), 0.5, steps), test)
    return {"afresh": fit(on_train), "with_val": fit(on_both)}


def tuned(data: Data, seed: int, total: int, note):
    """`total` inner steps for each algorithm. All models are then trained afresh."""
    train, val, test, clean = data
    start = jnp.zeros(len(clean))
    for name, algorithm in algorithms().items():
        state = algorithm.init(make_model(seed), start)
        count = total // algorithm.inner_steps
        state = steps_of(algorithm, state, train, val, count)
        weights = state.hyperparams
        f1, auc = detection(weights, clean)
        found = {"model": accuracy(state.model, test), "f1": f1, "auc": auc}
        if isinstance(algorithm, hpo.Penalty):
            found["y"] = accuracy(state.memory.episode[0].params, test)
        note(name, **found, **afresh(data, seed, weights, total))
    note("no tuning", **afresh(data, seed, start, total))
    right = jnp.where(clean, 30.0, -30.0)
    note("the clean ones alone", **afresh(data, seed, right, total))
    none = jnp.full(len(clean), -30.0)
    alone = afresh(data, seed, none, total)["with_val"]
    note("the validation images alone", with_val=alone)


LABELS = ("part", "name", "steps", "seed")


def summarise(rows) -> list[str]:
    """Means over the seeds, and standard errors."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        key = (row["part"], row["name"], row.get("steps"))
        groups.setdefault(key, []).append(row)
    lines = []
    for (part, name, steps), group in groups.items():
        line = f"{part}, {name}" + ("" if steps is None else f", {steps:.0f} steps")
        for figure in [x for x in group[0] if x not in LABELS]:
            values = [row[figure] for row in group]
            mean, error = mean_and_error(values)
            line += f" | {figure} {mean:.5g} ± {error:.2g}"
        lines.append(line)
    return lines


def main(args):
    folder = None if args.quick else args.folder
    rows = []

    def note_of(part, seed):
        def note(name, **figures):
            row = {"part": part, "seed": seed, "name": name}
            rows.append(row | {k: float(v) for k, v in figures.items()})
            print(rows[-1], flush=True)
            write_json(args.json, rows)

        return note

    for seed in range(args.first, args.first + args.seeds):
        data = load(folder, seed)
        if "published" in args.parts:
            total = 20 if args.quick else args.steps
            note = note_of("published", seed)
            published(data, seed, total, note)
        if "plain" in args.parts:
            note, model = note_of("plain", seed), make_model(seed)
            plain(data, model, 20 if args.quick else 4000, note)
            rhg(data, model, note, 5 if args.quick else 500, 2)
        if "tuned" in args.parts:
            tuned(data, seed, 20 if args.quick else 500, note_of("tuned", seed))
    print(*summarise(rows), sep="\n")
