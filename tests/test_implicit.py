import itertools
from typing import Any

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


@pytest.mark.slow
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
        _saddle(values),
        STAY,
        STAY,
        inner_steps=1,
        linear_solver=SOLVERS[solver],
        curvature_steps=5,
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
        _saddle(values),
        STAY,
        STAY,
        inner_steps=1,
        linear_solver=SOLVERS["cg"],
        curvature_steps=5,
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
    residuals = after.metrics.diagnostics.tasks.residual
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


@pytest.mark.slow
def test_conjugate_gradients_in_single_precision_at_any_scale_of_the_loss():
    """Lineax takes curvatures below 100 rounding units for each weight for zero: with
    1010 weights all of this problem."""
    keys = jr.split(jr.key(0), 3)
    with jax.enable_x64(False):
        x = jnp.abs(jr.normal(keys[0], (300, 100), jnp.float32)) / 10
        labels = jr.randint(keys[1], (300,), 0, 10)

        def cross_entropy(model, batch):
            weights, bias = model
            x, labels = batch
            scores = jax.nn.log_softmax(x @ weights + bias)
            return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], 1))

        def hypergradient(scale, solver):
            def train_loss(model, h, batch, key):
                square = sum(jnp.sum(x**2) for x in model)
                decay = 0.5 * jnp.exp(h) * square
                return scale * (cross_entropy(model, batch) + decay)

            val_loss = lambda model, h, batch, key: cross_entropy(model, batch)
            algorithm = hpo.Implicit(
                hpo.Problem(train_loss, val_loss),
                optax.sgd(0.5 / scale, momentum=0.9),
                STAY,
                inner_steps=500,
                linear_solver=solver,
            )
            model = (jnp.zeros((100, 10), jnp.float32), jnp.zeros(10, jnp.float32))
            state = algorithm.init(model, jnp.asarray(jnp.log(3e-3), jnp.float32))
            data = (x[:200], labels[:200]), (x[200:], labels[200:])
            return algorithm.compute_hypergradient(state, *data)

        expected = hypergradient(1.0, lx.GMRES(1e-5, 1e-5))
        assert abs(expected) > 0.01
        for scale in (1.0, 1e-6):
            got = hypergradient(scale, lx.CG(1e-5, 1e-5))
            assert jnp.allclose(got, expected, rtol=2e-3)


@pytest.mark.slow
def test_complex_weights():
    """Against the same problem in real and imaginary parts."""
    keys = jr.split(jr.key(0), 4)
    matrix = jr.normal(keys[0], (6, 3)) + 1j * jr.normal(keys[1], (6, 3))
    target = jr.normal(keys[2], (6,)) + 1j * jr.normal(keys[3], (6,))

    def train_loss(w, h, batch, key):
        fit = jnp.mean(jnp.abs(matrix @ w - target) ** 2)
        return fit + jnp.sum(jnp.exp(h) * jnp.abs(w) ** 2) + jnp.sum(jnp.abs(w) ** 4)

    val_loss = lambda w, h, batch, key: jnp.sum(jnp.abs(w - 1 + 0.5j) ** 2)

    def in_parts(loss):
        return lambda parts, *args: loss(parts[0] + 1j * parts[1], *args)

    h = jnp.array([-1.0, -2.0, 0.3])
    w = jnp.array([0.1 + 0.2j, 0.3 - 0.1j, -0.2j])
    parts = jnp.stack([w.real, w.imag])
    args: Any = dict(inner_steps=1, linear_solver=lx.CG(1e-12, 1e-12))
    complex_ = hpo.Implicit(hpo.Problem(train_loss, val_loss), STAY, STAY, **args)
    real = hpo.Implicit(
        hpo.Problem(in_parts(train_loss), in_parts(val_loss)), STAY, STAY, **args
    )
    got = complex_.compute_hypergradient(complex_.init(w, h), (), ())
    expected = real.compute_hypergradient(real.init(parts, h), (), ())
    assert relative_error(got, expected) < 1e-10
    after = complex_.step(complex_.init(w, h), (), ())
    assert int(after.skipped) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)]
)
def test_half_precision(dtype):
    """The system is that of the same weights in single precision."""
    case = ridge()
    cast = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    half = [
        cast(x, dtype) for x in (case.model, case.hyperparams, case.train, case.val)
    ]
    algorithm = hpo.Implicit(
        case.problem, STAY, STAY, inner_steps=1, linear_solver=lx.CG(1e-4, 1e-4)
    )
    got, expected = [
        algorithm.compute_hypergradient(algorithm.init(model, h), train, val)
        for model, h, train, val in (half, [cast(x, jnp.float32) for x in half])
    ]
    assert got["penalty"].dtype == dtype
    assert relative_error(got, expected) < 4 * float(jnp.finfo(dtype).eps)
    state = algorithm.step(algorithm.init(*half[:2]), *half[2:])
    assert int(state.skipped) == 0


@pytest.mark.slow
def test_the_report_costs_nothing_unless_asked_for():
    case = ridge(features=200, examples=300)
    products = []
    for curvature_steps in (None, 0):
        algorithm, state = _at_the_minimum(
            case, hpo.Neumann(1, 0.1), curvature_steps=curvature_steps
        )
        step = lambda state, algorithm=algorithm: jax.tree.leaves(
            eqx.filter(algorithm.step(state, case.train, case.val), eqx.is_array)
        )
        compiled = jax.jit(step).lower(state).compile()
        cost: dict = compiled.cost_analysis() or {}
        products.append(cost["flops"] / (4 * 300 * 200))  # in passes through the data
        report = algorithm.step(state, case.train, case.val).metrics.diagnostics
        asked = curvature_steps is not None
        assert jnp.isfinite(report.residual) == asked
        assert jnp.isfinite(report.curvature) == asked
        assert jnp.isfinite(report.gradient_norm)
    # By hand: the training gradient, that of the validation loss, the mixed product.
    assert products[0] < 3.2
    assert products[1] > products[0] + 0.9


def test_the_message_names_the_solver_that_failed():
    # The Hessian is singular, and alpha is not in its range.
    algorithm = hpo.Implicit(
        _saddle([1.0, 0.0]), STAY, STAY, inner_steps=1, linear_solver=lx.LU()
    )
    solution = hpo.tune(
        algorithm,
        jnp.zeros(2),
        jnp.zeros(2),
        None,
        jnp.ones(2),
        steps=30,
        key=None,
        progress=False,
    )
    assert solution.result == hpo.RESULTS.nonfinite
    assert "linear solver `LU` failed" in solution.message
    assert "learning rate" not in solution.message
