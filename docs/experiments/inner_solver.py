"""Tunes a weight decay for each weight of a logistic regression, with Optimistix as the
inner solver, and measures how well the inner problem must be solved.

Digits of scikit-learn; 650 weight decays, between bounds that keep the problem well
conditioned. Beside L-BFGS to several tolerances stand fixed numbers of steps of Optax.

    python -m docs.experiments.inner_solver
"""

from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
from jaxtyping import Array, Float, Int, Scalar

from .common import command, cross_entropy, mean_and_error, save, subplots
from .image_data import Images, load


START, LOWER, UPPER = 3e-3, 1e-4, 1e-1  # of each weight decay
TIGHT = 1e-10
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
OPTAX = {
    "SGD": (optax.sgd(0.3), (10, 100, 1000)),
    "Adam": (optax.adam(0.01), (100,)),
}
LOOSE, COLD, CLOSE = "L-BFGS 0.01", "L-BFGS 0.01, from zero", "L-BFGS 0.0001"
RUNS = ("L-BFGS 0.1", LOOSE, COLD, CLOSE, "SGD 10", "SGD 100", "Adam 100")
EVERY = 10  # updates between two measurements
SHARED = "one decay for all, grid"


class Data(NamedTuple):
    x: Float[np.ndarray, "n features"]
    y: Int[np.ndarray, " n"]


class Method(NamedTuple):
    algorithm: hpo.Implicit
    tolerance: float | None  # of L-BFGS; `None`: `algorithm` trains by Optax
    from_zero: bool = False  # in each update


class Record(NamedTuple):
    """One update, beside the same update at a minimum."""

    inner_steps: int
    report: hpo.ImplicitReport
    error: float  # of the hypergradient, relative
    cosine: float


class Row(NamedTuple):
    records: list[Record]
    val_loss: float
    val: float
    test: float


def load_data(size: int, seed: int) -> list[Data]:
    def convert(part: Images) -> Data:
        x: Any = part.images.reshape(len(part.labels), -1).astype(float)
        return Data(np.c_[x, np.ones(len(x))], part.labels)  # the last one is the bias

    return [convert(part) for part in load("digits", size=size, seed=seed)]


def val_loss(weights: Array, decay: Any, data: Data, key: None) -> Scalar:
    return cross_entropy(data.x @ weights, data.y)


def train_loss(weights: Array, decay: Any, data: Data, key: None) -> Scalar:
    return val_loss(weights, None, data, key) + jnp.sum(decay * weights**2)


@eqx.filter_jit
def minimise(
    weights: Array, decay: Array, data: Data, tolerance: Any
) -> tuple[Float[Array, "features classes"], Int[Array, ""]]:
    """The weights at the minimum, from those given, and the number of iterations."""
    solver: Any = optx.LBFGS(rtol=tolerance, atol=tolerance)
    loss = lambda weights, _: train_loss(weights, decay, data, None)
    solution = optx.minimise(loss, solver, weights, max_steps=5000, throw=False)
    return solution.value, jnp.asarray(solution.stats["num_steps"])


def make_algorithm(
    inner: optax.GradientTransformation, steps: int, rtol: float = 1e-4
) -> hpo.Implicit:
    return hpo.Implicit(
        hpo.Problem(train_loss, val_loss),
        inner=inner,
        outer=optax.adam(0.1),
        inner_steps=steps,
        linear_solver=lx.CG(rtol=rtol, atol=1e-12),
        curvature_steps=5,
    )


def make_methods() -> dict[str, Method]:
    # `set_to_zero` leaves the weights where L-BFGS has put them.
    fixed = make_algorithm(optax.set_to_zero(), 1)
    methods = {f"L-BFGS {x:g}": Method(fixed, x) for x in TOLERANCES}
    methods[COLD] = Method(fixed, 0.01, from_zero=True)
    for name, (inner, numbers) in OPTAX.items():
        for steps in numbers:
            methods[f"{name} {steps}"] = Method(make_algorithm(inner, steps), None)
    return methods


def advance(
    method: Method, state: hpo.BilevelState, train: Data, val: Data
) -> tuple[hpo.BilevelState, int]:
    """One update of the hyperparameters; also the number of inner steps."""
    algorithm, tolerance, from_zero = method
    if tolerance is None:
        return algorithm.step(state, train, val), algorithm.inner_steps
    decay = hpo.unwrap(state.hyperparams)
    start = jnp.zeros_like(state.model) if from_zero else state.model
    fitted, steps = minimise(start, decay, train, jnp.array(tolerance))
    # Not `restart`, which would throw away the start of the linear solver.
    state = eqx.tree_at(lambda s: s.model, state, fitted)
    return algorithm.step(state, train, val), int(steps)


def measure(
    exact: hpo.Implicit,
    before: hpo.BilevelState,
    after: hpo.BilevelState,
    steps: int,
    data: list[Data],
) -> Record:
    """Compares the hypergradient at the weights that an update used with that at the
    minimum; `exact` solves the linear system well, so that only the weights differ."""
    train, val, _ = data
    decay = hpo.unwrap(before.hyperparams)
    # From zero: near a minimum L-BFGS mistakes its own small steps for convergence.
    minimum, _ = minimise(jnp.zeros_like(after.model), decay, train, jnp.array(TIGHT))
    state = exact.init(after.model, before.hyperparams)
    there = eqx.tree_at(lambda s: s.model, state, minimum)
    x, y = (exact.compute_hypergradient(s, train, val).raw for s in (state, there))
    norms = jnp.linalg.norm(x), jnp.linalg.norm(y)
    error = jnp.linalg.norm(x - y) / norms[1]
    cosine = jnp.sum(x * y) / (norms[0] * norms[1])
    return Record(steps, after.metrics.diagnostics, float(error), float(cosine))


def start_state(method: Method, data: list[Data]) -> hpo.BilevelState:
    weights = jnp.zeros((data[0].x.shape[1], 10))
    decay = hpo.Interval(jnp.full(weights.shape, START), LOWER, UPPER)
    return method.algorithm.init(weights, decay)


def tune(method: Method, exact: hpo.Implicit, data: list[Data], updates: int) -> Row:
    state, records = start_state(method, data), []
    for update in range(updates + 1):
        # Each update goes on from the weights of the one before.
        after, steps = advance(method, state, *data[:2])
        if update % EVERY == 0:
            records.append(measure(exact, state, after, steps, data))
        if update < updates:
            state = after
    return assess(hpo.unwrap(state.hyperparams), data, records)


def assess(decay: Array, data: list[Data], records: list[Record]) -> Row:
    """With the weights at the minimum, however the decays were found."""
    train, val, test = data
    weights, _ = minimise(jnp.zeros(decay.shape), decay, train, jnp.array(1e-6))
    loss = float(val_loss(weights, None, val, None))
    right = (np.argmax(x @ weights, axis=1) == y for x, y in (val, test))
    return Row(records, loss, *(float(np.mean(x)) for x in right))


def search_grid(data: list[Data]) -> Row:
    shape = (data[0].x.shape[1], 10)
    decays = [jnp.full(shape, decay) for decay in np.logspace(-6, -1, 16)]
    rows = [assess(decay, data, []) for decay in decays]
    return min(rows, key=lambda row: row.val_loss)


def print_report(name: str, row: Row) -> None:
    print(f"\n{name}, first seed\nupdate  inner steps  gradient  residual  curvature")
    for number, record in enumerate(row.records):
        report = record.report
        numbers = (report.gradient_norm, report.residual, report.curvature)
        print(f"{EVERY * number:6}{record.inner_steps:13}", end="  ")
        print("  ".join(f"{x:8.1e}" for x in numbers), end="  ")
        print(hpo.RESULTS[report.result] or "solved")


def print_errors(starts: dict[str, list[Record]]) -> None:
    print(
        f"\n{'from zero, medians':22}{'steps':>7}{'gradient':>11}{'error':>9}  cosine"
    )
    for name, records in starts.items():
        steps = np.median([x.inner_steps for x in records])
        gradient = np.median([x.report.gradient_norm for x in records])
        error, cosine = (np.median(x) for x in zip(*(y[2:] for y in records)))
        print(f"{name:22}{steps:7.0f}{gradient:11.1e}{error:9.1e}{cosine:8.3f}")


def print_table(results: dict[str, list[Row]]) -> None:
    print(f"\n{'tuned, mean and SE':26}{'steps':>7}{'error':>9}", end="")
    print("".join(f"{name:>17}" for name in Row._fields[1:]))
    for name, rows in results.items():
        # The first record is from zero; the others go on from earlier weights.
        records = [record for row in rows for record in row.records[1:]]
        print(f"{name:26}", end="")
        if records:
            print(f"{np.mean([x.inner_steps for x in records]):7.0f}", end="")
            print(f"{np.median([x.error for x in records]):9.1e}", end="")
        else:
            print(f"{'':16}", end="")
        for column in zip(*(row[1:] for row in rows)):
            mean, error = mean_and_error(column)
            print(f"{mean:8.4f} ± {error:6.4f}", end="")
        print()


def draw(
    starts: dict[str, list[Record]], results: dict[str, list[Row]], path: str
) -> None:
    drawing, panels = subplots((11, 3.8), 1, 2)
    for marker, kind in zip("osv", ("L-BFGS", *OPTAX)):
        records = [x for name, y in starts.items() if name.startswith(kind) for x in y]
        gradients = [x.report.gradient_norm for x in records]
        errors = [x.error for x in records]
        panels[0].plot(gradients, errors, marker, color="black", alpha=0.6, label=kind)
    panels[0].set(
        xlabel="norm of the training gradient", title="from zero", xscale="log"
    )
    for name, rows in results.items():
        errors = np.array([[x.error for x in row.records] for row in rows])
        if errors.size > 0:
            updates = EVERY * np.arange(errors.shape[1])
            panels[1].plot(updates, np.median(errors, axis=0), "o-", label=name)
    panels[1].set(xlabel="update", title="each goes on from the last")
    for axes in panels:
        axes.set(ylabel="relative error of the hypergradient", yscale="log")
    panels[0].legend()
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(drawing, path, *panels)


QUICK = dict(size=100, updates=10, seeds=1)


def main(
    *,
    size: int = 300,
    updates: int = 40,
    seeds: int = 3,
    first: int = 0,
    figure: str = "inner_solver.png",
) -> tuple[dict[str, list[Record]], dict[str, list[Row]]]:
    starts: dict[str, list[Record]] = {}
    results: dict[str, list[Row]] = {}
    with jax.enable_x64(True):  # a tight solution needs it
        methods = make_methods()
        exact = make_algorithm(optax.set_to_zero(), 1, rtol=TIGHT)
        for seed in range(first, first + seeds):
            data = load_data(size, seed)
            results.setdefault(SHARED, []).append(search_grid(data))
            for name, method in methods.items():
                if method.from_zero:
                    continue
                state = start_state(method, data)
                after, steps = advance(method, state, *data[:2])
                record = measure(exact, state, after, steps, data)
                starts.setdefault(name, []).append(record)
            for name in RUNS:
                row = tune(methods[name], exact, data, updates)
                results.setdefault(name, []).append(row)
    print_errors(starts)
    print_report(CLOSE, results[CLOSE][0])
    print_table(results)
    draw(starts, results, figure)
    print(f"\nThe errors are in {figure}.")
    return starts, results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
    )
