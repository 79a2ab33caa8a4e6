"""Puts the hypergradients of all algorithms beside the exact one, on two problems with
the same network and the same images.

    python -m docs.experiments.compare
    python -m docs.experiments.compare --dataset fashion_mnist --size 1000

- `weights`: a weight for each train image, of which 30% have a random label. SGD with
  momentum, full batches.
- `decay and rate`: a weight decay for each layer, the level of the input noise, and the
  learning rate of Adam. Batches of 50.

Each at the start of training and after `--warm` steps of it, over `--steps` inner
steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .common import command, save, subplots
from .image_data import Images, load


OUTER = optax.adam(0.1)
DAMPING = 0.01  # of the Hessian, which is indefinite before training has converged


class Setting(NamedTuple):
    problem: hpo.Problem
    inner: Any
    hyperparams: Any
    train: Any
    algorithms: dict[str, hpo.AbstractBilevelOptimizer]


class Placed(NamedTuple):
    """A comparison, and where in the training it was made."""

    problem: str
    place: str
    comparison: hpo.Comparison


def losses(model: eqx.nn.MLP, batch: Images) -> Float[Array, " n"]:
    images = jnp.reshape(batch.images, (len(batch.images), -1))
    return optax.softmax_cross_entropy_with_integer_labels(
        jax.vmap(model)(images), batch.labels
    )


def val_loss(model: eqx.nn.MLP, h: Any, batch: Images, key: Any) -> Scalar:
    del h, key
    return jnp.mean(losses(model, batch))


def weighted_loss(
    model: eqx.nn.MLP, weights: Float[Array, " n"], batch: Images, key: Any
) -> Scalar:
    del key
    return jnp.mean(weights * losses(model, batch))


def regularised_loss(
    model: eqx.nn.MLP, h: dict[str, Array], batch: Images, key: PRNGKeyArray
) -> Scalar:
    images = batch.images + h["noise"] * jr.normal(key, batch.images.shape)
    norms = jnp.stack([jnp.sum(layer.weight**2) for layer in model.layers])
    return jnp.mean(losses(model, batch._replace(images=images))) + h["decay"] @ norms


def make_common(args: tuple, steps: int) -> dict[str, hpo.AbstractBilevelOptimizer]:
    many: dict[str, Any] = dict(inner_steps=steps)
    return {
        "T1T2": hpo.T1T2(*args, **many),
        "T1T2, differences": hpo.T1T2(
            *args, second_order=hpo.FiniteDifference(), **many
        ),
        "Greedy, 0.9": hpo.Greedy(*args, **many),
        "HyperDistill, 0.9": hpo.HyperDistill(*args, horizon=steps),
        "DrMAD": hpo.DrMAD(*args, **many),
        "Unrolled, last 5": hpo.Unrolled(*args, **many, truncation=min(5, steps)),
        "Unrolled": hpo.Unrolled(*args, **many),
        "Unrolled, recompute=2": hpo.Unrolled(*args, **many, recompute=2),
    }


def make_weights(data: Images, steps: int, seed: int) -> Setting:
    rng, size = np.random.default_rng(seed), len(data.labels)
    random = rng.integers(0, 10, size).astype(data.labels.dtype)
    labels = np.where(rng.random(size) < 0.3, random, data.labels)
    problem = hpo.Problem(weighted_loss, val_loss)
    inner = optax.sgd(0.1, momentum=0.9)
    args = (problem, inner, OUTER)
    many: dict[str, Any] = dict(inner_steps=steps, damping=DAMPING)
    # Far from a minimum the Hessian may be indefinite, which GMRES can solve.
    solve = lx.GMRES(rtol=1e-3, atol=1e-6, restart=10, max_steps=10)
    algorithms = {
        **make_common(args, steps),
        "Implicit, GMRES 10": hpo.Implicit(*args, **many, linear_solver=solve),
        "Implicit, Neumann 10": hpo.Implicit(
            *args, **many, linear_solver=hpo.Neumann(10, 0.1)
        ),
    }
    hyperparams = hpo.Interval(jnp.full(size, 0.5), 0.0, 1.0)
    return Setting(
        problem, inner, hyperparams, data._replace(labels=labels), algorithms
    )


def make_decay_and_rate(data: Images, steps: int, seed: int) -> Setting:
    del seed
    problem = hpo.Problem(regularised_loss, val_loss)
    inner = lambda h: optax.adam(h["rate"])
    args = (problem, inner, OUTER)
    algorithms = make_common(args, steps)
    algorithms["ForwardMode"] = hpo.ForwardMode(*args, inner_steps=steps)
    hyperparams = {
        "decay": hpo.Positive(jnp.full(3, 1e-4)),
        "noise": hpo.Positive(0.1),
        "rate": hpo.Positive(1e-3),
    }
    train = hpo.Minibatch(data, min(50, len(data.labels)))
    return Setting(problem, inner, hyperparams, train, algorithms)


SETTINGS: dict[str, Callable[[Images, int, int], Setting]] = {
    "weights": make_weights,
    "decay and rate": make_decay_and_rate,
}


def compare(
    name: str, setting: Setting, val: Images, *, warm: int, seed: int
) -> list[Placed]:
    """The comparisons at the start and after `warm` plain steps."""
    keys = jr.split(jr.key(seed), 3)
    model = eqx.nn.MLP(val.images[0].size, 10, 128, 2, key=keys[0])
    trainer = hpo.T1T2(setting.problem, setting.inner, OUTER, inner_steps=warm)
    start = trainer.init(model, setting.hyperparams)
    later = trainer.step(start, setting.train, val, key=keys[1])
    placed = []
    for place, state in (("at the start", start), (f"after {warm} steps", later)):
        comparison = hpo.compare_hypergradients(
            setting.algorithms,
            state.model,
            setting.hyperparams,
            setting.train,
            val,
            key=keys[2],
            inner_opt_state=state.inner_opt_state,
        )
        print(f"\n{name}, {place}\n{comparison}", flush=True)
        placed.append(Placed(name, place, comparison))
    return placed


def draw(results: list[Placed], path: str) -> None:
    figure, axes = subplots((11, 4.2), 1, len(results), sharey=True, squeeze=False)
    axes = axes[0]
    names = list(dict.fromkeys(row.name for x in results for row in x.comparison.rows))
    handles = {}
    for axis, (problem, place, comparison) in zip(axes, results):
        for row in comparison.rows:
            number = names.index(row.name)
            look: dict[str, Any] = dict(color=f"C{number % 10}", s=50)
            look["marker"] = "os^vDP*Xdhp"[number % 11]
            handles[row.name] = axis.scatter(1e3 * row.seconds, row.cosine, **look)
        axis.set(xlim=(0, None), xlabel="ms for each inner step")
        axis.set_title(f"{problem}, {place}", fontsize=10)
    axes[0].set(ylabel="cosine with the exact hypergradient")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    save(figure, path, *axes)


QUICK = dict(problems=("weights",), size=30, steps=3, warm=5)


def main(
    dataset: str = "digits",
    *,
    problems: tuple[str, ...] = tuple(SETTINGS),
    folder: str | None = None,
    size: int = 300,
    steps: int = 20,
    warm: int = 100,
    seed: int = 0,
    figure: str = "compare.png",
) -> list[Placed]:
    data = load(dataset, folder=folder, size=size, seed=seed)
    results = []
    for name in problems:
        setting = SETTINGS[name](data.train, steps, seed)
        results += compare(name, setting, data.val, warm=warm, seed=seed)
    draw(results, figure)
    print(f"\nCosine against time is in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        problems={"choices": SETTINGS},
        steps="inner steps",
        warm="steps before the second",
    )
