"""The second derivatives of the train loss at a point, as products with vectors.

The vectors are real, and in single precision at least, so that any linear solver takes
them: a complex array is a pair of real ones, and half precision is cast.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._custom_types import Hyperparams, IntScalar
from .._levels import Levels
from .._misc import as_single, match_types, tree_add, tree_scale
from .._second_order import ReverseOverReverse
from .._state import InnerState


class Point(eqx.Module):
    """The inner state at which the train loss of inner step `index` is looked at."""

    levels: Levels
    inner: InnerState
    index: IntScalar

    def hessian(
        self, hyperparams: Hyperparams, damping: Float[Array, ""]
    ) -> tuple[lx.AbstractLinearOperator, PyTree]:
        """Makes the damped Hessian as an operator, and the gradient."""
        exact = dataclasses.replace(self.levels, second_order=ReverseOverReverse())
        start = as_vector(self.inner.params)
        gradient, product = jax.linearize(
            lambda vector: self._gradient(exact, vector, hyperparams), start
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
            lambda hyperparams: self._gradient(self.levels, start, hyperparams),
            hyperparams,
        )
        return pullback(x)[0]

    def _gradient(
        self, levels: Levels, vector: PyTree, hyperparams: Hyperparams
    ) -> PyTree:
        levels = levels.in_single_precision(self.inner, hyperparams)
        params = _from_vector(vector, self.inner.params)
        if levels.train_loss.single is None:
            params = match_types(params, self.inner.params)
        else:
            hyperparams = jtu.tree_map(as_single, hyperparams)
        inner = dataclasses.replace(self.inner, params=params)
        gradient = levels.gradient(inner, hyperparams, self.index)[0]
        return as_covector(gradient)


def as_vector(tree: PyTree) -> PyTree:
    """Makes a vector of the inexact arrays of `tree`."""

    def split(x):
        x = as_single(x)
        return (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else x

    return jtu.tree_map(split, tree)


def as_covector(gradient: PyTree) -> PyTree:
    """Makes the vector of partial derivatives of a gradient. That of JAX in a complex
    number is the derivative in its real part minus `i` times that in its imaginary
    part."""
    return as_vector(jtu.tree_map(jnp.conj, gradient))


def _from_vector(vector: PyTree, like: PyTree) -> PyTree:
    join = lambda x, v: lax.complex(*v) if jnp.iscomplexobj(x) else v
    return jtu.tree_map(join, like, vector)
