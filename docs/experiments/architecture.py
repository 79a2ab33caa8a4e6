r"""Chooses activation, width and skip connection of each block of a network by
gradient, trains what is found from scratch, and compares it with random ones.

    python -m docs.experiments.architecture
    python -m docs.experiments.architecture --dataset fashion_mnist --folder ... \
        --size 1000
"""

from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar
from matplotlib.figure import Figure

from .common import command, cross_entropy, mean_and_error, save, Scores
from .image_data import Images, load, Splits


BLOCKS, STATE = 3, 32
ACTIVATIONS = dict(relu=jax.nn.relu, tanh=jnp.tanh, sin=jnp.sin, identity=lambda x: x)
WIDTHS = (4, 16, 64)
BATCH = 32
ALGORITHMS = {"FirstOrder": hpo.FirstOrder, "T1T2": hpo.T1T2, "Greedy": hpo.Greedy}
INNER_STEPS = 5  # training steps for each update of the architecture

LABELS = dict(activation=[*ACTIVATIONS], width=[*map(str, WIDTHS)], skip=["used"])
MARKERS = {"relaxed": "o", "discretised": "x", "retrained": "*"}


class Block(eqx.Module):
    """Holds placeholders when made, plain arrays in the losses."""

    spread: eqx.nn.Linear
    gather: eqx.nn.Linear
    activation: Any
    width: Any
    skip: Any

    def __init__(self, options: dict[str, Any], key: PRNGKeyArray):
        spread_key, gather_key = jr.split(key)
        self.spread = eqx.nn.Linear(STATE, max(WIDTHS), key=spread_key)
        self.gather = eqx.nn.Linear(max(WIDTHS), STATE, key=gather_key)
        self.activation = hpo.Choice(len(ACTIVATIONS), **options)
        self.width = hpo.Choice(len(WIDTHS), **options)
        self.skip = hpo.Switch(0.0, **options)

    def __call__(self, x: Float[Array, " state"]) -> Float[Array, " state"]:
        raw = self.spread(x)
        outputs = jnp.stack([f(raw) for f in ACTIVATIONS.values()])
        hidden = jnp.tensordot(self.activation, outputs, axes=1)
        # Each width is the first so many units: they share their weights.
        masks = jnp.arange(len(raw)) < jnp.array(WIDTHS)[:, None]
        return self.gather(self.width @ masks * hidden) + self.skip * x


class Network(eqx.Module):
    first: eqx.nn.Linear
    blocks: list[Block]
    last: eqx.nn.Linear

    def __init__(self, pixels: int, options: dict[str, Any], key: PRNGKeyArray):
        first_key, last_key, *keys = jr.split(key, BLOCKS + 2)
        self.first = eqx.nn.Linear(pixels, STATE, key=first_key)
        self.blocks = [Block(options, key) for key in keys]
        self.last = eqx.nn.Linear(STATE, 10, key=last_key)

    def __call__(self, image: Any) -> Float[Array, "10"]:
        x = self.first(jnp.ravel(image))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Search(NamedTuple):
    solution: hpo.Solution
    rows: dict[str, Scores]  # the keys are those of `MARKERS`


class Result(NamedTuple):
    random: Scores  # of arrays over the random architectures
    searches: dict[str, Search]


def loss(model: Network, architecture: Network, batch: Images, key: Any) -> Scalar:
    del key
    logits = jax.vmap(eqx.combine(model, architecture))(batch.images)
    return cross_entropy(logits, batch.labels)


@eqx.filter_jit
def evaluate(model: Network, architecture: Network, data: Splits) -> Scores:
    return Scores.of(jax.vmap(eqx.combine(model, architecture)), data)


def make_algorithm(algorithm: str, steps: int) -> hpo.AbstractBilevelOptimizer:
    return ALGORITHMS[algorithm](
        hpo.Problem(loss, loss),
        inner=optax.adam(optax.cosine_decay_schedule(3e-3, steps * INNER_STEPS)),
        outer=optax.adam(0.03),
        inner_steps=INNER_STEPS,
    )


def draw_architectures(
    architecture: Network, count: int, key: PRNGKeyArray
) -> list[Network]:
    """Random ones."""
    leaves, treedef = jtu.tree_flatten(architecture, is_leaf=hpo.is_hyperparameter)
    for i, x in enumerate(leaves):
        logits = jr.normal(jr.fold_in(key, i), (count, *x.raw.shape))
        leaves[i] = eqx.tree_at(lambda x: x.raw, x, logits)
    drawn = hpo.discretise(jtu.tree_unflatten(treedef, leaves))
    return [jtu.tree_map(lambda x: x[i], drawn) for i in range(count)]


def train_all(
    algorithm: hpo.AbstractBilevelOptimizer,
    model: Network,
    architectures: list[Network],
    data: Splits,
    steps: int,
    key: PRNGKeyArray,
) -> Scores:
    """Trains each of the architectures, from the same weights with the same batches."""
    train = hpo.Minibatch(data.train, BATCH)
    options: Any = dict(steps=steps, key=key, progress=False)

    def train_one(architecture: Network) -> Scores:
        trained = hpo.fit(algorithm, model, architecture, train, **options)
        return evaluate(trained.model, architecture, data)

    return Scores(*np.transpose([train_one(x) for x in architectures]))


def compare(
    data: Splits,
    algorithm: hpo.AbstractBilevelOptimizer,
    relaxations: dict[str, dict[str, Any]],
    steps: int,
    random: int,
    seed: int,
) -> Result:
    model_key, tune_key, train_key, random_key = jr.split(jr.key(seed), 4)
    train = hpo.Minibatch(data.train, BATCH)
    val = hpo.Minibatch(data.val, min(4 * BATCH, len(data.val.labels)))
    make = lambda x: Network(data.train.images[0].size, x, model_key)

    def search(options: dict[str, Any]) -> hpo.Solution:
        architecture, model = hpo.partition(make(options))
        args = (algorithm, model, architecture, train, val)
        return hpo.tune(*args, steps=steps, key=tune_key)

    solutions = {name: search(options) for name, options in relaxations.items()}
    architecture, model = hpo.partition(make({}))
    architectures = draw_architectures(architecture, random, random_key)
    found = {name: hpo.discretise(x.hyperparams) for name, x in solutions.items()}
    architectures += found.values()
    rows = train_all(algorithm, model, architectures, data, steps, train_key)
    searches = {}
    for i, (name, x) in enumerate(solutions.items(), start=random):
        tuned = [evaluate(x.model, y, data) for y in (x.values, found[name])]
        searches[name] = Search(x, dict(zip(MARKERS, [*tuned, rows.at(i)])))
    return Result(rows.at(slice(random)), searches)


def describe(solution: hpo.Solution) -> str:
    blocks = []
    for block in hpo.discretise(solution.hyperparams).blocks:
        activation = list(ACTIVATIONS)[int(np.argmax(block.activation))]
        width = WIDTHS[int(np.argmax(block.width))]
        blocks.append(f"{activation} {width}" + (" skip" if block.skip > 0.5 else ""))
    return ", ".join(blocks)


def get_rows(result: Result) -> dict[str, Scores]:
    random = result.random
    order = np.argsort(random.test)
    rows = {
        "random, worst on test": random.at(order[0]),
        "random, median on test": random.at(order[len(order) // 2]),
        "random, best on validation": random.at(np.argmin(random.val_loss)),
        "random, best on test": random.at(order[-1]),
    }
    for name, search in result.searches.items():
        rows |= {f"{name}, {kind}": row for kind, row in search.rows.items()}
    return rows


def print_table(results: list[Result]) -> None:
    print(f"{'means over the seeds':30}{'val loss':>9}{'val':>8}{'test':>8}{'SE':>7}")
    for name in get_rows(results[0]):
        table = np.array([get_rows(result)[name] for result in results], float)
        val_loss, val, _ = np.mean(table, axis=0)
        test, error = mean_and_error(table[:, 2])
        print(f"{name:30}{val_loss:9.3f}{val:8.1%}{test:8.1%}{error:7.1%}")
    for name in results[0].searches:
        print(f"\n{name}: what was found, and how many random ones it beats on test")
        for random, searches in results:
            solution, rows = searches[name]
            beaten = np.sum(random.test < rows["retrained"].test)
            print(f"{beaten:3} of {len(random.test)}: {describe(solution)}")


def draw(result: Result, path: str) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(3, 1))
    grid = parts[0].subplots(BLOCKS, len(LABELS), sharex=True, sharey=True)
    history = result.searches["sampled"].solution.history
    for number, block in enumerate(history.hyperparams.blocks):
        for axes, (name, labels) in zip(grid[number], LABELS.items()):
            weights = getattr(block, name).reshape(len(history.step), -1)
            axes.plot(history.step, weights, label=labels)
            axes.set_title(f"{name}, block {number + 1}")
    for axes in grid[-1]:
        axes.set_xlabel("outer step")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5), ncols=2)

    axes = parts[1].subplots()
    shift = np.linspace(-0.2, 0.2, len(result.random.test))
    axes.scatter(shift, 100 * result.random.test, s=16, color="grey")
    for x, search in enumerate(result.searches.values(), start=1):
        for i, (kind, row) in enumerate(search.rows.items()):
            look: Any = dict(color=f"C{i}", marker=MARKERS[kind], s=60)
            axes.scatter(x + 0.2 * i - 0.2, 100 * row.test, **look)
    names = ["random", *(name.replace(" ", "\n") for name in result.searches)]
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set(title="test accuracy, %")
    axes.legend(["random", *MARKERS], loc="lower right")
    save(figure, path, dpi=90)


QUICK = dict(size=100, steps=12, random=2)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int = 300,
    steps: int = 300,
    random: int = 20,
    seeds: int = 1,
    first: int = 0,
    algorithm: str = "FirstOrder",
    figure: str = "architecture.png",
) -> list[Result]:
    # Made once: a new algorithm or schedule would be compiled anew.
    tuner = make_algorithm(algorithm, steps)
    cooling = optax.exponential_decay(1.0, steps, 0.2)
    relaxations: dict[str, dict[str, Any]] = {
        "softmax": {},
        "sampled": dict(sample=True, temperature=cooling),
        "hard samples": dict(sample=True, straight_through=True),
    }
    results = []
    for seed in range(first, first + seeds):
        data = load(dataset, folder=folder, size=size, seed=seed)
        results.append(compare(data, tuner, relaxations, steps, random, seed))
    print_table(results)
    draw(results[0], figure)
    print(f"\nThe course of the first seed is in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        steps="architecture updates",
        random="random architectures",
        algorithm={"choices": ALGORITHMS},
    )
