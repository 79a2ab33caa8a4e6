"""Searches the cell of a convolutional network by DARTS, of first and of second order,
makes it discrete, trains that network from scratch, and compares it with random cells.

    python -m docs.experiments.darts
    python -m docs.experiments.darts --seeds 3
    python -m docs.experiments.darts --dataset fashion_mnist --size 1000 --steps 600
"""

import functools as ft
import math
from typing import Any, cast, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .common import command, save, subplots
from .image_data import Images, load, Splits


OPERATIONS = ("none", "skip", "average 3x3", "max 3x3", "conv 3x3", "separable 3x3")
INPUTS, NODES, KEPT = 2, 3, 2  # of a cell; `KEPT` of the edges into a node remain
SOURCES, END = INPUTS + NODES - 1, INPUTS + NODES
EDGES = [(i, j) for i in range(SOURCES) for j in range(max(INPUTS, i + 1), END)]
CELLS, CHANNELS, BATCH, SIDE = 2, 4, 32, 8
OUTER_RATE = 0.03
COLOURS = ("0.85", "tab:green", "tab:cyan", "tab:purple", "tab:orange", "tab:red")
FIRST, SECOND = "first order", "second order"
RANDOM, LARGEST = "random cells", "conv 3x3 only"


class Row(NamedTuple):
    parameters: int
    val_loss: float
    val: float  # accuracy
    test: float


class Search(NamedTuple):
    solution: hpo.Solution
    cell: Float[Array, "edges operations"]
    relaxed: Row
    discretised: Row  # with the weights of the search
    retrained: Row


class Result(NamedTuple):
    searches: dict[str, Search]
    random: list[Row]
    largest: Row


@ft.cache
def make_shifts(side: int) -> Float[np.ndarray, "9 pixels pixels"]:
    """The matrices that move an image by a pixel or not, with zeros from outside."""
    one = [np.eye(side, k=shift, dtype=np.float32) for shift in (-1, 0, 1)]
    return np.stack([np.kron(rows, columns) for rows in one for columns in one])


def get_neighbours(
    x: Float[Array, "pixels channels n"],
) -> Float[Array, "9 pixels channels n"]:
    # By a product of matrices, as true convolutions and pools run slowly inside
    # compiled loops on CPUs.
    return jnp.tensordot(make_shifts(math.isqrt(len(x))), x, axes=1)


def convolve(
    neighbours: Float[Array, "k pixels channels n"],
    weight: Float[Array, "k channels new"],
) -> Float[Array, "pixels new n"]:
    """ReLU, convolution, BatchNorm."""
    x = jnp.einsum("kpcn,kcd->pdn", jax.nn.relu(neighbours), weight)
    return normalise(x)


def normalise(x: Float[Array, "pixels channels n"]) -> Array:
    """BatchNorm by the statistics of the batch at hand, without parameters."""
    mean = jnp.mean(x, axis=(0, 2), keepdims=True)
    variance = jnp.mean((x - mean) ** 2, axis=(0, 2), keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5)


def draw_weights(key: PRNGKeyArray, *shape: int, inputs: int) -> Array:
    return (2 / inputs) ** 0.5 * jr.normal(key, shape)


class Edges(eqx.Module):
    """All that leave one node. Their convolutions are computed as one, for speed."""

    full: Float[Array, "9 channels edges new"]
    depthwise: Float[Array, "9 channels edges 1"]
    pointwise: Float[Array, "channels edges new"]

    def __init__(self, edges: int, key: PRNGKeyArray):
        keys, shape = jr.split(key, 3), (CHANNELS, edges, CHANNELS)
        self.full = draw_weights(keys[0], 9, *shape, inputs=9 * CHANNELS)
        self.depthwise = draw_weights(keys[1], 9, CHANNELS, edges, 1, inputs=9)
        self.pointwise = draw_weights(keys[2], *shape, inputs=CHANNELS)

    def __call__(
        self,
        x: Float[Array, "pixels channels n"],
        mixtures: Float[Array, "edges operations"],
    ) -> list[Float[Array, "pixels channels n"]]:
        neighbours = get_neighbours(x)
        pools = [f(neighbours, axis=0) for f in (jnp.mean, jnp.max)]
        same = [x, *map(normalise, pools)]
        kernels = [self.full, self.depthwise * self.pointwise]
        outputs = [convolve(neighbours, k.reshape(9, CHANNELS, -1)) for k in kernels]
        own = [jnp.split(y, len(mixtures), axis=1) for y in outputs]
        # The weight of the first, `none`, is used only in that the others get less.
        return [
            jnp.tensordot(weights[1:], jnp.stack([*same, *others]), axes=1)
            for weights, *others in zip(mixtures, *own)
        ]


class Cell(eqx.Module):
    entrances: list[Float[Array, "1 channels new"]]
    sources: list[Edges]

    def __init__(self, channels: tuple[int, int], key: PRNGKeyArray):
        *keys, key = jr.split(key, SOURCES + 1)
        sizes = zip(channels, jr.split(key, INPUTS))
        self.entrances = [draw_weights(k, 1, x, CHANNELS, inputs=x) for x, k in sizes]
        self.sources = [Edges(len(leaving(i)), key) for i, key in enumerate(keys)]

    def __call__(
        self, inputs: list[Array], mixtures: Float[Array, "edges operations"]
    ) -> Float[Array, "pixels channels n"]:
        states = [convolve(x[None], y) for x, y in zip(inputs, self.entrances)]
        states += [jnp.zeros_like(states[0])] * NODES
        # A node is complete before its turn, as edges go from lower to higher numbers.
        for number, source in enumerate(self.sources):
            edges = leaving(number)
            outputs = source(states[number], mixtures[np.array(edges)])
            for edge, output in zip(edges, outputs):
                states[EDGES[edge][1]] += output
        return jnp.concatenate(states[INPUTS:], axis=1)


def leaving(node: int) -> list[int]:
    return [i for i, edge in enumerate(EDGES) if edge[0] == node]


class Network(eqx.Module):
    """Cells of the same form, each with the outputs of the two before it as inputs."""

    stem: Float[Array, "9 channels new"]
    cells: list[Cell]
    last: eqx.nn.Linear

    def __init__(self, channels: int, key: PRNGKeyArray):
        stem_key, last_key, *keys = jr.split(key, CELLS + 2)
        size = 9 * channels
        self.stem = draw_weights(stem_key, 9, channels, CHANNELS, inputs=size)
        sizes = [CHANNELS] * 2 + [NODES * CHANNELS] * CELLS
        self.cells = [Cell((sizes[i], sizes[i + 1]), k) for i, k in enumerate(keys)]
        self.last = eqx.nn.Linear(NODES * CHANNELS, 10, key=last_key)

    def __call__(
        self, images: Any, mixtures: Float[Array, "edges operations"]
    ) -> Float[Array, "n classes"]:
        pixels = jnp.transpose(images.reshape(len(images), SIDE**2, -1), (1, 2, 0))
        x = convolve(get_neighbours(pixels), self.stem)
        inputs = [x, x]
        for number, cell in enumerate(self.cells):
            if number > 0:
                inputs = [halve(x) for x in inputs]
            inputs = [inputs[1], cell(inputs, mixtures)]
        return jax.vmap(self.last)(jnp.mean(inputs[1], axis=0).T)


def halve(x: Float[Array, "pixels channels n"]) -> Array:
    side = math.isqrt(len(x)) // 2
    squares = x.reshape(side, 2, side, 2, *x.shape[1:])
    return jnp.max(squares, axis=(1, 3)).reshape(side**2, *x.shape[1:])


make_network = eqx.filter_jit(Network)


def loss(
    model: Network, mixtures: Float[Array, "edges operations"], batch: Images, key: Any
) -> Scalar:
    del key
    logits = model(batch.images, mixtures)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.mean(losses)


def discretise(
    mixtures: Float[Array, "edges operations"],
) -> Float[Array, "edges operations"]:
    """Of the edges into each node the two that are strongest in their best operation,
    other than `none`, with this operation alone."""
    strengths = np.asarray(mixtures)[:, 1:]
    cell = np.zeros(mixtures.shape, np.float32)
    for node in range(INPUTS, INPUTS + NODES):
        arriving = [i for i, edge in enumerate(EDGES) if edge[1] == node]
        for i in sorted(arriving, key=lambda i: -np.max(strengths[i]))[:KEPT]:
            cell[i, 1 + np.argmax(strengths[i])] = 1
    return jnp.asarray(cell)


def draw_cell(key: PRNGKeyArray) -> Float[Array, "edges operations"]:
    return discretise(jr.normal(key, (len(EDGES), len(OPERATIONS))))


def make_largest() -> Float[Array, "edges operations"]:
    """Convolutions only."""
    options = np.eye(len(OPERATIONS))[OPERATIONS.index("conv 3x3")]
    return discretise(jnp.tile(options, (len(EDGES), 1)))


def count_parameters(model: Network, mixtures: Float[Array, "edges operations"]) -> int:
    """Without those of operations that are not used."""
    total = sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    sizes = {"conv 3x3": 9 * CHANNELS**2, "separable 3x3": 9 * CHANNELS + CHANNELS**2}
    for name, size in sizes.items():
        unused = np.asarray(mixtures)[:, OPERATIONS.index(name)] == 0
        total -= CELLS * size * int(np.sum(unused))
    return total


@eqx.filter_jit
def predict(model: Network, mixtures: Any, data: Splits) -> Any:
    guesses = [jnp.argmax(model(x.images, mixtures), axis=1) for x in data[1:]]
    right = [jnp.mean(x == part.labels) for x, part in zip(guesses, data[1:])]
    return loss(model, mixtures, data.val, None), *right


def evaluate(model: Network, mixtures: Any, data: Splits) -> Row:
    parameters = count_parameters(model, mixtures)
    return Row(parameters, *map(float, predict(model, mixtures, data)))


@eqx.filter_jit
def train(
    optimiser: optax.GradientTransformation,
    model: Network,
    mixtures: Any,
    data: Images,
    keys: PRNGKeyArray,
) -> Network:
    def step(carry: Any, key: PRNGKeyArray) -> tuple[Any, None]:
        model, state = carry
        rows = jr.randint(key, (BATCH,), 0, len(data.labels))
        batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], data)
        gradient = jax.grad(loss)(model, mixtures, batch, None)
        updates, state = optimiser.update(gradient, state, cast(Any, model))
        return (eqx.apply_updates(model, updates), state), None

    carry = model, optimiser.init(cast(Any, model))
    return lax.scan(step, carry, keys)[0][0]


def make_algorithms(
    inner: optax.GradientTransformation,
) -> dict[str, hpo.AbstractBilevelOptimizer]:
    args = hpo.Problem(loss, loss), inner, optax.adam(OUTER_RATE, b1=0.5)
    return {
        FIRST: hpo.FirstOrder(*args),
        SECOND: hpo.T1T2(*args, second_order=hpo.FiniteDifference()),
    }


def compare(
    data: Splits,
    inner: optax.GradientTransformation,
    algorithms: dict[str, hpo.AbstractBilevelOptimizer],
    steps: int,
    random: int,
    seed: int,
) -> Result:
    """All from the same weights; all training from scratch with the same batches."""
    model_key, tune_key, train_key, random_key = jr.split(jr.key(seed), 4)
    model = make_network(data.train.images.shape[-1], model_key)
    keys = jr.split(train_key, steps)

    def retrain(cell: Any) -> Row:
        return evaluate(train(inner, model, cell, data.train, keys), cell, data)

    def search(algorithm: hpo.AbstractBilevelOptimizer) -> Search:
        start = hpo.Choice(jnp.zeros((len(EDGES), len(OPERATIONS))))
        batches = hpo.Minibatch(data.train, BATCH), hpo.Minibatch(data.val, BATCH)
        solution = hpo.tune(
            algorithm, model, start, *batches, steps=steps, key=tune_key
        )
        cell = discretise(solution.values)
        relaxed = evaluate(solution.model, solution.values, data)
        discretised = evaluate(solution.model, cell, data)
        return Search(solution, cell, relaxed, discretised, retrain(cell))

    searches = {name: search(x) for name, x in algorithms.items()}
    rows = [retrain(draw_cell(key)) for key in jr.split(random_key, random)]
    return Result(searches, rows, retrain(make_largest()))


def shrink(data: Splits) -> Splits:
    """Averages over squares of pixels, down to 8x8."""

    def apply(part: Images) -> Images:
        n, height, width, channels = part.images.shape
        size = -(-height // SIDE)
        margin = SIDE * size - height, SIDE * size - width
        pads = [(0, 0), *((x // 2, x - x // 2) for x in margin), (0, 0)]
        squares = np.pad(part.images, pads).reshape(n, SIDE, size, SIDE, size, channels)
        return Images(squares.mean(axis=(2, 4)), part.labels)

    return Splits(*map(apply, data))


def get_rows(result: Result) -> dict[str, list[Row]]:
    best = min(result.random, key=lambda row: row.val_loss)
    rows = {RANDOM: result.random, f"{RANDOM}, best on validation": [best]}
    rows[LARGEST] = [result.largest]
    for name, search in result.searches.items():
        for kind in ("relaxed", "discretised", "retrained"):
            rows[f"{name}, {kind}"] = [getattr(search, kind)]
    return rows


def print_table(results: list[Result]) -> None:
    print(
        f"{'means ± standard deviations':32}{'parameters':>12}{'val loss':>14}", end=""
    )
    print(f"{'val, %':>13}{'test, %':>13}")
    for name in get_rows(results[0]):
        table = np.array([row for x in results for row in get_rows(x)[name]])
        means, deviations = table.mean(axis=0), table.std(axis=0, ddof=len(table) > 1)
        print(f"{name:32}{means[0]:7.0f}±{deviations[0]:4.0f}", end="")
        print(f"{means[1]:9.3f}±{deviations[1]:.3f}", end="")
        for mean, deviation in zip(100 * means[2:], 100 * deviations[2:]):
            print(f"{mean:8.2f}±{deviation:4.2f}", end="")
        print()
    for name in results[0].searches:
        print(f"\n{name}: the operations, and how many random cells it beats on test")
        for result in results:
            search = result.searches[name]
            beaten = sum(row.test < search.retrained.test for row in result.random)
            print(f"{beaten} of {len(result.random)}: {describe(search.cell)}")


def describe(cell: Float[Array, "edges operations"]) -> str:
    counts = np.sum(np.asarray(cell), axis=0)
    used = [(int(n), name) for n, name in zip(counts, OPERATIONS) if n > 0]
    return ", ".join(f"{n} {name}" for n, name in used)


def draw_graph(axes: Any, cell: Float[Array, "edges operations"], title: str) -> None:
    places = [(0, 0.6), (0, -0.6), (1, 0), (2, 0.5), (3, -0.3)]
    names = ["input 1", "input 2", "node 1", "node 2", "node 3"]
    for (x, y), name in zip(places, names):
        box: Any = dict(boxstyle="round", facecolor="white", edgecolor="grey")
        axes.text(x, y, name, ha="center", va="center", bbox=box, zorder=3)
    for (source, node), operations in zip(EDGES, np.asarray(cell)):
        if np.any(operations):
            colour = COLOURS[int(np.argmax(operations))]
            bend = 0.0 if node - source < 2 else 0.15 * (1 if source % 2 else -1)
            look: Any = dict(arrowstyle="-|>", color=colour, linewidth=2.5)
            look |= dict(shrinkA=20, shrinkB=20, connectionstyle=f"arc3,rad={bend}")
            axes.annotate("", places[node], places[source], arrowprops=look)
    axes.set(xlim=(-0.4, 3.4), ylim=(-1, 1), title=title)
    axes.axis("off")


def draw(results: list[Result], path: str) -> None:
    figure, grid = subplots((11, 7), 2, 2)
    course, scatter = grid[1]
    for axes, style, (name, search) in zip(grid[0], "-:", results[0].searches.items()):
        draw_graph(axes, search.cell, f"cell found by {name}")
        history = search.solution.history
        for i, weights in enumerate(np.mean(history.hyperparams, axis=1).T):
            course.plot(history.step, weights, style, color=COLOURS[i])
    for colour, name in zip(COLOURS, OPERATIONS):
        course.plot([], [], color=colour, label=name)
    course.set(xlabel="outer step", ylabel="weight, mean over the edges")
    course.set_title("first order (solid), second order (dotted)")
    figure.legend(
        *course.get_legend_handles_labels(), loc="outside upper center", ncols=6
    )
    groups = {RANDOM: [row for x in results for row in x.random]}
    groups[LARGEST] = [x.largest for x in results]
    for name in results[0].searches:
        groups[name] = [x.searches[name].retrained for x in results]
    for marker, colour, (name, rows) in zip(
        "osD^", ("0.6", "k", "C0", "C1"), groups.items()
    ):
        x, y = [row.parameters for row in rows], [100 * row.test for row in rows]
        scatter.scatter(x, y, marker=marker, color=colour, label=name, alpha=0.8)
    scatter.set(xlabel="parameters", ylabel="test accuracy, %", title="from scratch")
    scatter.legend()
    save(figure, path)


QUICK = dict(size=100, steps=30, random=1)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int = 300,
    steps: int = 200,
    random: int = 5,
    seeds: int = 1,
    first: int = 0,
    figure: str = "darts.png",
) -> list[Result]:
    # Made once: a new algorithm or schedule would be compiled anew.
    rate = optax.cosine_decay_schedule(0.2, steps)
    inner = optax.chain(optax.add_decayed_weights(3e-4), optax.sgd(rate, momentum=0.9))
    algorithms = make_algorithms(inner)
    results = []
    for seed in range(first, first + seeds):
        data = shrink(load(dataset, folder=folder, size=size, seed=seed))
        results.append(compare(data, inner, algorithms, steps, random, seed))
    print_table(results)
    draw(results, figure)
    print(f"\nThe cells of the first seed are in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        steps="of search and training",
        random="random cells a seed",
    )
