"""The state of a bilevel optimisation, one pytree of arrays."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._checks import check_type
from ._custom_types import FloatScalar, Hyperparams, Model


class Metrics(eqx.Module):
    """What the last `step` saw. A report: no algorithm reads it.

    **Attributes:**

    - `train_loss`: the train loss of the last inner step, before its update.
    - `val_loss`: the validation loss of the model that the step reached.
    - `hypergradient_norm`: the Euclidean norm of the hypergradient over all `raw`
        arrays.
    - `aux`: `(train_aux, val_aux)` with `Problem(..., has_aux=True)`, else `None`.
    - `diagnostics`: the algorithm's own report on its estimate. An
        [`eqx_hpo.ImplicitReport`][] from [`eqx_hpo.Implicit`][], a
        [`eqx_hpo.TaskReport`][] from [`eqx_hpo.MetaLearner`][], otherwise `None`.

    The numbers are NaN before the first step. A skipped step reports the values that
    caused the skip.
    """

    train_loss: Float[Array, ""]
    val_loss: Float[Array, ""]
    hypergradient_norm: Float[Array, ""]
    aux: Any
    diagnostics: Any = None


class TaskReport(eqx.Module):
    r"""How far the tasks of [`eqx_hpo.MetaLearner`][] agree on the hypergradient, in
    `state.metrics.diagnostics`.

    The hypergradient is the mean over the tasks, and its standard error is $s /
    \sqrt{n}$ with $s$ the standard deviation over the $n$ tasks. A coordinate whose
    hypergradient is no larger than that may have the wrong sign: [`eqx_hpo.gate`][]
    leaves it where it is.

    The error is right where tasks are independent. [`eqx_hpo.folds`][] share most of
    their train data, so it is an approximation for them. Repeated folds share all of
    their data: each further repeat makes the reported error smaller, though it brings
    no new data. It is then too small by about the square root of the repeats.

    **Attributes:**

    - `standard_error`: that of each coordinate, shaped as the hypergradient. `None`
        with a single task, NaN before the first step.
    - `tasks`: the diagnostics of the wrapped algorithm, with an axis for the tasks.
    """

    standard_error: Hyperparams
    tasks: Any


class Memory(eqx.Module):
    """The memory that an algorithm carries from step to step.

    **Attributes:**

    - `episode`: the part that belongs to the training at hand. `init_memory` makes it
        at the start, and again at each restart of the inner level.
    - `lasting`: the part that lives on over restarts. Within [`eqx_hpo.MetaLearner`][]
        all tasks share one, while each task has its own `episode`.
    """

    episode: PyTree = None
    lasting: PyTree = None


class BilevelState(eqx.Module):
    """Everything that changes during an optimisation, as one pytree: jit, scan, vmap,
    shard and save it as one value. `init` makes the first state, and `step` makes the
    next one from it.

    **Attributes:**

    - `model`: the model as trained so far, of the structure given to `init`.
    - `hyperparams`: the hyperparameters, placeholders included.
    - `inner_opt_state`: the state of the inner Optax optimiser.
    - `outer_opt_state`: the state of the outer Optax optimiser.
    - `memory`: what the algorithm itself carries from step to step, a
        [`eqx_hpo.Memory`][].
    - `model_state`: an `eqx.nn.State`, or `None`.
    - `step`: the number of `step` calls so far, the skipped ones included.
    - `episode_step`: the number of inner steps that the model has taken since it was
        fresh. Skipped calls do not count.
    - `skipped`: how many of the last calls in a row were skipped, because a loss, the
        hypergradient or a part of the new state was not finite.
    - `total_skipped`: how many calls were skipped in all.
    - `first_skipped`: the number of the first call that was skipped, from 1; 0 if there
        is none.
    - `metrics`: a report of the last step.
    """

    model: Model
    hyperparams: Hyperparams
    inner_opt_state: PyTree
    outer_opt_state: PyTree
    memory: Memory
    model_state: PyTree
    step: Int[Array, ""]
    episode_step: Int[Array, ""]
    skipped: Int[Array, ""]
    total_skipped: Int[Array, ""]
    first_skipped: Int[Array, ""]
    metrics: Metrics


class InnerState(eqx.Module):
    """The part of the state that the inner level moves.

    **Attributes:**

    - `params`: the inexact arrays of the model, `None` elsewhere. Within a step those
        of [`eqx_hpo.mixed_precision`][] are the masters.
    - `opt_state`: the state of the inner optimiser.
    - `model_state`: an `eqx.nn.State`, or `None`.
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree


class Estimate(eqx.Module):
    r"""The result of an algorithm's work in one call of `step`.

    **Attributes:**

    - `inner`: the inner state after the inner steps.
    - `memory`: the algorithm's memory after them.
    - `hypergradient`: an estimate of $dC_2/d\lambda$, `None` where a leaf is not an
        inexact array. An algorithm's `estimate` gives that of the unwrapped
        hyperparameters; `step` goes on with that of the `raw` arrays.
    - `train`, `val`: the last `(loss, aux)` of each level; `None` for `val` if it was
        not taken.
    - `diagnostics`: goes into `state.metrics.diagnostics`.
    - `error`: the standard error of the hypergradient of the `raw` arrays, which the
        outer update gets as the argument `error`. `None` for single models.
    """

    inner: InnerState
    memory: Memory
    hypergradient: Hyperparams
    train: tuple[FloatScalar, Any]
    val: tuple[FloatScalar, Any] | None
    diagnostics: Any = None
    error: Hyperparams = None


def check_state(name: str, state: Any) -> None:
    what = "a `BilevelState` (that of a `Solution` is `solution.state`)"
    check_type(name, state, BilevelState, what)


def float_scalar(x: Any) -> Float[Array, ""]:
    """Makes a scalar of the default float dtype: reports have the same dtype in every
    step."""
    return jnp.asarray(x, jnp.result_type(float))


def inner_state(state: BilevelState) -> InnerState:
    """Takes the part that the inner level moves out of a state."""
    params = eqx.filter(state.model, eqx.is_inexact_array)
    return InnerState(params, state.inner_opt_state, state.model_state)
