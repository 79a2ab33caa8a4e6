"""Tunes one weight decay for each input of a neural network while it trains, and
compares it on untouched data with the strongest cheap rivals.

    pip install 'eqx_hpo[examples]'
    python -m docs.experiments.quickstart

The data are a regression with 15 inputs of which only five matter (Friedman's first
function). One decay for all inputs must serve both kinds; with a decay for each, the
gradient of the validation loss finds out which inputs to ignore. All methods see the
same 200 examples, in five folds, and train once more on all of them at the end.
"""

from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Scalar
from sklearn.datasets import load_diabetes, make_friedman1

from .common import command, describe, mean_and_error, save, subplots


EXAMPLES, FOLDS = 200, 5
STEPS = 500  # of a training
UPDATES, INNER_STEPS = 100, 10  # of the decays, and the training steps for each
DEFAULT_DECAY, START_DECAY = 1e-4, 1e-2
GRID = np.logspace(-5, 0, 6)
TRIALS = 60  # of the black-box search

DEFAULT, STOPPED = "default decay", "default decay, early stopping"
SHARED, SEARCHED = "two decays, grid of 36", f"all decays, TPE, {TRIALS} trials"
TUNED = "all decays, tuned by gradient"
# What each costs before the last training. The second-order product of an update counts
# as two training gradients, its validation gradient as one.
TRAININGS = {
    DEFAULT: 0,
    STOPPED: FOLDS,
    SHARED: FOLDS * len(GRID) ** 2,
    SEARCHED: TRIALS,
    TUNED: FOLDS * UPDATES * (INNER_STEPS + 3) // STEPS,
}


class Data(NamedTuple):
    x: Any
    y: Any


class Decays(NamedTuple):
    """Holds placeholders while they are tuned, plain arrays in the losses."""

    inputs: Any  # one for each input, or one for all
    layers: Any  # one for the weights behind the first layer


def val_loss(model: eqx.nn.MLP, decays: Decays, data: Data, key: None) -> Scalar:
    return jnp.mean((jax.vmap(model)(data.x)[:, 0] - data.y) ** 2)


def train_loss(model: eqx.nn.MLP, decays: Decays, data: Data, key: None) -> Scalar:
    first, *others = [jnp.sum(layer.weight**2, axis=0) for layer in model.layers]
    penalty = jnp.sum(decays.inputs * first)
    penalty += decays.layers * sum(jnp.sum(x) for x in others)
    return val_loss(model, decays, data, key) + penalty


PROBLEM = hpo.Problem(train_loss, val_loss)
INNER = optax.adam(0.01)
ALGORITHM = hpo.T1T2(PROBLEM, INNER, optax.adam(0.1), inner_steps=INNER_STEPS)
# One model for each fold; the decays follow the mean of their hypergradients.
LEARNER = hpo.MetaLearner(ALGORITHM, tasks=FOLDS)
# Nothing moves in these: a step is a whole training on each fold, or a part of one.
JUDGE = hpo.MetaLearner(
    hpo.T1T2(PROBLEM, INNER, optax.set_to_zero(), inner_steps=STEPS), tasks=FOLDS
)
STILL = hpo.MetaLearner(
    hpo.T1T2(PROBLEM, INNER, optax.set_to_zero(), inner_steps=INNER_STEPS), tasks=FOLDS
)


def make_data(name: str, seed: int) -> tuple[Data, Data]:
    """The data to train on, and the untouched ones."""
    if name == "friedman":
        x, y = make_friedman1(EXAMPLES + 2000, 15, noise=1.0, random_state=seed)
    else:
        x, y = load_diabetes(return_X_y=True, scaled=False)
        order = np.random.default_rng(seed).permutation(len(y))
        x, y = x[order], y[order]
    x = (x - x[:EXAMPLES].mean(axis=0)) / x[:EXAMPLES].std(axis=0)
    y = (y - y[:EXAMPLES].mean()) / y[:EXAMPLES].std()
    data = Data(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    parts = (slice(EXAMPLES), slice(EXAMPLES, None))
    train, test = (Data(data.x[i], data.y[i]) for i in parts)
    return train, test


def make_decays(inputs: Any, layers: Any) -> Decays:
    return Decays(hpo.Positive(jnp.asarray(inputs)), hpo.Positive(jnp.asarray(layers)))


def fit(
    model: eqx.nn.MLP, decays: Decays, data: Data, steps: int = STEPS // INNER_STEPS
) -> eqx.nn.MLP:
    settings: Any = dict(key=None, progress=False)
    return hpo.fit(ALGORITHM, model, decays, data, steps=steps, **settings).model


def tune(model: eqx.nn.MLP, data: Data) -> hpo.Solution:
    train, val = hpo.folds(data, FOLDS)
    start = make_decays(jnp.full(data.x.shape[1], START_DECAY), START_DECAY)
    return hpo.tune(
        LEARNER, model, start, train, val, steps=UPDATES, key=None, progress=False
    )


def choose_shared(model: eqx.nn.MLP, data: Data) -> Decays:
    """The best of a grid, by the mean error over the folds."""
    train, val = hpo.folds(data, FOLDS)
    candidates = [make_decays(x, y) for x in GRID for y in GRID]

    def error(decays):
        state = JUDGE.step(JUDGE.init(model, decays), train, val)
        return float(state.metrics.val_loss)

    return min(candidates, key=error)


def choose_steps(model: eqx.nn.MLP, data: Data) -> int:
    """When to stop at the default decay, by the mean error over the folds."""
    train, val = hpo.folds(data, FOLDS)
    decays = make_decays(DEFAULT_DECAY, DEFAULT_DECAY)
    settings: Any = dict(
        steps=STEPS // INNER_STEPS, key=None, record_every=1, progress=False
    )
    history = hpo.tune(STILL, model, decays, train, val, **settings).history
    return int(history.step[np.argmin(history.val_loss)])


def search(model: eqx.nn.MLP, data: Data, seed: int) -> Decays:
    """The best of many trainings on four folds of five, by the error on the fifth."""
    train, val = (jax.tree.map(lambda x: x[0], part) for part in hpo.folds(data, FOLDS))
    ends = (GRID[0], GRID[-1])
    low, high = (make_decays(jnp.full(data.x.shape[1], x), x) for x in ends)
    return hpo.search(
        ALGORITHM,
        model,
        low,
        high,
        train,
        val,
        trials=TRIALS,
        steps=STEPS // INNER_STEPS,
        key=jr.key(seed),
        parallel=20,
        progress=False,
    ).hyperparams


def compare(name: str, seed: int) -> tuple[dict[str, float], hpo.Solution]:
    """The error of each method on the untouched data, and the tuning."""
    data, test = make_data(name, seed)
    model = eqx.nn.MLP(data.x.shape[1], 1, 32, 2, activation=jnp.tanh, key=jr.key(seed))
    default, tuned = make_decays(DEFAULT_DECAY, DEFAULT_DECAY), tune(model, data)
    models = {
        DEFAULT: fit(model, default, data),
        STOPPED: fit(model, default, data, choose_steps(model, data)),
        SHARED: fit(model, choose_shared(model, data), data),
        SEARCHED: fit(model, search(model, data, seed), data),
        TUNED: fit(model, tuned.hyperparams, data),
    }
    errors = {x: float(val_loss(y, default, test, None)) for x, y in models.items()}
    return errors, tuned


def print_table(errors: dict[str, np.ndarray]) -> None:
    print(f"{'squared error on untouched data':34}{'trainings':>10}{'mean':>8}")
    for name, values in errors.items():
        line = f"{name:34}{TRAININGS[name]:10}{np.mean(values):8.3f}"
        if name != TUNED:
            more = describe(values / errors[TUNED], ".2f", of=mean_and_error)
            line += f"   {more} times that of the tuned"
        print(line)


def draw(errors: dict[str, np.ndarray], tuned: hpo.Solution, path: str) -> None:
    figure, (left, right) = subplots((10, 4.4), 1, 2)
    history = tuned.history
    for number, decay in enumerate(np.transpose(history.hyperparams.inputs)):
        matters = number < 5
        label = {0: "an input that matters", 5: "one that does not"}.get(number)
        colour = "tab:blue" if matters else "tab:gray"
        left.plot(history.step, decay, color=colour, label=label, alpha=0.8)
    left.set(xlabel="update", ylabel="weight decay of an input", yscale="log")
    left.legend()
    for row, (name, values) in enumerate(errors.items()):
        colour = "tab:blue" if name == TUNED else "tab:gray"
        right.plot(values, [row] * len(values), "o", color=colour, alpha=0.6)
        right.plot(np.mean(values), row, "|", color=colour, markersize=24)
    right.set_yticks(range(len(errors)), list(errors))
    right.invert_yaxis()
    right.set(xlabel="squared error on untouched data, each seed")
    right.set_xlim(left=0)
    save(figure, path, left, right, dpi=150)


QUICK = dict(seeds=1, first=100)


def main(
    data: str = "friedman",
    *,
    first: int = 0,
    seeds: int = 3,
    figure: str = "quickstart.png",
) -> dict[str, np.ndarray]:
    results = [compare(data, seed) for seed in range(first, first + seeds)]
    errors = {x: np.array([row[x] for row, _ in results]) for x in results[0][0]}
    print_table(errors)
    draw(errors, results[0][1], figure)
    print(f"\nThe course of the decays is in {figure}.")
    return errors


if __name__ == "__main__":
    command(main, __doc__, QUICK, data={"choices": ["friedman", "diabetes"]})
