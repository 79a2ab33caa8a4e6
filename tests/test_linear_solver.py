import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest


SIZE = 6
SOLVERS = {
    "neumann": hpo.Neumann(400, 0.3),
    "nystrom": hpo.Nystrom(SIZE, 0.0),
    "nystrom_more": hpo.Nystrom(100, 0.0),
}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def _matrix(values, seed=0):
    """A symmetric matrix with the given eigenvalues."""
    basis, _ = jnp.linalg.qr(jr.normal(jr.key(seed), (len(values), len(values))))
    matrix = (basis * jnp.asarray(values)) @ basis.T
    return (matrix + matrix.T) / 2


def _operator(matrix):
    return lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)


MATRIX = _matrix(np.linspace(0.5, 3.0, SIZE))
VECTOR = jnp.linspace(-1.0, 2.0, SIZE)


@solvers
def test_solves(solver):
    solution = lx.linear_solve(_operator(MATRIX), VECTOR, solver)
    assert solution.result == lx.RESULTS.successful
    assert jnp.allclose(MATRIX @ solution.value, VECTOR, atol=1e-12)


@solvers
def test_pytrees_of_any_structure(solver):
    tree = {"scalar": VECTOR[0], "rest": (VECTOR[1:5].reshape(2, 2), VECTOR[5:])}
    flat, unflatten = jfu.ravel_pytree(tree)
    operator = lx.FunctionLinearOperator(
        lambda x: unflatten(MATRIX @ jfu.ravel_pytree(x)[0]),
        jax.eval_shape(lambda: tree),
        lx.positive_semidefinite_tag,
    )
    got = lx.linear_solve(operator, tree, solver).value
    assert jtu.tree_structure(got) == jtu.tree_structure(tree)
    expected = unflatten(jnp.linalg.solve(MATRIX, flat))
    assert jtu.tree_all(jtu.tree_map(jnp.allclose, got, expected))


@solvers
def test_one_unknown(solver):
    got = lx.linear_solve(_operator(jnp.array([[2.0]])), jnp.array([3.0]), solver)
    assert jnp.allclose(got.value, 1.5)


@solvers
def test_a_state_serves_many_vectors(solver):
    operator = _operator(MATRIX)
    state = solver.init(operator, options={})
    for vector in (VECTOR, jnp.ones(SIZE)):
        got = lx.linear_solve(operator, vector, solver, state=state).value
        assert jnp.allclose(got, jnp.linalg.solve(MATRIX, vector))


@solvers
def test_transpose_and_conjugate_of_a_state(solver):
    operator = _operator(MATRIX)
    state = solver.init(operator, {})
    for transformed, expected in (
        (solver.transpose(state, {}), operator.T),
        (solver.conj(state, {}), lx.conj(operator)),
    ):
        got, _, _ = solver.compute(transformed[0], VECTOR, transformed[1])
        expected, _, _ = solver.compute(solver.init(expected, {}), VECTOR, {})
        assert jnp.allclose(got, expected)


def test_neumann_transposes_what_is_not_symmetric():
    matrix = jnp.array([[1.0, 0.4], [0.0, 0.8]])
    solver = hpo.Neumann(300, 0.5)
    state = solver.init(lx.MatrixLinearOperator(matrix), {})
    got, _, _ = solver.compute(*_with(solver.transpose(state, {}), VECTOR[:2]))
    assert jnp.allclose(matrix.T @ got, VECTOR[:2])


def _with(transposed, vector):
    state, options = transposed
    return state, vector, options


@solvers
def test_derivatives_in_the_operator_and_in_the_vector(solver):
    def solve(matrix, vector):
        return jnp.sum(
            jnp.sin(lx.linear_solve(_operator(matrix), vector, solver).value)
        )

    exact = lambda matrix, vector: jnp.sum(jnp.sin(jnp.linalg.solve(matrix, vector)))
    got = jax.jit(jax.grad(solve, argnums=(0, 1)))(MATRIX, VECTOR)
    expected = jax.grad(exact, argnums=(0, 1))(MATRIX, VECTOR)
    assert all(jnp.allclose(x, y, atol=1e-10) for x, y in zip(got, expected))
    tangents = (_matrix(np.ones(SIZE), 1), jnp.ones(SIZE))
    _, got = jax.jvp(solve, (MATRIX, VECTOR), tangents)
    _, expected = jax.jvp(exact, (MATRIX, VECTOR), tangents)
    assert jnp.allclose(got, expected)


@solvers
def test_vmap(solver):
    vectors = jnp.stack([VECTOR, jnp.ones(SIZE)])
    solve = lambda vector: lx.linear_solve(_operator(MATRIX), vector, solver).value
    expected = jnp.linalg.solve(MATRIX, vectors.T).T
    assert jnp.allclose(jax.vmap(solve)(vectors), expected)


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_the_sum(terms):
    got = lx.linear_solve(_operator(MATRIX), VECTOR, hpo.Neumann(terms, 0.3)).value
    step = jnp.eye(SIZE) - 0.3 * MATRIX
    powers = [jnp.linalg.matrix_power(step, j) @ VECTOR for j in range(terms)]
    assert jnp.allclose(got, 0.3 * sum(powers), rtol=1e-13)


def test_neumann_converges_at_its_rate():
    values = np.linspace(0.5, 3.0, SIZE)
    exact = jnp.linalg.solve(MATRIX, VECTOR)
    for terms in (5, 20):
        solver = hpo.Neumann(terms, 0.3)
        error = lx.linear_solve(_operator(MATRIX), VECTOR, solver).value - exact
        got = jnp.linalg.eigh(MATRIX)[1].T @ error
        expected = -((1 - 0.3 * values) ** terms) * (
            jnp.linalg.eigh(MATRIX)[1].T @ exact
        )
        assert jnp.allclose(got, expected, atol=1e-13)


def test_neumann_goes_on_from_a_first_estimate():
    operator = _operator(MATRIX)
    half = lx.linear_solve(operator, VECTOR, hpo.Neumann(4, 0.3)).value
    got = lx.linear_solve(operator, VECTOR, hpo.Neumann(3, 0.3), options={"y0": half})
    expected = lx.linear_solve(operator, VECTOR, hpo.Neumann(7, 0.3)).value
    assert jnp.allclose(got.value, expected, rtol=1e-13)


@pytest.mark.parametrize("values", [[-0.5, 1.0, 2.0], [0.5, 1.0, 9.0]])
def test_neumann_reports_divergence(values):
    operator, vector = _operator(_matrix(values)), jnp.ones(3)
    got = lx.linear_solve(operator, vector, hpo.Neumann(30, 0.3), throw=False)
    assert got.result == lx.RESULTS.breakdown


def test_nystrom_of_low_rank_is_woodbury():
    rank, damping = 3, 0.1
    solver = hpo.Nystrom(rank, damping, seed=4)
    got = lx.linear_solve(_operator(MATRIX), VECTOR, solver).value
    chosen = np.sort(np.random.default_rng(4).choice(SIZE, rank, replace=False))
    columns, block = MATRIX[:, chosen], MATRIX[np.ix_(chosen, chosen)]
    approximation = columns @ jnp.linalg.solve(block, columns.T)
    expected = jnp.linalg.solve(approximation + damping * jnp.eye(SIZE), VECTOR)
    assert jnp.allclose(got, expected, rtol=1e-10)


def test_nystrom_is_exact_once_its_rank_is_that_of_the_matrix():
    matrix = _matrix([0.0, 0.0, 0.0, 1.0, 2.0, 3.0])
    expected = jnp.linalg.solve(matrix + 0.1 * jnp.eye(SIZE), VECTOR)
    for rank, exact in ((2, False), (3, True), (5, True)):
        got = lx.linear_solve(_operator(matrix), VECTOR, hpo.Nystrom(rank, 0.1)).value
        assert bool(jnp.allclose(got, expected, rtol=1e-8)) == exact


def test_nystrom_is_accurate_in_single_precision():
    matrix = _matrix(np.logspace(-4, 1, SIZE)).astype(jnp.float32)
    solver = hpo.Nystrom(4, 1e-2)
    got = lx.linear_solve(_operator(matrix), VECTOR.astype(jnp.float32), solver).value
    double = lx.linear_solve(_operator(matrix.astype(float)), VECTOR, solver).value
    assert got.dtype == jnp.float32
    assert jnp.linalg.norm(got - double) < 3e-3 * jnp.linalg.norm(double)


def test_nystrom_keeps_small_eigenvalues_of_a_large_operator():
    """What counts as rounding does not grow with the size of the operator."""
    size, rank = 20_000, 3
    factor = jr.normal(jr.key(0), (size, rank)) * jnp.array([1.0, 0.1, 0.03])
    vector = factor @ jnp.ones(rank)

    def solve(dtype):
        root, rest = factor.astype(dtype), vector.astype(dtype)
        operator = lx.FunctionLinearOperator(
            lambda x: root @ (root.T @ x),
            jax.ShapeDtypeStruct((size,), dtype),
            lx.positive_semidefinite_tag,
        )
        return lx.linear_solve(operator, rest, hpo.Nystrom(rank, 1.0)).value

    exact = factor @ jnp.linalg.solve(factor.T @ factor + jnp.eye(rank), jnp.ones(rank))
    for dtype, tolerance in ((jnp.float64, 1e-8), (jnp.float32, 0.05)):
        error = jnp.linalg.norm(solve(dtype).astype(float) - exact)
        assert error < tolerance * jnp.linalg.norm(exact)


def test_nystrom_reports_an_indefinite_operator():
    operator = _operator(jnp.diag(jnp.array([1.0, -1.0, 2.0])))
    got = lx.linear_solve(operator, jnp.ones(3), hpo.Nystrom(3, 0.1), throw=False)
    assert got.result == lx.RESULTS.breakdown


def test_nystrom_without_damping_says_that_the_rest_is_singular():
    got = lx.linear_solve(_operator(MATRIX), VECTOR, hpo.Nystrom(2, 0.0), throw=False)
    assert got.result == lx.RESULTS.singular


def test_another_number_compiles_nothing_anew():
    traces = 0

    @eqx.filter_jit
    def solve(solver):
        nonlocal traces
        traces += 1
        return lx.linear_solve(_operator(MATRIX), VECTOR, solver).value

    for solver in (hpo.Neumann(5, 0.1), hpo.Neumann(5, 0.2)):
        solve(solver)
    assert traces == 1


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: hpo.Neumann(0, 0.1), "`terms`"),
        (lambda: hpo.Neumann(3, 0.0), "`learning_rate`"),
        (lambda: hpo.Neumann(3, float("inf")), "`learning_rate`"),
        (lambda: hpo.Nystrom(0, 0.1), "`rank`"),
        (lambda: hpo.Nystrom(3, -0.1), "`damping`"),
    ],
)
def test_bad_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_operators_that_do_not_fit():
    wide = lx.MatrixLinearOperator(jnp.ones((2, 3)))
    plain = lx.MatrixLinearOperator(MATRIX)
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(wide, jnp.ones(2), hpo.Neumann(3, 0.1))
    with pytest.raises(ValueError, match="symmetric"):
        lx.linear_solve(plain, VECTOR, hpo.Nystrom(3, 0.1))
    hermitian = _operator(MATRIX.astype(complex))
    with pytest.raises(ValueError, match="complex"):
        lx.linear_solve(hermitian, VECTOR.astype(complex), hpo.Nystrom(3, 0.1))
