r"""Data hyper-cleaning in a training that goes on, by minibatches: one weight for each
train image, of which some have wrong labels, is tuned on clean validation images.

    python -m docs.experiments.minibatch_cleaning
    python -m docs.experiments.minibatch_cleaning --dataset fashion_mnist --size 1000 \
        --val-size 1000 --steps 2000 --seeds 5
    python -m docs.experiments.minibatch_cleaning --dataset fashion_mnist --size 1000 \
        --val-size 1000 --steps 2000 --seeds 2 --first 10 --reserve 2000 \
        --rates 0.01 0.03 0.1 0.3 1

All trainings take the same number of steps from the same start. The first command is
small. The third one chose the rates of the second, on other seeds and by images that
are neither validation nor test: `--reserve` puts them in the place of the test images.

The table holds means and standard deviations over the seeds:

- `val`, `test`: accuracy at the end;
- `stopped`: test accuracy where the validation accuracy was best. Trainings that see
  the validation images stop after `STOP` steps, chosen on the other seeds, if at all;
- `AUC`: how well the weights tell the changed labels;
- the differences in test accuracy at the end to two versions of T1-T2, by seed, with
  standard errors.
"""

import functools as ft
from collections.abc import Sequence
from typing import Any, NamedTuple

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from . import hyper_cleaning as cleaning
from .common import command, mean_and_std, save, write_json
from .hyper_cleaning import Batch, Net


INNER_STEPS, BATCH, VAL_BATCH = 10, 32, 128
READ_EVERY = 100  # training steps
CLEAN = 10.0  # the raw weight of a validation image, beside weights that were found
T1T2, GREEDY = f"T1-T2, {INNER_STEPS} steps", f"Greedy 0.9, {INNER_STEPS} steps"
T1T2_EACH, DISTILL = "T1-T2, 1 step", "HyperDistill 0.9, 1 step"
RATES = {T1T2: 1.0, T1T2_EACH: 0.1, GREEDY: 0.3, DISTILL: 0.3}  # of Adam
NONE, VALIDATION, BOTH = "no weights", "validation alone", "train + validation"
CLEANED = "train + validation, weighted"
STOP = {VALIDATION: 400, BOTH: 400, CLEANED: 2000}  # training steps


class Numbered(NamedTuple):
    """Images with the numbers of their weights, along the first axis."""

    rows: Int[Array, " n"]
    patches: Float[Array, "n pixels height width"]
    labels: Int[Array, " n"]


class Row(NamedTuple):
    steps: Int[np.ndarray, " readings"]
    val: Float[np.ndarray, " readings"]
    test: Float[np.ndarray, " readings"]
    auc: float
    weights: Float[np.ndarray, " n"]


def number(batch: Batch) -> Numbered:
    patches = jnp.moveaxis(batch.patches, -1, 0)
    return Numbered(jnp.arange(len(patches)), patches, batch.labels)


def losses(model: Net, batch: Numbered) -> Float[Array, " n"]:
    patches = jnp.moveaxis(batch.patches, 0, -1)
    return cleaning.losses(model, Batch(patches, batch.labels))


def train_loss(
    model: Net, weights: Float[Array, " m"], batch: Numbered, key: PRNGKeyArray
) -> Scalar:
    del key
    return jnp.mean(jax.nn.sigmoid(weights[batch.rows]) * losses(model, batch))


def val_loss(
    model: Net, weights: Float[Array, " m"], batch: Numbered, key: PRNGKeyArray
) -> Scalar:
    del weights, key
    return jnp.mean(losses(model, batch))


# Made once for each rate: a new algorithm would be compiled anew.
@ft.cache
def make_method(name: str, rate: float) -> hpo.AbstractBilevelOptimizer:
    problem, inner = hpo.Problem(train_loss, val_loss), optax.sgd(0.1, momentum=0.9)
    args = (problem, inner, optax.adam(rate))
    makers = {
        T1T2: lambda: hpo.T1T2(*args, inner_steps=INNER_STEPS),
        T1T2_EACH: lambda: hpo.T1T2(*args),
        GREEDY: lambda: hpo.Greedy(*args, inner_steps=INNER_STEPS, discount=0.9),
        DISTILL: lambda: hpo.HyperDistill(*args, discount=0.9),
    }
    return makers[name]()


class Trial:
    """The data and the start of a seed, and trainings from there."""

    def __init__(self, problem: cleaning.Problem, reserve: int, steps: int, seed: int):
        self.val, self.test = problem.val, problem.test
        if reserve > 0:
            parts = np.split(np.arange(len(self.val.labels)), [-reserve])
            self.val, self.test = (
                Batch(problem.val.patches[..., x], problem.val.labels[x]) for x in parts
            )
        self.changed, self.steps = problem.changed, steps
        keys = jr.split(jr.key(seed))
        self.model, self.key = cleaning.make_net(problem.train, keys[0]), keys[1]
        self.train, clean = number(problem.train), number(self.val)
        self.clean = clean._replace(rows=clean.rows + len(self.train.rows))
        pairs = zip(self.train, self.clean)
        self.both = Numbered(*(jnp.concatenate(pair) for pair in pairs))

    def tune(self, name: str, rate: float) -> Row:
        method, start = make_method(name, rate), jnp.zeros(len(self.train.rows))
        val = hpo.Minibatch(self.clean, VAL_BATCH)
        run = lambda data, **options: hpo.tune(
            method, self.model, start, data, val, **options
        )
        return self._watch(run, self.train, method.inner_steps)

    def fit(self, data: Numbered, weights: Float[Array, " m"]) -> Row:
        method = make_method(T1T2_EACH, 1.0)  # all train alike
        run = lambda data, **options: hpo.fit(
            method, self.model, weights, data, **options
        )
        return self._watch(run, data, 1)

    def _watch(self, run: Any, data: Numbered, inner_steps: int) -> Row:
        tests = []

        def read(state):
            tests.append(float(cleaning.accuracy(state.model, self.test)))
            return cleaning.accuracy(state.model, self.val)

        solution = run(
            hpo.Minibatch(data, BATCH),
            steps=self.steps // inner_steps,
            key=self.key,
            monitor=hpo.Monitor(read, every=READ_EVERY // inner_steps, mode="max"),
            progress=False,
        )
        readings = solution.history.monitor
        weights = np.asarray(solution.state.hyperparams)[: len(self.changed)]
        auc = float(roc_auc_score(self.changed, -weights))
        steps = inner_steps * readings.step
        return Row(steps, readings.value, np.array(tests), auc, weights)


def run(trial: Trial, rates: Sequence[float] | None) -> dict[str, Row]:
    """Every method, each with its own rate or with all of those given."""
    zeros = jnp.zeros(len(trial.both.rows))
    data = {NONE: trial.train, VALIDATION: trial.clean, BOTH: trial.both}
    rows = {name: trial.fit(x, zeros) for name, x in data.items()}
    for name, own in RATES.items():
        for rate in (own,) if rates is None else rates:
            label = name if rates is None else f"{name}, {rate}"
            rows[label] = trial.tune(name, rate)
    if rates is None:
        clean = CLEAN * np.ones(len(trial.clean.rows), np.float32)
        weights = jnp.concatenate([rows[T1T2_EACH].weights, clean])
        rows[CLEANED] = trial.fit(trial.both, weights)
    return rows


def stopped(name: str, row: Row) -> float:
    """The test accuracy of a training that was stopped early."""
    if name in STOP:
        return row.test[np.searchsorted(row.steps, min(STOP[name], row.steps[-1]))]
    return row.test[np.argmax(row.val)]


def print_table(results: dict[str, list[Row]]) -> None:
    print(
        f"\n{'':30}{'val, %':>13}{'test, %':>13}{'stopped, %':>13}{'AUC':>14}", end=""
    )
    print(f"{'to T1-T2, 10':>15}{'to T1-T2, 1':>15}")
    ends = {k: 100 * np.array([x.test[-1] for x in v]) for k, v in results.items()}
    for name, rows in results.items():
        early = [100 * stopped(name, row) for row in rows]
        columns = [[100 * x.val[-1] for x in rows], ends[name], early]
        print(f"{name:30}", end="")
        print(
            "".join("{:8.2f}±{:4.2f}".format(*mean_and_std(x)) for x in columns), end=""
        )
        print("{:9.3f}±{:4.3f}".format(*mean_and_std([x.auc for x in rows])), end="")
        for other in (T1T2, T1T2_EACH):
            if other in ends:
                mean, std = mean_and_std(ends[name] - ends[other])
                print(f"{mean:+9.2f}±{std / len(rows) ** 0.5:4.2f} ", end="")
        print()


def draw(results: dict[str, list[Row]], path: str) -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    course, bars = figure.subplots(1, 2, width_ratios=[1.4, 1])
    for number, (name, rows) in enumerate(results.items()):
        test = 100 * np.array([row.test for row in rows])
        look = dict(color=f"C{number}", label=name)
        course.plot(rows[0].steps[1:], test.mean(axis=0)[1:], **look)
        mean, std = mean_and_std(test[:, -1])
        bars.barh(name, mean, xerr=std, color=f"C{number}", alpha=0.8)
    course.set(xlabel="training step", ylabel="test accuracy, %")
    bars.invert_yaxis()
    bars.set(xlabel="test accuracy at the end, %", xlim=(40, None))
    save(figure, path, course)


QUICK = dict(steps=300)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    corrupt: float = 0.3,
    size: int = 300,
    val_size: int = 300,
    reserve: int = 0,
    steps: int = 500,
    seeds: int = 1,
    first: int = 0,
    rates: Sequence[float] | None = None,
    figure: str = "minibatch_cleaning.png",
    record: str | None = None,
) -> dict[str, list[Row]]:
    results: dict[str, list[Row]] = {}
    for seed in range(first, first + seeds):
        sizes = (size, val_size + reserve)
        problem = cleaning.make_problem(dataset, folder, corrupt, *sizes, seed)
        for name, row in run(Trial(problem, reserve, steps, seed), rates).items():
            results.setdefault(name, []).append(row)
        print_table(results)
    draw(results, figure)
    print(f"\nThe courses of the runs are in {figure}.")
    plain = lambda row: {k: np.asarray(x).tolist() for k, x in row._asdict().items()}
    write_json(record, {k: [plain(row) for row in x] for k, x in results.items()})
    return results


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        corrupt="share of labels",
        reserve="images to choose by",
        rates={"type": float, "nargs": "+", "help": "of Adam, to try"},
        record="a JSON file for all numbers",
    )
