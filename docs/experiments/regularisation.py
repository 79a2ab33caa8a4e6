r"""Tunes the weight decay, the noise and the Gaussian dropout of each layer of an MLP
as it trains on few images, and shows which layer wants which.

The three numbers of a layer are placeholders in its fields, and `hpo.partition` splits
them off. Untuned training, training with the values found, and a small search over one
rate of dropout for all layers stand beside it.

    python -m docs.experiments.regularisation
    python -m docs.experiments.regularisation --dataset mnist --size 1000 \
        --steps 600 --seeds 4
"""

import time
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from .common import collect, command, cross_entropy, describe, save, subplots
from .image_data import Images, load, Splits


WIDTH, HIDDEN_LAYERS = 128, 2
INNER_STEPS = 5  # training steps for each update of the hyperparameters
TEST = 2000  # images of a part at most
RECORDS = 20  # of the test loss in a run
DEFAULTS = (1e-4, 0.1, 0.2)  # decay, noise and rate of dropout of each layer
NOTHING = (1e-8, 1e-8, 1e-8)  # as good as zero, which no placeholder reaches
RATES = (0.4, 0.6)  # of dropout, tried besides the default in all layers
NONE, DEFAULT, SEARCHED = "no regularisation", "defaults", "best of three rates"
T1T2, DISTILL, GREEDY = "T1T2", "HyperDistill", "Greedy"
RETRAINED = "T1T2, retrained"
LOOKS = {T1T2: "-", DISTILL: ":", GREEDY: "--"}
KINDS = {"decay": "weight decay", "noise": "noise", "dropout": "rate of dropout"}


class Layer(eqx.Module):
    """Disturbs its input, if there is a key, and maps it linearly."""

    linear: eqx.nn.Linear
    # Placeholders until they are split off, plain arrays in the losses.
    decay: Any
    noise: Any
    dropout: Any

    def __call__(
        self, x: Float[Array, " inputs"], key: PRNGKeyArray | None
    ) -> Float[Array, " outputs"]:
        if key is not None:
            # The first two moments of dropout at this rate, but smooth in the rate.
            spread = jnp.sqrt(self.dropout / (1 - self.dropout))
            factor, summand = jr.normal(key, (2, *x.shape))
            x = x * (1 + spread * factor) + self.noise * summand
        return self.linear(x)


class Network(eqx.Module):
    layers: list[Layer]

    def __call__(
        self, x: Float[Array, " pixels"], key: PRNGKeyArray | None = None
    ) -> Float[Array, " classes"]:
        count = len(self.layers)
        keys = [None] * count if key is None else jr.split(key, count)
        for layer, layer_key in zip(self.layers[:-1], keys):
            x = jax.nn.relu(layer(x, layer_key))
        return self.layers[-1](x, keys[-1])


class Score(NamedTuple):
    loss: Scalar
    accuracy: Scalar


class Run(NamedTuple):
    course: Float[np.ndarray, "kinds layers records"]
    steps: Int[np.ndarray, " records"]  # training steps
    test_losses: list[float]  # along the way
    val: Score
    test: Score
    seconds: float


def make_network(pixels: int, values: Any, key: PRNGKeyArray) -> Network:
    """`values`: decay, noise and dropout, for all layers together or for each."""
    sizes = (pixels, *[WIDTH] * HIDDEN_LAYERS, 10)
    keys = jr.split(key, len(sizes) - 1)
    table = np.broadcast_to(np.reshape(values, (3, -1)), (3, len(keys)))
    layers = []
    for i, (decay, noise, dropout) in enumerate(table.T.tolist()):
        linear = eqx.nn.Linear(sizes[i], sizes[i + 1], key=keys[i])
        rate = hpo.Interval(dropout, 0.0, 1.0)
        layers.append(Layer(linear, hpo.Positive(decay), hpo.Positive(noise), rate))
    return Network(layers)


def as_table(values: Any) -> Float[np.ndarray, "kinds layers *records"]:
    return np.array([[getattr(x, kind) for x in values.layers] for kind in KINDS])


def train_loss(rest: Any, values: Any, batch: Images, key: PRNGKeyArray) -> Scalar:
    network = eqx.combine(rest, values)
    keys = jr.split(key, len(batch.labels))
    logits = jax.vmap(network)(batch.images, keys)
    decays = [x.decay * jnp.sum(x.linear.weight**2) for x in network.layers]
    return cross_entropy(logits, batch.labels) + sum(decays)


def val_loss(rest: Any, values: Any, batch: Images, key: Any) -> Scalar:
    del key  # so nothing is disturbed
    network = eqx.combine(rest, values)
    return cross_entropy(jax.vmap(network)(batch.images), batch.labels)


@eqx.filter_jit
def assess(network: Any, data: Images) -> Score:
    """Undisturbed."""
    logits = jax.vmap(network)(data.images)
    right = jnp.argmax(logits, axis=-1) == data.labels
    return Score(cross_entropy(logits, data.labels), jnp.mean(right))


def load_flat(dataset: str, folder: str | None, size: int, seed: int) -> Splits:
    splits = load(dataset, folder=folder, size=size, seed=seed)
    flat = [Images(x.images.reshape(len(x.labels), -1), x.labels) for x in splits]
    return Splits(*(Images(x.images[:TEST], x.labels[:TEST]) for x in flat))


def make_algorithms(steps: int) -> dict[str, Any]:
    problem = hpo.Problem(train_loss, val_loss)
    schedule = optax.cosine_decay_schedule(0.05, steps * INNER_STEPS)
    inner, outer = optax.sgd(schedule, momentum=0.9), optax.adam(0.03)
    args = (problem, inner, outer)
    options: Any = dict(inner_steps=INNER_STEPS)
    return {
        T1T2: hpo.T1T2(*args, **options),
        DISTILL: hpo.HyperDistill(*args, **options, estimation_period=50),
        GREEDY: hpo.Greedy(*args, **options),
    }


def run(
    driver: Any, algorithm: Any, values: Any, data: Splits, steps: int, seed: int
) -> Run:
    """Runs `hpo.tune`, or `hpo.fit` at fixed values. All runs of a seed start from the
    same weights and see the same batches."""
    model_key, tune_key = jr.split(jr.key(seed))
    network = make_network(data.train.images.shape[1], values, model_key)
    hyperparams, rest = hpo.partition(network)
    train = hpo.Minibatch(data.train, batch_size=min(64, len(data.train.labels)))
    val = hpo.Minibatch(data.val, batch_size=min(128, len(data.val.labels)))
    test_losses = []

    def record(state: hpo.BilevelState) -> None:
        now = eqx.combine(state.model, hpo.unwrap(state.hyperparams))
        test_losses.append(float(assess(now, data.test).loss))

    options: Any = dict(record_every=max(1, steps // RECORDS), callback=record)
    args, start = (algorithm, rest, hyperparams, train), time.process_time()
    solution = driver(*args, val=val, steps=steps, key=tune_key, **options)
    seconds = time.process_time() - start
    final = eqx.combine(solution.model, solution.values)
    return Run(
        as_table(solution.history.hyperparams),
        solution.history.step * INNER_STEPS,
        test_losses,
        assess(final, data.val),
        assess(final, data.test),
        seconds,
    )


def compare(
    algorithms: dict[str, Any], data: Splits, steps: int, seed: int
) -> dict[str, Run]:
    # Of the algorithm `fit` takes the losses and the way of training.
    fixed = lambda values: run(hpo.fit, algorithms[T1T2], values, data, steps, seed)
    runs = {NONE: fixed(NOTHING), DEFAULT: fixed(DEFAULTS)}
    tried = [fixed((*DEFAULTS[:2], rate)) for rate in RATES]
    runs[SEARCHED] = min([runs[DEFAULT], *tried], key=lambda x: x.val.loss)
    for name in LOOKS:
        runs[name] = run(hpo.tune, algorithms[name], DEFAULTS, data, steps, seed)
    return runs | {RETRAINED: fixed(runs[T1T2].course[..., -1])}


def print_tables(results: dict[str, list[Run]]) -> None:
    print(f"{'':20}{'val., %':>15}{'test, %':>15}{'test loss':>17}{'CPU s':>8}")
    for name, runs in results.items():
        val = describe([100 * x.val.accuracy for x in runs], ".2f")
        test = describe([100 * x.test.accuracy for x in runs], ".2f")
        loss = describe([x.test.loss for x in runs])
        # The first run of an algorithm compiles.
        seconds = np.median([x.seconds for x in runs])
        print(f"{name:20}{val:>15}{test:>15}{loss:>17}{seconds:8.1f}")
    for number, label in enumerate(KINDS.values()):
        print(f"\n{label + ' of each layer':34}")
        for name in (SEARCHED, *LOOKS):
            table = np.array([x.course[number, :, -1] for x in results[name]])
            digits = ".5f" if number == 0 else ".3f"
            cells = [f"{describe(x, digits):>20}" for x in table.T]
            print(f"{name:20}", *cells)


def draw(results: dict[str, list[Run]], path: str) -> None:
    figure, panels = subplots((11, 8.5), 2, 2)
    panels = panels.ravel()
    for number, (axes, label) in enumerate(zip(panels, KINDS.values())):
        draw_courses(axes, results, number)
        scale = "linear" if label == KINDS["dropout"] else "log"
        axes.set(ylabel=label, yscale=scale)
    panels[1].yaxis.set_minor_formatter("{x:.2g}")
    for name, runs in results.items():
        losses = np.mean([x.test_losses for x in runs], axis=0)
        look = "-" if name in LOOKS else "--"
        panels[3].plot(runs[0].steps[: len(losses)], losses, look, label=name)
    panels[3].set(ylabel="test loss")
    for axes in panels:
        axes.set(xlabel="training step")
    for axes, place in [(panels[0], "upper"), (panels[3], "lower")]:
        handles = axes.get_legend_handles_labels()
        look: Any = dict(loc=f"outside {place} center", ncols=7, fontsize=9)
        figure.legend(*handles, **look)
    save(figure, path, *panels)


def draw_courses(axes: Any, results: dict[str, list[Run]], number: int) -> None:
    for name, look in LOOKS.items():
        courses = np.mean([x.course[number] for x in results[name]], axis=0)
        for layer, course in enumerate(courses):
            axes.plot(results[name][0].steps, course, look, color=f"C{layer}")
    # The legend has an entry for each layer and one for each algorithm.
    for layer in range(HIDDEN_LAYERS + 1):
        axes.plot([], [], color=f"C{layer}", label=f"layer {layer + 1}")
    for name, look in LOOKS.items():
        axes.plot([], [], look, color="black", label=name)


QUICK = dict(size=60, steps=20)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int = 200,
    steps: int = 300,
    seeds: int = 1,
    first: int = 0,
    figure: str = "regularisation.png",
) -> dict[str, list[Run]]:
    algorithms = make_algorithms(steps)

    def of_seed(seed: int) -> dict[str, Run]:
        data = load_flat(dataset, folder, size, seed)
        return compare(algorithms, data, steps, seed)

    results = collect(of_seed, seeds, first)
    print_tables(results)
    draw(results, figure)
    print(f"\nThe course is in {figure}.")
    return results


if __name__ == "__main__":
    command(main, __doc__, QUICK, steps="hyperparameter updates")
