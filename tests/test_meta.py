import functools as ft
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
from eqx_hpo._tasks import mean_and_error

from .helpers import arrays, equal, relative_error
from .problems import ridge


SGD, ADAM = optax.sgd(0.05, momentum=0.9), optax.adam(0.1)
HORIZON = 6
PROBLEM = ridge().problem
ALGORITHMS = {
    "t1t2": hpo.T1T2(PROBLEM, SGD, ADAM),
    "greedy": hpo.Greedy(PROBLEM, ADAM, ADAM, inner_steps=3),
    "hyperdistill": hpo.HyperDistill(PROBLEM, ADAM, ADAM, horizon=HORIZON),
    "unrolled": hpo.Unrolled(PROBLEM, SGD, ADAM, inner_steps=HORIZON),
}


def _tasks(count, dtype=float):
    """`(train, val)` of so many ridge problems."""
    cases = [ridge(seed=seed) for seed in range(count)]
    stack = lambda *x: jnp.stack(x).astype(dtype)
    return tuple(
        jtu.tree_map(stack, *[getattr(case, name) for case in cases])
        for name in ("train", "val")
    )


def _of(tree, i):
    return jtu.tree_map(lambda x: x[i], tree)


def _same(left, right, tolerance=1e-12):
    return relative_error(left, right) < tolerance


@pytest.mark.parametrize(
    "name",
    [
        "t1t2",
        "hyperdistill",
        pytest.param("greedy", marks=pytest.mark.slow),
        pytest.param("unrolled", marks=pytest.mark.slow),
    ],
)
def test_one_task_is_the_plain_algorithm(name):
    plain = ALGORITHMS[name]
    algorithm = hpo.MetaLearner(plain, 1, horizon=HORIZON, reptile=None)
    case = ridge()
    train, val = _tasks(1)
    expected = plain.init(case.model, case.hyperparams, train=case.train)
    state = algorithm.init(case.model, case.hyperparams, train=train)
    for i in range(HORIZON // plain.inner_steps):
        key = jr.key(i)
        expected = plain.step(expected, case.train, case.val, key=key)
        state = algorithm.step(state, train, val, key=key)
        assert _same(state.hyperparams, expected.hyperparams)
        assert _same(_of(state.model, 0), expected.model)
        assert _same(_of(state.inner_opt_state, 0), expected.inner_opt_state)
        assert _same(state.metrics, expected.metrics)


@pytest.mark.parametrize(
    "name", ["greedy", pytest.param("unrolled", marks=pytest.mark.slow)]
)
def test_the_hypergradient_is_the_mean_over_the_tasks(name):
    plain, case = ALGORITHMS[name], ridge()
    algorithm = hpo.MetaLearner(plain, 3, horizon=HORIZON)
    train, val = _tasks(3)
    state = algorithm.init(case.model, case.hyperparams)
    got = algorithm.compute_hypergradient(state, train, val)
    single = plain.init(case.model, case.hyperparams)
    parts = [
        plain.compute_hypergradient(single, _of(train, i), _of(val, i))
        for i in range(3)
    ]
    assert _same(got, jtu.tree_map(lambda *x: sum(x) / 3, *parts))


@pytest.mark.parametrize(
    "dtype, tolerance",
    [("float64", 1e-12), pytest.param("float32", 1e-6, marks=pytest.mark.slow)],
)
def test_tasks_over_devices_equal_those_on_one(dtype, tolerance):
    cast = lambda tree: jtu.tree_map(lambda x: jnp.asarray(x, dtype), tree)
    plain = hpo.HyperDistill(PROBLEM, SGD, SGD, horizon=HORIZON)
    algorithm = hpo.MetaLearner(plain, 8, horizon=HORIZON)
    train, val = _tasks(8, dtype)
    model, hyperparams = cast((ridge().model, ridge().hyperparams))
    start = algorithm.init(model, hyperparams, train=train)
    mesh = jax.make_mesh((8,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
    each = jax.NamedSharding(mesh, jax.P("tasks"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    sharded, one = jax.device_put(start, everywhere), start
    data = jax.device_put((train, val), each)
    for _ in range(HORIZON + 2):
        sharded = algorithm.step(sharded, *data)
        one = algorithm.step(one, train, val)
    assert len(sharded.model.sharding.device_set) == 8
    assert _same(sharded.hyperparams, one.hyperparams, tolerance)
    assert _same(sharded.model, one.model, tolerance)
    assert _same(sharded.memory.lasting, one.memory.lasting, tolerance)


@pytest.mark.parametrize("reptile", [0.3, 0.0])
def test_episodes_start_from_the_reptile_initialisation(reptile):
    algorithm = hpo.MetaLearner(
        ALGORITHMS["hyperdistill"], 2, horizon=HORIZON, reptile=reptile
    )
    case, (train, val) = ridge(), _tasks(2)
    state = algorithm.init(case.model, case.hyperparams, train=train)
    initial = case.model
    for i in range(2 * HORIZON + 1):
        if i % HORIZON == 0:
            if i > 0:
                trained = jnp.mean(state.model, axis=0)
                initial = initial - reptile * (initial - trained)
            assert _same(algorithm.initialisation(state), initial)
            # A plain algorithm that starts there has the same first step.
            state = algorithm.step(state, train, val)
            count = state.inner_opt_state[0].count
            assert jnp.all(count == 1)
            _, past = state.memory.episode
            assert jnp.all(past.mass == 1.0)
            assert _same(past.weights, jnp.stack([initial, initial]))
        else:
            state = algorithm.step(state, train, val)
            assert _same(algorithm.initialisation(state), initial) or (
                (i + 1) % HORIZON == 0
            )
    assert state.outer_opt_state[0].count == 2 * HORIZON + 1


def test_restart_begins_with_the_model_that_is_given():
    algorithm = hpo.MetaLearner(ALGORITHMS["t1t2"], 2, horizon=HORIZON)
    case, (train, val) = ridge(), _tasks(2)
    state = algorithm.init(case.model, case.hyperparams)
    for _ in range(3):
        state = algorithm.step(state, train, val)
    model = 2 * case.model
    state = algorithm.restart(state, model)
    assert state.step == 3
    assert _same(state.model, jnp.stack([model, model]))
    assert _same(algorithm.initialisation(state), model)
    state = algorithm.step(state, train, val)
    assert _same(algorithm.initialisation(state), model)


def test_each_task_draws_its_own_batches():
    drawn = []

    def train_loss(model, hyperparams, batch, key):
        jax.debug.callback(
            lambda x, k: drawn.append((int(x), int(k))),
            *(
                batch[0],
                jr.bits(key),
            ),
        )
        return jnp.sum((model - hyperparams) ** 2) + 0.0 * batch[0]

    problem = hpo.Problem(train_loss, lambda m, h, b, k: jnp.sum(m**2 * h))
    algorithm = hpo.MetaLearner(hpo.FirstOrder(problem, SGD, ADAM), 2, horizon=4)
    data = jnp.arange(100).reshape(2, 50)
    train = eqx.filter_vmap(lambda x: hpo.Minibatch(x, 1))(data)
    state = algorithm.init(jnp.ones(2), jnp.ones(2), train=train)
    for i in range(4):
        state = algorithm.step(state, train, None, key=jr.key(i))
    jax.effects_barrier()
    numbers = {x for x, _ in drawn}
    assert len({x for x in numbers if x < 50}) == 4
    assert len({x for x in numbers if x >= 50}) == 4
    assert len({x % 50 for x in numbers}) > 4
    assert len({k for _, k in drawn}) == 8


@pytest.mark.slow
def test_tune_with_an_iterator_and_many_inner_steps():
    """Batches stacked on the host have the axis of the tasks behind that of the
    steps."""
    algorithm = hpo.MetaLearner(ALGORITHMS["greedy"], 2, horizon=HORIZON)
    case, (train, val) = ridge(), _tasks(2)
    tune = ft.partial(
        hpo.tune, algorithm, case.model, case.hyperparams, steps=4, key=None
    )
    loader = lambda data: iter([jtu.tree_map(np.asarray, data)] * 12)
    got = tune(loader(train), loader(val))
    expected = tune(train, val)
    assert got.result == hpo.RESULTS.successful
    assert _same(got.hyperparams, expected.hyperparams)
    assert got.model.shape == (2, 6)


def test_model_state_and_aux_of_each_task():
    """Statistics start anew with each episode, moved by Reptile like the weights."""
    index = eqx.nn.StateIndex(jnp.zeros(()))

    class Counter(eqx.Module):
        weight: jax.Array
        mean: eqx.nn.StateIndex

    model, model_state = eqx.nn.make_with_state(Counter)(jnp.ones(2), index)

    def train_loss(model, hyperparams, batch, key):
        del key
        model, state = model
        mean = 0.5 * state.get(model.mean) + 0.5 * batch
        loss = jnp.sum((model.weight - hyperparams * batch) ** 2)
        return loss, (state.set(model.mean, mean), mean)

    def val_loss(model, hyperparams, batch, key):
        del hyperparams, key
        model, _ = model
        return jnp.sum((model.weight - batch) ** 2), batch

    problem = hpo.Problem(train_loss, val_loss, has_aux=True)
    algorithm = hpo.MetaLearner(hpo.T1T2(problem, SGD, ADAM), 2, horizon=2, reptile=0.5)
    train, val = jnp.array([1.0, 3.0]), jnp.array([1.0, 3.0])
    state = algorithm.init(
        model, jnp.ones(2), train=train, val=val, model_state=model_state
    )
    means = []
    for _ in range(3):
        structure = jtu.tree_structure(state)
        state = algorithm.step(state, train, val)
        assert jtu.tree_structure(state) == structure
        means.append(state.metrics.aux[0])
        assert _same(state.metrics.aux[1], val)
    # (1/2 + 3/2) / 2 = 1 after the first step, 1.5 after the second.
    assert np.allclose(means, [[0.5, 1.5], [0.75, 2.25], [0.875, 1.875]])
    assert arrays(state.model_state)[0].shape == (2,)


@pytest.mark.parametrize("name", ["t1t2", "hyperdistill"])
def test_the_report_keeps_its_structure_and_survives_a_file(name, tmp_path):
    """From `init` on, so that nothing compiles twice."""
    algorithm = hpo.MetaLearner(ALGORITHMS[name], 3, horizon=HORIZON)
    case, (train, val) = ridge(), _tasks(3)
    state = algorithm.init(case.model, case.hyperparams, train=train)
    report = state.metrics.diagnostics
    assert isinstance(report, hpo.TaskReport) and report.tasks is None
    assert jnp.all(jnp.isnan(report.standard_error["penalty"]))
    specs = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in arrays(tree)]
    for _ in range(2):
        new = algorithm.step(state, train, val)
        assert jtu.tree_structure(new) == jtu.tree_structure(state)
        assert specs(new) == specs(state)
        state = new
    restarted = algorithm.restart(state, case.model)
    assert equal(restarted.metrics, state.metrics)
    hpo.save(tmp_path / "state", state)
    like = algorithm.init(case.model, case.hyperparams, train=train)
    loaded = hpo.load(tmp_path / "state", like)
    assert equal(loaded, state)
    after = algorithm.step(loaded, train, val)
    assert equal(after, algorithm.step(state, train, val))


def test_a_single_task_has_no_standard_error():
    algorithm = hpo.MetaLearner(ALGORITHMS["t1t2"], 1)
    case, (train, val) = ridge(), _tasks(1)
    state = algorithm.init(case.model, case.hyperparams)
    assert state.metrics.diagnostics == hpo.TaskReport(None, None)
    state = algorithm.step(state, train, val)
    assert state.metrics.diagnostics == hpo.TaskReport(None, None)


@pytest.mark.parametrize("size", [3, 2000])
@pytest.mark.parametrize("tasks", [2, 5, 11])
def test_mean_and_standard_error(size, tasks):
    """Of values that are equal but for some last bits too, in single precision."""
    noise = jr.normal(jr.key(0), (tasks, size), jnp.float32)
    cases = noise, 1 + 1e-6 * noise, 1e8 * noise, noise.astype(jnp.bfloat16)
    got = jax.jit(ft.partial(mean_and_error, tasks=tasks))(cases)
    for x, mean, error in zip(cases, *got):
        exact = np.asarray(x, np.float64)
        expected = exact.std(0, ddof=1) / tasks**0.5
        assert mean.dtype == error.dtype == x.dtype
        tolerance = 2 * jnp.finfo(x.dtype).eps
        assert np.allclose(error.astype(float), expected, rtol=max(tolerance, 1e-6))
        scale = np.abs(exact).max()
        assert np.allclose(mean.astype(float), exact.mean(0), atol=scale * tolerance)


@pytest.mark.slow
def test_the_report_of_each_solve():
    """Under that of the tasks; the outcome of `tune` is still that of one that
    fails."""
    case, (train, val) = ridge(), _tasks(3)
    few = lx.CG(rtol=1e-12, atol=1e-12, max_steps=1)
    plain = hpo.Implicit(PROBLEM, SGD, ADAM, inner_steps=1, linear_solver=few)
    algorithm = hpo.MetaLearner(plain, 3)
    run = ft.partial(hpo.tune, algorithm, case.model, case.hyperparams, train, val)
    solution = run(steps=1, key=None, progress=False)
    assert solution.result == hpo.RESULTS.promote(lx.RESULTS.max_steps_reached)
    assert "CG" in solution.message
    report = solution.state.metrics.diagnostics
    assert report.tasks.solver_steps.shape == (3,)
    assert report.standard_error["penalty"].shape == (6,)


def test_bad_arguments():
    plain = ALGORITHMS["greedy"]
    with pytest.raises(ValueError, match="`horizon` must be a multiple.*, 3; got 7"):
        hpo.MetaLearner(plain, 2, horizon=7)
    with pytest.raises(ValueError, match="`tasks` must be an integer"):
        hpo.MetaLearner(plain, 0, horizon=6)
    with pytest.raises(ValueError, match="`reptile` must be a number from 0 to 1"):
        hpo.MetaLearner(plain, 2, horizon=6, reptile=-1.0)
    with pytest.raises(ValueError, match="`reptile` moves the start of episodes"):
        hpo.MetaLearner(plain, 2, reptile=0.5)
    algorithm = hpo.MetaLearner(plain, 2, horizon=6)
    with pytest.raises(ValueError, match="an algorithm for one model"):
        hpo.MetaLearner(algorithm, 2, horizon=6)
    case, (_, val) = ridge(), _tasks(2)
    state = algorithm.init(case.model, case.hyperparams)
    with pytest.raises(ValueError, match=r"`train` must have an axis for the 2 tasks"):
        algorithm.step(state, case.train, val)
    with pytest.raises(ValueError, match=r"got the shape \(3, 24, 6\)"):
        algorithm.step(state, _tasks(3)[0], val)
    with pytest.raises(ValueError, match="`model` is float64"):
        algorithm.restart(state, jnp.ones(7))


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
def test_discretised_losses_are_means_over_tasks(stacked):
    def val_loss(model, hyperparams, batch, key):
        error = model - batch
        return jnp.vdot(jnp.array([1.0, 2.0, 4.0]), hyperparams) * error**2

    problem = hpo.Problem(val_loss, val_loss)
    still = hpo.T1T2(problem, optax.sgd(0.0), optax.set_to_zero())
    learner, train = hpo.MetaLearner(still, 2), jnp.zeros(2)
    val = jnp.array([1.0, 3.0])
    val = hpo.Stacked(val[None]) if stacked else val
    choice = hpo.Choice(jnp.log(jnp.array([2.0, 5.0, 3.0])))
    settings: Any = {"steps": 2, "key": None, "progress": False}
    solution: Any = hpo.tune(learner, jnp.array(0.0), choice, train, val, **settings)
    # The mean of 1^2 and 3^2, times the weight.
    assert float(solution.discretised.val_loss) == 5 * 2
    expected = 5 * (0.2 * 1 + 0.5 * 2 + 0.3 * 4)
    np.testing.assert_allclose(solution.discretised.relaxed_val_loss, expected)
    np.testing.assert_array_equal(solution.discretised.values, [0.0, 1.0, 0.0])


def test_a_validation_loss_may_be_a_constant():
    loss = lambda w, h, batch, key: jnp.sum((w - h * batch) ** 2)
    problem = hpo.Problem(loss, lambda *_: 0.0)
    plain = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1))
    learner = hpo.MetaLearner(plain, 2)
    state = learner.init(jnp.ones(2), jnp.array(0.5))
    state = learner.step(state, jnp.ones((2, 2)), jnp.ones((2, 2)))
    assert state.metrics.val_loss == 0
    assert int(state.skipped) == 0
