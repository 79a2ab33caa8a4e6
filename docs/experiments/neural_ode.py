"""Fits a neural ODE to a few noisy, irregularly sampled trajectories of the Van der Pol
oscillator, and tunes three regularisers while it trains, on the validation loss: a
penalty on the curvature of the solutions, noise on the initial states, and a weight
decay for each layer.

    python -m docs.experiments.neural_ode
    python -m docs.experiments.neural_ode --start strong --first 300 --seeds 5

Three trainings for each seed: with the starting values fixed, with the values tuned
online, and from scratch with the tuned values fixed. All seeds train at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import diffrax as dfx
import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from .common import command, mean_and_error, save, subplots


POINTS, HORIZON = 12, 4.0  # observations of a trajectory, and its length
NOISE = 0.2  # of the observations, that of the initial state included
WIDTH, LAYERS = 32, 2
TEST = 100  # trajectories
TOLERANCE = 1e-4  # of the adaptive solver, with which the test is made

STARTS = {  # curvature, noise, decay
    "weak": (1e-4, 0.02, 1e-5),
    "strong": (1e-1, 0.5, 1e-2),
}
FIXED, TUNED, RETRAINED = "fixed", "tuned online", "retrained"


Field: TypeAlias = Callable[[Array], Array]


class Trajectories(NamedTuple):
    start: Float[Array, "*seeds n 2"]
    times: Float[Array, "*seeds n points"]
    states: Float[Array, "*seeds n points 2"]


class Task(NamedTuple):
    train: Trajectories
    val: Trajectories
    noisy: Trajectories  # the test, measured as the validation data are
    exact: Trajectories  # the same without the noise


class Regularisation(NamedTuple):
    """Holds placeholders before training, plain arrays in the losses and after."""

    curvature: Any
    noise: Any
    decay: Any  # one for each layer


class Course(NamedTuple):
    net: eqx.nn.MLP
    values: Regularisation  # after each step
    val_loss: Float[Array, "seeds steps"]


class Row(NamedTuple):
    course: Course
    states: Float[Array, "seeds n points 2"]  # of the exact test trajectories
    noisy: Float[Array, " seeds"]  # mean squared errors
    exact: Float[Array, " seeds"]
    steps: Float[Array, " seeds"]  # of the adaptive solver, for a trajectory


def van_der_pol(state: Float[Array, "2"]) -> Float[Array, "2"]:
    x, y = state
    return jnp.stack([y, (1 - x**2) * y - x])


def integrate(field: Field, start: Array, end: Any, **how: Any) -> dfx.Solution:
    term = dfx.ODETerm(lambda t, y, field: field(y))
    args = (0.0, end, None, start, field)
    return dfx.diffeqsolve(term, how.pop("solver"), *args, throw=False, **how)


def solve(
    field: Field, start: Float[Array, "2"], times: Float[Array, " points"]
) -> Float[Array, "points 2"]:
    """One step from each observation to the next: where the steps are does not depend
    on the model, so that the losses are smooth in it."""
    solution = integrate(
        field,
        start,
        times[-1],
        solver=dfx.Bosh3(),
        stepsize_controller=dfx.StepTo(jnp.pad(times, (1, 0))),
        saveat=dfx.SaveAt(steps=True),
        # Differentiable in both modes, as `ForwardOverReverse` needs it.
        adjoint=dfx.DirectAdjoint(),
        max_steps=POINTS,
    )
    assert solution.ys is not None
    return solution.ys


def solve_adaptively(
    field: Field,
    start: Float[Array, "2"],
    times: Float[Array, " points"],
    tolerance: float,
) -> tuple[Float[Array, "points 2"], Int[Array, ""]]:
    solution = integrate(
        field,
        start,
        HORIZON,
        solver=dfx.Tsit5(),
        stepsize_controller=dfx.PIDController(rtol=tolerance, atol=tolerance),
        saveat=dfx.SaveAt(ts=times),
    )
    assert solution.ys is not None
    return solution.ys, solution.stats["num_steps"]


def fit(net: eqx.nn.MLP, data: Trajectories) -> tuple[Scalar, Array]:
    states = jax.vmap(solve, (None, 0, 0))(net, data.start, data.times)
    return jnp.mean((states - data.states) ** 2), states


def train_loss(
    net: eqx.nn.MLP, values: Regularisation, data: Trajectories, key: PRNGKeyArray
) -> Scalar:
    noise = values.noise * jr.normal(key, data.start.shape)
    error, states = fit(net, data._replace(start=data.start + noise))
    # Along a solution y'' is the derivative of the field in its own direction.
    second = lambda y: jax.jvp(net, (y,), (net(y),))[1]
    curvature = jnp.mean(jax.vmap(jax.vmap(second))(states) ** 2)
    norms = jnp.stack([jnp.sum(layer.weight**2) for layer in net.layers])
    return error + values.curvature * curvature + jnp.sum(values.decay * norms)


def val_loss(
    net: eqx.nn.MLP, values: Regularisation, data: Trajectories, key: PRNGKeyArray
) -> Scalar:
    del values, key
    return fit(net, data)[0]


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(0, None))
def make_task(seed: Int[Array, ""], size: int) -> Task:
    keys, count = jr.split(jr.fold_in(jr.key(seed), 0), 4), 2 * size + TEST
    start = jr.uniform(keys[0], (count, 2), minval=-2.5, maxval=2.5)
    jitter = jr.uniform(keys[1], (count, POINTS))
    times = HORIZON * (jnp.arange(POINTS) + jitter) / POINTS
    truth = lambda y, t: solve_adaptively(van_der_pol, y, t, 1e-5)[0]
    exact = Trajectories(start, times, jax.vmap(truth)(start, times))
    add_noise = lambda key, x: x + NOISE * jr.normal(key, x.shape)
    states = add_noise(keys[3], exact.states)
    noisy = Trajectories(add_noise(keys[2], start), times, states)
    pick = lambda data, *ends: Trajectories(*(x[slice(*ends)] for x in data))
    ends = (0, size), (size, 2 * size), (2 * size, count)
    train, val, test = (pick(noisy, *x) for x in ends)
    return Task(train, val, test, pick(exact, *ends[-1]))


def make_algorithm() -> hpo.T1T2:
    # The rate is part of the state, so that one compiled step can tune or not.
    outer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)
    return hpo.T1T2(hpo.Problem(train_loss, val_loss), optax.adam(1e-2), outer)


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0, 0, 0, None))
def train(
    algorithm: hpo.T1T2,
    seed: Int[Array, ""],
    task: Task,
    values: Regularisation,
    rates: Float[Array, " steps"],
) -> Course:
    net_key, step_key = jr.split(jr.fold_in(jr.key(seed), 1))
    net = eqx.nn.MLP(2, 2, WIDTH, LAYERS - 1, jnp.tanh, key=net_key)
    state = algorithm.init(net, jtu.tree_map(hpo.Positive, values))
    where = lambda state: state.outer_opt_state.hyperparams["learning_rate"]
    dynamic, static = eqx.partition(state, eqx.is_array)

    def step(dynamic, rate_and_key):
        rate, key = rate_and_key
        state = eqx.tree_at(where, eqx.combine(dynamic, static), rate)
        state = algorithm.step(state, task.train, task.val, key=key)
        report = hpo.unwrap(state.hyperparams), state.metrics.val_loss
        return eqx.filter(state, eqx.is_array), report

    keys = jr.split(step_key, len(rates))
    dynamic, report = lax.scan(step, dynamic, (rates, keys))
    return Course(eqx.combine(dynamic, static).model, *report)


@eqx.filter_jit
@eqx.filter_vmap
def assess(course: Course, task: Task) -> Row:
    run = lambda start, times: solve_adaptively(course.net, start, times, TOLERANCE)
    tests = jtu.tree_map(lambda *x: jnp.stack(x), task.noisy, task.exact)
    states, steps = jax.vmap(jax.vmap(run))(tests.start, tests.times)
    noisy, exact = jnp.mean((states - tests.states) ** 2, axis=(1, 2, 3))
    return Row(course, states[1], noisy, exact, jnp.mean(steps[1], dtype=exact.dtype))


def last(values: Regularisation) -> Regularisation:
    return jtu.tree_map(lambda x: x[:, -1], values)


def with_error(x: Array) -> str:
    mean, error = mean_and_error(x)
    return f"{mean:.4f} ({error:.4f})"


def print_table(rows: dict[str, Row]) -> None:
    names = ("val. loss", "noisy test", "exact test", "solver steps")
    print(" " * 14 + "".join(f"{name:>18}" for name in names))
    for name, row in rows.items():
        numbers = [f"{np.mean(row.course.val_loss[:, -1]):.4f}"]
        numbers += [with_error(x) for x in (row.noisy, row.exact, row.steps)]
        print(f"{name:14}" + "".join(f"{x:>18}" for x in numbers))
    for name in (TUNED, RETRAINED):
        row, fixed = rows[name], rows[FIXED]
        changes = [row.noisy - fixed.noisy, row.exact - fixed.exact]
        changes = "".join(f"{with_error(x):>18}" for x in changes)
        print(f"{f'{name}, minus {FIXED}':32}{changes}")
    print(f"\n{'tuned values':14}{'curvature':>13}{'noise':>13}   decay of each layer")
    for curvature, noise, decay in zip(*last(rows[TUNED].course.values)):
        layers = "  ".join(f"{x:.1e}" for x in decay)
        print(f"{'':14}{curvature:13.1e}{noise:13.4f}   {layers}")


def draw(rows: dict[str, Row], task: Task, path: str) -> None:
    """Of the first seed."""
    figure, (plane, losses, trajectories) = subplots((12, 4.2), 1, 3)
    data, test = jtu.tree_map(lambda x: np.asarray(x[0]), (task.train, task.exact))
    plane.plot(*data.states.reshape(-1, 2).T, ".", color="grey", ms=3, label="train")
    plane.plot(*test.states[0].T, "k-", label="a test trajectory")
    for name, row in rows.items():
        plane.plot(*row.states[0, 0].T, label=name)
        losses.plot(row.course.val_loss[0], label=name, linewidth=1)
    values = jtu.tree_map(lambda x: np.asarray(x[0]), rows[TUNED].course.values)
    trajectories.plot(values.curvature, label="curvature penalty")
    trajectories.plot(values.noise, label="noise of the initial state")
    for layer, decay in enumerate(values.decay.T, start=1):
        trajectories.plot(decay, ":", label=f"weight decay, layer {layer}")
    plane.set(xlabel="x", ylabel="dx/dt")
    losses.set(xlabel="step", ylabel="validation loss", yscale="log")
    trajectories.set(xlabel="step", ylabel="hyperparameter", yscale="log")
    for axes in (plane, losses, trajectories):
        axes.legend(fontsize="small")
    save(figure, path)


QUICK = dict(size=2, steps=4, warmup=1, seeds=1)


def main(
    *,
    start: str = "weak",
    size: int = 12,
    steps: int = 1000,
    rate: float = 0.01,
    warmup: int = 300,
    seeds: int = 3,
    first: int = 0,
    figure: str = "neural_ode.png",
) -> dict[str, Row]:
    keys = jnp.arange(first, first + seeds)
    task, algorithm = make_task(keys, size), make_algorithm()
    curvature, noise, decay = (jnp.full(seeds, x) for x in STARTS[start])
    values = Regularisation(curvature, noise, jnp.tile(decay[:, None], LAYERS))

    def run(values: Regularisation, rate: float) -> Row:
        rates = jnp.where(jnp.arange(steps) < warmup, 0.0, rate)
        course = train(algorithm, keys, task, values, rates)
        return assess(course, task)

    rows = {FIXED: run(values, 0.0), TUNED: run(values, rate)}
    rows[RETRAINED] = run(last(rows[TUNED].course.values), 0.0)
    print_table(rows)
    draw(rows, task, figure)
    print(f"\nThe course of the first seed is in {figure}.")
    return rows


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        start={"choices": tuple(STARTS)},
        size="trajectories to train on",
        rate="of the outer Adam",
        warmup="steps without tuning",
    )
