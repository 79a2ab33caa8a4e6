r"""The rules for the derivative of the training gradient.

Every hypergradient needs, for some vector $v$ and the train loss $C_1(\theta, \rho)$
(with $\rho$ the hyperparameters and the model state), the product

$$v^\top \frac{\partial}{\partial (\theta, \rho)} \nabla_\theta C_1(\theta, \rho).$$

It is the pull-back of $v$ through the gradient function. So each rule here is a
derivative rule for that function and nothing else. JAX differentiates everything on top
(an Optax update, a scan over many of them) as usual, and meets the rule inside.
"""

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from ._checks import as_number
from ._custom_types import FloatScalar
from ._misc import as_single, holds_half, tree_add, tree_norm


# loss(params, rest, args) -> (loss, (carried, report)). `params`, `rest` and `carried`
# are differentiable, `args` is any pytree of arrays, `report` is never differentiated.
LossFn: TypeAlias = Callable[
    [PyTree, PyTree, PyTree], tuple[FloatScalar, tuple[PyTree, Any]]
]
# gradient(params, rest, args) -> (d loss / d params, carried, (loss, report))
GradientFn: TypeAlias = Callable[
    [PyTree, PyTree, PyTree], tuple[PyTree, PyTree, tuple[FloatScalar, Any]]
]
# gradients(params, rest) -> (d loss / d params, d loss / d rest)
_Gradients: TypeAlias = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
# product(gradients, params, rest, v, settings): the derivative of `gradients` along `v`
# in `params`, by a rule with these settings
_Product: TypeAlias = Callable[[_Gradients, PyTree, PyTree, PyTree, Any], PyTree]


class AbstractSecondOrder(eqx.Module):
    """A rule that says how to differentiate the training gradient."""

    @abc.abstractmethod
    def differentiate(self, loss: LossFn) -> GradientFn:
        """Builds the gradient function of a loss, with this rule as its reverse-mode
        derivative.

        **Arguments:**

        - `loss`: a function that is called as `loss(params, rest, args)` and returns
            `(scalar, (carried, report))`. All leaves of `params`, `rest` and `carried`
            are inexact arrays. It closes over no traced arrays: `args` holds all that
            it needs. A rule with a custom VJP must not close over traced arrays either,
            including its own settings.

        **Returns:** a function of the same arguments that returns
        `(gradient, carried, (scalar, report))`. Its derivative in `args` is zero, and
        so is the derivative of the last part.
        """


class ReverseOverReverse(AbstractSecondOrder):
    """Applies reverse mode to the training gradient. The result is exact.

    It keeps the tape of the whole gradient evaluation. It works with every loss that
    JAX can differentiate twice in reverse mode. The gradient has no custom rule here,
    so JAX can also push it forward.
    """

    def differentiate(self, loss: LossFn) -> GradientFn:
        def gradient(params, rest, args):
            # `args` has no derivative under the other rules either.
            return _gradient(loss, params, rest, lax.stop_gradient(args))

        return gradient


class ForwardOverReverse(AbstractSecondOrder):
    r"""Applies forward mode to the training gradient. The result is exact, and needs no
    second-order tape.

    By the symmetry of second derivatives the product is a derivative *along* $v$,

    $$v^\top \frac{\partial}{\partial (\theta, \rho)} \nabla_\theta C_1 =
    \frac{d}{d\epsilon} \nabla_{(\theta, \rho)} C_1(\theta + \epsilon v, \rho)
    \Big|_{\epsilon=0},$$

    so a single `jax.jvp` of the gradient computes it (Pearlmutter, 1994). A loss whose
    own derivative rule is not the derivative of its value breaks the symmetry, and the
    product is wrong: use [`eqx_hpo.ReverseOverReverse`][].

    A `jax.custom_vjp` inside the loss works as long as JAX can differentiate its own
    forward and backward functions. Where it cannot (straight-through estimators, some
    adjoints of Diffrax), use [`eqx_hpo.ReverseOverReverse`][] or
    [`eqx_hpo.FiniteDifference`][].
    """

    def differentiate(self, loss: LossFn) -> GradientFn:
        def product(gradients, params, rest, v, settings):
            del settings
            with explain_no_forward_mode():
                fn = lambda params: gradients(params, rest)
                return jax.jvp(fn, (params,), (v,))[1]

        return _with_product(loss, product)


@contextlib.contextmanager
def explain_no_forward_mode(saying: str = "") -> Iterator[None]:
    """Says what to do about an error whose text has `saying`. The gradient itself is
    traced before, so that the error is one of its derivative."""
    try:
        yield
    except Exception as e:
        if saying not in str(e):
            raise
        raise ValueError(
            "The training gradient has no forward-mode derivative, which the default "
            "rule and `ForwardMode` take, as where a `jax.custom_vjp` cannot be "
            "differentiated twice. Use `second_order=eqx_hpo.ReverseOverReverse()` or "
            "`eqx_hpo.FiniteDifference()`, and in place of `ForwardMode` another "
            f"algorithm. (JAX raised: {e})"
        ) from e


def _as_epsilon(epsilon: Any) -> Float[Array, ""] | None:
    if isinstance(epsilon, str) and epsilon == "auto":
        return None
    return as_number("epsilon", epsilon, zero=False)


class FiniteDifference(AbstractSecondOrder):
    r"""Takes a central difference of two gradients along $v$ (the rule of DARTS),

    $$\frac{\nabla_{(\theta, \rho)} C_1(\theta + \epsilon v, \rho) -
    \nabla_{(\theta, \rho)} C_1(\theta - \epsilon v, \rho)}{2 \epsilon},
    \qquad \epsilon = \frac{\text{epsilon}}{\lVert v \rVert}.$$

    It relies on the same symmetry as [`eqx_hpo.ForwardOverReverse`][]. It costs two
    gradients for any number of hyperparameters, and needs only first-order derivatives
    of the loss. Both gradients use the same batch and the same key. Liu et
    al., *DARTS: Differentiable Architecture Search*, ICLR 2019, eq. 8.

    For a model in half precision, both gradients are evaluated in single precision,
    since their difference is smaller than the rounding of half precision. If the loss
    cannot be evaluated in single precision, they stay in half precision. The error then
    grows to 0.1 and more.
    """

    epsilon: Float[Array, ""] | None = eqx.field(default="auto", converter=_as_epsilon)

    def differentiate(self, loss: LossFn) -> GradientFn:
        return _with_product(loss, _central_difference, self.epsilon)


FiniteDifference.__init__.__doc__ = r"""**Arguments:**

- `epsilon`: the length of the step in the space of the model's parameters. It is a
    number, or `"auto"` for $(u \sqrt{P} / 2)^{1/3}$ with the machine precision $u$ and
    the number of parameters $P$. In single precision this is 0.01 for 400 parameters
    and 0.04 for a million. The choice balances two errors: that of rounding falls with
    the length, and that of higher derivatives grows with it.
"""


def _central_difference(gradients, params, rest, v, epsilon):
    args = _in_single_precision(gradients, params, rest)
    norm = tree_norm(v)
    # v / ||v||, and zero for v = 0: then both gradients are the same.
    inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
    if epsilon is None:
        epsilon = _balanced_epsilon(args[0])
    epsilon = jnp.asarray(epsilon, norm.dtype)

    def times(x, scale):
        # At least in the dtype of the norm: half precision might overflow.
        dtype = jnp.promote_types(x.dtype, norm.dtype)
        return x.astype(dtype) * scale.astype(dtype)

    def at(epsilon):
        step = epsilon * inverse
        move = lambda p, x: p + times(x, step).astype(p.dtype)
        return gradients(jtu.tree_map(move, args[0], v), args[1])

    up, down = at(epsilon), at(-epsilon)
    # The points lie epsilon / ||v|| along v to both sides.
    scale = norm / (2 * epsilon)
    slope = lambda u, d, x: times(u - d, scale).astype(x.dtype)
    return jtu.tree_map(slope, up, down, (params, rest))


def _in_single_precision(
    gradients: _Gradients, params: PyTree, rest: PyTree
) -> tuple[PyTree, PyTree]:
    """Casts half precision to single precision, if `gradients` takes it."""
    args = (params, rest)
    if not holds_half(args):
        return args
    single = jtu.tree_map(as_single, args)
    try:
        jax.eval_shape(gradients, *single)
    except Exception:
        return args
    return single


def _balanced_epsilon(params: PyTree) -> float:
    leaves = jtu.tree_leaves(params)
    size = max(1, sum(x.size for x in leaves))
    unit = max([float(jnp.finfo(x.dtype).eps) for x in leaves], default=1.0)
    return (unit * size**0.5 / 2) ** (1 / 3)


def _gradient(loss: LossFn, params: PyTree, rest: PyTree, args: PyTree):
    (value, (carried, report)), grad = jax.value_and_grad(loss, has_aux=True)(
        params, rest, args
    )
    return grad, carried, lax.stop_gradient((value, report))


def _with_product(loss: LossFn, product: _Product, settings: Any = None) -> GradientFn:
    """Makes the gradient function whose reverse-mode derivative is `product`. A custom
    VJP must not close over traced arrays, so `settings` are arguments of it."""

    @jax.custom_vjp
    def gradient(params, rest, args, settings):
        del settings
        return _gradient(loss, params, rest, args)

    def forward(params, rest, args, settings):
        out = gradient(params, rest, args, settings)
        return out, (params, rest, args, settings)

    def backward(residuals, cotangents):
        params, rest, args, settings = residuals
        v, carried_cotangent, _ = cotangents

        def gradients(params, rest):
            return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, rest, args)[0]

        out = product(gradients, params, rest, v, settings)
        # What the loss carries, the model state, has a derivative beside the gradient.
        if len(jtu.tree_leaves(carried_cotangent)) > 0:
            carried = lambda params, rest: loss(params, rest, args)[1][0]
            _, pullback = jax.vjp(carried, params, rest)
            out = tree_add(out, pullback(carried_cotangent))
        return *out, None, None

    gradient.defvjp(forward, backward)
    return lambda params, rest, args: gradient(params, rest, args, settings)
