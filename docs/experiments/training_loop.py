"""Hyperparameter tuning in a training loop of your own, by `init` and `step` instead of
`tune`: logging, early stopping, checkpoints, and the library for every n-th step only.

The plain loop is `train_plain`, the tuned one `train_tuned`. The script interrupts the
tuned loop, resumes it from its files, and checks that nothing has changed.

    python -m docs.experiments.training_loop
    python -m docs.experiments.training_loop --seeds 5
"""

import collections
import functools
import itertools
import math
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from . import image_data
from .common import command, cross_entropy, describe, mean_and_std, save, subplots
from .image_data import Images, Splits


BATCH_SIZE, HIDDEN_LAYERS = 64, 2
INNER = optax.sgd(0.05, momentum=0.9)
# Multiples of each n: there the state is that of the step, and tells its number.
LOG_EVERY, CHECKPOINT_EVERY = 100, 500
OUTER_RATE = 0.01  # times n, so that the hyperparameters move as far whatever n
DECAY, NOISE = 1e-4, 0.1  # of the plain script, and where tuning starts
INTERRUPTED, INTERRUPT = 5, 730  # n, and after how many steps
PLAIN, EVERY = "plain", (1, 5, 20)
TIMED_STEPS, TIMED_BLOCKS = 40, 25


class Regularisation(NamedTuple):
    decay: Any  # one for each layer
    noise: Any


class Record(NamedTuple):
    step: int
    train_loss: float
    val_loss: float
    hypergradient_norm: float
    values: Regularisation


class Run(NamedTuple):
    log: list[Record]
    step: int  # with the lowest validation loss
    model: eqx.nn.MLP  # in that step
    states: tuple[hpo.BilevelState, ...] = ()  # the last one and that of this step
    test: float = math.nan


def compute_logits(model: eqx.nn.MLP, images: Any) -> Float[Array, "n classes"]:
    return jax.vmap(model)(images.reshape(len(images), -1))


def val_loss(model: eqx.nn.MLP, values: Any, batch: Images, key: Any) -> Scalar:
    return cross_entropy(compute_logits(model, batch.images), batch.labels)


def train_loss(
    model: eqx.nn.MLP, values: Regularisation, batch: Images, key: PRNGKeyArray
) -> Scalar:
    noise = values.noise * jr.normal(key, batch.images.shape)
    norms = jnp.stack([jnp.sum(layer.weight**2) for layer in model.layers])
    loss = val_loss(model, None, batch._replace(images=batch.images + noise), None)
    return loss + jnp.sum(values.decay * norms)


@eqx.filter_jit
def train_step(
    model: eqx.nn.MLP, opt_state: Any, values: Regularisation, batch: Images, key: Any
) -> tuple[eqx.nn.MLP, Any, Scalar]:
    """As in any script with Equinox and Optax."""
    loss, gradient = eqx.filter_value_and_grad(train_loss)(model, values, batch, key)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = INNER.update(gradient, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss


validation_loss = eqx.filter_jit(val_loss)


@eqx.filter_jit
def accuracy(model: eqx.nn.MLP, data: Images) -> Scalar:
    guesses = jnp.argmax(compute_logits(model, data.images), axis=1)
    return jnp.mean(guesses == data.labels)


def validate(model: eqx.nn.MLP, data: Images) -> float:
    return float(validation_loss(model, None, data, None))


def load_batches(data: Images, seed: int, start: int = 0) -> Iterator[Images]:
    """A plain data loader: shuffled epochs without end, from batch `start` on."""
    size = min(BATCH_SIZE, len(data.labels))
    per_epoch = len(data.labels) // size
    for step in itertools.count(start):
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(data.labels))
        rows = order[place * size : (place + 1) * size]
        yield Images(data.images[rows], data.labels[rows])


def make_model(data: Images, width: int, seed: int) -> eqx.nn.MLP:
    return eqx.nn.MLP(data.images[0].size, 10, width, HIDDEN_LAYERS, key=jr.key(seed))


def make_values() -> Regularisation:
    return Regularisation(jnp.full(HIDDEN_LAYERS + 1, DECAY), jnp.array(NOISE))


@functools.cache  # what is compiled belongs to the Optax functions in it
def make_algorithm(every: int) -> hpo.T1T2:
    problem = hpo.Problem(train_loss, val_loss)
    return hpo.T1T2(problem, INNER, outer=optax.adam(OUTER_RATE * every))


def plain_steps(
    model: eqx.nn.MLP, data: Splits, seed: int
) -> Iterator[tuple[int, eqx.nn.MLP, Scalar]]:
    opt_state = INNER.init(eqx.filter(model, eqx.is_inexact_array))
    values, key = make_values(), jr.key(seed)
    for step, batch in enumerate(load_batches(data.train, seed), start=1):
        step_key = jr.fold_in(key, step)
        model, opt_state, loss = train_step(model, opt_state, values, batch, step_key)
        yield step, model, loss


def tuned_steps(
    algorithm: hpo.T1T2, state: hpo.BilevelState, data: Splits, every: int, seed: int
) -> Iterator[tuple[int, hpo.BilevelState]]:
    """The same, but by the library where `every` divides the step. There the state that
    comes with it is that of the step; in between it is an earlier one."""
    calls = int(state.step)
    train = load_batches(data.train, seed, start=calls * every)
    val = load_batches(data.val, seed, start=calls)
    inner, values = (state.model, state.inner_opt_state), hpo.unwrap(state.hyperparams)
    for step, batch in enumerate(train, start=calls * every + 1):
        key = jr.fold_in(jr.key(seed), step)
        if step % every == 0:
            where = lambda state: (state.model, state.inner_opt_state)
            state = eqx.tree_at(where, state, inner)
            state = algorithm.step(state, batch, next(val), key=key)
            inner, values = where(state), hpo.unwrap(state.hyperparams)
        else:
            *new, _ = train_step(*inner, values, batch, key)
            inner = tuple(new)
        yield step, state


def train_plain(
    model: eqx.nn.MLP, data: Splits, *, steps: int, patience: int, seed: int
) -> Run:
    values, log = make_values(), []
    best, best_step, lowest = model, 0, validate(model, data.val)
    for step, model, loss in plain_steps(model, data, seed):
        if step % LOG_EVERY == 0:
            val = validate(model, data.val)
            log.append(Record(step, float(loss), val, math.nan, values))
            if val < lowest:
                best, best_step, lowest = model, step, val
            if step >= steps or step - best_step >= patience:
                break
    return Run(log, best_step, best)


def train_tuned(
    model: eqx.nn.MLP,
    data: Splits,
    *,
    every: int,
    steps: int,
    patience: int,
    seed: int,
    folder: pathlib.Path,
    resume: bool = False,
    interrupt: int | None = None,
) -> Run:
    """The files in `folder` are all that it needs to go on."""
    algorithm, log = make_algorithm(every), []
    state = best = algorithm.init(model, jax.tree.map(hpo.Positive, make_values()))
    if resume:
        state = hpo.load(folder / "last.eqx", like=state)
        best = hpo.load(folder / "best.eqx", like=state)
    lowest = validate(best.model, data.val)
    for step, state in tuned_steps(algorithm, state, data, every, seed):
        if step % LOG_EVERY == 0:
            val, metrics = validate(state.model, data.val), state.metrics
            report = float(metrics.train_loss), val, float(metrics.hypergradient_norm)
            log.append(Record(step, *report, hpo.unwrap(state.hyperparams)))
            if val < lowest:
                best, lowest = state, val
                hpo.save(folder / "best.eqx", best)
            if step >= steps or step - int(best.step) * every >= patience:
                break
        if step % CHECKPOINT_EVERY == 0:
            hpo.save(folder / "last.eqx", state)
        if step == interrupt:
            raise KeyboardInterrupt
    return Run(log, int(best.step) * every, best.model, (state, best))


def train_interrupted(model: eqx.nn.MLP, data: Splits, at: int, **options: Any) -> Run:
    """Stops in the middle of training, and goes on from the files."""
    try:
        train_tuned(model, data, interrupt=at, **options)
    except KeyboardInterrupt:
        return train_tuned(model, data, resume=True, **options)
    raise AssertionError("Training ended before it was interrupted.")


def check_equal(left: Run, right: Run) -> None:
    """The same numbers, bit for bit."""
    arrays = lambda run: jax.tree.leaves(eqx.filter(run.states, eqx.is_array))
    for x, y in zip(arrays(left), arrays(right), strict=True):
        assert np.array_equal(x, y, equal_nan=True)


def measure_seconds(model: eqx.nn.MLP, data: Splits) -> dict[Any, np.ndarray]:
    """CPU seconds for a step, in alternating blocks of plain training and each n."""
    loops: dict[Any, Iterator[Any]] = {PLAIN: plain_steps(model, data, 0)}
    for every in EVERY:
        algorithm = make_algorithm(every)
        state = algorithm.init(model, jax.tree.map(hpo.Positive, make_values()))
        loops[every] = tuned_steps(algorithm, state, data, every, 0)
    seconds = {name: [] for name in loops}
    for _ in range(TIMED_BLOCKS + 1):
        for name, loop in loops.items():
            start = time.process_time()
            jax.block_until_ready(take_last(loop, TIMED_STEPS))
            seconds[name].append((time.process_time() - start) / TIMED_STEPS)
    return {name: np.array(x[1:]) for name, x in seconds.items()}  # compiled by then


def take_last(loop: Iterator[Any], count: int) -> Any:
    (last,) = collections.deque(itertools.islice(loop, count), maxlen=1)
    return last


def run_seed(
    model: eqx.nn.MLP, data: Splits, check: bool, **options: Any
) -> dict[Any, Run]:
    runs: dict[Any, Run] = {PLAIN: train_plain(model, data, **options)}
    for every in EVERY:
        with tempfile.TemporaryDirectory() as folder:
            more = options | {"every": every, "folder": pathlib.Path(folder)}
            runs[every] = train_tuned(model, data, **more)
        with tempfile.TemporaryDirectory() as folder:
            if check and every == INTERRUPTED:
                more["folder"] = pathlib.Path(folder)
                again = train_interrupted(model, data, INTERRUPT, **more)
                check_equal(runs[every], again)
    return {
        name: run._replace(test=100 * float(accuracy(run.model, data.test)))
        for name, run in runs.items()
    }


def print_log(run: Run) -> None:
    print("  step   train    val.   |grad|   noise   decay of each layer")
    for row in run.log[:: max(1, len(run.log) // 10)]:
        print(f"{row.step:6}{row.train_loss:8.3f}{row.val_loss:8.3f}", end="")
        print(f"{row.hypergradient_norm:9.1e}{row.values.noise:8.3f}", end="   ")
        print("  ".join(f"{x:.1e}" for x in row.values.decay))


def print_table(results: dict[Any, list[Run]], seconds: dict[Any, np.ndarray]) -> None:
    print(f"\n{'':10}{'test, %':>16}{'val. loss':>18}{'best step':>16}", end="")
    print(f"{'last step':>16}{'CPU ms':>11}{'ratio':>7}")
    for name, runs in results.items():
        losses = [min(row.val_loss for row in run.log) for run in runs]
        steps = describe([run.step for run in runs], ".0f")
        last = describe([run.log[-1].step for run in runs], ".0f")
        test = describe([run.test for run in runs], ".2f")
        print(f"{label(name):10}{test:>16}{describe(losses):>18}", end="")
        print(f"{steps:>16}{last:>16}", end="")
        ratio = np.median(seconds[name] / seconds[PLAIN])
        print(f"{1000 * np.median(seconds[name]):11.3f}{ratio:7.2f}")


def label(name: Any) -> str:
    return name if name == PLAIN else f"n = {name}"


def draw(
    results: dict[Any, list[Run]], seconds: dict[Any, np.ndarray], path: str
) -> None:
    figure, (losses, trajectories, costs) = subplots((12, 4.2), 1, 3)
    for colour, (name, (run, *_)) in enumerate(results.items()):
        look = dict(color=f"C{colour}", label=label(name))
        steps = [row.step for row in run.log]
        losses.plot(steps, [row.val_loss for row in run.log], **look)
        lowest = min(row.val_loss for row in run.log)
        losses.plot(run.step, lowest, "o", color=f"C{colour}")
        trajectories.plot(steps, [row.values.noise for row in run.log], **look)
        decay = [row.values.decay[0] for row in run.log]
        trajectories.plot(steps, decay, "--", color=f"C{colour}")
        test = mean_and_std([x.test for x in results[name]])
        ratio = np.median(seconds[name] / seconds[PLAIN])
        costs.errorbar(ratio, *test, fmt="o", capsize=4, **look)
    losses.set(ylabel="validation loss", xlabel="training step", yscale="log")
    title = "noise (solid), decay of layer 1 (dashed)"
    trajectories.set(title=title, xlabel="training step", yscale="log")
    costs.set(ylabel="test accuracy, %", xlabel="CPU time of a step / plain")
    costs.legend()
    save(figure, path, losses, trajectories, costs)


QUICK = dict(size=200, width=32, steps=800)


def main(
    dataset: str = "digits",
    *,
    folder: str | None = None,
    size: int = 300,
    width: int = 128,
    steps: int = 4000,
    patience: int = 1000,
    seeds: int = 1,
    first: int = 0,
    figure: str = "training_loop.png",
) -> tuple[dict[Any, list[Run]], dict[Any, np.ndarray]]:
    results, seconds = {name: [] for name in (PLAIN, *EVERY)}, {}
    for seed in range(first, first + seeds):
        data = image_data.load(dataset, folder=folder, size=size, seed=seed)
        model, check = make_model(data.train, width, seed), seed == first
        options: Any = dict(steps=steps, patience=patience, seed=seed)
        runs = run_seed(model, data, check, **options)
        for name, run in runs.items():
            results[name].append(run)
        if check:
            print(f"Interrupted at step {INTERRUPT} and resumed: the same bits.\n")
            print_log(runs[EVERY[0]])
            seconds = measure_seconds(model, data)
    print_table(results, seconds)
    draw(results, seconds, figure)
    print(f"\nThe course of the runs is in {figure}.")
    return results, seconds


if __name__ == "__main__":
    command(
        main,
        __doc__,
        QUICK,
        width="of the hidden layers",
        steps="training steps at most",
        patience="in training steps",
    )
