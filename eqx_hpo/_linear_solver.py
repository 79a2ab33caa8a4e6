"""Two approximate linear solvers, to be used with `lineax.linear_solve`.

Both use the operator only through its products with vectors. Both are made for the
systems of `Implicit`, which are large and symmetric, and for which a rough answer
suffices.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from ._checks import as_int, as_number
from ._misc import tree_add, tree_norm, tree_scale


class Neumann(lx.AbstractLinearSolver):
    r"""Solves a linear system by the first terms of the Neumann series,

    $$A^{-1} v \approx a \sum_{j=0}^{\text{terms}-1} (I - a A)^j v,$$

    which are as many steps of gradient descent at rate $a$ on the system. The series
    converges if all eigenvalues of $aA$ lie between 0 and 2. A component with
    eigenvalue $\mu$ of $A$ then has the relative error $(1 - a \mu)^\text{terms}$. If
    the last term is larger than the first, as with eigenvalues below 0, the result is
    `breakdown`.

    The option `y0` is a first estimate. The series then applies to the remainder,
    $v - A y_0$.

    ??? cite "Reference"

        Lorraine et al., *Optimizing Millions of Hyperparameters by Implicit
        Differentiation*, AISTATS 2020, algorithm 3.
    """

    terms: int = eqx.field(static=True)
    learning_rate: Float[Array, ""]

    def __init__(self, terms: int, learning_rate: float | Float[Array, ""]):
        """**Arguments:**

        - `terms`: the number of terms. Each term but the first costs one product with
            the operator.
        - `learning_rate`: the rate $a$, above zero. It should be less than two over the
            largest eigenvalue.
        """
        self.terms = as_int("terms", terms, 1)
        self.learning_rate = as_number("learning_rate", learning_rate, zero=False)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> lx.AbstractLinearOperator:
        del options
        _check_square("Neumann", operator)
        return lx.linearise(operator)

    def compute(
        self,
        state: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        options: dict[str, Any],
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        y0 = options.get("y0")
        first = vector
        if y0 is not None:
            first = jtu.tree_map(jnp.subtract, vector, state.mv(y0))

        def add_term(carry, _):
            term, total = carry
            moved = tree_scale(-self.learning_rate, state.mv(term))
            term = tree_add(term, moved)
            return (term, tree_add(total, term)), None

        (last, total), _ = lax.scan(add_term, (first, first), length=self.terms - 1)
        solution = tree_scale(self.learning_rate, total)
        if y0 is not None:
            solution = tree_add(y0, solution)
        grows = tree_norm(last) > tree_norm(first)
        stats = {"num_steps": self.terms, "max_steps": self.terms}
        return solution, _breakdown_where(grows), stats

    def transpose(
        self, state: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lx.AbstractLinearOperator, dict[str, Any]]:
        del options
        return state.transpose(), {}

    def conj(
        self, state: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lx.AbstractLinearOperator, dict[str, Any]]:
        del options
        return lx.conj(state), {}

    def assume_full_rank(self) -> bool:
        return True


class _Spectrum(NamedTuple):
    """Represents `basis @ diag(values) @ basis.T`. `indefinite` tells whether a
    negative value is certain."""

    basis: Float[Array, "size rank"]
    values: Float[Array, " rank"]
    indefinite: Bool[Array, ""]


class Nystrom(lx.AbstractLinearSolver):
    r"""Solves $(A_k + \rho I) x = v$ with the Nyström approximation of rank $k$,

    $$A_k = C W^+ C^\top,$$

    where $C$ holds $k$ columns of $A$, drawn at random, and $W$ their rows of the same
    numbers. The rest is exact and uses the eigendecomposition of $A_k$. (Woodbury's
    formula contains $C^\top C$ and would square the condition number.) If `rank` is at
    least the size of $A$, it solves $(A + \rho I) x = v$.

    The operator must be real and symmetric. The solver holds $k$ vectors of the size of
    $v$, and takes $k$ products with the operator. If $W$ has a negative eigenvalue, $A$
    has one too, and the result is `breakdown`.

    ??? cite "Reference"

        Hataya and Yamada, *Nyström Method for Accurate and Scalable Implicit
        Differentiation*, AISTATS 2023.
    """

    rank: int = eqx.field(static=True)
    damping: Float[Array, ""]
    seed: int = eqx.field(static=True)

    def __init__(self, rank: int, damping: float | Float[Array, ""], seed: int = 0):
        r"""**Arguments:**

        - `rank`: the number $k$ of columns.
        - `damping`: the number $\rho$, above zero, or zero if `rank` is the size of the
            operator. It stands for the eigenvalues that the columns do not show.
        - `seed`: the seed for the choice of the columns.
        """
        self.rank = as_int("rank", rank, 1)
        self.damping = as_number("damping", damping)
        self.seed = as_int("seed", seed, 0)

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> _Spectrum:
        del options
        _check_square("Nystrom", operator)
        if not (
            lx.is_symmetric(operator)
            or lx.is_positive_semidefinite(operator)
            or lx.is_negative_semidefinite(operator)
        ):
            raise ValueError(
                "`Nystrom` needs an operator that is known to be symmetric: give it "
                "the tag `lineax.symmetric_tag` or `lineax.positive_semidefinite_tag`."
            )
        size = operator.in_size()
        chosen = np.arange(size)
        if self.rank < size:
            rng = np.random.default_rng(self.seed)
            chosen = np.sort(rng.choice(size, self.rank, replace=False))
        columns = _columns(operator, chosen)
        values, vectors = jnp.linalg.eigh(columns[chosen])
        cutoff = jnp.finfo(values.dtype).eps * len(chosen) * jnp.max(jnp.abs(values))
        indefinite = jnp.min(values) < -cutoff
        if self.rank >= size:
            return _Spectrum(vectors, values, indefinite)
        inverse = jnp.where(jnp.abs(values) > cutoff, 1 / values, 0)
        basis, triangle = jnp.linalg.qr(columns)
        root = triangle @ vectors
        values, vectors = jnp.linalg.eigh((root * inverse) @ root.T)
        return _Spectrum(basis @ vectors, values, indefinite)

    def compute(
        self, state: _Spectrum, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        del options
        flat, unflatten = jfu.ravel_pytree(vector)
        damping = self.damping.astype(flat.dtype)
        within = state.basis.T @ flat
        solution = state.basis @ (within / (state.values + damping))
        size, rank = state.basis.shape
        if rank < size:
            solution = solution + (flat - state.basis @ within) / damping
        stats = {"num_steps": rank, "max_steps": rank}
        return unflatten(solution), _breakdown_where(state.indefinite), stats

    def transpose(
        self, state: _Spectrum, options: dict[str, Any]
    ) -> tuple[_Spectrum, dict[str, Any]]:
        return state, options

    def conj(
        self, state: _Spectrum, options: dict[str, Any]
    ) -> tuple[_Spectrum, dict[str, Any]]:
        return state, options

    def assume_full_rank(self) -> bool:
        return True


def _check_square(name: str, operator: lx.AbstractLinearOperator) -> None:
    if operator.in_structure() != operator.out_structure():
        raise ValueError(
            f"`{name}` solves square systems only; the operator takes "
            f"{operator.in_structure()} and returns {operator.out_structure()}."
        )


def _columns(
    operator: lx.AbstractLinearOperator, chosen: np.ndarray
) -> Float[Array, "size rank"]:
    zeros = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), operator.in_structure())
    flat, unflatten = jfu.ravel_pytree(zeros)
    if jnp.issubdtype(flat.dtype, jnp.complexfloating):
        raise ValueError("`Nystrom` solves real systems only; the operator is complex.")

    def column(index):
        unit = unflatten(flat.at[index].set(1))
        return jfu.ravel_pytree(operator.mv(unit))[0]

    return jax.vmap(column, out_axes=1)(jnp.asarray(chosen))


def _breakdown_where(pred: Bool[Array, ""]) -> lx.RESULTS:
    return lx.RESULTS.where(pred, lx.RESULTS.breakdown, lx.RESULTS.successful)
