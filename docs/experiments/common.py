"""What the experiments have in common: statistics over seeds, figures, options, and two
small pieces of network code."""

import argparse
import inspect
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar
from matplotlib.figure import Figure

from .image_data import NAMES, Splits


# --- Statistics over seeds ---


def mean_and_std(values: Any) -> tuple[float, float]:
    """The mean and the standard deviation, which is 0 for a single value."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=min(1, len(values) - 1)))


def mean_and_error(values: Any) -> tuple[float, float]:
    """The mean and its standard error, which is 0 for a single value."""
    mean, std = mean_and_std(values)
    return mean, std / len(values) ** 0.5


def bootstrap(
    statistic: Callable[[Any], Any], values: Any, draws: int = 2000
) -> tuple[float, float, float]:
    """A statistic, and the ends of its 95% interval."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    drawn = values[rng.integers(0, len(values), (draws, len(values)))]
    low, high = np.quantile(
        [statistic(x) for x in drawn], [0.025, 0.975], method="nearest"
    )
    return float(statistic(values)), float(low), float(high)


def describe(
    values: Any, digits: str = ".3f", spread: str | None = None, of: Any = mean_and_std
) -> str:
    """Mean ± standard deviation, or what `of` returns, in the formats given."""
    mean, width = of(values)
    return f"{mean:{digits}} ± {width:{spread or digits}}"


def collect(
    run: Callable[[int], Mapping[str, Any]], seeds: int, first: int
) -> dict[str, list[Any]]:
    """For each name that `run` returns, the list of its values over the seeds."""
    found: dict[str, list[Any]] = {}
    for seed in range(first, first + seeds):
        for name, value in run(seed).items():
            found.setdefault(name, []).append(value)
    return found


# --- Figures and files ---

matplotlib.rcParams["legend.frameon"] = False


def subplots(
    size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def save(figure: Figure, path: Any, *with_grid: Any, dpi: int = 100) -> None:
    for axes in with_grid:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=dpi)


def write_json(path: Any, rows: Any) -> None:
    """Does nothing where no file is asked for."""
    if path is not None:
        pathlib.Path(path).write_text(json.dumps(rows, indent=1))


# --- Options ---

OPTIONS: dict[str, Any] = {
    "dataset": {"choices": NAMES},
    "folder": "with the data; else they are downloaded",
    "size": "of the train set",
    "first": "the first seed",
    "figure": "file to write",
}


def command(
    main: Callable[..., Any],
    doc: str | None,
    quick: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Calls `main` with what the command line says. Its arguments are the options;
    `options` has a help text or more for some. `--quick` takes the defaults of `quick`,
    a run of seconds that only shows that everything works."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, parameter in inspect.signature(main).parameters.items():
        more = options.get(name, OPTIONS.get(name, {}))
        more: dict[str, Any] = {"help": more} if isinstance(more, str) else more
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, **(_infer(parameter.default) | more))
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help="a run of seconds")
        if "--quick" in sys.argv[1:]:
            parser.set_defaults(**quick)
    args = vars(parser.parse_args())
    args.pop("quick", None)
    main(**args)


def _infer(default: Any) -> dict[str, Any]:
    """What `argparse` has to know of an option with this default."""
    if default is inspect.Parameter.empty:
        return {"required": True}
    if isinstance(default, bool):
        return {"action": "store_true"}
    if isinstance(default, tuple):
        return {"default": default, "nargs": "+", "type": type(default[0])}
    kind = {} if default is None else {"type": type(default)}
    return {"default": default} | kind


# --- Networks ---


def cross_entropy(logits: Any, labels: Any) -> Scalar:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def make_layers(sizes: Sequence[int], key: PRNGKeyArray) -> list[eqx.nn.Linear]:
    shapes = zip(sizes, sizes[1:], jr.split(key, len(sizes) - 1))
    return [eqx.nn.Linear(fan_in, out, key=key) for fan_in, out, key in shapes]


def apply_layers(layers: Any, x: Any) -> Float[Array, "n outputs"]:
    """With whole batches, and ReLU between the layers."""
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer.weight.T + layer.bias)
    return x @ layers[-1].weight.T + layers[-1].bias


class Plain(NamedTuple):
    """The state of training without tuning."""

    model: Any
    opt_state: Any
    values: Any


class Method(NamedTuple):
    init: Callable[..., Any]
    step: Callable[..., Any]


def plain_training(
    train_loss: Any, inner: optax.GradientTransformation, steps: int
) -> Method:
    """`steps` training steps in each step, with the arguments of an algorithm."""

    def init(model: Any, hyperparams: Any, train: Any = None) -> Plain:
        return Plain(model, inner.init(model), hpo.unwrap(hyperparams))

    def step(state: Plain, train: Any, val: Any) -> Plain:
        def one(carry, _):
            model, opt_state = carry
            gradient = jax.grad(train_loss)(model, state.values, train, None)
            updates, opt_state = inner.update(gradient, opt_state)
            return (optax.apply_updates(model, updates), opt_state), None

        carry, _ = jax.lax.scan(one, (state.model, state.opt_state), length=steps)
        return Plain(*carry, state.values)

    return Method(init, step)


class Scores(NamedTuple):
    """Of one model, or of several: arrays over them."""

    val_loss: Any
    val: Any  # accuracy
    test: Any

    @classmethod
    def of(cls, predict: Callable[[Any], Any], data: Splits) -> "Scores":
        logits = [predict(part.images) for part in data[1:]]
        right = [jnp.argmax(x, -1) == part.labels for x, part in zip(logits, data[1:])]
        return cls(cross_entropy(logits[0], data.val.labels), *map(jnp.mean, right))

    def at(self, index: Any) -> "Scores":
        return Scores(*(np.asarray(x)[index] for x in self))
