r"""Meta-learning by HyperDistill (appendix G): sinusoids `y = A sin(x - phase)` are
regressed by a network of which all layers but the last are shared between the tasks.
Those are the hyperparameters; each task trains the last layer, from a shared
initialisation that Reptile learns.

    python -m docs.experiments.sinusoid
    python -m docs.experiments.sinusoid --seeds 20 --first 100 \
        --gammas 0.8 0.9 0.99 --periods 1 5
    python -m docs.experiments.sinusoid --seeds 20 --gammas 0.8 0.9 --periods 1 5

An episode is thirty inner steps on each of ten new tasks. The hyperparameters move
after each step, or after as many as the name of a method says, or, by Neumann series,
after the last three. All methods see the same networks and tasks. The number behind
HyperDistill's discount is of the episodes between two fits of its scale, if not 1.

The first table holds the mean squared error on new tasks after the last episode: mean
and 95% interval over the seeds, median, difference to `T1-T2` with its interval, how
many steps were skipped, and the scale that was fitted. The second one holds cosines
with the exact hypergradient some inner steps after the start of an episode, with the
hyperparameters that HyperDistill has reached.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .common import command, mean_and_error, save, subplots


TASKS, TEST_TASKS, POINTS, WIDTH, HORIZON, DISCOUNT = 10, 1000, 10, 100, 30, 0.8
PERIOD = 1  # episodes, after which the scale is fitted anew
SOLVES, TERMS = 3, 5  # of the Neumann series: after the last steps of an episode
COSINE_STEPS = (1, 3, 10, 30)
FIRST_ORDER, ONE_STEP, DISTILL = "first order", "T1-T2", "HyperDistill"
NEUMANN = f"Neumann, {SOLVES} solves"
DRMAD, EXACT = f"DrMAD, {HORIZON} steps", f"exact, {HORIZON} steps"
PUBLISHED = {  # of five runs, with 95% intervals
    FIRST_ORDER: (0.567, 0.193),
    ONE_STEP: (0.670, 0.283),
    f"{DISTILL} {DISCOUNT}": (0.327, 0.052),
    NEUMANN: (0.502, 0.146),
    DRMAD: (1.086, 0.176),
}


class Points(NamedTuple):
    x: Float[Array, "*tasks n 1"]
    y: Float[Array, "*tasks n 1"]


class Tasks(NamedTuple):
    train: Points
    val: Points
    test: Points


class Net(eqx.Module):
    shared: list[eqx.nn.Linear]
    last: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        sizes = zip((1, WIDTH, WIDTH), (WIDTH, WIDTH, WIDTH), keys)
        self.shared = [eqx.nn.Linear(n, m, key=key) for n, m, key in sizes]
        self.last = eqx.nn.Linear(WIDTH, 1, key=keys[3])

    def __call__(self, x: Float[Array, "1"]) -> Float[Array, "1"]:
        for layer in self.shared:
            x = jax.nn.relu(layer(x))
        return self.last(x)


class Course(NamedTuple):
    nets: Net  # at the start and after each episode
    skipped: Array
    memory: hpo.Memory


class Row(NamedTuple):
    errors: Float[np.ndarray, " seeds"]
    skipped: int
    scale: float


def split(net: Net) -> tuple[Net, Net]:
    """The hyperparameters and the model."""
    parts = lambda net: (net.shared, net.last)
    return hpo.partition(net, eqx.tree_at(parts, net, (True, False)))


def loss(model: Net, hyperparams: Net, batch: Points, key: None) -> Scalar:
    del key
    net = eqx.combine(model, hyperparams)
    return jnp.mean((jax.vmap(net)(batch.x) - batch.y) ** 2)


def draw_tasks(key: PRNGKeyArray, shape: tuple[int, ...]) -> Tasks:
    keys = jr.split(key, 3)
    amplitude = jr.uniform(keys[0], (*shape, 1, 1), minval=0.1, maxval=5.0)
    phase = jr.uniform(keys[1], (*shape, 1, 1), maxval=jnp.pi)
    x = jr.uniform(keys[2], (3, *shape, POINTS, 1), minval=-5.0, maxval=5.0)
    return Tasks(*map(Points, x, amplitude * jnp.sin(x - phase)))


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(0, None))
def draw(seed: Array, episodes: int) -> tuple[Net, Tasks, Tasks]:
    """A network, the tasks of each episode, and those of the test."""
    keys = jr.split(jr.key(seed), 3)
    train = draw_tasks(keys[1], (episodes, TASKS))
    return Net(keys[0]), train, draw_tasks(keys[2], (TEST_TASKS,))


ARGS = (hpo.Problem(loss, loss), optax.sgd(0.01, momentum=0.9), optax.adam(1e-3))


def name_distill(gamma: float, period: int) -> str:
    return f"{DISTILL} {gamma}" + ("" if period == PERIOD else f", {period}")


def make_neumann() -> hpo.Implicit:
    """The hyperparameters move after the last inner steps of an episode alone."""
    problem, inner, outer = ARGS
    late = lambda step, **_: step % HORIZON >= HORIZON - SOLVES
    outer, solver = optax.conditionally_mask(outer, late), hpo.Neumann(TERMS, 0.01)
    options: dict[str, Any] = dict(inner_steps=1, warm_start=False)
    return hpo.Implicit(problem, inner, outer, linear_solver=solver, **options)


def make_methods(
    gammas: Sequence[float], greedy_steps: Sequence[int], periods: Sequence[int]
) -> dict[str, hpo.AbstractBilevelOptimizer]:
    methods = {FIRST_ORDER: hpo.FirstOrder(*ARGS), ONE_STEP: hpo.T1T2(*ARGS)}
    for steps in greedy_steps:
        greedy = hpo.Greedy(*ARGS, inner_steps=steps, discount=0.5)
        methods[f"greedy, {steps} steps"] = greedy
    for gamma, period in itertools.product(gammas, periods):
        distill = hpo.HyperDistill(
            *ARGS, horizon=HORIZON, discount=gamma, estimation_period=period
        )
        methods[name_distill(gamma, period)] = distill
    methods[NEUMANN] = make_neumann()
    methods[DRMAD] = hpo.DrMAD(*ARGS, inner_steps=HORIZON)
    methods[EXACT] = hpo.Unrolled(*ARGS, inner_steps=HORIZON)
    return methods


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0, 0))
def learn(method: hpo.AbstractBilevelOptimizer, net: Net, episodes: Tasks) -> Course:
    learner = hpo.MetaLearner(method, TASKS, horizon=HORIZON, reptile=1.0)
    hyperparams, model = split(net)
    first = jtu.tree_map(lambda x: x[0], episodes)
    state = learner.init(model, hyperparams, train=first.train, val=first.val)

    def run_episode(state, tasks):
        def step(state, _):
            state = learner.step(state, tasks.train, tasks.val)
            return state, state.skipped > 0

        steps = HORIZON // learner.inner_steps
        state, skipped = lax.scan(step, state, length=steps)
        net = eqx.combine(learner.initialisation(state), state.hyperparams)
        return state, (net, skipped)

    state, (nets, skipped) = lax.scan(run_episode, state, episodes)
    nets = jtu.tree_map(lambda x, y: jnp.concatenate([x[None], y]), net, nets)
    return Course(nets, jnp.sum(skipped), state.memory)


@eqx.filter_jit
def evaluate(nets: Net, tests: Tasks) -> Float[Array, " seeds"]:
    """The mean squared error on new tasks, after the inner steps."""
    trainer = hpo.FirstOrder(*ARGS, inner_steps=HORIZON)
    learner = hpo.MetaLearner(trainer, TEST_TASKS, horizon=HORIZON)

    def error(net_and_tasks):
        net, tasks = net_and_tasks
        hyperparams, model = split(net)
        state = learner.init(model, hyperparams)
        return learner.step(state, tasks.train, tasks.test).metrics.val_loss

    return lax.map(error, (nets, tests))


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(0, 0, None, 0))
def compare(
    net: Net, tests: Tasks, inner_steps: int, scale: Scalar
) -> dict[str, Scalar]:
    """Cosines with the exact hypergradient after some steps from the start."""
    hyperparams, model = split(net)
    train, val, _ = jtu.tree_map(lambda x: x[:TASKS], tests)
    options: dict[str, Any] = dict(inner_steps=inner_steps)
    methods = {
        FIRST_ORDER: hpo.FirstOrder(*ARGS, **options),
        ONE_STEP: hpo.T1T2(*ARGS, **options),
        "greedy": hpo.Greedy(*ARGS, **options, discount=0.9),
        DISTILL: hpo.HyperDistill(*ARGS, **options, discount=DISCOUNT, scale=scale),
    }

    def hypergradient(method):
        learner = hpo.MetaLearner(method, TASKS, horizon=inner_steps)
        state = learner.init(model, hyperparams, train=train)
        x = learner.compute_hypergradient(state, train, val)
        return jnp.concatenate([x.ravel() for x in jtu.tree_leaves(x)])

    exact = hypergradient(hpo.Unrolled(*ARGS, **options))
    unit = exact / jnp.linalg.norm(exact)
    found = {name: hypergradient(method) for name, method in methods.items()}
    return {name: jnp.vdot(x, unit) / jnp.linalg.norm(x) for name, x in found.items()}


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    mean, error = mean_and_error(values)
    return mean, 1.96 * error


def print_table(rows: dict[str, Row]) -> None:
    print(f"{'':20}{'mean':>15}{'median':>9}{'to T1-T2':>16}{'skipped':>9}{'scale':>8}")
    for name, row in rows.items():
        mean, interval = mean_and_interval(row.errors)
        change, width = mean_and_interval(row.errors - rows[ONE_STEP].errors)
        print(
            f"{name:20}{mean:9.3f}±{interval:5.3f}{np.median(row.errors):9.3f}"
            f"{change:10.3f}±{width:5.3f}{row.skipped:9}{row.scale:8.2f}"
        )


def compute_cosines(course: Course, tests: Tasks) -> dict[int, dict[str, list[float]]]:
    """After some numbers of episodes; means over the seeds."""
    scale = course.memory.lasting
    last = jtu.tree_leaves(course.nets)[0].shape[1] - 1
    stages = {}
    for stage in sorted({0, last // 3, last}):
        nets = jtu.tree_map(lambda x: x[:, stage], course.nets)
        found = [compare(nets, tests, steps, scale) for steps in COSINE_STEPS]
        stages[stage] = {
            name: [float(jnp.mean(x[name])) for x in found] for name in found[0]
        }
    return stages


def draw_figure(rows: dict[str, Row], stages: dict[int, Any], path: str) -> None:
    figure, (errors, *others) = subplots((11, 3.8), 1, 3, width_ratios=[1.5, 1, 1])
    places = np.arange(len(rows))
    means = np.array([mean_and_interval(row.errors) for row in rows.values()]).T
    errors.errorbar(means[0], places, xerr=means[1], fmt="o", label="here")
    published = np.array([PUBLISHED.get(name, (np.nan, np.nan)) for name in rows]).T
    style: dict[str, Any] = dict(fmt="s", mfc="none", alpha=0.6, label="published")
    errors.errorbar(published[0], places + 0.25, xerr=published[1], **style)
    medians = [np.median(row.errors) for row in rows.values()]
    errors.plot(medians, places, "k|", markersize=12, label="median here")
    errors.set_yticks(places, list(rows))
    errors.invert_yaxis()
    errors.set(xlabel="mean squared error on new tasks", xlim=(0, 1.5))
    errors.legend(loc="upper right")
    for axes, stage in zip(others, (min(stages), max(stages))):
        for name, values in stages[stage].items():
            axes.plot(COSINE_STEPS, values, "o-", label=name)
        axes.set(xscale="log", ylim=(-0.05, 1.05), title=f"after {stage} episodes")
        axes.set_xticks(COSINE_STEPS, [str(x) for x in COSINE_STEPS])
        axes.set(xlabel="inner steps", ylabel="cosine with the exact hypergradient")
        axes.minorticks_off()
    others[0].legend(fontsize="small")
    save(figure, path, *others)


QUICK = dict(seeds=2, episodes=1)


def main(
    *,
    seeds: int = 3,
    first: int = 0,
    episodes: int = 30,
    gammas: Sequence[float] = (DISCOUNT,),
    greedy_steps: Sequence[int] = (3,),
    periods: Sequence[int] = (PERIOD,),
    figure: str = "sinusoid.png",
) -> dict[str, Row]:
    nets, train, test = draw(jnp.arange(first, first + seeds), episodes)
    rows, stages = {}, {}
    for name, method in make_methods(gammas, greedy_steps, periods).items():
        course = learn(method, nets, train)
        last = jtu.tree_map(lambda x: x[:, -1], course.nets)
        scale = course.memory.lasting
        errors = np.asarray(evaluate(last, test))
        rows[name] = Row(
            errors=np.where(np.isfinite(errors), errors, np.inf),
            skipped=int(jnp.sum(course.skipped)),
            scale=np.nan if scale is None else float(jnp.mean(scale)),
        )
        if name == f"{DISTILL} {DISCOUNT}":
            stages = compute_cosines(course, test)
    print_table(rows)
    for stage, cosines in stages.items():
        print(f"\n{f'after {stage} episodes':24}", end="")
        print("".join(f"{f't = {t}':>8}" for t in COSINE_STEPS))
        for name, values in cosines.items():
            print(f"{name:24}" + "".join(f"{x:8.2f}" for x in values))
    if len(stages) > 0:
        draw_figure(rows, stages, figure)
        print(f"\nThe errors and the cosines are in {figure}.")
    return rows


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
    )
