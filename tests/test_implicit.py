import itertools

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import optax
import pytest

from .helpers import relative_error, RULES
from .problems import CASES, quadratic, ridge


SOLVERS = {
    "cg": lx.CG(rtol=1e-12, atol=1e-12),
    "gmres": lx.GMRES(rtol=1e-12, atol=1e-12),
    "bicgstab": lx.BiCGStab(rtol=1e-12, atol=1e-12),
    "normal_cg": lx.Normal(lx.CG(rtol=1e-14, atol=1e-14)),
    "cholesky": lx.Cholesky(),
    "lu": lx.LU(),
    "neumann": hpo.Neumann(2000, 0.3),
    "nystrom": hpo.Nystrom(100, 0.0),
}
STAY = optax.set_to_zero()


def _at_the_minimum(case, solver, *rest, **kwargs):
    """The algorithm, and a state whose model solves the inner level."""
    algorithm = hpo.Implicit(
        case.problem,
        STAY,
        optax.sgd(0.1),
        *rest,
        inner_steps=1,
        linear_solver=solver,
        **kwargs,
    )
    model = case.response(hpo.unwrap(case.hyperparams))
    return algorithm, algorithm.init(model, case.hyperparams)


QUICK = [
    ("ridge", "cg"),
    ("ridge", "neumann"),
    *[
        ("quadratic", solver)
        for solver in ("gmres", "normal_cg", "cholesky", "lu", "nystrom")
    ],
]


@pytest.mark.parametrize(
    "case_name, solver",
    [
        pytest.param(*x, marks=[] if x in QUICK else [pytest.mark.slow])
        for x in itertools.product(CASES, SOLVERS)
    ],
)
def test_closed_forms(case_name, solver):
    case = CASES[case_name]()
    algorithm, state = _at_the_minimum(case, SOLVERS[solver])
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    expected = case.hypergradient(case.hyperparams)
    assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize("rule_name", RULES)
def test_every_second_order_rule(rule_name):
    case = ridge()
    algorithm, state = _at_the_minimum(case, lx.CG(1e-12, 1e-12), RULES[rule_name])
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    tolerance = 1e-5 if rule_name == "finite_difference" else 1e-9
    assert relative_error(got, case.hypergradient(case.hyperparams)) < tolerance


def test_conjugate_gradients_are_exact_after_as_many_steps_as_weights():
    case = ridge()
    for steps, exact in ((5, False), (6, True)):
        solver = lx.CG(rtol=0.0, atol=0.0, max_steps=steps, stabilise_every=None)
        algorithm, state = _at_the_minimum(case, solver)
        got = algorithm.compute_hypergradient(state, case.train, case.val)
        error = relative_error(got, case.hypergradient(case.hyperparams))
        assert (error < 1e-9) == exact


def test_training_until_convergence():
    case = ridge()
    algorithm = hpo.Implicit(
        case.problem,
        optax.sgd(0.3),
        optax.sgd(0.1),
        inner_steps=3000,
        linear_solver=lx.CG(1e-12, 1e-12),
    )
    state = algorithm.init(case.model, case.hyperparams)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    assert relative_error(got, case.hypergradient(case.hyperparams)) < 1e-9


def _trees():
    """A scalar, a matrix that is not square, and leaves that are not trained."""

    def train_loss(model, h, batch, key):
        del key
        matrix, scalar = model["matrix"], model["scalar"]
        fit = jnp.mean((batch @ matrix + scalar - 1.0) ** 2)
        return fit + h["a"] * jnp.sum(matrix**2) + jnp.exp(h["b"]) * scalar**2

    def val_loss(model, h, batch, key):
        del key
        out = batch @ model["matrix"] + model["scalar"]
        return jnp.mean(jnp.sin(out)) + h["a"] ** 2

    model = {
        "matrix": jnp.ones((3, 2)),
        "scalar": jnp.array(0.5),
        "other": (jax.nn.relu, 3),
    }
    keys = jr.split(jr.key(0))
    data = [jr.normal(key, (8, 3)) for key in keys]
    return hpo.Problem(train_loss, val_loss), model, {"a": 0.3, "b": -1.0}, *data


def test_trees_of_every_shape_equal_the_long_unroll():
    problem, model, hyperparams, train, val = _trees()
    inner = optax.sgd(0.2)
    unrolled = hpo.Unrolled(problem, inner, optax.sgd(0.1), inner_steps=2000)
    state = unrolled.init(model, hyperparams)
    expected = unrolled.compute_hypergradient(state, train, val)
    for solver in (lx.CG(1e-12, 1e-12), lx.LU(), hpo.Nystrom(7, 0.0)):
        implicit = hpo.Implicit(
            problem, inner, optax.sgd(0.1), inner_steps=2000, linear_solver=solver
        )
        state = implicit.init(model, hyperparams)
        got = implicit.compute_hypergradient(state, train, val)
        assert relative_error(got, expected) < 1e-9


def test_a_single_weight():
    problem = hpo.Problem(
        lambda w, h, batch, key: (w - batch) ** 2 + h * w**2,
        lambda w, h, batch, key: (w - batch) ** 2,
    )
    algorithm = hpo.Implicit(
        problem, STAY, STAY, inner_steps=1, linear_solver=lx.CG(1e-12, 1e-12)
    )
    # w = 2 / (1 + h) for the target 2, so dw/dh = -2 / (1 + h)^2
    state = algorithm.init(jnp.array(2 / 1.5), 0.5)
    got = algorithm.compute_hypergradient(state, jnp.array(2.0), jnp.array(3.0))
    assert jnp.allclose(got, 2 * (2 / 1.5 - 3) * (-2 / 1.5**2), rtol=1e-12)


def test_damping():
    case, damping = quadratic(), 0.7
    algorithm, state = _at_the_minimum(case, lx.LU(), damping=damping)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    model, hyperparams = state.model, state.hyperparams
    x = jnp.linalg.solve(case.train + damping * jnp.eye(2), 2 * (model - case.val))
    # The mixed derivative of 0.5 (w - h)^T M (w - h) is -M.
    assert jnp.allclose(got, 0.2 * hyperparams + case.train @ x, rtol=1e-12)


def _residual(algorithm, state, case):
    """That of the linear solve of a step, with the state after it."""
    after = algorithm.step(state, case.train, case.val)
    return float(after.metrics.diagnostics.residual), after


def test_warm_start_goes_on_from_the_last_solution():
    case = ridge()
    make = lambda warm: _at_the_minimum(
        case, hpo.Neumann(3, 0.3), warm_start=warm, curvature_steps=0
    )
    algorithm, state = make(True)
    algorithm = eqx.tree_at(lambda o: o.outer, algorithm, STAY)
    state = algorithm.init(state.model, state.hyperparams)
    residuals = []
    for _ in range(4):
        residual, state = _residual(algorithm, state, case)
        residuals.append(residual)
    assert residuals == sorted(residuals, reverse=True)
    cold, _ = make(False)
    cold = eqx.tree_at(lambda o: o.linear_solver, cold, hpo.Neumann(12, 0.3))
    start = cold.init(state.model, state.hyperparams)
    residual, _ = _residual(cold, start, case)
    assert jnp.allclose(residual, residuals[-1], rtol=1e-10)
    again = algorithm.restart(state, state.model)
    residual, _ = _residual(algorithm, again, case)
    assert jnp.allclose(residual, residuals[0], rtol=1e-10)


def _saddle(values):
    """`C1 = 0.5 w^T diag(values) w - h . w`."""

    def train_loss(model, h, batch, key):
        del batch, key
        return 0.5 * jnp.sum(jnp.array(values) * model**2) - jnp.sum(h * model)

    def val_loss(model, h, batch, key):
        del h, key
        return jnp.sum((model - batch) ** 2)

    return hpo.Problem(train_loss, val_loss)


@pytest.mark.parametrize(
    "values",
    [[2.0, 1.0, -0.5], pytest.param([-1.0, -2.0, -3.0], marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "solver",
    ["lu", "cholesky"]
    + [pytest.param(x, marks=pytest.mark.slow) for x in ("cg", "gmres", "nystrom")],
)
def test_an_indefinite_hessian_is_reported(values, solver):
    target = jnp.array([1.0, -1.0, 0.1])  # the solution itself has positive curvature
    algorithm = hpo.Implicit(
        _saddle(values), STAY, STAY, inner_steps=1, linear_solver=SOLVERS[solver]
    )
    state = algorithm.init(jnp.zeros(3), jnp.zeros(3))
    after = algorithm.step(state, None, target)
    report = after.metrics.diagnostics
    assert report.result != hpo.RESULTS.successful
    assert report.curvature < 0
    if solver in ("gmres", "lu"):
        assert report.result == hpo.RESULTS.indefinite
        assert report.residual < 1e-10


def test_a_hessian_that_is_only_semidefinite_is_no_saddle():
    values = [2.0, 1.0, 0.0]
    algorithm = hpo.Implicit(
        _saddle(values), STAY, STAY, inner_steps=1, linear_solver=SOLVERS["cg"]
    )
    state = algorithm.init(jnp.zeros(3), jnp.zeros(3))
    after = algorithm.step(state, None, jnp.array([1.0, -1.0, 0.0]))
    report = after.metrics.diagnostics
    assert report.result == hpo.RESULTS.successful
    assert jnp.allclose(report.curvature, 1.0)
    assert jnp.allclose(report.gradient_norm, 0.0)


def test_a_solve_that_fails_is_carried_to_the_user():
    case = ridge()
    solver = lx.CG(rtol=1e-10, atol=1e-10, max_steps=2)
    algorithm, state = _at_the_minimum(case, solver)
    after = algorithm.step(state, case.train, case.val)
    report = after.metrics.diagnostics
    assert report.result == hpo.RESULTS.max_steps_reached
    assert int(report.solver_steps) == 2
    assert int(after.skipped) == 0
    run = lambda algorithm, steps: hpo.tune(
        algorithm,
        state.model,
        state.hyperparams,
        case.train,
        case.val,
        steps=steps,
        key=None,
        progress=False,
    )
    solution = run(algorithm, 3)
    assert solution.result == hpo.RESULTS.max_steps_reached
    assert "linear solve" in solution.message
    algorithm, _ = _at_the_minimum(case, SOLVERS["cholesky"])
    assert run(algorithm, 3).result == hpo.RESULTS.successful


def test_over_tasks():
    case = ridge()
    solver = lx.CG(rtol=1e-10, atol=1e-10)
    plain, state = _at_the_minimum(case, solver)
    meta = hpo.MetaLearner(plain, 2, horizon=1)
    both = (
        [jnp.stack([x, x]) for x in case.train],
        [jnp.stack([x, x]) for x in case.val],
    )
    after = meta.step(meta.init(state.model, state.hyperparams), *map(tuple, both))
    expected = plain.step(state, case.train, case.val)
    assert relative_error(after.hyperparams, expected.hyperparams) < 1e-10
    residuals = after.metrics.diagnostics.residual
    assert residuals.shape == (2,)


def test_hyperparameters_of_the_optimiser_are_refused():
    with pytest.raises(ValueError, match="no implicit hypergradient"):
        hpo.Implicit(
            ridge().problem,
            lambda h: optax.sgd(h["rate"]),
            STAY,
            inner_steps=1,
            linear_solver=lx.LU(),
        )


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(linear_solver="cg"), "linear_solver"),
        (dict(damping=-1.0), "`damping`"),
        (dict(curvature_steps=-1), "`curvature_steps`"),
    ],
)
def test_bad_settings(kwargs, match):
    kwargs = {"linear_solver": lx.LU(), "inner_steps": 1, **kwargs}
    with pytest.raises((ValueError, TypeError), match=match):
        hpo.Implicit(ridge().problem, STAY, STAY, **kwargs)
