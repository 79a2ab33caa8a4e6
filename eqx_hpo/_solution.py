"""What `tune` returns."""

from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Float, Int, PyTree

from ._custom_types import Hyperparams, Model
from ._hyperparameter import unwrap
from ._state import BilevelState


class RESULTS(lx.RESULTS):  # pyright: ignore
    nonfinite = (
        "A loss, the hypergradient or an update was not finite (NaN or inf) for too "
        "many steps in a row. None of those steps changed the model or the "
        "hyperparameters. Likely causes: a learning rate of the inner or of the outer "
        "optimiser that is too large; a hyperparameter that has run away (look at "
        "`history.hyperparams`); a logarithm, root or division at zero in a loss; or "
        "data that are not finite."
    )
    interrupted = "The run was interrupted from the keyboard."
    stopped = "The callback asked to stop."
    data_exhausted = (
        "An iterator of batches ended before the last step. Pass an iterable that can "
        "be started again, such as a data loader, to go through it many times."
    )


class Record(eqx.Module):
    """What one line of the history holds."""

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
        axis over the records.
    """

    step: Int[np.ndarray, " records"]
    train_loss: Float[np.ndarray, " records"]
    val_loss: Float[np.ndarray, " records"]
    hypergradient_norm: Float[np.ndarray, " records"]
    hyperparams: PyTree[Any]


class Solution(eqx.Module):
    """What a run came to.

    **Attributes:**

    - `model`: the trained model.
    - `hyperparams`: the tuned hyperparameters, placeholders included.
    - `values`: their constrained values.
    - `history`: a [`eqx_hpo.History`][].
    - `result`: an item of [`eqx_hpo.RESULTS`][].
    - `state`: the last state; pass it to `tune` to go on.
    - `message`: the result in words, with the step at which it came about.
    """

    model: Model
    hyperparams: Hyperparams
    values: Hyperparams
    history: History
    result: RESULTS
    state: BilevelState
    message: str


def record(state: BilevelState) -> Record:
    """The line of the history that a state makes."""
    arrays = eqx.filter(unwrap(state.hyperparams), eqx.is_array)
    metrics = state.metrics
    return Record(
        step=state.step,
        train_loss=metrics.train_loss,
        val_loss=metrics.val_loss,
        hypergradient_norm=metrics.hypergradient_norm,
        hyperparams=arrays,
    )


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
