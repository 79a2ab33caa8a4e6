"""What the base class gives to every algorithm."""

import functools as ft
import warnings
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optax
import pytest

from .helpers import ALGORITHMS, arrays, equal, relative_error
from .problems import logistic, quadratic, ridge


@ft.cache
def _ridge_algorithm():
    case = ridge()
    return case, hpo.T1T2(case.problem, optax.sgd(0.1, momentum=0.9), optax.adam(0.05))


def _start(case, algorithm):
    return algorithm.init(case.model, case.hyperparams, train=case.train)


@pytest.mark.filterwarnings("ignore:These hyperparameters get a hypergradient of zero")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_structure_never_changes_and_step_uses_the_hypergradient(name):
    case = quadratic()
    algorithm = ALGORITHMS[name](case.problem, optax.adam(0.1), optax.sgd(0.5))
    state = _start(case, algorithm)
    grads = algorithm.compute_hypergradient(state, case.train, case.val)
    after = algorithm.step(state, case.train, case.val)
    assert jtu.tree_structure(after) == jtu.tree_structure(state)
    assert [(x.shape, x.dtype, x.weak_type) for x in arrays(after)] == [
        (x.shape, x.dtype, x.weak_type) for x in arrays(state)
    ]
    assert jnp.allclose(after.hyperparams, state.hyperparams - 0.5 * grads, rtol=1e-13)
    assert (int(state.step), int(after.step), int(after.skipped)) == (0, 1, 0)
    assert jnp.allclose(after.metrics.hypergradient_norm, jnp.linalg.norm(grads))


@pytest.mark.parametrize("name", ["t1t2_3", "unrolled_4"])
def test_one_compilation_for_a_whole_run(name, getkey):
    """Counts what JAX compiles, and how often the loss is traced."""
    case = ridge()
    traces = 0

    def train_loss(*args):
        nonlocal traces
        traces += 1
        return case.problem.train_loss(*args)

    problem = hpo.Problem(train_loss, case.problem.val_loss)
    algorithm = ALGORITHMS[name](problem, optax.adam(0.1), optax.adam(0.1))
    state = algorithm.init(case.model, case.hyperparams, train=case.train)
    keys = list(jr.split(getkey(), 4))
    state = algorithm.step(state, case.train, case.val, key=keys[0])
    before, compiled = traces, []
    listener = lambda event, *_, **__: compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(listener)
    for key in keys[1:]:
        state = algorithm.step(state, case.train, case.val, key=key)
    assert traces == before
    assert not [event for event in compiled if "compile" in event]


def test_jit_and_scan_agree_with_a_loop():
    case, algorithm = _ridge_algorithm()
    start = _start(case, algorithm)
    looped = start
    for _ in range(5):
        looped = algorithm.step(looped, case.train, case.val)

    @jax.jit
    def scanned(state, train, val):
        body = lambda state, _: (algorithm.step(state, train, val), None)
        return jax.lax.scan(body, state, length=5)[0]

    assert relative_error(scanned(start, case.train, case.val), looped) < 1e-13
    jitted = jax.jit(algorithm.step)(start, case.train, case.val)
    expected = algorithm.step(start, case.train, case.val)
    assert relative_error(jitted, expected) < 1e-13


def _noisy(model, h, batch, key):
    noise = jr.uniform(key, batch.shape)
    return jnp.sum((model - batch - h["noise"] * noise) ** 2)


def _seeds(problem=hpo.Problem(_noisy, _noisy)):
    """A run of three steps as a function of its seed."""
    inner = lambda h: optax.sgd(h["rate"], momentum=0.5)
    algorithm = hpo.T1T2(problem, inner, optax.adam(0.1))

    def run(key, rate):
        hyperparams = {"noise": hpo.Positive(0.1), "rate": hpo.Positive(rate)}
        state = algorithm.init(jr.uniform(key, (3,)), hyperparams)
        for i in range(3):
            step_key = jr.fold_in(key, i)
            state = algorithm.step(state, jnp.ones(3), jnp.ones(3), key=step_key)
        return state

    return jax.jit(run)


@pytest.mark.slow
def test_vmap_over_seeds_and_learning_rates(getkey):
    run = _seeds()
    keys, rates = jr.split(getkey(), 3), jnp.array([0.01, 0.1, 0.2])
    batched = jax.vmap(run)(keys, rates)
    for i in range(3):
        single = run(keys[i], rates[i])
        assert relative_error(jtu.tree_map(lambda x: x[i], batched), single) < 1e-12


@pytest.mark.parametrize("name", ["t1t2", "implicit_3", "hyperdistill"])
def test_a_first_state_may_be_donated(name):
    case = ridge()
    algorithm = ALGORITHMS[name](case.problem, optax.adam(0.1), optax.adam(0.1))
    copy = lambda tree: jtu.tree_map(jnp.copy, tree)
    state = algorithm.init(copy(case.model), copy(case.hyperparams))
    leaves, static = eqx.partition(state, eqx.is_array)

    def step(leaves):
        new = algorithm.step(eqx.combine(leaves, static), case.train, case.val)
        return eqx.filter(new, eqx.is_array)

    donating = jax.jit(step, donate_argnums=0)
    for _ in range(2):
        leaves = donating(leaves)
    assert int(leaves.step) == 2 and int(leaves.skipped) == 0


def test_vmap_over_learning_rates_of_the_optimiser(getkey):
    """The rate is a tracer in the closure of the Optax transformation."""
    case = ridge()

    def run(rate):
        algorithm = hpo.T1T2(case.problem, optax.sgd(rate), optax.sgd(0.1))
        state = algorithm.init(case.model, case.hyperparams)
        return algorithm.step(state, case.train, case.val).hyperparams["penalty"]

    batched = jax.vmap(run)(jnp.array([0.01, 0.1]))
    assert jnp.allclose(batched, jnp.stack([run(0.01), run(0.1)]), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of `pmap` itself
def test_pmap_over_seeds_equals_vmap(getkey):
    run = _seeds()
    keys, rates = jr.split(getkey(), 4), jnp.array([0.01, 0.1, 0.2, 0.3])
    assert jax.device_count() >= 4
    parallel = eqx.filter_pmap(run)(keys, rates)
    assert relative_error(parallel, jax.vmap(run)(keys, rates)) < 1e-12


@pytest.mark.slow
def test_batch_sharded_over_devices(getkey):
    """Data parallel: the batch is split over devices, the state is on all of them."""
    case, algorithm = _ridge_algorithm()
    state = _start(case, algorithm)
    expected = algorithm.step(state, case.train, case.val)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    train, val = jax.device_put((case.train, case.val), rows)
    got = algorithm.step(jax.device_put(state, everywhere), train, val)
    assert relative_error(got, expected) < 1e-12


# Guard


@pytest.mark.parametrize("where", ["train", "val"])
def test_a_non_finite_step_changes_only_counters_and_metrics(where):
    case, algorithm = _ridge_algorithm()
    state = algorithm.step(_start(case, algorithm), case.train, case.val)
    data = {"train": case.train, "val": case.val}
    data[where] = (data[where][0].at[0, 0].set(jnp.nan), data[where][1])
    skipped = algorithm.step(state, **data)
    skipped = algorithm.step(skipped, **data)
    assert (int(skipped.step), int(skipped.skipped)) == (3, 2)
    assert jnp.isnan(skipped.metrics.val_loss)
    assert (int(skipped.total_skipped), int(skipped.first_skipped)) == (2, 2)
    restore = lambda s: (
        s.step, s.skipped, s.total_skipped, s.first_skipped, s.metrics
    )  # fmt: skip
    assert equal(eqx.tree_at(restore, skipped, restore(state)), state)
    good = algorithm.step(skipped, case.train, case.val)
    assert int(good.skipped) == 0
    assert (int(good.total_skipped), int(good.first_skipped)) == (2, 2)
    assert bool(jnp.isfinite(good.metrics.val_loss))


def test_a_non_finite_update_of_an_unused_parameter_is_skipped():
    """Both losses are finite, but the gradient of one parameter is not."""
    train_loss = lambda w, h, batch, key: jnp.sum(w["a"] ** 2) * h + jnp.sqrt(w["b"])
    val_loss = lambda w, h, batch, key: jnp.sum(w["a"] ** 2)
    algorithm = hpo.T1T2(
        hpo.Problem(train_loss, val_loss), optax.sgd(0.1), optax.sgd(0.1)
    )
    state = algorithm.init({"a": jnp.ones(2), "b": jnp.array(0.0)}, 0.5)
    after = algorithm.step(state, jnp.ones(1), jnp.ones(1))
    assert int(after.skipped) == 1
    assert equal(after.model, state.model)


def test_an_outer_update_that_overflows_is_skipped():
    case, inner = quadratic(), optax.sgd(0.1)
    algorithm = hpo.T1T2(case.problem, inner, optax.sgd(jnp.inf))
    state = _start(case, algorithm)
    after = algorithm.step(state, case.train, case.val)
    assert int(after.skipped) == 1
    assert equal(after.hyperparams, state.hyperparams)


# Restart


def test_restart_keeps_the_outer_level_alone():
    case, algorithm = _ridge_algorithm()
    start = _start(case, algorithm)
    state = start
    for _ in range(3):
        state = algorithm.step(state, case.train, case.val)
    again = algorithm.restart(state, case.model)
    assert equal(again.model, start.model)
    assert equal(again.inner_opt_state, start.inner_opt_state)
    assert equal(again.hyperparams, state.hyperparams)
    assert equal(again.outer_opt_state, state.outer_opt_state)
    assert int(again.step) == 3
    assert not equal(state.inner_opt_state, start.inner_opt_state)


def test_restart_refuses_another_model():
    case, algorithm = _ridge_algorithm()
    with pytest.raises(ValueError, match=r"`model` is float64\[7\].*float64\[6\]"):
        algorithm.restart(_start(case, algorithm), jnp.zeros(7))
    with pytest.raises(ValueError, match="does not have the structure"):
        algorithm.restart(_start(case, algorithm), {"w": jnp.zeros(6)})


# Structures


def test_empty_hyperparameters():
    problem = hpo.Problem(
        lambda w, h, batch, key: jnp.sum((w - batch) ** 2),
        lambda w, h, batch, key: jnp.sum((w - batch) ** 2),
    )
    args = (problem, optax.sgd(0.5), optax.adam(0.1))
    implicit = hpo.Implicit(*args, inner_steps=1, linear_solver=lx.LU())
    for algorithm, empty in (
        *[(hpo.T1T2(*args), empty) for empty in (None, {}, ())],
        (hpo.ForwardMode(*args), {}),
        (implicit, {}),
    ):
        state = algorithm.init(jnp.zeros(2), empty)
        state = algorithm.step(state, jnp.ones(2), jnp.ones(2))
        assert jnp.allclose(state.model, 1.0)
        assert state.metrics.hypergradient_norm == 0
        assert int(state.skipped) == 0


def test_other_leaves_of_the_model_pass_through():
    model = {"w": jnp.ones(2), "n": 3, "ints": jnp.arange(2), "f": jax.nn.relu}

    def loss(model, h, batch, key):
        scaled = model["f"](model["w"]) * model["n"] + model["ints"]
        return h * jnp.sum((scaled - batch) ** 2)

    algorithm = hpo.T1T2(hpo.Problem(loss, loss), optax.adam(0.1), optax.sgd(0.1))
    state = algorithm.step(algorithm.init(model, 0.5), jnp.ones(2), jnp.ones(2))
    assert state.model["n"] == 3
    assert state.model["f"] is jax.nn.relu
    assert jnp.array_equal(state.model["ints"], jnp.arange(2))
    assert not jnp.array_equal(state.model["w"], model["w"])


def test_numpy_models_and_batches():
    case, algorithm = _ridge_algorithm()
    to_numpy = lambda tree: jtu.tree_map(np.asarray, tree)
    state = algorithm.init(to_numpy(case.model), to_numpy(case.hyperparams))
    got = algorithm.step(state, to_numpy(case.train), to_numpy(case.val))
    expected = algorithm.step(_start(case, algorithm), case.train, case.val)
    assert equal(got, expected)


def test_hyperparameters_inside_the_model(getkey):
    """Split off, put back by the loss, and trained as a model with masks."""

    class Noisy(eqx.Module):
        mlp: eqx.nn.MLP
        noise: Any

        def __call__(self, x, key):
            return self.mlp(x + self.noise * jr.normal(key, x.shape))

    model = Noisy(eqx.nn.MLP(3, 1, 8, 1, key=getkey()), hpo.Positive(0.2))
    hyperparams, model = hpo.partition(model)
    assert model.noise is None and hyperparams.mlp.layers[0].weight is None

    def loss(model, hyperparams, batch, key):
        model = eqx.combine(model, hyperparams)
        keys = jr.split(key, batch[0].shape[0])
        return jnp.mean((jax.vmap(model)(*(batch[0], keys)) - batch[1]) ** 2)

    # An Equinox model is callable: masks must be functions of the parameters.
    mask = lambda params: jtu.tree_map(lambda x: x.ndim == 2, params)
    inner = optax.adamw(0.01, mask=mask)
    algorithm = hpo.T1T2(hpo.Problem(loss, loss), inner, optax.adam(0.1))
    state = algorithm.init(model, hyperparams)
    batch = (jr.normal(getkey(), (5, 3)), jnp.ones((5, 1)))
    grads = algorithm.compute_hypergradient(state, batch, batch, key=getkey())
    assert grads.noise.raw.shape == () and grads.noise.raw != 0
    after = algorithm.step(state, batch, batch, key=getkey())
    assert after.hyperparams.noise.raw != state.hyperparams.noise.raw
    assert after.model.noise is None


def test_bounds_are_never_trained():
    problem = hpo.Problem(
        lambda w, h, batch, key: jnp.sum((w - h) ** 2),
        lambda w, h, batch, key: jnp.sum((w - batch) ** 2),
    )
    outer = optax.adamw(0.1, weight_decay=0.1)  # moves whatever it is given
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), outer)
    state = algorithm.init(jnp.array(0.0), hpo.Interval(0.5, 0.0, 2.0))
    after = algorithm.step(state, jnp.array(1.0), jnp.array(1.0))
    assert (after.hyperparams.lower, after.hyperparams.upper) == (0.0, 2.0)
    assert after.hyperparams.raw != state.hyperparams.raw
    grads = algorithm.compute_hypergradient(state, jnp.array(1.0), jnp.array(1.0))
    assert grads.lower is None and grads.upper is None


# Errors


def test_integer_hyperparameters_raise():
    case, algorithm = _ridge_algorithm()
    for bad in (3, True, jnp.arange(2), np.array([True])):
        with pytest.raises(ValueError, match=r"hyperparams\['n'\].*floating point"):
            algorithm.init(case.model, {"n": bad})


def test_placeholders_left_in_the_model_raise():
    case, algorithm = _ridge_algorithm()
    with pytest.raises(ValueError, match=r"model\['noise'\].*Positive.*partition"):
        algorithm.init({"w": case.model, "noise": hpo.Positive(1.0)}, None)


def test_a_model_without_parameters_raises():
    _, algorithm = _ridge_algorithm()
    with pytest.raises(ValueError, match="no floating-point array"):
        algorithm.init({"n": 3, "i": jnp.arange(2)}, 0.5)


def test_a_state_of_another_optimizer_raises():
    case, algorithm = _ridge_algorithm()
    state = _start(case, algorithm)
    other = hpo.T1T2(case.problem, optax.adam(0.1), optax.adam(0.05))
    with pytest.raises(ValueError, match="state.inner_opt_state.*`init` of the same"):
        other.step(state, case.train, case.val)
    swapped = eqx.tree_at(lambda s: s.hyperparams, state, {"penalty": jnp.zeros(4)})
    with pytest.raises(ValueError, match="state.outer_opt_state.*state.hyperparams"):
        algorithm.step(swapped, case.train, case.val)


def _ignores_dead(w, h, batch, key):
    unused = jnp.sum(jax.lax.stop_gradient(h["cut"])) + jnp.sum(h["whole"] > 0)
    return h["live"] * jnp.sum(w**2) + unused


def test_each_hyperparameter_without_a_hypergradient_is_named_once():
    """A live one hides none of the others; a bare `step` says nothing."""
    case = ridge()
    problem = hpo.Problem(_ignores_dead, case.problem.val_loss)
    hyperparams = {x: jnp.array(1.0) for x in ("live", "cut", "whole", "unused")}
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1))
    init = lambda algorithm: algorithm.init(
        case.model, hyperparams, train=case.train, val=case.val
    )
    with pytest.warns(UserWarning, match="Neither the training update") as record:
        state = init(algorithm)
    (message,) = [str(w.message) for w in record]
    names = [name for name in hyperparams if f"`hyperparams['{name}']`" in message]
    assert names == ["cut", "whole", "unused"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithm.step(state, case.train, case.val)
    with pytest.warns(UserWarning, match="'live'.*looks at nothing else"):
        init(hpo.FirstOrder(problem, optax.sgd(0.1), optax.sgd(0.1)))


def test_hyperparameters_of_the_optimiser_are_reached():
    case = ridge()
    inner = lambda h: optax.sgd(h["rate"], momentum=h["momentum"])
    hyperparams = {**case.hyperparams, "rate": 0.1, "momentum": 0.9}
    for make in (hpo.T1T2, hpo.ForwardMode):
        algorithm = make(case.problem, inner, optax.sgd(0.1))
        algorithm.init(case.model, hyperparams, train=case.train, val=case.val)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_step_traces_each_loss_once(name):
    case, calls = ridge(), []

    def counted(loss, name):
        def fn(*args):
            calls.append(name)
            return loss(*args)

        return fn

    problem = hpo.Problem(
        counted(case.problem.train_loss, "train"), counted(case.problem.val_loss, "val")
    )
    algorithm = ALGORITHMS[name](problem, optax.adam(0.1), optax.adam(0.1))
    state = algorithm.init(case.model, case.hyperparams)
    assert calls == []
    for _ in range(2):
        state = algorithm.step(state, case.train, case.val)
    assert sorted(calls) == ["train", "val"]


def test_a_learning_rate_alone_is_not_zero():
    case = ridge()
    problem = hpo.Problem(
        lambda w, h, batch, key: case.problem.val_loss(w, h, batch, key),
        case.problem.val_loss,
    )
    algorithm = hpo.T1T2(problem, lambda h: optax.sgd(h), optax.sgd(0.1))
    state = algorithm.init(case.model, hpo.Positive(0.1))
    grads = algorithm.compute_hypergradient(state, case.train, case.val)
    assert grads.raw != 0


def test_a_missing_key_is_said():
    algorithm = hpo.T1T2(hpo.Problem(_noisy, _noisy), optax.sgd(0.1), optax.sgd(0.1))
    state = algorithm.init(jnp.zeros(3), {"noise": jnp.array(0.1)})
    with pytest.raises(ValueError, match="`key` is missing"):
        algorithm.step(state, jnp.ones(3), jnp.ones(3))


def test_an_error_of_the_loss_itself_is_passed_on():
    def loss(model, h, batch, key):
        raise RuntimeError("mine")

    algorithm = hpo.T1T2(hpo.Problem(loss, loss), optax.sgd(0.1), optax.sgd(0.1))
    state = algorithm.init(jnp.zeros(3), jnp.array(0.1))
    with pytest.raises(RuntimeError, match="mine"):
        algorithm.step(state, jnp.ones(3), jnp.ones(3))


def test_optimisers_that_need_the_loss_value_raise():
    case = ridge()
    inner = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    algorithm = hpo.T1T2(case.problem, inner, optax.sgd(0.1))
    state = _start(case, algorithm)
    with pytest.raises(ValueError, match="value of the loss"):
        algorithm.step(state, case.train, case.val)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"inner_steps": 0}, "inner_steps"),
        ({"inner_steps": True}, "inner_steps"),
        ({"unroll": 0}, "unroll"),
        ({"outer": 0.1}, "outer"),
        ({"inner": 0.1}, "inner"),
    ],
)
def test_bad_settings(kwargs, match):
    settings = {"inner": optax.sgd(0.1), "outer": optax.sgd(0.1), **kwargs}
    with pytest.raises((ValueError, TypeError), match=match):
        hpo.T1T2(quadratic().problem, **settings)


def test_an_optimiser_that_cannot_be_differentiated_trains_all_the_same():
    """Its update is computed outside of JAX; the direct term needs no derivative."""

    def halve(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: np.asarray(x) / 2, shape, x)

    inner = optax.stateless(lambda updates, _: jtu.tree_map(halve, updates))
    case = quadratic()
    algorithm = hpo.FirstOrder(case.problem, inner, optax.sgd(0.1))
    after = algorithm.step(_start(case, algorithm), case.train, case.val)
    assert int(after.skipped) == 0


def test_inner_must_make_a_transformation():
    case = quadratic()
    algorithm = hpo.T1T2(
        case.problem,
        lambda h: 0.1,  # pyright: ignore[reportArgumentType]
        optax.sgd(0.1),
    )
    with pytest.raises(ValueError, match="`inner` must be"):
        _start(case, algorithm)


# Model state and aux


class _BatchNormNet(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key)
        self.linear = eqx.nn.Linear(3, 4, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.head = eqx.nn.Linear(4, 1, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.linear(x), state)
        return self.head(jax.nn.relu(x)), state


def _apply(model_and_state, x):
    model, state = model_and_state
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return batched(x, state)


def _bn_train(model_and_state, h, batch, key):
    x, y = batch
    noise_key, dropout_key = jr.split(key)
    x = eqx.nn.Dropout(0.3)(x + h * jr.uniform(noise_key, x.shape), key=dropout_key)
    out, state = _apply(model_and_state, x)
    return jnp.mean((out[:, 0] - y) ** 2), state


def _bn_val(model_and_state, h, batch, key):
    model, state = model_and_state
    out, _ = _apply((eqx.nn.inference_mode(model), state), batch[0])
    return jnp.mean((out[:, 0] - batch[1]) ** 2)


@pytest.mark.slow
def test_batch_norm_and_dropout_equal_a_python_loop(getkey):
    """Statistics are carried from step to step, differentiated (the validation loss
    reads them), never touched by validation. Each step has its own key, and where steps
    are taken again, the same one again."""
    model, model_state = eqx.nn.make_with_state(_BatchNormNet)(getkey())
    batch = lambda: (jr.normal(getkey(), (8, 3)), jr.normal(getkey(), (8,)))
    train, val, key = batch(), batch(), getkey()
    args = (hpo.Problem(_bn_train, _bn_val), optax.sgd(0.1), optax.sgd(0.1))
    algorithm = hpo.Unrolled(*args, inner_steps=3)
    state = algorithm.init(model, jnp.array(0.3), model_state=model_state)
    got = algorithm.compute_hypergradient(state, train, val, key=key)
    after = algorithm.step(state, train, val, key=key)

    def by_hand(h):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        model_state = state.model_state
        for i in range(3):
            step_key = jr.split(jr.fold_in(jr.fold_in(key, i), 0))[1]
            loss = lambda p, s: _bn_train(
                (eqx.combine(p, static), s), h, train, step_key
            )
            grads, model_state = jax.grad(loss, has_aux=True)(params, model_state)
            params = jtu.tree_map(lambda p, g: p - 0.1 * g, params, grads)
        model_ = eqx.combine(params, static)
        return _bn_val((model_, model_state), h, val, None), (params, model_state)

    by_hand = jax.jit(jax.value_and_grad(by_hand, has_aux=True))
    (value, (params, expected_state)), expected = by_hand(jnp.array(0.3))
    assert relative_error(got, expected) < 1e-6
    assert relative_error(after.model_state, expected_state) < 1e-6
    assert relative_error(eqx.filter(after.model, eqx.is_inexact_array), params) < 1e-6
    assert jnp.allclose(after.metrics.val_loss, value)
    for other in (
        hpo.Unrolled(*args, inner_steps=3, recompute=2),
        hpo.ForwardMode(*args, inner_steps=3),
    ):
        start = other.init(model, jnp.array(0.3), model_state=model_state)
        got = other.compute_hypergradient(start, train, val, key=key)
        assert relative_error(got, expected) < 1e-6
    fresh = algorithm.restart(after, model, model_state=model_state)
    assert equal(fresh.model_state, state.model_state)
    assert equal(algorithm.restart(after, model).model_state, after.model_state)


def test_aux_of_both_losses_is_reported():
    train = lambda w, h, b, k: (jnp.sum((w - b) ** 2) + h * w[0], {"n": jnp.sum(b)})
    val = lambda w, h, b, k: (jnp.sum((w - b) ** 2), w)
    problem = hpo.Problem(train, val, has_aux=True)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1), inner_steps=2)
    data = (jnp.ones(2), jnp.zeros(2))
    state = algorithm.init(jnp.ones(2), 0.5, train=data[0], val=data[1])
    after = algorithm.step(state, *data)
    assert jtu.tree_structure(state) == jtu.tree_structure(after)
    train_aux, val_aux = after.metrics.aux
    assert train_aux["n"] == 2
    assert equal(val_aux, after.model)
    without = algorithm.init(jnp.ones(2), 0.5)
    assert without.metrics.aux is None
    assert equal(algorithm.step(without, *data).metrics.aux, after.metrics.aux)


@pytest.mark.slow
def test_hyperparameters_improve_the_validation_loss():
    case = logistic()
    run = lambda outer: hpo.tune(
        hpo.T1T2(case.problem, optax.sgd(0.1), outer),
        case.model, case.hyperparams, case.train, case.val,
        steps=500, key=None,
    ).state.metrics.val_loss  # fmt: skip
    assert run(optax.adam(0.05)) < run(optax.set_to_zero())
