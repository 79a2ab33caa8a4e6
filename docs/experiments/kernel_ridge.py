"""Kernel ridge regression with one length scale for each feature, half of them noise.

The length scales and the ridge are tuned by the gradient of the validation error. The
inner problem is a linear system, so that there are two ways to this gradient, which are
compared: by the implicit function theorem, and straight through the solver. One length
scale for all features, chosen on a grid, stands beside it.

    python -m docs.experiments.kernel_ridge
    python -m docs.experiments.kernel_ridge --data friedman
"""

from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array, Float, Scalar
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import RidgeCV

from .common import collect, command, mean_and_error, save, subplots


EXAMPLES, NOISE = 442, 10  # features of pure noise beside those of the data
START_SCALE, START_RIDGE = 6.0, 0.3
LINEAR, SHARED = "linear, ridge", "one length scale, grid"
EACH, PENALISED = "one for each feature", "one for each, penalised"


class Data(NamedTuple):
    x: Any
    y: Any


class Task(NamedTuple):
    train: Data
    val: Data
    test: Data


class Values(NamedTuple):
    """Holds placeholders while they are tuned, plain arrays in the losses."""

    scale: Any  # one for each feature
    ridge: Any


class Row(NamedTuple):
    val: float
    test: float
    refitted: float  # test error with the validation data as train data too
    values: Values | None = None


def make_task(data: str, seed: int) -> Task:
    rng = np.random.default_rng(seed)
    if data == "diabetes":
        x, y = load_diabetes(return_X_y=True, scaled=False)
        x = np.concatenate([x, rng.normal(size=(EXAMPLES, NOISE))], axis=1)
    else:
        x, y = make_friedman1(EXAMPLES, 5 + NOISE, noise=1.0, random_state=seed)
    parts = np.split(rng.permutation(EXAMPLES), [200, 320])
    train = parts[0]
    x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    y = (y - y[train].mean()) / y[train].std()
    return Task(*(Data(jnp.asarray(x[i]), jnp.asarray(y[i])) for i in parts))


def pool(task: Task) -> Data:
    return Data(*map(jnp.concatenate, zip(task.train, task.val)))


def gram(
    x: Float[Array, "n features"], z: Float[Array, "m features"], scale: Array
) -> Float[Array, "n m"]:
    x, z = x / scale, z / scale
    squares = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(z**2, axis=1)
    return jnp.exp(-0.5 * (squares - 2 * x @ z.T))


def fit(values: Values, train: Data) -> Float[Array, " n"]:
    """The dual coefficients, the solution of the inner problem."""
    matrix = gram(train.x, train.x, values.scale) + values.ridge * jnp.eye(len(train.y))
    operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
    return lx.linear_solve(operator, train.y, lx.Cholesky()).value


def train_loss(
    dual: Float[Array, " n"], values: Values, train: Data, key: None
) -> Scalar:
    product = gram(train.x, train.x, values.scale) @ dual + values.ridge * dual
    return 0.5 * dual @ product - dual @ train.y


def squared_error(dual: Array, values: Values, train: Data, data: Data) -> Scalar:
    return jnp.mean((gram(data.x, train.x, values.scale) @ dual - data.y) ** 2)


@eqx.filter_jit
def error(values: Values, train: Data, data: Data) -> Scalar:
    return squared_error(fit(values, train), values, train, data)


def val_loss(dual: Float[Array, " n"], values: Values, batch: Any, key: None) -> Scalar:
    train, val, penalty = batch
    # A long length scale takes its feature out of the kernel.
    taken_in = jnp.sum(1 / values.scale)
    return squared_error(dual, values, train, val) + penalty * taken_in


def make_algorithm() -> hpo.Implicit:
    return hpo.Implicit(
        hpo.Problem(train_loss, val_loss),
        inner=optax.set_to_zero(),
        outer=optax.adam(0.05),
        inner_steps=1,
        linear_solver=lx.Cholesky(),
    )


@eqx.filter_jit
def solve_inner(state: hpo.BilevelState, train: Data) -> hpo.BilevelState:
    dual = fit(hpo.unwrap(state.hyperparams), train)
    return eqx.tree_at(lambda s: s.model, state, dual)


@eqx.filter_jit
def differentiate(hyperparams: Values, train: Data, val: Data) -> Values:
    """The same hypergradient, through the linear solver; without the penalty."""
    loss = lambda hyperparams: error(hpo.unwrap(hyperparams), train, val)
    return eqx.filter_grad(loss)(hyperparams)


def compare_gradients(
    algorithm: hpo.Implicit, state: hpo.BilevelState, task: Task
) -> float:
    """The difference of the two hypergradients, relative to their norm."""
    train, val, _ = task
    state = solve_inner(state, train)
    implicit = algorithm.compute_hypergradient(state, train, (train, val, 0.0))
    direct = differentiate(state.hyperparams, train, val)
    pairs = zip(jtu.tree_leaves(implicit), jtu.tree_leaves(direct), strict=True)
    gaps, norms = zip(*((jnp.sum((x - y) ** 2), jnp.sum(y**2)) for x, y in pairs))
    return float(jnp.sqrt(sum(gaps) / sum(norms)))


def tune(
    algorithm: hpo.Implicit, task: Task, penalty: float, steps: int
) -> hpo.BilevelState:
    features, batch = task.train.x.shape[1], (task.train, task.val, penalty)
    start = Values(jnp.full(features, START_SCALE), jnp.array(START_RIDGE))
    hyperparams = Values(*map(hpo.Positive, start))
    state = algorithm.init(jnp.zeros(len(task.train.y)), hyperparams)
    for _ in range(steps):
        state = solve_inner(state, task.train)
        state = algorithm.step(state, task.train, batch)
    return state


def search_grid(task: Task) -> Values:
    ones = jnp.ones(task.train.x.shape[1])
    scales, ridges = np.logspace(0, 2, 12), np.logspace(-4, 1, 11)
    grid = [Values(s * ones, jnp.array(r)) for s in scales for r in ridges]
    return min(grid, key=lambda values: float(error(values, task.train, task.val)))


def assess(values: Values, task: Task) -> Row:
    train, val, test = task
    pairs = (train, val), (train, test), (pool(task), test)
    few, test_error, refitted = (float(error(values, *pair)) for pair in pairs)
    return Row(few, test_error, refitted, values)


def fit_linear(task: Task) -> Row:
    """The strength is chosen by leave-one-out cross-validation."""
    models: list[Any] = [RidgeCV(np.logspace(-2, 4, 30)) for _ in range(2)]
    few, many = (x.fit(*data) for x, data in zip(models, (task.train, pool(task))))
    wrong = lambda model, data: float(np.mean((model.predict(data.x) - data.y) ** 2))
    return Row(wrong(few, task.val), wrong(few, task.test), wrong(many, task.test))


def compare_scikit(values: Values, task: Task) -> float:
    """The largest difference between predictions here and by scikit-learn."""
    alpha: Any = float(values.ridge)
    model: Any = KernelRidge(kernel="rbf", gamma=0.5, alpha=alpha)
    model.fit(task.train.x / values.scale, task.train.y)
    cross = gram(task.test.x, task.train.x, values.scale)
    ours = cross @ fit(values, task.train)
    return float(np.max(np.abs(ours - model.predict(task.test.x / values.scale))))


def run(
    algorithm: hpo.Implicit, task: Task, penalty: float, steps: int
) -> dict[str, Row]:
    rows = {LINEAR: fit_linear(task), SHARED: assess(search_grid(task), task)}
    gaps = []
    for name, strength in {EACH: 0.0, PENALISED: penalty}.items():
        state = tune(algorithm, task, strength, steps)
        values = hpo.unwrap(state.hyperparams)
        rows[name] = assess(values, task)
        gap = compare_gradients(algorithm, state, task)
        gaps.append((gap, compare_scikit(values, task)))
    gradient, prediction = np.max(gaps, axis=0)
    print(f"difference of the hypergradients {gradient:.0e}, relative; ", end="")
    print(f"of predictions to those of scikit-learn {prediction:.0e}")
    return rows


def print_table(results: dict[str, list[Row]]) -> None:
    print(f"\n{'squared error, mean and SE':26}", end="")
    print("".join(f"{name:>18}" for name in Row._fields[:3]))
    for name, rows in results.items():
        print(f"{name:26}", end="")
        for column in zip(*(row[:3] for row in rows)):
            mean, error = mean_and_error(column)
            print(f"{mean:9.3f} ± {error:5.3f}", end="  ")
        print()


def draw(results: dict[str, list[Row]], path: str) -> None:
    drawing, panels = subplots((10, 3.6), 1, 2, sharey=True)
    for axes, name in zip(panels, (EACH, PENALISED)):
        scales = np.array([row.values.scale for row in results[name] if row.values])
        features = scales.shape[1]
        useful = np.arange(1, features + 1) <= features - NOISE
        for inverse in 1 / scales:
            for part, colour in [(useful, "tab:red"), (~useful, "grey")]:
                numbers = np.flatnonzero(part) + 1
                axes.plot(numbers, inverse[part], "o", color=colour, alpha=0.5)
        axes.plot([], "o", color="tab:red", label="feature of the data")
        axes.plot([], "o", color="grey", label="noise")
        axes.set(xlabel="feature", title=name, xticks=np.arange(1, features + 1))
    panels[0].set(ylabel="1 / length scale")
    panels[0].legend()
    save(drawing, path)


QUICK = dict(data="friedman", steps=60, seeds=1)


def main(
    data: str = "diabetes",
    *,
    penalty: float = 0.1,
    steps: int = 200,
    seeds: int = 5,
    first: int = 0,
    single: bool = False,
    figure: str = "kernel_ridge.png",
) -> dict[str, list[Row]]:
    with jax.enable_x64(not single):
        algorithm = make_algorithm()  # once: a new one would be compiled anew
        of_seed = lambda seed: run(algorithm, make_task(data, seed), penalty, steps)
        results = collect(of_seed, seeds, first)
    print_table(results)
    draw(results, figure)
    print(f"\nThe length scales are in {figure}.")
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        data={"choices": ("diabetes", "friedman")},
        penalty="on 1 / scale",
        steps="outer steps",
        single="single precision",
    )
