"""The results of a run: its history, its outcome in words, and the `Solution`."""

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
from ._hyperparameter import unwrap
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


# Why a run may end early; all other items are of a linear solve.
_STOPPED = [
    RESULTS.nonfinite,
    RESULTS.interrupted,
    RESULTS.stopped,
    RESULTS.data_exhausted,
]


# Numbers in a row of the history up to which hyperparameters are recorded in full.
_FULL_ROW = 10**5


class Record(eqx.Module):
    """One row of the history."""

    step: Int[Any, ""]
    train_loss: Float[Any, ""]
    val_loss: Float[Any, ""]
    hypergradient_norm: Float[Any, ""]
    hyperparams: Hyperparams


class History(eqx.Module):
    """The course of a run, as NumPy arrays with one entry for each recorded step.

    **Attributes:**

    - `step`: the number of the step, from 1.
    - `train_loss`, `val_loss`, `hypergradient_norm`: those of `state.metrics` after it.
    - `hyperparams`: the unwrapped hyperparameters after it, each array with a leading
        axis over the records. If there are more than 100,000 numbers in all, arrays of
        more than three are recorded as `(mean, minimum, maximum)`.
    """

    step: Int[np.ndarray, " records"]
    train_loss: Float[np.ndarray, " records"]
    val_loss: Float[np.ndarray, " records"]
    hypergradient_norm: Float[np.ndarray, " records"]
    hyperparams: PyTree[Any]


class Discretised(eqx.Module):
    """Discrete hyperparameters at the end of their relaxation. The gap between the two
    losses is what the relaxation hid.

    **Attributes:**

    - `values`: the hyperparameters by [`eqx_hpo.discretise`][].
    - `val_loss`: the validation loss of the final model with them. The model was
        trained with the relaxed ones; train it again with these to know their worth.
    - `relaxed_val_loss`: the validation loss of the same model with the relaxed ones,
        at the centre of their noise.

    Both losses are of the same batch and key: of a single batch if the validation data
    are a [`eqx_hpo.Minibatch`][] or an iterator, so evaluate both on all data to
    measure a small gap.
    """

    values: Hyperparams
    val_loss: Float[Array, ""]
    relaxed_val_loss: Float[Array, ""]


class Solution(eqx.Module):
    """The result of a run.

    **Attributes:**

    - `model`: the trained model.
    - `hyperparams`: the tuned hyperparameters, placeholders included.
    - `values`: their constrained values.
    - `history`: a [`eqx_hpo.History`][].
    - `result`: an item of [`eqx_hpo.RESULTS`][]; compare it by `==`.
    - `state`: the last state; pass it to `tune` to go on.
    - `message`: the result in words, with the step at which it came about.
    - `discretised`: an [`eqx_hpo.Discretised`][] if there are discrete hyperparameters
        ([`eqx_hpo.Choice`][], [`eqx_hpo.Integer`][], [`eqx_hpo.Switch`][]), else
        `None`.
    """

    model: Model
    hyperparams: Hyperparams
    values: Hyperparams
    history: History
    result: RESULTS
    state: BilevelState
    message: str
    discretised: Discretised | None


def record(state: BilevelState) -> Record:
    """Makes the row of the history that belongs to a state."""
    arrays = eqx.filter(unwrap(without_noise(state.hyperparams)), eqx.is_array)
    if sum(x.size for x in jtu.tree_leaves(arrays)) > _FULL_ROW:
        arrays = jtu.tree_map(_summarise, arrays)
    metrics = state.metrics
    return Record(
        step=state.step,
        train_loss=metrics.train_loss,
        val_loss=metrics.val_loss,
        hypergradient_norm=metrics.hypergradient_norm,
        hyperparams=arrays,
    )


def _summarise(x: Array) -> Array:
    if x.size <= 3:
        return x
    return jnp.stack([jnp.mean(x), jnp.min(x), jnp.max(x)])


def as_history(blocks: list[Record]) -> History:
    """Joins blocks of records, each with a leading axis."""
    joined = jtu.tree_map(lambda *x: np.concatenate(x), *blocks)
    return History(
        step=joined.step,
        train_loss=joined.train_loss,
        val_loss=joined.val_loss,
        hypergradient_norm=joined.hypergradient_norm,
        hyperparams=joined.hyperparams,
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


def describe(result: Any, state: BilevelState, discretised: Discretised | None) -> str:
    """Puts the result of a run in words."""
    step, skipped = int(state.step), int(state.skipped)
    if result == RESULTS.successful:
        text = f"Finished after step {step}."
    elif any(result == item for item in _STOPPED):
        text = f"{RESULTS[result]} Steps taken: {step}."
    else:
        text = (
            f"Finished after step {step}, but the linear solve of that step was not "
            f"successful: {RESULTS[result]}"
        )
    if skipped > 0:
        metrics = state.metrics
        text += (
            f" Not finite since step {step - skipped + 1}: train loss "
            f"{float(metrics.train_loss)}, validation loss {float(metrics.val_loss)}, "
            f"hypergradient norm {float(metrics.hypergradient_norm)}."
        )
    if discretised is not None:
        text += (
            f" Validation loss {float(discretised.val_loss):.4g} with discretised "
            f"hyperparameters, {float(discretised.relaxed_val_loss):.4g} with relaxed "
            "ones."
        )
    return text
