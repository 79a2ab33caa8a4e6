"""The state of a bilevel optimisation, one pytree of arrays."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._custom_types import FloatScalar, Hyperparams, Model


class Metrics(eqx.Module):
    """What the last `step` saw. A report: no algorithm reads it.

    **Attributes:**

    - `train_loss`: the train loss of the last inner step, before its update.
    - `val_loss`: the validation loss of the model that the step reached.
    - `hypergradient_norm`: the Euclidean norm of the hypergradient over all `raw`
        arrays.
    - `aux`: `(train_aux, val_aux)` with `Problem(..., has_aux=True)`, else `None`.
    - `diagnostics`: what the algorithm says of its estimate: an
        [`eqx_hpo.ImplicitReport`][] of [`eqx_hpo.Implicit`][], else `None`.

    NaN before the first step. A skipped step reports the values that caused it.
    """

    train_loss: Float[Array, ""]
    val_loss: Float[Array, ""]
    hypergradient_norm: Float[Array, ""]
    aux: Any
    diagnostics: Any = None


class Memory(eqx.Module):
    """What an algorithm carries from step to step.

    **Attributes:**

    - `episode`: what belongs to the training at hand. All zeros at the start, and again
        after each restart of the inner level.
    - `lasting`: what lives on over restarts. Within [`eqx_hpo.MetaLearner`][] there is
        one for all tasks, while each task has its own `episode`.
    """

    episode: PyTree = None
    lasting: PyTree = None


class BilevelState(eqx.Module):
    """All that changes during an optimisation: to be jitted, scanned, vmapped, sharded
    and saved as one value. Made by `init`, and by `step` from another one.

    **Attributes:**

    - `model`: the model as trained so far, of the structure given to `init`.
    - `hyperparams`: the hyperparameters, placeholders included.
    - `inner_opt_state`: the state of the inner Optax optimiser.
    - `outer_opt_state`: the state of the outer Optax optimiser.
    - `memory`: what the algorithm itself carries from step to step, a
        [`eqx_hpo.Memory`][].
    - `model_state`: an `eqx.nn.State`, or `None`.
    - `step`: the number of `step` calls so far, the skipped ones included.
    - `skipped`: how many of the last calls in a row were skipped because a loss or a
        hypergradient was not finite.
    - `metrics`: a report of the last step.
    """

    model: Model
    hyperparams: Hyperparams
    inner_opt_state: PyTree
    outer_opt_state: PyTree
    memory: Memory
    model_state: PyTree
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    metrics: Metrics


class InnerState(eqx.Module):
    """The part of the state that the inner level moves.

    **Attributes:**

    - `params`: the inexact arrays of the model, `None` elsewhere.
    - `opt_state`: the state of the inner optimiser.
    - `model_state`: an `eqx.nn.State`, or `None`.
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree


class Estimate(eqx.Module):
    r"""What an algorithm makes of the inner steps of one call of `step`.

    **Attributes:**

    - `inner`: the inner state after the inner steps.
    - `memory`: the algorithm's own, updated.
    - `hypergradient`: an estimate of $dC_2/d\lambda$, shaped like the unwrapped
        hyperparameters, `None` where a leaf is not an inexact array.
    - `train`, `val`: the last `(loss, aux)` of each level.
    - `diagnostics`: what goes into `state.metrics.diagnostics`.
    """

    inner: InnerState
    memory: Memory
    hypergradient: Hyperparams
    train: tuple[FloatScalar, Any]
    val: tuple[FloatScalar, Any]
    diagnostics: Any = None


def float_scalar(x: Any) -> Float[Array, ""]:
    """A scalar of the default float dtype, so that a report has the same dtype in
    every step."""
    return jnp.asarray(x, jnp.result_type(float))
