"""The second derivatives of the train loss at a point, as products with vectors.

Any linear solver can take the vectors, since they are real and at least in single
precision. A complex array becomes a pair of real ones, and half precision is cast.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._custom_types import FloatScalar, Hyperparams, IntScalar
from .._levels import Levels
from .._misc import as_single, match_types, tree_add, tree_scale
from .._second_order import ReverseOverReverse
from .._state import InnerState


class Point(eqx.Module):
    """The inner state at which the train loss of inner step `index` is
    differentiated."""

    levels: Levels
    inner: InnerState
    index: IntScalar

    def hessian(
        self, hyperparams: Hyperparams, damping: Float[Array, ""]
    ) -> tuple[lx.AbstractLinearOperator, PyTree]:
        """Computes the damped Hessian, as an operator, and the gradient."""
        exact = dataclasses.replace(self.levels, second_order=ReverseOverReverse())
        start = as_vector(self.inner.params)
        gradient, product = jax.linearize(
            lambda vector: self._gradient(exact, vector, hyperparams)[0], start
        )
        operator = lx.FunctionLinearOperator(
            lambda v: tree_add(product(v), tree_scale(damping, v)),
            jax.eval_shape(lambda: start),
            lx.positive_semidefinite_tag,
        )
        return operator, gradient

    def mixed_product(self, hyperparams: Hyperparams, x: PyTree) -> Hyperparams:
        r"""Computes $x^\top \partial^2 C_1 / \partial \theta \partial \lambda$."""
        start = as_vector(self.inner.params)
        _, pullback = eqx.filter_vjp(
            lambda hyperparams: self._gradient(self.levels, start, hyperparams)[0],
            hyperparams,
        )
        return pullback(x)[0]

    def gradient(
        self, hyperparams: Hyperparams
    ) -> tuple[
        Callable[[PyTree], tuple[PyTree, Hyperparams]],
        tuple[PyTree, PyTree, tuple[FloatScalar, Any]],
    ]:
        r"""Computes the training gradient, for both products of a vector at once.

        **Returns:** a function from $v$ to $(Hv, v^\top \partial^2 C_1 / \partial
        \theta \partial \lambda)$ by the second-order rule; and what `Levels.gradient`
        returns.
        """
        start = as_vector(self.inner.params)
        _, pullback, found = eqx.filter_vjp(
            lambda vector, h: self._gradient(self.levels, vector, h),
            start,
            hyperparams,
            has_aux=True,
        )
        gradient, model_state, report = found
        gradient = match_types(gradient, self.inner.params)
        return pullback, (gradient, model_state, report)

    def _gradient(
        self, levels: Levels, vector: PyTree, hyperparams: Hyperparams
    ) -> tuple[PyTree, tuple[PyTree, PyTree, tuple[FloatScalar, Any]]]:
        """Computes the gradient as a covector, and what `Levels.gradient` returns."""
        levels = levels.in_single_precision(self.inner, hyperparams)
        params = _from_vector(vector, self.inner.params)
        if levels.train_loss.single is None:
            params = match_types(params, self.inner.params)
        else:
            hyperparams = jtu.tree_map(as_single, hyperparams)
        inner = dataclasses.replace(self.inner, params=params)
        found = levels.gradient(inner, hyperparams, self.index)
        return as_covector(found[0]), found


def as_vector(tree: PyTree) -> PyTree:
    """Makes a vector from the inexact arrays of `tree`."""

    def split(x):
        x = as_single(x)
        return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else x

    return jtu.tree_map(split, tree)


def as_covector(gradient: PyTree) -> PyTree:
    """Makes the vector of partial derivatives from a gradient of JAX. For a complex
    number, that gradient is the derivative in the real part minus `i` times the
    derivative in the imaginary part."""
    return as_vector(jtu.tree_map(jnp.conj, gradient))


def _from_vector(vector: PyTree, like: PyTree) -> PyTree:
    join = lambda x, v: lax.complex(*v) if jnp.iscomplexobj(x) else v
    return jtu.tree_map(join, like, vector)
