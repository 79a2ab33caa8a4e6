"""Defines the results of a run: its history, its outcome in words, and the
`Solution`."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._custom_types import Hyperparams, Key, Model
from ._data import AbstractBatches
from ._discrete import discretise, without_noise
from ._draw import draw_run
from ._hyperparameter import unwrap
from ._monitor import Best, Readings
from ._problem import evaluate_val, Problem
from ._state import BilevelState, float_scalar


class RESULTS(lx.RESULTS):  # pyright: ignore
    nonfinite = (
        "A loss, the hypergradient or a part of the new state was not finite (NaN or "
        "inf) for too many steps in a row. None of those steps changed the model or "
        "the hyperparameters. Likely causes: a learning rate of the inner or of the "
        "outer optimiser that is too large; a hyperparameter that has run away (look "
        "at `history.hyperparams`); a logarithm, root or division at zero in a loss; "
        "or data that are not finite."
    )
    interrupted = "The run was interrupted from the keyboard."
    stopped = "The callback asked to stop."
    preempted = "The run was told to end by a signal, and can go on from its state."
    callback_failed = "A callback raised an exception: `exception` of the solution."
    patience = "The monitor saw nothing better for as long as its `patience` lasts."
    failed = (
        "An exception ended the run. It was raised, with the solution so far as its "
        "attribute `solution`."
    )
    diverged = (
        "The validation loss ended far above where it began. Likely causes: a learning "
        "rate of the inner or of the outer optimiser that is too large, or a "
        "hyperparameter that has run away (look at `history.hyperparams`)."
    )
    data_exhausted = (
        "An iterator of batches ended before the last step. Pass an iterable that can "
        "be started again, such as a data loader, to go through it many times."
    )
    indefinite = (
        "The Hessian of the train loss has negative curvature at the weights that the "
        "inner steps reached, so these are no minimum and the implicit hypergradient "
        "may point anywhere. Likely causes: too few inner steps (`gradient_norm` in "
        "the report says how far training is from its end), a loss without weight "
        "decay, or a small train batch. Add `damping`, or use `Unrolled` or `DrMAD`."
    )


# Numbers in a row of the history up to which hyperparameters are recorded in full.
_FULL_ROW = 10**5


class Record(eqx.Module):
    """One row of the history."""

    step: Int[Any, ""]
    train_loss: Float[Any, ""]
    val_loss: Float[Any, ""]
    hypergradient_norm: Float[Any, ""]
    skipped: Int[Any, ""]
    hyperparams: Hyperparams


class Course(eqx.Module):
    """The validation loss at the first and at the best step of a run, and the number of
    the best step. The losses are NaN if no step was finite. (The train loss says less:
    it may grow because the hyperparameters in it grow.)"""

    first: Float[Array, ""]
    best: Float[Array, ""]
    best_step: Int[Array, ""]


class History(eqx.Module):
    """Holds the course of a run as NumPy arrays with one entry for each recorded step.

    **Attributes:**

    - `step`: the number of the step, counted from 1.
    - `train_loss`, `val_loss`, `hypergradient_norm`: the entries of `state.metrics`
        after the step.
    - `skipped`: the number of steps skipped so far.
    - `hyperparams`: the unwrapped hyperparameters after the step. Each array has a
        leading axis over the records. If the hyperparameters hold more than 100,000
        numbers in all, each array with more than three is recorded as
        `(mean, minimum, maximum)`.
    - `monitor`: the [`eqx_hpo.Readings`][] of an [`eqx_hpo.Monitor`][], or `None`
        without one.
    """

    step: Int[np.ndarray, " records"]
    train_loss: Float[np.ndarray, " records"]
    val_loss: Float[np.ndarray, " records"]
    hypergradient_norm: Float[np.ndarray, " records"]
    skipped: Int[np.ndarray, " records"]
    hyperparams: PyTree[Any]
    monitor: Readings | None


class Discretised(eqx.Module):
    """Compares discrete hyperparameters with their relaxation at the end of a run. The
    gap between the two losses shows the error that the relaxation hid.

    **Attributes:**

    - `values`: the hyperparameters as [`eqx_hpo.discretise`][] returns them.
    - `val_loss`: the validation loss of the final model with these values. This model
        was trained with the relaxed values. Train it again with the discrete ones to
        know their worth.
    - `relaxed_val_loss`: the validation loss of the same model with the relaxed values,
        at the centre of their noise.

    Both losses use the same batch and the same key. They use a single batch if the
    validation data are an [`eqx_hpo.Minibatch`][] or an iterator: to measure a small
    gap, evaluate both on all data.
    """

    values: Hyperparams
    val_loss: Float[Array, ""]
    relaxed_val_loss: Float[Array, ""]


class Solution(eqx.Module):
    """Holds the result of a run.

    **Attributes:**

    - `model`: the trained model. With an [`eqx_hpo.Monitor`][] it is that of the best
        state, otherwise that of the last state. The same holds for `hyperparams` and
        `values`.
    - `hyperparams`: the tuned hyperparameters, with their placeholders.
    - `values`: the constrained values of the hyperparameters.
    - `history`: an [`eqx_hpo.History`][].
    - `result`: an item of [`eqx_hpo.RESULTS`][]. Compare it by `==`.
    - `state`: the last state. Pass it to `tune` to continue the run.
    - `message`: the result in words, with the number of the last step.
    - `best`: the [`eqx_hpo.Best`][] state that the monitor saw, or `None` without a
        monitor.
    - `discretised`: an [`eqx_hpo.Discretised`][] if there are discrete hyperparameters
        ([`eqx_hpo.Choice`][], [`eqx_hpo.Integer`][], [`eqx_hpo.Switch`][]), else
        `None`.
    - `exception`: the exception that a callback raised, if the result is
        `RESULTS.callback_failed`, else `None`.
    """

    model: Model
    hyperparams: Hyperparams
    values: Hyperparams
    history: History
    result: RESULTS
    state: BilevelState
    message: str
    best: Best | None
    discretised: Discretised | None
    exception: Exception | None = None

    def draw(self) -> Any:
        """Draws the history of the run and marks the best state of a monitor. It needs
        Matplotlib: `pip install 'eqx_hpo[examples]'`.

        There are panels for the losses, the metric of a monitor, the norm of the
        hypergradient, and each hyperparameter array. An array with at most 8 entries is
        drawn as a line for each entry. A larger one is drawn as its mean, with bands
        from the first to the third quartile and from the minimum to the maximum. If
        there are more than 9 arrays, the last panel shows the means of the remaining
        ones. A scale is logarithmic where positive numbers differ tenfold. A cross
        marks a record before which steps were skipped.

        ```python
        solution.draw().savefig("run.png")
        ```

        **Returns:** a `matplotlib.figure.Figure`. It opens no window. A notebook shows
        it as the value of a cell.
        """
        return draw_run(self.history, self.values, self.best)


def record(state: BilevelState) -> Record:
    """Makes the row of the history for a state."""
    arrays = constrained(state.hyperparams)
    if sum(x.size for x in jtu.tree_leaves(arrays)) > _FULL_ROW:
        arrays = jtu.tree_map(_summarise, arrays)
    metrics = state.metrics
    return Record(
        step=state.step,
        train_loss=metrics.train_loss,
        val_loss=metrics.val_loss,
        hypergradient_norm=metrics.hypergradient_norm,
        skipped=state.total_skipped,
        hyperparams=arrays,
    )


def _summarise(x: Array) -> Array:
    return x if x.size <= 3 else mean_min_max(x)


def constrained(hyperparams: Hyperparams) -> PyTree[Array]:
    """Unwraps the arrays that a report shows, at the centre of their noise."""
    return eqx.filter(unwrap(without_noise(hyperparams)), eqx.is_array)


def mean_min_max(x: Array) -> Float[Array, "3"]:
    return jnp.stack([jnp.mean(x), jnp.min(x), jnp.max(x)])


def as_history(blocks: list[Record], monitor: Readings | None) -> History:
    """Joins blocks of records, each with a leading axis."""
    joined = jtu.tree_map(lambda *x: np.concatenate(x), *blocks)
    return History(
        step=joined.step,
        train_loss=joined.train_loss,
        val_loss=joined.val_loss,
        hypergradient_norm=joined.hypergradient_norm,
        skipped=joined.skipped,
        hyperparams=joined.hyperparams,
        monitor=monitor,
    )


@eqx.filter_jit
def compare_discretised(
    problem: Problem, state: BilevelState, val: AbstractBatches, key: Key
) -> Discretised:
    """Evaluates both forms of the hyperparameters on the same batch."""
    draw_key, loss_key = (None, None) if key is None else jr.split(key)
    batch = val.draw(jnp.array(0), state.step, draw_key)

    def loss(values):
        model, model_state = state.model, state.model_state
        return evaluate_val(problem, model, model_state, values, batch, loss_key)[0]

    relaxed = unwrap(without_noise(state.hyperparams))
    values = discretise(state.hyperparams)
    return Discretised(
        values=values,
        val_loss=float_scalar(loss(values)),
        relaxed_val_loss=float_scalar(loss(relaxed)),
    )


def start_course() -> Course:
    """Makes the course of a run before its first step."""
    nan = lambda: jnp.full((), jnp.nan, float)  # of a strong dtype, as losses are
    return Course(nan(), nan(), jnp.zeros((), int))


def follow(course: Course, state: BilevelState) -> Course:
    """Updates the course with the loss of a step, unless the step was skipped."""
    loss, is_good = state.metrics.val_loss, state.skipped == 0
    is_better = is_good & ~(loss >= course.best)  # NaN is no number to be below
    return Course(
        jnp.where(is_good & jnp.isnan(course.first), loss, course.first),
        jnp.where(is_better, loss, course.best),
        jnp.where(is_better, state.step, course.best_step),
    )


def has_diverged(course: Course, state: BilevelState) -> bool:
    """Tells whether the loss ended far above its first value: by more than ten times
    that value, and by more than ten times what it had gained until its best step."""
    first, last = float(course.first), float(state.metrics.val_loss)
    scale = max(abs(first), first - float(course.best))
    return scale > 0 and last - first > 10 * scale


def describe(
    result: Any,
    state: BilevelState,
    course: Course,
    solve: tuple[Any, str] | None,
    discretised: Discretised | None,
) -> str:
    """Describes the result of a run in words. `solve` holds the result of a linear
    solve that failed in the last step, and the name of its solver, or is `None`."""
    step = int(state.step)
    if solve is not None and result in (solve[0], RESULTS.nonfinite):
        text = _describe_solve(result, step, *solve)
    elif result == RESULTS.successful:
        text = f"Finished after step {step}."
    else:
        text = f"{RESULTS[result]} Steps taken: {step}."
    text += describe_skipped(state) + _describe_course(course, state)
    if discretised is not None:
        text += (
            f" Validation loss {float(discretised.val_loss):.4g} with discretised "
            f"hyperparameters, {float(discretised.relaxed_val_loss):.4g} with relaxed "
            "ones."
        )
    return text


def _describe_solve(result: Any, step: int, outcome: Any, solver: str) -> str:
    if result == RESULTS.nonfinite:
        return (
            f"The linear solver `{solver}` failed in the last steps, which were not "
            f"finite and changed nothing: {RESULTS[outcome]} Add `damping`, take more "
            f"inner steps, or use another solver. Steps taken: {step}."
        )
    return (
        f"Finished after step {step}, but the linear solver `{solver}` was not "
        f"successful in that step: {RESULTS[outcome]}"
    )


def describe_skipped(state: BilevelState) -> str:
    """Counts the skipped steps in words; empty if there are none."""
    step, total = int(state.step), int(state.total_skipped)
    if total == 0:
        return ""
    text = f" {total} of {step} steps were not finite; first at step "
    text += f"{int(state.first_skipped)}."
    if int(state.skipped) > 0:
        metrics = state.metrics
        text += (
            f" The last one: train loss {float(metrics.train_loss)}, validation loss "
            f"{float(metrics.val_loss)}, hypergradient norm "
            f"{float(metrics.hypergradient_norm)}."
        )
    return text


def _describe_course(course: Course, state: BilevelState) -> str:
    best, last = float(course.best), float(state.metrics.val_loss)
    if not (np.isfinite(best) and np.isfinite(last)):
        return ""
    return (
        f" Validation loss {float(course.first):.4g} at first, {best:.4g} at best "
        f"(step {int(course.best_step)}), {last:.4g} at the end."
    )
