"""The state of a bilevel optimisation, as one pytree of arrays."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._checks import check_type
from ._custom_types import FloatScalar, Hyperparams, Model


class Metrics(eqx.Module):
    """Reports what the last `step` saw. No algorithm reads it.

    **Attributes:**

    - `train_loss`: the train loss of the last inner step, before its update.
    - `val_loss`: the validation loss of the model that the step reached.
    - `hypergradient_norm`: the Euclidean norm of the hypergradient over all `raw`
        arrays.
    - `aux`: `(train_aux, val_aux)` with `Problem(..., has_aux=True)`, else `None`.
    - `diagnostics`: the algorithm's own report on its estimate. This is an
        [`eqx_hpo.ImplicitReport`][] from [`eqx_hpo.Implicit`][], an
        [`eqx_hpo.EvolutionReport`][] from [`eqx_hpo.Evolution`][], an
        [`eqx_hpo.PenaltyReport`][] from [`eqx_hpo.Penalty`][] with `bias_every`, a
        [`eqx_hpo.TaskReport`][] from [`eqx_hpo.MetaLearner`][], and otherwise `None`.

    The numbers are NaN before the first step. A skipped step reports the values that
    caused the skip.
    """

    train_loss: Float[Array, ""]
    val_loss: Float[Array, ""]
    hypergradient_norm: Float[Array, ""]
    aux: Any
    diagnostics: Any = None


class TaskReport(eqx.Module):
    r"""Reports how far the tasks of an [`eqx_hpo.MetaLearner`][] agree on the
    hypergradient. It is found in `state.metrics.diagnostics`.

    The hypergradient is the mean over the tasks. Its standard error is $s / \sqrt{n}$,
    where $s$ is the standard deviation over the $n$ tasks. A coordinate whose
    hypergradient is no larger than this error may have the wrong sign.
    [`eqx_hpo.gate`][] can hold such a coordinate in place.

    The error is right if the tasks are independent. [`eqx_hpo.folds`][] share most of
    their train data, so for them it is an approximation. Repeated folds share all of
    their data: each further repeat makes the reported error smaller, although it brings
    no new data. The error is then too small by a factor of about the square root of the
    number of repeats.

    **Attributes:**

    - `standard_error`: the standard error of each coordinate, in the shape of the
        hypergradient. It is `None` with a single task, and NaN before the first step.
    - `tasks`: the diagnostics of the wrapped algorithm, with an axis for the tasks.
    """

    standard_error: Hyperparams
    tasks: Any


class Memory(eqx.Module):
    """Holds the memory that an algorithm carries from step to step.

    **Attributes:**

    - `episode`: the part that belongs to the present training. `init_memory` makes it
        at the start, and again at each restart of the inner level.
    - `lasting`: the part that is kept over restarts. Within [`eqx_hpo.MetaLearner`][]
        all tasks share one `lasting`, while each task has its own `episode`.
    """

    episode: PyTree = None
    lasting: PyTree = None


class BilevelState(eqx.Module):
    """Holds everything that changes during an optimisation, as one pytree. It can be
    compiled, scanned, mapped, sharded and saved as one value. `init` makes the first
    state, and `step` makes the next one from it.

    **Attributes:**

    - `model`: the model as trained so far, in the structure given to `init`.
    - `hyperparams`: the hyperparameters, with their placeholders.
    - `inner_opt_state`: the state of the inner Optax optimiser.
    - `outer_opt_state`: the state of the outer Optax optimiser.
    - `memory`: the [`eqx_hpo.Memory`][] that the algorithm carries from step to step.
    - `model_state`: an `eqx.nn.State`, or `None`.
    - `step`: the number of calls of `step` so far, including skipped ones.
    - `episode_step`: the number of inner steps that the model has taken since `init` or
        the last `restart`. Skipped calls do not count.
    - `skipped`: the number of calls in a row, up to the last one, that were skipped
        because a loss, the hypergradient or a part of the new state was not finite.
    - `total_skipped`: the number of skipped calls in all.
    - `first_skipped`: the number of the first skipped call, counted from 1. It is 0 if
        there is none.
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
    """Holds the part of the state that the inner level moves.

    **Attributes:**

    - `params`: the inexact arrays of the model, with `None` elsewhere. With
        [`eqx_hpo.mixed_precision`][], these are the masters within a step.
    - `opt_state`: the state of the inner optimiser.
    - `model_state`: an `eqx.nn.State`, or `None`.
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree


class Estimate(eqx.Module):
    r"""Holds the result of an algorithm's work in one call of `step`.

    **Attributes:**

    - `inner`: the inner state after the inner steps.
    - `memory`: the algorithm's memory after the inner steps.
    - `hypergradient`: an estimate of $dC_2/d\lambda$, with `None` where a leaf is not
        an inexact array. An algorithm's `estimate` returns the hypergradient of the
        unwrapped hyperparameters, unless the algorithm `sees_raw`. `step` converts it
        to that of the `raw` arrays.
    - `train`, `val`: the last `(loss, aux)` of each level. `val` is `None` if it was
        not taken.
    - `diagnostics`: the report that `step` puts into `state.metrics.diagnostics`.
    - `error`: the standard error of the hypergradient of the `raw` arrays, or `None` if
        it is unknown. The outer update gets it as the argument `error`.
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
    """Makes a scalar of the default float dtype, since reports must have the same dtype
    in every step."""
    return jnp.asarray(x, jnp.result_type(float))


def inner_state(state: BilevelState) -> InnerState:
    """Selects the part of a state that the inner level moves."""
    params = eqx.filter(state.model, eqx.is_inexact_array)
    return InnerState(params, state.inner_opt_state, state.model_state)
