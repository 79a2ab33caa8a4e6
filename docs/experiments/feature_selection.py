"""Finds the 20 useful ones of 500 features in linear regression, from 200 examples.

Two formulations: a penalty for each feature, all strong at the start, and a gate for
each feature with an L1 penalty on it. The outer optimiser moves all of them at each
step, or only the top k by the magnitude of the hypergradient. Ridge and lasso stand
beside them.

    python -m docs.experiments.feature_selection
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import eqx_hpo as hpo
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float, Scalar
from matplotlib.axes import Axes
from sklearn.linear_model import LassoCV

from .common import collect, command, mean_and_error, save, subplots


FEATURES, USEFUL = 500, 20
NOISE = 2.0  # of the targets in all three parts; the squared error cannot fall below 4
INNER_STEPS = 10
# With train inputs like these, training diverges from a penalty of about 13 on.
RATE, START, LOWER, UPPER = 0.05, 4.0, 0.01, 8.0

RIDGE, LASSO = "ridge, one penalty", "lasso"
LASSO_BOTH = "lasso, validation data too"
DENSE, TOP_K = "penalties, Adam, all", "penalties, Adam, top k"


class Data(NamedTuple):
    x: Any
    y: Any


class Task(NamedTuple):
    truth: Float[np.ndarray, " features"]
    train: Data
    val: Data
    test: Data


class Fit(NamedTuple):
    weights: Float[np.ndarray, " features"]
    kept: Bool[np.ndarray, " features"]
    history: hpo.History | None = None
    test_errors: tuple[float, ...] = ()  # one for each record of the history


class Row(NamedTuple):
    val: float
    test: float
    kept: int
    kept_useful: int
    found: int  # useful features among as many with the largest weights
    refit: float  # test error of least squares on those with the largest weights


class Formulation(NamedTuple):
    problem: hpo.Problem
    start: Any
    weights: Callable[[Any, Any], Any]  # of the model and the hyperparameters
    kept: Callable[[Any], Any]  # of the hyperparameters


class Method(NamedTuple):
    formulation: Formulation
    algorithm: hpo.AbstractBilevelOptimizer


def make_task(seed: int, size: int) -> Task:
    rng = np.random.default_rng(seed)
    truth = np.zeros(FEATURES)
    where = rng.choice(FEATURES, USEFUL, replace=False)
    truth[where] = rng.choice([-1, 1], USEFUL) * rng.uniform(0.5, 1.5, USEFUL)

    def draw(count: int) -> Data:
        x = rng.normal(size=(count, FEATURES))
        y = x @ truth + NOISE * rng.normal(size=count)
        return Data(x.astype(np.float32), y.astype(np.float32))

    return Task(truth, draw(size), draw(size), draw(2000))


def squared_error(weights: Any, data: Data) -> Scalar:
    return jnp.mean((data.x @ weights - data.y) ** 2)


def make_penalties() -> Formulation:
    def train_loss(weights, penalty, data, key):
        return squared_error(weights, data) + jnp.sum(penalty * weights**2)

    def val_loss(weights, penalty, data, key):
        return squared_error(weights, data)

    return Formulation(
        hpo.Problem(train_loss, val_loss),
        start=hpo.Interval(jnp.full(FEATURES, START), LOWER, UPPER),
        weights=lambda weights, penalty: weights,
        kept=lambda penalty: penalty < START / 2,
    )


def make_gates() -> Formulation:
    def train_loss(weights, gate, data, key):
        # Without this the weights would grow to make up for small gates.
        return squared_error(gate * weights, data) + 0.1 * jnp.sum(weights**2)

    def val_loss(weights, gate, data, key):
        return squared_error(gate * weights, data)

    return Formulation(
        hpo.Problem(train_loss, val_loss),
        start=jnp.full(FEATURES, 0.5),
        weights=lambda weights, gate: gate * weights,
        kept=lambda gate: gate != 0,
    )


def make_methods(k: int, l1: float, algorithm: str) -> dict[str, Method]:
    penalties, gates, select = make_penalties(), make_gates(), hpo.select_top_k(k)
    sparse = hpo.proximal(hpo.L1(l1), learning_rate=0.02)
    box = hpo.project(optax.projections.projection_box, 0.0, 1.0)
    outers = {
        DENSE: (penalties, [optax.adam(0.05)]),
        TOP_K: (penalties, [optax.adam(0.05), select]),
        "penalties, SGD, all": (penalties, [optax.sgd(1.0)]),
        "penalties, SGD, top k": (penalties, [optax.sgd(1.0), select]),
        "gates, L1, all": (gates, [optax.sgd(0.02), sparse, box]),
        "gates, L1, top k": (gates, [optax.sgd(0.02), select, sparse, box]),
    }

    def make(formulation: Formulation, outer: list[Any]) -> Method:
        args = (formulation.problem, optax.sgd(RATE), optax.chain(*outer))
        kind = {"T1T2": hpo.T1T2, "Greedy": hpo.Greedy}[algorithm]
        return Method(formulation, kind(*args, inner_steps=INNER_STEPS))

    return {name: make(*parts) for name, parts in outers.items()}


def fit_method(method: Method, task: Task, steps: int) -> Fit:
    formulation, errors = method.formulation, []

    def watch(state: hpo.BilevelState) -> None:
        values = hpo.unwrap(state.hyperparams)
        weights = formulation.weights(state.model, values)
        errors.append(float(squared_error(weights, task.test)))

    solution = hpo.tune(
        method.algorithm,
        jnp.zeros(FEATURES),
        formulation.start,
        task.train,
        task.val,
        steps=steps,
        key=None,
        record_every=max(1, steps // 50),
        callback=watch,
    )
    values = np.asarray(solution.values)
    return Fit(
        np.asarray(formulation.weights(solution.model, values)),
        formulation.kept(values),
        solution.history,
        tuple(errors),
    )


def fit_ridge(task: Task) -> Fit:
    """The strength is the best one on the validation data."""
    x, y = task.train
    gram, moment = x.T @ x / len(y), x.T @ y / len(y)
    candidates = [
        np.linalg.solve(gram + strength * np.eye(FEATURES), moment)
        for strength in np.logspace(-3, 2, 30)
    ]
    best = min(candidates, key=lambda w: float(squared_error(w, task.val)))
    return Fit(best, best != 0)


def fit_lasso(data: Data) -> Fit:
    """The strength is that of five-fold cross-validation within the data."""
    lasso: Any = LassoCV(fit_intercept=False, cv=5, max_iter=10_000)
    weights = lasso.fit(data.x, data.y).coef_
    return Fit(weights, weights != 0)


def assess(fit: Fit, task: Task) -> Row:
    chosen = np.argsort(-np.abs(fit.weights))[:USEFUL]
    useful, both = task.truth != 0, pool(task)
    refit = np.zeros(FEATURES)
    refit[chosen] = np.linalg.lstsq(both.x[:, chosen], both.y)[0]
    return Row(
        val=float(squared_error(fit.weights, task.val)),
        test=float(squared_error(fit.weights, task.test)),
        kept=int(np.sum(fit.kept)),
        kept_useful=int(np.sum(fit.kept & useful)),
        found=int(np.sum(useful[chosen])),
        refit=float(squared_error(refit, task.test)),
    )


def pool(task: Task) -> Data:
    return Data(*(np.concatenate(parts) for parts in zip(task.train, task.val)))


def print_table(rows: dict[str, list[Row]]) -> None:
    print(f"{'means over the seeds':28}{'kept':>7}{'useful':>8}{'found':>7}", end="")
    print(f"{'val':>8}{'test':>8}{'its SE':>8}{'refitted':>10}")
    for name, results in rows.items():
        val, test, kept, useful, found, refit = np.mean(results, axis=0)
        _, error = mean_and_error([row.test for row in results])
        print(f"{name:28}{kept:7.1f}{useful:8.1f}{found:7.1f}", end="")
        print(f"{val:8.2f}{test:8.2f}{error:8.2f}{refit:10.2f}")


def draw(fits: dict[str, Fit], task: Task, path: str) -> None:
    figure, (penalties, errors, weights) = subplots((12, 4.2), 1, 3)
    draw_penalties(penalties, fits[TOP_K], task.truth != 0)
    for name, colour in [(DENSE, "tab:blue"), (TOP_K, "tab:orange")]:
        fit = fits[name]
        assert fit.history is not None
        label = "top k" if name == TOP_K else "all"
        style: Any = dict(color=colour)
        step = fit.history.step[: len(fit.test_errors)]
        errors.plot(step, fit.test_errors, label=f"test, {label}", **style)
        val_loss = fit.history.val_loss
        step = fit.history.step
        errors.plot(step, val_loss, ":", label=f"validation, {label}", **style)
    errors.axhline(NOISE**2, color="grey", linewidth=0.8, label="noise of the targets")
    errors.set(xlabel="outer step", ylabel="squared error", title="penalties, Adam")
    errors.set_ylim(0, None)
    errors.legend()

    weights.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    for name, shift in [(RIDGE, -0.06), (DENSE, 0.0), ("gates, L1, top k", 0.06)]:
        look: Any = dict(s=10, alpha=0.5, linewidths=0)
        weights.scatter(task.truth + shift, fits[name].weights, label=name, **look)
    weights.set(xlabel="true weight", ylabel="weight found")
    weights.legend(loc="upper left", markerscale=2)
    save(figure, path)


def draw_penalties(axes: Axes, fit: Fit, useful: Bool[np.ndarray, " features"]) -> None:
    assert fit.history is not None
    step, values = fit.history.step, fit.history.hyperparams
    axes.plot(step, values[:, ~useful], color="grey", alpha=0.3, linewidth=0.8)
    axes.plot(step, values[:, useful], color="tab:red", linewidth=1)
    axes.plot([], color="tab:red", label="useful feature")
    axes.plot([], color="grey", label="useless feature")
    axes.set(xlabel="outer step", ylabel="penalty", title=TOP_K)
    axes.legend()


QUICK = dict(steps=100, seeds=1)


def main(
    *,
    k: int = 20,
    l1: float = 0.2,
    size: int = 200,
    steps: int = 300,
    seeds: int = 3,
    first: int = 0,
    algorithm: str = "T1T2",
    figure: str = "feature_selection.png",
) -> dict[str, list[Row]]:
    # Made once: a new algorithm would be compiled anew.
    methods = make_methods(k, l1, algorithm)

    def of_seed(seed: int) -> dict[str, Row]:
        task = make_task(seed, size)
        fits = {RIDGE: fit_ridge(task), LASSO: fit_lasso(task.train)}
        fits[LASSO_BOTH] = fit_lasso(pool(task))
        fits |= {name: fit_method(x, task, steps) for name, x in methods.items()}
        if seed == first:
            draw(fits, task, figure)
        return {name: assess(fit, task) for name, fit in fits.items()}

    rows = collect(of_seed, seeds, first)
    print_table(rows)
    print(f"\nThe course of the first seed is in {figure}.")
    return rows


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        k="moved at each outer step",
        l1="penalty on each gate",
        size="of train and validation",
        steps="outer steps",
        algorithm={"choices": ("T1T2", "Greedy")},
    )
