"""The two losses of a bilevel problem, and one normal form for what they return."""

import functools as ft
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._checks import as_flag, check_function
from ._custom_types import Batch, FloatScalar, Hyperparams, Key, Loss, Model


class Problem(eqx.Module):
    r"""Holds the two losses of a bilevel problem. The model minimises the train loss.
    The hyperparameters minimise the validation loss of the trained model.

    $$\min_\lambda C_2(\theta_T(\lambda), \lambda), \qquad
    \theta_t = \Phi(\theta_{t-1}, \lambda)$$

    where $\Phi$ is one step of an Optax optimiser on the train loss $C_1(\theta,
    \lambda)$.

    Both losses are called as `loss(model, hyperparams, batch, key)`:

    - `model` has the structure of the model given to `init`. This is the whole model,
        or the rest that [`eqx_hpo.partition`][] returned
        (`eqx.combine(model, hyperparams)` puts the two together again).
    - `hyperparams` arrive unwrapped, as plain arrays that satisfy their constraints.
    - `batch` is one batch of the train or of the validation data.
    - `key` is a PRNG key, or `None` where none was given to `step`.

    Each loss returns a floating-point scalar, or `(scalar, aux)` if `has_aux=True`.

    A model with a state, such as one with BatchNorm, is trained with
    `init(..., model_state=state)`. The first argument of the losses is then
    `(model, model_state)`, and the train loss returns `(scalar, model_state)`, or
    `(scalar, (model_state, aux))` if `has_aux=True`. The validation loss may return the
    same; its model state is dropped.

    [`eqx_hpo.Evolution`][] needs no derivative of the validation loss. There it may be
    any function that JAX can trace, such as an accuracy or a simulator. It is
    minimised, so return one minus the accuracy. Code that runs outside JAX can be
    called by `jax.pure_callback`.
    """

    train_loss: Loss
    val_loss: Loss
    has_aux: bool = eqx.field(
        static=True, default=False, converter=ft.partial(as_flag, "has_aux")
    )

    def __check_init__(self):
        what = "a function `loss(model, hyperparams, batch, key)`"
        check_function("train_loss", self.train_loss, what)
        check_function("val_loss", self.val_loss, what)


Problem.__init__.__doc__ = """**Arguments:**

- `train_loss`: the loss that the inner optimiser minimises over the model.
- `val_loss`: the loss that the outer optimiser minimises over the hyperparameters.
- `has_aux`: whether both losses return `(scalar, aux)`. `aux` is any pytree of arrays
    and is reported in `state.metrics.aux`.
"""


def evaluate_train(
    problem: Problem,
    model: Model,
    model_state: PyTree,
    hyperparams: Hyperparams,
    batch: Batch,
    key: Key,
) -> tuple[FloatScalar, PyTree, Any]:
    """Computes the train loss as `(loss, model_state, aux)`."""
    first = _first_argument(model, model_state)
    out = problem.train_loss(first, hyperparams, batch, key)
    if model_state is None:
        loss, aux = _split(out, "train_loss", problem.has_aux)
        return loss, None, aux
    loss, rest = _split(out, "train_loss", True, "(scalar, model_state)")
    if not problem.has_aux:
        return loss, _check_model_state(rest, model_state), None
    if not (isinstance(rest, tuple) and len(rest) == 2):
        raise ValueError(
            "With a model state and `has_aux=True`, `train_loss` must return "
            f"`(scalar, (model_state, aux))`; its second part was a {_kind(rest)}."
        )
    return loss, _check_model_state(rest[0], model_state), rest[1]


def evaluate_val(
    problem: Problem,
    model: Model,
    model_state: PyTree,
    hyperparams: Hyperparams,
    batch: Batch,
    key: Key,
) -> tuple[FloatScalar, Any]:
    """Computes the validation loss as `(loss, aux)`."""
    first = _first_argument(model, model_state)
    out = problem.val_loss(first, hyperparams, batch, key)
    if model_state is None:
        return _split(out, "val_loss", problem.has_aux)
    returns_state = isinstance(out, tuple) and not problem.has_aux
    loss, aux = _split(out, "val_loss", problem.has_aux or returns_state)
    if returns_state:
        return loss, None
    if isinstance(aux, tuple) and len(aux) == 2 and _same(aux[0], model_state):
        aux = aux[1]
    return loss, aux


def _first_argument(model: Model, model_state: PyTree) -> Any:
    if model_state is None:
        return model
    # A copy: an `eqx.nn.State` may be used once, and the loss uses the one it gets.
    return model, jtu.tree_map(lambda x: x, model_state)


def _split(out: Any, name: str, pair: bool, form: str = "(scalar, aux)"):
    if pair:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"`{name}` must return `{form}`; got a {_kind(out)}.")
        loss, rest = out
    else:
        if isinstance(out, tuple):
            raise ValueError(
                f"`{name}` returned a tuple of {len(out)}. Return a scalar, or pass "
                "`Problem(..., has_aux=True)` if it returns `(scalar, aux)`."
            )
        loss, rest = out, None
    if not eqx.is_array_like(loss):
        raise ValueError(f"`{name}` must return a scalar; got a {_kind(loss)}.")
    loss = jnp.asarray(loss)
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` must return a floating-point scalar; got an array of shape "
            f"{loss.shape} and dtype {loss.dtype}. Reduce it, for example by its mean."
        )
    return loss, rest


def _check_model_state(got: PyTree, expected: PyTree) -> PyTree:
    if not _same(got, expected):
        raise ValueError(
            "`train_loss` must return the updated model state in its second part, as "
            f"it was given to `init`; got a {_kind(got)} of another structure."
        )
    return got


def _same(left: PyTree, right: PyTree) -> bool:
    return jtu.tree_structure(left) == jtu.tree_structure(right)


def _kind(x: Any) -> str:
    return type(x).__name__
