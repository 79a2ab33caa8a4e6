"""`summary`: the numbers of a state by name, against NumPy."""

import dataclasses
import math

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
import pytest
from eqx_hpo import _summary
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


BATCH = (jnp.eye(3), jnp.arange(3.0))
VAL = (jnp.eye(3) + 1, jnp.ones(3))


def _val_loss(weights, hyperparams, batch, key):
    x, y = batch
    error = x @ weights - y
    return jnp.mean(error**2), {"error": error, "worst": jnp.max(jnp.abs(error))}


def _train_loss(weights, hyperparams, batch, key):
    error, _ = _val_loss(weights, hyperparams, batch, key)
    numbers = [jnp.sum(x) for x in jax.tree.leaves(hyperparams) if eqx.is_array(x)]
    return error + sum(numbers) * jnp.sum(weights**2), jnp.sum(weights) + 3


PROBLEM = hpo.Problem(_train_loss, _val_loss, has_aux=True)
SETTINGS = (PROBLEM, optax.sgd(0.01), optax.adam(0.01))


def _three(name, array):
    array = np.asarray(array, np.float64)
    values = array.mean(), array.min(), array.max()
    return {f"{name}.{x}": y for x, y in zip(("mean", "min", "max"), values)}


def _run(algorithm, hyperparams, train=BATCH, val=VAL, key=None):
    state = algorithm.init(jnp.zeros(3), hyperparams, train=train, val=val, key=key)
    return state, algorithm.step(state, train, val, key=key)


def test_numbers_are_those_of_numpy():
    hyperparams = {
        "decay": hpo.Positive(0.1),
        "layers": [hpo.Interval(jnp.array([0.2, 0.3]), 0.0, 1.0), jnp.ones((2, 2))],
        "act": jax.nn.relu,
    }
    _, state = _run(hpo.T1T2(*SETTINGS), hyperparams)
    got, metrics = hpo.summary(state), state.metrics
    values = hpo.unwrap(state.hyperparams)
    expected = {
        "step": 1.0,
        "episode_step": 1.0,
        "skipped": 0.0,
        "train_loss": float(metrics.train_loss),
        "val_loss": float(metrics.val_loss),
        "hypergradient_norm": float(metrics.hypergradient_norm),
        "hyperparams.decay": float(values["decay"]),
        **_three("hyperparams.layers.0", values["layers"][0]),
        **_three("hyperparams.layers.1", values["layers"][1]),
        "train_aux": 3.0,
        **_three("val_aux.error", VAL[0] @ state.model - VAL[1]),
        "val_aux.worst": np.abs(VAL[0] @ state.model - VAL[1]).max(),
    }
    assert list(got) == list(expected)
    assert all(type(x) is float for x in got.values())
    assert got == pytest.approx(expected, rel=1e-12)


def test_a_hyperparameter_without_a_path_and_none_at_all():
    start = lambda hyperparams: hpo.FirstOrder(*SETTINGS).init(ones, hyperparams)
    ones = jnp.ones(3)
    assert hpo.summary(start(hpo.Positive(0.5)))["hyperparams"] == pytest.approx(0.5)
    numbers = hpo.summary(start(jnp.array([1.0, 5.0])))
    assert numbers["hyperparams.mean"] == 3 and numbers["hyperparams.max"] == 5
    assert math.isnan(numbers["val_loss"])
    names = [x for x in hpo.summary(start(None)) if x.startswith("hyperparams")]
    assert names == []


def test_placeholders_by_the_values_that_a_report_shows():
    noisy = hpo.Choice(jnp.array([0.0, 2.0]), sample=True, temperature=0.5)
    hyperparams = {
        "choice": noisy,
        "integer": hpo.Integer(2, 1, 8),
        "schedule": hpo.Schedule(hpo.Positive(jnp.array([0.1, 0.2])), every=5),
        "simplex": hpo.Simplex(jnp.array([0.25, 0.75])),
        "switch": hpo.Switch(1.0),
    }
    state = hpo.FirstOrder(*SETTINGS).init(jnp.zeros(3), {"x": 1.0})
    noisy = eqx.tree_at(lambda x: x.noise, noisy, jnp.array([9.0, -9.0]))
    state = eqx.tree_at(lambda x: x.hyperparams, state, hyperparams | {"choice": noisy})
    got = {k: x for k, x in hpo.summary(state).items() if k.startswith("hyperparams")}
    weights = np.exp(np.array([0.0, 4.0])) / np.exp(np.array([0.0, 4.0])).sum()
    expected = {
        **_three("hyperparams.choice", weights),
        "hyperparams.integer": 2.0,
        **_three("hyperparams.schedule", [0.1, 0.2]),
        **_three("hyperparams.simplex", [0.25, 0.75]),
        "hyperparams.switch": 1 / (1 + np.exp(-1.0)),
    }
    assert got == pytest.approx(expected, rel=1e-12)


def test_the_report_of_implicit():
    solver = lx.CG(rtol=1e-3, atol=1e-3)
    algorithm = hpo.Implicit(*SETTINGS, inner_steps=2, linear_solver=solver)
    state = algorithm.init(jnp.zeros(3), {"decay": hpo.Positive(0.1)})
    numbers = lambda state: (
        state.metrics.diagnostics.gradient_norm,
        state.metrics.diagnostics.solver_steps,
    )
    state = eqx.tree_at(numbers, state, (jnp.array(0.25), jnp.array(7)))
    got = {k: x for k, x in hpo.summary(state).items() if k.startswith("diagnostics")}
    expected = {"result": 1, "gradient_norm": 0.25, "solver_steps": 7}
    expected |= {"residual": math.nan, "curvature": math.nan}
    expected = {f"diagnostics.{name}": x for name, x in expected.items()}
    assert got == pytest.approx(expected, nan_ok=True)
    failed = hpo.RESULTS.promote(lx.RESULTS.max_steps_reached)
    bad = eqx.tree_at(lambda x: x.metrics.diagnostics.result, state, failed)
    assert hpo.summary(bad)["diagnostics.result"] == 0


def test_tasks_by_mean_and_by_their_standard_error():
    algorithm = hpo.MetaLearner(hpo.T1T2(*SETTINGS), 2)
    train, val = ([jnp.stack([x, 2 * x]) for x in batch] for batch in (BATCH, VAL))
    hyperparams = {"decay": hpo.Positive(jnp.array([0.1, 0.2]))}
    _, state = _run(algorithm, hyperparams, tuple(train), tuple(val))
    got, report = hpo.summary(state), state.metrics.diagnostics
    error = _three(
        "diagnostics.standard_error.decay", report.standard_error["decay"].raw
    )
    worst = _three("val_aux.worst", state.metrics.aux[1]["worst"])
    assert {k: got[k] for k in error | worst} == pytest.approx(error | worst, rel=1e-12)
    assert got["val_loss"] == float(state.metrics.val_loss)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_averaged_in_single(dtype):
    array = (1 + jr.uniform(jr.key(0), (5000,))).astype(dtype)
    state = hpo.FirstOrder(*SETTINGS).init(jnp.zeros(3), {"x": array})
    expected = _three("hyperparams.x", array)
    with jax.enable_x64(False):
        got = hpo.summary(state)
    assert {k: got[k] for k in expected} == pytest.approx(expected, rel=1e-6)


def test_counts_beyond_single_precision_are_exact():
    with jax.enable_x64(False):
        state = hpo.FirstOrder(*SETTINGS).init(jnp.zeros(3), {"x": 1.0})
        state = eqx.tree_at(lambda x: x.step, state, jnp.array(2**24 + 1))
        assert hpo.summary(state)["step"] == 2**24 + 1


def test_sharded_arrays():
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    array = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("rows")))
    state = hpo.FirstOrder(*SETTINGS).init(jnp.zeros(3), {"x": 1.0})
    state = eqx.tree_at(lambda x: x.hyperparams, state, {"x": array})
    got, expected = hpo.summary(state), _three("hyperparams.x", np.arange(16.0))
    assert {k: got[k] for k in expected} == expected


def test_what_is_no_number_is_left_out():
    state = hpo.FirstOrder(*SETTINGS).init(jnp.zeros(3), {"x": 1.0})
    aux = {
        "key": jr.key(0),
        "complex": jnp.ones(2, complex),
        "empty": jnp.zeros((0, 2)),
        "flag": jnp.array([True, False]),
        "host": np.arange(3),
    }
    metrics = dataclasses.replace(state.metrics, aux=(None, aux))
    state = dataclasses.replace(state, metrics=metrics)
    got = {k: x for k, x in hpo.summary(state).items() if k.startswith("val_aux")}
    assert got == _three("val_aux.flag", [1, 0]) | _three("val_aux.host", [0, 1, 2])


def test_states_of_one_structure_compile_once_and_come_in_one_transfer(monkeypatch):
    algorithm, calls = hpo.T1T2(*SETTINGS), []

    def counted(name, fn):
        return lambda x: calls.append(name) or fn(x)

    monkeypatch.setattr(_summary, "constrained", counted("trace", _summary.constrained))
    monkeypatch.setattr(jax, "device_get", counted("transfer", jax.device_get))
    start = {"only here": hpo.Positive(jnp.array([0.1, 0.7]))}
    got = [hpo.summary(state) for state in _run(algorithm, start)]
    assert got[0].keys() == got[1].keys() and got[0] != got[1]
    assert calls == ["trace", "transfer", "transfer"]
