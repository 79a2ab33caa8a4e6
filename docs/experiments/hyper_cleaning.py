r"""Data hyper-cleaning: some labels of the train set are wrong, and one weight for each
train image is tuned on a clean validation set.

    python -m docs.experiments.hyper_cleaning
    python -m docs.experiments.hyper_cleaning --dataset fashion_mnist --size 1000 \
        --val-size 1000 \
        --steps 200 --seeds 5

The problem of Generalized Greedy (table 2): ten steps of training from the start, then
one update of the weights, again and again. The start is the same one each time, which
is what `hpo.tune(..., restart_every=1)` does, or with `--fresh` a new draw each time.
The table holds the mean and the standard deviation over the seeds:

- `val`, `test`: accuracy after ten steps with the final weights. With `--fresh` it is
  the mean of five new starts.
- `AUC`, `F1`: how well the weights tell the changed labels; for F1, a weight below a
  half says that a label was changed.
- `cosine`: of the hypergradient with the exact one, in the state in which the method is
  at the start, after a quarter of the steps and at the end.
"""

import functools as ft
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from sklearn.metrics import f1_score, roc_auc_score

from .common import command, mean_and_std, save, subplots
from .image_data import Images, load


INNER_STEPS = 10
CHANNELS, LAYERS, CLASSES = 8, 3, 10
FRESH_STARTS = 5  # over which an accuracy is averaged
NONE, EXACT = "none", "exact"


class Batch(NamedTuple):
    """Images as the patches that the first convolution sees, cut only once.

    The convolutions are written as products of matrices, with the examples last, since
    true ones run slowly inside compiled loops on CPUs.
    """

    patches: Float[Array, "pixels height width n"]
    labels: Int[Array, " n"]


class Problem(NamedTuple):
    train: Batch
    val: Batch
    test: Batch
    changed: Bool[np.ndarray, " n"]  # which train labels are wrong


class Row(NamedTuple):
    val: float
    test: float
    auc: float = np.nan
    f1: float = np.nan
    cosines: tuple[float, ...] = ()
    weights: np.ndarray = np.empty(0)
    course: tuple[float, ...] = ()  # the AUC after each outer step


def cut_patches(
    x: Float[Array, "channels height width n"],
) -> Float[Array, "pixels new_height new_width n"]:
    """What a 3x3 convolution with stride 2 and padding 1 sees of its input."""
    # By splits, whose gradients are concatenations: those of strided slices are slow.
    for axis in (2, 1):
        before, (size, after, *rest) = x.shape[:axis], x.shape[axis:]
        x = jnp.pad(x, [(0, size % 2 if i == axis else 0) for i in range(4)])
        x = x.reshape(*before, -1, 2 * after, *rest)
        even, odd = jnp.split(x, 2, axis + 1)
        head, last = jnp.split(odd, [odd.shape[axis] - 1], axis)
        above = jnp.concatenate([jnp.zeros_like(last), head], axis)
        x = jnp.concatenate([above, even, odd])
    return x


class Layer(eqx.Module):
    """Convolution, BatchNorm by the statistics of the batch at hand, and ReLU."""

    weight: Float[Array, "channels pixels"]
    scale: Float[Array, " channels"]
    shift: Float[Array, " channels"]

    def __init__(self, pixels: int, key: PRNGKeyArray):
        self.weight = draw_uniform(key, (CHANNELS, pixels))
        self.scale, self.shift = jnp.ones(CHANNELS), jnp.zeros(CHANNELS)

    def __call__(self, patches: Float[Array, "pixels height width n"]) -> Array:
        x = self.weight @ patches.reshape(len(patches), -1)
        mean = jnp.mean(x, axis=1)
        variance = jnp.mean(x**2, axis=1) - mean**2
        scale = self.scale * jax.lax.rsqrt(variance + 1e-5)
        shift = self.shift - mean * scale
        x = jax.nn.relu(x * scale[:, None] + shift[:, None])
        return x.reshape(CHANNELS, *patches.shape[1:])


class Net(eqx.Module):
    layers: list[Layer]
    weight: Float[Array, "classes features"]
    bias: Float[Array, " classes"]

    def __init__(self, batch: Batch, key: PRNGKeyArray):
        keys = jr.split(key, LAYERS + 1)
        pixels, height, width, _ = batch.patches.shape
        sizes = [pixels] + [9 * CHANNELS] * (LAYERS - 1)
        self.layers = [Layer(size, key) for size, key in zip(sizes, keys)]
        for _ in range(LAYERS - 1):
            height, width = (height + 1) // 2, (width + 1) // 2
        self.weight = draw_uniform(keys[-1], (CLASSES, CHANNELS * height * width))
        self.bias = jnp.zeros(CLASSES)

    def __call__(self, x: Float[Array, "pixels height width n"]) -> Array:
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = layer(cut_patches(x))
        return (self.weight @ x.reshape(-1, x.shape[-1]) + self.bias[:, None]).T


def draw_uniform(key: PRNGKeyArray, shape: tuple[int, int]) -> Array:
    bound = shape[1] ** -0.5
    return jr.uniform(key, shape, minval=-bound, maxval=bound)


make_net = eqx.filter_jit(Net)


def losses(model: Net, batch: Batch) -> Float[Array, " n"]:
    logits = model(batch.patches)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)


def train_loss(
    model: Net, weights: Float[Array, " n"], batch: Batch, key: None
) -> Scalar:
    del key
    return jnp.mean(jax.nn.sigmoid(weights) * losses(model, batch))


def val_loss(
    model: Net, weights: Float[Array, " n"], batch: Batch, key: None
) -> Scalar:
    del weights, key
    return jnp.mean(losses(model, batch))


@eqx.filter_jit
def accuracy(model: Net, batch: Batch) -> Scalar:
    return jnp.mean(jnp.argmax(model(batch.patches), axis=1) == batch.labels)


# Made once: a new algorithm would be compiled anew.
@ft.cache
def make_methods() -> dict[str, hpo.AbstractBilevelOptimizer]:
    inner, outer = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
    args = (hpo.Problem(train_loss, val_loss), inner, outer)
    options: dict[str, Any] = dict(inner_steps=INNER_STEPS)
    return {
        "T1-T2": hpo.T1T2(*args, **options),
        "greedy 0.9": hpo.Greedy(*args, **options, discount=0.9),
        "greedy 0.9, momentum": hpo.Greedy(
            *args, **options, discount=0.9, momentum=0.9
        ),
        "implicit, 5 terms": hpo.Implicit(
            *args, **options, linear_solver=hpo.Neumann(5, 0.3), warm_start=False
        ),
        EXACT: hpo.Unrolled(*args, **options),
    }


def make_problem(
    dataset: str,
    folder: str | None,
    corrupt: float,
    size: int,
    val_size: int,
    seed: int,
) -> Problem:
    data = load(dataset, folder=folder, size=max(size, val_size), seed=seed)
    train, val = take(data.train, size), take(data.val, val_size)
    rng = np.random.default_rng(seed)
    random = rng.integers(0, CLASSES, size).astype(np.int32)
    labels = np.where(rng.random(size) < corrupt, random, train.labels)
    batches = (to_batch(x) for x in (train._replace(labels=labels), val, data.test))
    return Problem(*batches, changed=labels != train.labels)


def take(data: Images, size: int) -> Images:
    return Images(data.images[:size], data.labels[:size])


def to_batch(data: Images) -> Batch:
    patches = jax.jit(cut_patches)(jnp.transpose(data.images, (3, 1, 2, 0)))
    return Batch(patches, jnp.asarray(data.labels))


def run(problem: Problem, *, steps: int, seed: int, fresh: bool) -> dict[str, Row]:
    """Every method, on the same data and from the same starts."""
    keys = jr.split(jr.key(seed), 3)
    count = FRESH_STARTS if fresh else 1
    first = make_net(problem.train, keys[0])
    tests = [make_net(problem.train, key) for key in jr.split(keys[2], count)]

    def start(step):
        key = jr.fold_in(keys[1], step)
        return make_net(problem.train, key) if fresh else first

    starts = tests if fresh else [first]
    zeros = jnp.zeros(problem.changed.shape)
    rows = {NONE: Row(*evaluate(problem, zeros, starts))}
    for name, method in make_methods().items():
        state = method.init(start(0), zeros)
        cosines, course = [], []
        for step in range(steps + 1):
            state = method.restart(state, start(step))
            if step in (0, steps // 4, steps):
                cosines.append(compare(method, state, problem))
            if step < steps:
                state = method.step(state, problem.train, problem.val)
                course.append(roc_auc_score(problem.changed, -state.hyperparams))
        weights = np.asarray(jax.nn.sigmoid(state.hyperparams))
        rows[name] = Row(
            *evaluate(problem, state.hyperparams, starts),
            auc=course[-1],
            f1=float(f1_score(problem.changed, weights < 0.5)),
            cosines=tuple(cosines),
            weights=weights,
            course=tuple(course),
        )
    return rows


def compare(
    method: hpo.AbstractBilevelOptimizer, state: hpo.BilevelState, problem: Problem
) -> float:
    """The cosine with the exact hypergradient in the same state."""
    exact = make_methods()[EXACT]
    if method is exact:
        return 1.0
    x, y = (
        algorithm.compute_hypergradient(state, problem.train, problem.val)
        for algorithm in (method, exact)
    )
    return float(jnp.vdot(x, y) / jnp.linalg.norm(x) / jnp.linalg.norm(y))


def evaluate(
    problem: Problem, weights: Float[Array, " n"], starts: list[Net]
) -> tuple[float, float]:
    """Validation and test accuracy after the inner steps."""
    trainer = make_methods()["T1-T2"]  # the cheapest: all train alike
    models = [
        trainer.step(trainer.init(x, weights), problem.train, problem.val).model
        for x in starts
    ]
    val, test = (
        np.mean([accuracy(model, batch) for model in models])
        for batch in (problem.val, problem.test)
    )
    return float(val), float(test)


def print_table(results: dict[str, list[Row]]) -> None:
    print(f"\n{'':28}{'val, %':>13}{'test, %':>13}{'AUC':>14}{'F1':>14}   cosine")
    for name, rows in results.items():
        print(f"{name:28}", end="")
        for column in ("val", "test"):
            mean, std = mean_and_std([100 * getattr(row, column) for row in rows])
            print(f"{mean:8.2f}±{std:4.2f}", end="")
        if name != NONE:
            for column in ("auc", "f1"):
                mean, std = mean_and_std([getattr(row, column) for row in rows])
                print(f"{mean:9.3f}±{std:4.3f}", end="")
            cosines = np.mean([row.cosines for row in rows], axis=0)
            print("  " + "".join(f"{x:6.2f}" for x in cosines), end="")
        print()


def draw(
    results: dict[str, list[Row]],
    changed: Bool[np.ndarray, " n"],
    path: str,
    shown: str = "greedy 0.9",
) -> None:
    figure, (histogram, course, bars) = subplots((11, 3.8), 1, 3)
    weights = results[shown][0].weights
    for label, chosen in [("right label", ~changed), ("wrong label", changed)]:
        bins = np.linspace(0, 1, 31).tolist()
        histogram.hist(weights[chosen], bins, alpha=0.6, label=label)
    histogram.set(xlabel=f"weight of a train image, {shown}", ylabel="images")
    histogram.legend()
    for number, (name, rows) in enumerate(results.items()):
        mean, std = mean_and_std([100 * row.test for row in rows])
        colour = f"C{number}"
        bars.barh(name, mean, xerr=std, color=colour, alpha=0.8)
        if name != NONE:
            auc = np.mean([row.course for row in rows], axis=0)
            course.plot(np.arange(1, len(auc) + 1), auc, color=colour, label=name)
    course.set(xlabel="outer step", ylabel="AUC for wrong labels")
    bars.invert_yaxis()
    bars.set(xlabel="test accuracy, %", xlim=(40, None))
    save(figure, path, course)


QUICK = dict(size=200, val_size=200, steps=20, seeds=1)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    corrupt: float = 0.3,
    fresh: bool = False,
    size: int = 300,
    val_size: int = 300,
    steps: int = 60,
    seeds: int = 3,
    figure: str = "hyper_cleaning.png",
) -> dict[str, list[Row]]:
    results, changed = {}, []
    for seed in range(seeds):
        problem = make_problem(dataset, folder, corrupt, size, val_size, seed)
        changed.append(problem.changed)
        for name, row in run(problem, steps=steps, seed=seed, fresh=fresh).items():
            results.setdefault(name, []).append(row)
    print_table(results)
    draw(results, changed[0], figure)
    print(f"\nThe weights and the course of the runs are in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        corrupt="share of labels",
        fresh="a new start each time",
        steps="outer steps",
    )
