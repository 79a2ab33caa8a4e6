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
from eqx_hpo._hyperparameter import partition_raw

from .helpers import arrays, equal, relative_error


ROWS, FEATURES = 23, 4


def _data(key, rows=ROWS):
    keys = jr.split(key)
    x = jr.normal(keys[0], (rows, FEATURES))
    return x, x @ jnp.array([1.0, -0.5, 0.0, 2.0]) + jr.normal(keys[1], (rows,))


# What is split


@pytest.mark.parametrize("rows, count, repeats", [(23, 5, 3), (6, 6, 1), (7, 2, 2)])
def test_each_row_is_held_out_once_a_repeat(rows, count, repeats):
    train, val = hpo.folds(jnp.arange(rows), count, repeats=repeats)
    held_out = rows // count
    assert val.shape == (count * repeats, held_out)
    assert train.shape == (count * repeats, rows - held_out)
    for left, right in zip(train, val):
        assert sorted([*left.tolist(), *right.tolist()]) == list(range(rows))
    by_repeat = val.reshape(repeats, count * held_out)
    assert all(len(set(x.tolist())) == count * held_out for x in by_repeat)
    # Each repeat has an order of its own, and none is that of the data.
    orders = {tuple(x.tolist()) for x in by_repeat}
    assert len(orders) == repeats and tuple(range(rows)) not in orders


def test_the_order_is_that_of_the_key():
    data = jnp.arange(20)
    fixed = hpo.folds(data, 4)
    assert equal(fixed, hpo.folds(data, 4))
    assert equal(fixed, hpo.folds(data, 4, key=jr.key(0)))
    assert not equal(fixed, hpo.folds(data, 4, key=jr.key(1)))
    assert equal(
        hpo.folds(data, 4, key=jr.PRNGKey(1)), hpo.folds(data, 4, key=jr.key(1))
    )
    traced = jax.jit(lambda x, key: hpo.folds(x, 4, key=key))(data, jr.key(1))
    assert equal(traced, hpo.folds(data, 4, key=jr.key(1)))


@pytest.mark.slow
def test_rows_of_all_arrays_stay_together():
    numbers = np.arange(10)
    keys = jr.split(jr.key(3), 10)
    data = {"n": numbers, "x": np.stack([numbers, -0.5 * numbers], 1), "key": keys}
    for part in hpo.folds(data, 3, repeats=2):
        assert part["n"].shape[0] == 6 and part["n"].dtype == numbers.dtype
        assert jnp.array_equal(part["x"][..., 1], -0.5 * part["n"])
        assert jnp.array_equal(jr.key_data(part["key"]), jr.key_data(keys[part["n"]]))


TEXTS = {
    "`count` must be an integer of at least 2; got 1.": lambda: hpo.folds(
        jnp.ones(4), 1
    ),
    "`count` must be from 2 to the 4 rows of `data`; got 5.": lambda: hpo.folds(
        jnp.ones(4), 5
    ),
    "`repeats` must be an integer of at least 1; got 0.": lambda: hpo.folds(
        jnp.ones(4), 2, repeats=0
    ),
    "`data` needs the same, non-empty leading axis in all arrays; got shapes "
    "[(4,), (3,)].": lambda: hpo.folds((jnp.ones(4), jnp.ones(3)), 2),
}


@pytest.mark.parametrize("text", TEXTS)
def test_bad_input_raises(text):
    with pytest.raises(ValueError) as info:
        TEXTS[text]()
    assert str(info.value) == text


# Folds beside runs of their own


def _val_loss(weights, h, batch, key):
    del h, key
    x, y, _ = batch
    return 0.5 * jnp.mean((x @ weights - y) ** 2)


def _train_loss(weights, h, batch, key):
    """A decay for each feature, and a weight for each example."""
    del key
    x, y, index = batch
    errors = 0.5 * h["weights"][index] * (x @ weights - y) ** 2
    return jnp.mean(errors) + 0.5 * jnp.sum(h["decay"] * weights**2)


PROBLEM = hpo.Problem(_train_loss, _val_loss)
INNER, OUTER = optax.sgd(0.2, momentum=0.5), optax.adam(0.1)
SOLVER = lx.CG(rtol=1e-14, atol=1e-14)
ALGORITHMS = {
    "t1t2": hpo.T1T2(PROBLEM, INNER, OUTER, inner_steps=2),
    "unrolled": hpo.Unrolled(PROBLEM, optax.adam(0.1), OUTER, inner_steps=4),
    "greedy": hpo.Greedy(PROBLEM, INNER, OUTER, inner_steps=3),
    "implicit": hpo.Implicit(
        PROBLEM, INNER, OUTER, inner_steps=20, linear_solver=SOLVER
    ),
}


def _hyperparams():
    weights = hpo.Interval(jnp.linspace(0.3, 0.7, ROWS), 0.0, 1.0)
    return {"decay": hpo.Positive(jnp.full(FEATURES, 0.05)), "weights": weights}


def _of(tree, i):
    take = lambda x: x[i] if eqx.is_array(x) else x
    return jtu.tree_map(take, tree)


def _with_hyperparams(state, hyperparams):
    return eqx.tree_at(lambda s: s.hyperparams, state, hyperparams)


def _compare_with_runs_of_their_own(
    algorithm, model, hyperparams, data, calls, tolerance=1e-12, **options
):
    """Each fold by an algorithm whose outer update moves nothing; the mean of their
    hypergradients moves the hyperparameters of all by hand."""
    train, val = data
    count = len(arrays(train)[0])
    learner = hpo.MetaLearner(algorithm, tasks=count)
    state = learner.init(model, hyperparams, **options)
    still = eqx.tree_at(lambda a: a.outer, algorithm, optax.set_to_zero())
    singles = [still.init(model, hyperparams, **options) for _ in range(count)]
    opt_state = OUTER.init(partition_raw(hyperparams)[0])
    for call in range(calls):
        key = jr.fold_in(jr.key(5), call)
        got = learner.compute_hypergradient(state, train, val, key=key)
        state = learner.step(state, train, val, key=key)
        parts = []
        for i, task_key in enumerate(jr.split(key, count)):
            own = (_of(train, i), _of(val, i))
            parts += [still.compute_hypergradient(singles[i], *own, key=task_key)]
            singles[i] = still.step(singles[i], *own, key=task_key)
        stacked = jtu.tree_map(lambda *x: jnp.stack(x), *parts)
        mean = jtu.tree_map(lambda x: jnp.mean(x, 0), stacked)
        error = jtu.tree_map(lambda x: jnp.std(x, 0, ddof=1) / count**0.5, stacked)
        report = state.metrics.diagnostics
        assert relative_error(got, mean) < tolerance
        assert relative_error(report.standard_error, error) < 10 * tolerance
        raw, constants = partition_raw(singles[0].hyperparams)
        updates, opt_state = OUTER.update(mean, opt_state, raw)
        h = eqx.combine(optax.apply_updates(raw, updates), constants)
        singles = [_with_hyperparams(x, h) for x in singles]
        assert relative_error(state.hyperparams, h) < tolerance
        # The state of a fold is that of its own run.
        for i, single in enumerate(singles):
            mine = _of((state.model, state.model_state), i)
            assert relative_error(mine, (single.model, single.model_state)) < tolerance
    assert int(state.skipped) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, batch_size",
    [
        ("t1t2", 6),
        ("t1t2", None),
        ("unrolled", 6),
        ("unrolled", None),
        ("greedy", 6),
        ("greedy", None),
        ("implicit", None),
    ],
)
def test_folds_equal_runs_of_their_own(name, batch_size):
    """With a weight for each example, by its index among the data."""
    x, y = _data(jr.key(0))
    train, val = hpo.folds((x, y, jnp.arange(ROWS)), 3)
    if batch_size is not None:
        make = lambda part: hpo.Minibatch(part, batch_size, replacement=False)
        train = eqx.filter_vmap(make)(train)
    _compare_with_runs_of_their_own(
        ALGORITHMS[name], jnp.zeros(FEATURES), _hyperparams(), (train, val), 3
    )


@pytest.mark.slow
def test_weights_of_held_out_examples_get_nothing_from_their_fold():
    """So the hypergradient of a weight is that of the other folds, over all of them."""
    x, y = _data(jr.key(0))
    train, val = hpo.folds((x, y, jnp.arange(ROWS)), 3)
    learner = hpo.MetaLearner(ALGORITHMS["t1t2"], 3)
    model = jnp.zeros(FEATURES)
    state = learner.init(model, _hyperparams())
    got = learner.compute_hypergradient(state, train, val)["weights"].raw
    plain = ALGORITHMS["t1t2"]
    single = plain.init(model, _hyperparams())
    total = jnp.zeros(ROWS)
    for i in range(3):
        part = plain.compute_hypergradient(single, _of(train, i), _of(val, i))
        part = part["weights"].raw
        assert jnp.all(part[val[2][i]] == 0) and jnp.all(part[train[2][i]] != 0)
        total += part
    assert relative_error(got, total / 3) < 1e-12


@pytest.mark.slow
def test_folds_of_indices_hold_the_data_once():
    """The loss gathers the rows of what it closes over."""
    x, y = _data(jr.key(0))
    gather = lambda fn: (
        lambda w, h, index, key: fn(w, h, (x[index], y[index], index), key)
    )
    problem = hpo.Problem(gather(_train_loss), gather(_val_loss))
    by_index = eqx.tree_at(lambda a: a.problem, ALGORITHMS["t1t2"], problem)
    results = []
    for algorithm, data in (
        (ALGORITHMS["t1t2"], (x, y, jnp.arange(ROWS))),
        (by_index, jnp.arange(ROWS)),
    ):
        train, val = hpo.folds(data, 4)
        make = lambda part: hpo.Minibatch(part, 5)
        train = eqx.filter_vmap(make)(train)
        learner = hpo.MetaLearner(algorithm, 4)
        state = learner.init(jnp.zeros(FEATURES), _hyperparams())
        for i in range(2):
            state = learner.step(state, train, val, key=jr.key(i))
        results.append((state.model, state.hyperparams, state.metrics))
    assert relative_error(results[1], results[0]) < 1e-12


class _BatchNormNet(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.linear = eqx.nn.Linear(FEATURES, 1, key=key)
        self.norm = eqx.nn.BatchNorm(1, "batch", mode="batch", dtype=jnp.float64)

    def __call__(self, x, state):
        return self.norm(self.linear(x), state)


def _norm_loss(model_and_state, h, batch, key):
    del key
    (model, state), (x, y) = model_and_state, batch
    apply = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    out, state = apply(x, state)
    decay = jnp.sum(h * model.linear.weight[0] ** 2)
    return jnp.mean((out[:, 0] - y) ** 2) + decay, state


def _norm_val_loss(model_and_state, h, batch, key):
    model, state = model_and_state
    still = (eqx.nn.inference_mode(model), state)
    return _norm_loss(still, jnp.zeros_like(h), batch, key)[0]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 6])
def test_each_fold_has_its_own_batch_norm(batch_size):
    model, model_state = eqx.nn.make_with_state(_BatchNormNet)(jr.key(0))
    problem = hpo.Problem(_norm_loss, _norm_val_loss)
    algorithm = hpo.Unrolled(problem, INNER, OUTER, inner_steps=3)
    train, val = hpo.folds(_data(jr.key(0)), 3)
    if batch_size is not None:
        make = lambda part: hpo.Minibatch(part, batch_size, replacement=False)
        train = eqx.filter_vmap(make)(train)
    _compare_with_runs_of_their_own(
        algorithm,
        model,
        jnp.full(FEATURES, 0.1),
        (train, val),
        3,
        model_state=model_state,
    )


@pytest.mark.slow
def test_folds_over_devices_equal_those_on_one():
    learner = hpo.MetaLearner(ALGORITHMS["t1t2"], 5)
    train, val = hpo.folds((*_data(jr.key(0)), jnp.arange(ROWS)), 5)
    start = learner.init(jnp.zeros(FEATURES), _hyperparams())
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((5,), ("folds",), auto, devices=jax.devices()[:5])
    each = jax.NamedSharding(mesh, jax.P("folds"))
    sharded = eqx.filter_shard(start, jax.NamedSharding(mesh, jax.P()))
    data = jax.device_put((train, val), each)
    for _ in range(3):
        sharded = learner.step(sharded, *data)
        start = learner.step(start, train, val)
    assert len(sharded.model.sharding.device_set) == 5
    left, right = ((s.hyperparams, s.model, s.metrics) for s in (sharded, start))
    assert relative_error(left, right) < 1e-12


# Closed forms


def _ridge_loss(weights, h, batch, key, rows):
    """The sum over the batch, over the number of all rows: with it the penalty is the
    same in each fold, as the formula of the leave-one-out residuals has it."""
    del key
    x, y = batch
    penalty = 0.5 * jnp.sum(h * weights**2)
    return 0.5 * jnp.sum((x @ weights - y) ** 2) / rows + penalty


def _square_loss(weights, h, batch, key):
    del h, key
    x, y = batch
    return jnp.mean((x @ weights - y) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["implicit", "unrolled"])
def test_leave_one_out_is_the_derivative_of_press(name):
    x, y = _data(jr.key(2), 15)
    log_decay = jnp.log(0.2)
    loss = lambda *args: _ridge_loss(*args, rows=len(x))
    problem = hpo.Problem(loss, _square_loss)
    train, val = hpo.folds((x, y), len(x))
    decay = lambda log: jnp.exp(log) * jnp.eye(FEATURES)

    def press(log):
        hat = x @ jnp.linalg.solve(x.T @ x / len(x) + decay(log), x.T / len(x))
        residuals = (y - hat @ y) / (1 - jnp.diag(hat))
        return jnp.mean(residuals**2)

    def solution(x_fold, y_fold):
        hessian = x_fold.T @ x_fold / len(x) + decay(log_decay)
        return jnp.linalg.solve(hessian, x_fold.T @ y_fold / len(x))

    if name == "implicit":
        inner, linear_solver = optax.set_to_zero(), lx.Cholesky()
        algorithm = hpo.Implicit(
            problem, inner, OUTER, inner_steps=1, linear_solver=linear_solver
        )
    else:
        algorithm = hpo.Unrolled(problem, optax.sgd(0.5), OUTER, inner_steps=200)
    learner = hpo.MetaLearner(algorithm, tasks=len(x))
    state = learner.init(jnp.zeros(FEATURES), hpo.Positive(jnp.exp(log_decay)))
    state = eqx.tree_at(lambda s: s.model, state, jax.vmap(solution)(*train))
    got = learner.compute_hypergradient(state, train, val)
    assert relative_error(got, hpo.Real(jax.grad(press)(log_decay))) < 1e-8
    after = learner.step(state, train, val)
    assert jnp.allclose(after.metrics.val_loss, press(log_decay), rtol=1e-10)


LOG_DECAY, COUNT = jnp.array(-1.0), 5
WEIGHTS = jnp.linspace(-1.0, 1.0, FEATURES)


def _hold_out_hypergradient(rate, train, val):
    """One step of gradient descent, in closed form: only the train rows move the
    weights, only the held-out rows tell."""
    (x, y), decay = train, jnp.exp(LOG_DECAY)
    gradient = x.T @ (x @ WEIGHTS - y) / len(x) + decay * WEIGHTS
    moved = WEIGHTS - rate * gradient
    x, y = val
    alpha = 2 * x.T @ (x @ moved - y) / len(x)
    return -rate * decay * alpha @ WEIGHTS


def _reported(rate, key, repeats=1):
    """The mean hypergradient and its standard error, over the folds of 400 data
    sets."""
    loss = lambda w, h, batch, k: (
        _square_loss(w, h, batch, k) / 2 + h * jnp.sum(w**2) / 2
    )
    problem = hpo.Problem(loss, _square_loss)
    plain = hpo.T1T2(problem, optax.sgd(rate), optax.set_to_zero())
    learner = hpo.MetaLearner(plain, tasks=COUNT * repeats)
    state = learner.init(WEIGHTS, hpo.Positive(jnp.exp(LOG_DECAY)))

    def one(key):
        train, val = hpo.folds(_data(key, 100), COUNT, repeats=repeats, key=key)
        mean = learner.compute_hypergradient(state, train, val).raw
        report = learner.step(state, train, val).metrics.diagnostics
        return mean, report.standard_error.raw

    mean, error = jax.lax.map(one, jr.split(key, 400), batch_size=100)
    return mean, jnp.sqrt(jnp.mean(error**2))


@pytest.mark.slow
def test_the_standard_error_is_that_of_independent_hold_outs():
    rate = 0.3

    def one(key):
        x, y = _data(key, 100)
        return _hold_out_hypergradient(rate, (x[20:], y[20:]), (x[:20], y[:20]))

    single = jax.vmap(one)(jr.split(jr.key(7), 2000))
    mean, error = _reported(rate, jr.key(8))
    assert jnp.abs(error / (jnp.std(single) / COUNT**0.5) - 1) < 0.1
    # Here the weights move far on data that the folds share, which is what makes the
    # mean over folds less noisy than that of independent hold-outs.
    assert 0.4 < jnp.std(mean) / error < 0.7


@pytest.mark.slow
def test_the_standard_error_where_training_hardly_tells_folds_apart():
    rate = 0.01
    mean, error = _reported(rate, jr.key(8))
    assert jnp.abs(error / jnp.std(mean) - 1) < 0.1
    # With repeats it is too small by about their root.
    mean, error = _reported(rate, jr.key(9), repeats=4)
    assert jnp.abs(error / jnp.std(mean) * 2 - 1) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 40])  # train parts that 4 divides, and 30 rows
def test_of_data_on_a_mesh_with_explicit_axes(size):
    x = jnp.arange(2.0 * size).reshape(size, 2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("data")
    split = jax.device_put(x, jax.NamedSharding(mesh, spec))
    parts = zip(hpo.folds(split, 4), hpo.folds(x, 4), strict=True)
    for got, expected in parts:
        assert jnp.array_equal(got, expected)
        assert got.sharding.is_fully_replicated == (got.shape[1] % 4 != 0)
