"""Hypergradients by the implicit function theorem, through any linear solver."""

import functools as ft
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from .._checks import as_flag, as_int, as_number
from .._custom_types import Batch, Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import tree_add, tree_dot, tree_norm, tree_scale
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ForwardOverReverse
from .._sharding import whole_like
from .._solution import RESULTS
from .._state import Estimate, float_scalar, InnerState, Memory, TaskReport
from .base import AbstractAlgorithm
from .hessian import as_covector, as_vector, Point
from .settings import check_plain_inner


class ImplicitReport(eqx.Module):
    r"""Reports how well the assumptions of [`eqx_hpo.Implicit`][] held in a step. It is
    found in `state.metrics.diagnostics`.

    **Attributes:**

    - `result`: the result of the linear solve, an item of [`eqx_hpo.RESULTS`][]. It is
        `RESULTS.indefinite` if the solve succeeded but the curvature is negative.
    - `residual`: $\lVert (H + \rho I) x - \alpha \rVert / \lVert \alpha \rVert$.
    - `curvature`: the smallest curvature $u^\top (H + \rho I) u / u^\top u$ that was
        seen. A value below zero proves that the model is not at a minimum.
    - `gradient_norm`: the norm of the training gradient. It is zero at a minimum.
    - `solver_steps`: the number of steps of the linear solver. It is zero for a direct
        solver.
    - `solver`: the name of the linear solver.

    `residual` and `curvature` are NaN unless `curvature_steps` asks for them.
    """

    result: RESULTS
    residual: Float[Array, ""]
    curvature: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    solver_steps: Int[Array, ""]
    solver: str = eqx.field(static=True)


class Implicit(AbstractAlgorithm):
    r"""Computes the hypergradient at a minimum of the train loss,

    $$\frac{dC_2}{d\lambda} = \frac{\partial C_2}{\partial \lambda} - x^\top
    \frac{\partial^2 C_1}{\partial \theta \partial \lambda}, \qquad
    (H + \rho I) \, x = \alpha = \frac{\partial C_2}{\partial \theta}, \qquad
    H = \frac{\partial^2 C_1}{\partial \theta^2},$$

    at the weights that `inner_steps` of training reach. It does not differentiate the
    way there. So memory is $O(P + H)$, plus the memory of the linear solver. The
    optimiser plays no part: a learning rate or a momentum among the hyperparameters is
    refused ([`eqx_hpo.FixedPoint`][] tunes them). The estimate needs a converged
    training. The [`eqx_hpo.ImplicitReport`][] in `state.metrics.diagnostics` says how
    close training came. A linear solve that fails does not stop the run: its answer is
    used if it is finite.

    Weights may be complex or in half precision. The solver sees real vectors, at least
    in single precision.

    `second_order` is the rule for the mixed product $x^\top \partial^2 C_1 / \partial
    \theta \partial \lambda$. Products with the Hessian are always exact.

    The Hessian is taken on the batch of the last inner step. With small batches it is
    noisy and may be indefinite. It is never formed, unless the solver does so. A
    model's state (`eqx.nn.State`) is held fixed.

    With `inner=optax.set_to_zero()` the model does not change. Use this for weights
    that another solver has put into `state.model`.

    ??? cite "References"

        Pedregosa, *Hyperparameter Optimization with Approximate Gradient*, ICML 2016.
        Lorraine et al., *Optimizing Millions of Hyperparameters by Implicit
        Differentiation*, AISTATS 2020.
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    second_order: AbstractSecondOrder = ForwardOverReverse()
    inner_steps: int = eqx.field(static=True, kw_only=True)
    linear_solver: lx.AbstractLinearSolver = eqx.field(kw_only=True)
    damping: Float[Array, ""] = eqx.field(
        kw_only=True, default=0.0, converter=lambda x: as_number("damping", x)
    )
    warm_start: bool = eqx.field(
        static=True,
        kw_only=True,
        default=True,
        converter=ft.partial(as_flag, "warm_start"),
    )
    curvature_steps: int | None = eqx.field(static=True, kw_only=True, default=None)
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    through: ClassVar[Through] = "gradient"
    val_at_each_step: ClassVar[bool] = False

    def __check_init__(self):
        if self.curvature_steps is not None:
            as_int("curvature_steps", self.curvature_steps, 0)
        check_plain_inner(self.inner)
        if not isinstance(self.linear_solver, lx.AbstractLinearSolver):
            raise ValueError(
                "`linear_solver` must be a `lineax.AbstractLinearSolver`, such as "
                "`lineax.CG(rtol=1e-3, atol=1e-3)`; got a "
                f"{type(self.linear_solver).__name__}."
            )

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del hyperparams, batch
        if not self.warm_start:
            return Memory()
        zeros = jtu.tree_map(jnp.zeros_like, as_vector(inner.params))
        return Memory(episode=zeros)

    def init_diagnostics(self) -> ImplicitReport:
        nans = [float_scalar(jnp.nan) for _ in range(3)]
        none, name = jnp.zeros((), int), type(self.linear_solver).__name__
        return ImplicitReport(RESULTS.successful, *nans, none, name)  # pyright: ignore

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        _check_axes(inner.params)
        inner, train = levels.run(inner, hyperparams, 0, self.inner_steps)
        last = jnp.asarray(self.inner_steps - 1)
        val, (alpha, _), direct = levels.validation_gradient(inner, hyperparams, last)
        point = Point(levels, inner, last)
        hessian, gradient = point.hessian(hyperparams, self.damping)
        alpha = as_covector(alpha)
        options = {"y0": memory.episode} if self.warm_start else {}
        if _has_absolute_test(self.linear_solver):
            options["preconditioner"] = _scaling(hessian, alpha)
        # A solve that fails is reported and does not end the run.
        solved = lx.linear_solve(
            hessian, alpha, self.linear_solver, options=options, throw=False
        )
        x = solved.value
        indirect = point.mixed_product(hyperparams, jtu.tree_map(jnp.negative, x))
        return Estimate(
            inner=inner,
            memory=Memory(episode=x) if self.warm_start else memory,
            hypergradient=tree_add(direct, indirect),
            train=train,
            val=val,
            diagnostics=self._report(hessian, solved, alpha, gradient),
        )

    def _report(
        self,
        hessian: lx.AbstractLinearOperator,
        solved: lx.Solution,
        alpha: PyTree,
        gradient: PyTree,
    ) -> ImplicitReport:
        result = RESULTS.promote(solved.result)
        residual = curvature = jnp.array(jnp.nan)
        if self.curvature_steps is not None:
            product = hessian.mv(solved.value)
            residual = tree_norm(jtu.tree_map(jnp.subtract, product, alpha))
            residual = _divide(residual, tree_norm(alpha))
            square = tree_norm(solved.value) ** 2
            along = _divide(tree_dot(solved.value, product), square)
            smallest, largest = _ritz_values(hessian, alpha, self.curvature_steps)
            curvature = jnp.fmin(along, smallest)
            # Rounding alone can push a curvature of zero below zero.
            rounding = 100 * jnp.finfo(curvature.dtype).eps
            indefinite = curvature < -rounding * jnp.fmax(jnp.abs(along), largest)
            indefinite &= result == RESULTS.successful
            result = RESULTS.where(indefinite, RESULTS.indefinite, result)
        return ImplicitReport(
            result=result,
            residual=float_scalar(residual),
            curvature=float_scalar(curvature),
            gradient_norm=float_scalar(tree_norm(gradient)),
            solver_steps=jnp.asarray(solved.stats.get("num_steps", 0), int),
            solver=type(self.linear_solver).__name__,
        )


Implicit.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractAlgorithm`][], of which `inner` must not depend on the
hyperparameters,

- `linear_solver`: any solver of Lineax for the system with the Hessian, which is
    declared positive semidefinite. Start with `lineax.CG(rtol, atol)`
    (`rtol=0, atol=0, max_steps=n` gives `n` steps without a test). Other choices are
    `lineax.GMRES` or `lineax.BiCGStab` for an indefinite Hessian, `lineax.Cholesky()`
    or `lineax.LU()` for few weights, and [`eqx_hpo.Neumann`][] or
    [`eqx_hpo.Nystrom`][].
- `damping`: the number $\rho$ that is added to the diagonal, at least zero.
- `warm_start`: whether a solver that takes a first estimate starts from the solution of
    the step before.
- `curvature_steps`: the number of products with the Hessian that look for negative
    curvature (by Lanczos' method, from $\alpha$). One more product finds the residual
    and the curvature along $x$. With 0 only this one is made. With `None` none is made,
    and the report holds only what costs nothing.
"""


def _check_axes(params: PyTree) -> None:
    if any(whole_like(x) is not None for x in jtu.tree_leaves(params)):
        raise ValueError(
            "`state.model` lies along Explicit axes of a mesh, which linear solves by "
            "Lineax do not take. Make the mesh with "
            "`axis_types=(jax.sharding.AxisType.Auto,)`."
        )


def _has_absolute_test(solver: lx.AbstractLinearSolver) -> bool:
    """Tells whether a solver treats curvatures below a fixed number as zero."""
    if isinstance(solver, lx.Normal):
        solver = solver.inner_solver
    return isinstance(solver, lx.CG)


def _scaling(
    operator: lx.AbstractLinearOperator, vector: PyTree
) -> lx.AbstractLinearOperator:
    """Makes a preconditioner that is a multiple of the identity. It changes no iterate
    of conjugate gradients. But with it, Lineax compares curvatures with the rounding
    error of the curvature along `vector`, in place of 100 times that of `size`."""
    along = _divide(tree_norm(operator.mv(vector)), tree_norm(vector))
    scale = 100 * operator.in_size() / jnp.where(along > 0, along, 1)
    return lx.FunctionLinearOperator(
        lambda v: tree_scale(scale, v),
        operator.in_structure(),
        lx.positive_semidefinite_tag,
    )


def failed_solve(diagnostics: Any) -> tuple[RESULTS, str] | None:
    """Finds a linear solve that was not successful, the first one over tasks. Returns
    its result and the name of the solver, or `None` if all were successful."""
    if isinstance(diagnostics, TaskReport):
        diagnostics = diagnostics.tasks
    if not isinstance(diagnostics, ImplicitReport):
        return None
    failed = jnp.atleast_1d(diagnostics.result != RESULTS.successful)
    if not jnp.any(failed):
        return None
    first = jnp.argmax(failed)
    result = jtu.tree_map(lambda x: jnp.atleast_1d(x)[first], diagnostics.result)
    return result, diagnostics.solver


def _ritz_values(
    operator: lx.AbstractLinearOperator, start: PyTree, steps: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Estimates the smallest and the largest eigenvalue of a symmetric operator by
    `steps` steps of Lanczos' method. Returns NaN for zero steps."""
    dtype = jnp.result_type(*jtu.tree_leaves(start))
    if steps == 0:
        return jnp.array(jnp.nan, dtype), jnp.array(jnp.nan, dtype)

    def step(carry, _):
        old, now, beta = carry
        product = operator.mv(now)
        alpha = tree_dot(now, product).astype(dtype)
        new = tree_add(product, tree_scale(-alpha, now))
        new = tree_add(new, tree_scale(-beta, old))
        norm = tree_norm(new).astype(dtype)
        # Nothing but rounding is left where the Krylov space is exhausted.
        ends = norm <= 100 * jnp.finfo(dtype).eps * jnp.abs(alpha)
        norm = jnp.where(ends, 0, norm)
        new = tree_scale(_divide(jnp.where(ends, 0, 1).astype(dtype), norm), new)
        return (now, new, norm), (alpha, norm)

    zeros = jtu.tree_map(jnp.zeros_like, start)
    norm = tree_norm(start).astype(dtype)
    first = tree_scale(_divide(jnp.ones((), dtype), norm), start)
    carry = (zeros, first, jnp.zeros((), dtype))
    _, (alphas, betas) = lax.scan(step, carry, length=steps)
    # What comes after the end is a block of its own: it must not be seen as zero.
    alive = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(betas[:-1] == 0)]) == 0
    diagonal = jnp.diag(jnp.where(alive, alphas, alphas[0]))
    off = jnp.diag(betas[:-1], 1)
    values = jnp.linalg.eigvalsh(diagonal + off + off.T)
    return values[0], values[-1]


def _divide(x: Array, y: Array) -> Array:
    """Divides, and returns zero where `y` is zero."""
    return jnp.where(y == 0, 0, x / jnp.where(y == 0, 1, y))
