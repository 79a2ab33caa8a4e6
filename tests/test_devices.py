"""One process on many devices: a run on a mesh equals that on one device, compiles once
and leaves each array where it is."""

import contextlib
import logging
import math
import re

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import pytest
from eqx_hpo._feed import Feed
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from .helpers import ALGORITHMS, equal, relative_error


EXAMPLES, FEATURES, UNITS = 1024, 4, 8
SGD = optax.sgd(0.1, momentum=0.9)


def _fresh(name):
    """An algorithm that no other test has compiled."""
    return ALGORITHMS[name](PROBLEM, optax.sgd(0.1, momentum=0.9), SGD)


kinds = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def _like(x):
    """The sharding for a result along the rows of `x`, where one must be given."""
    sharding = jax.typeof(x).sharding
    explicit = not sharding.mesh.empty and sharding.mesh.explicit_axes
    return sharding if explicit else None


def _error(model, batch):
    x, y, _ = batch
    hidden = jnp.tanh(x @ model["w"])
    out = jnp.einsum("nk,k->n", hidden, model["v"], out_sharding=_like(y))
    return (out - y) ** 2


def _train_loss(model, hyperparams, batch, key):
    weights = hyperparams["weights"].raw
    if len(batch[0]) < EXAMPLES:
        weights = weights.at[batch[2]].get(out_sharding=_like(batch[1]))
    weights = jax.nn.sigmoid(weights)
    decay = jnp.exp(hyperparams["decay"])
    penalty = jnp.sum(decay * model["w"] ** 2) + jnp.sum(model["v"] ** 2)
    return jnp.mean(weights * _error(model, batch)) + 0.1 * penalty


def _val_loss(model, hyperparams, batch, key):
    return jnp.mean(_error(model, batch))


class _Weights(eqx.Module):
    raw: jax.Array


PROBLEM = hpo.Problem(_train_loss, _val_loss)


def _case():
    keys = jr.split(jr.key(0), 7)
    model = {"w": jr.normal(keys[0], (FEATURES, UNITS)), "v": jr.normal(keys[1], (8,))}
    weights = _Weights(0.1 * jr.normal(keys[2], (EXAMPLES,)))
    hyperparams = {"weights": weights, "decay": jnp.zeros((FEATURES, UNITS))}
    data = [
        (
            jr.normal(keys[i], (EXAMPLES, FEATURES)),
            jr.normal(keys[i + 1], (EXAMPLES,)),
            jnp.arange(EXAMPLES),
        )
        for i in (3, 5)
    ]
    return model, hyperparams, *data


def _mesh(kind, shape=(4, 2), names=("rows", "columns")):
    return jax.make_mesh(shape, names, axis_types=(getattr(AxisType, kind),) * 2)


def _spread(kind, case, split_model=True):
    """Data and their weights split over the rows; the model split over the columns, or
    whole."""
    mesh = _mesh(kind)
    columns = "columns" if split_model else None
    rows = NamedSharding(mesh, P("rows"))
    matrix = NamedSharding(mesh, P(None, columns))
    model, hyperparams, train, val = case
    model = jax.device_put(model, {"w": matrix, "v": NamedSharding(mesh, P(columns))})
    hyperparams = jax.device_put(hyperparams, {"weights": rows, "decay": matrix})
    return model, hyperparams, *jax.device_put((train, val), rows)


def _difference(left, right):
    """The relative error of what is on a mesh."""
    fetch = lambda x: jnp.asarray(jax.device_get(x)) if eqx.is_array(x) else None
    return relative_error(*[jtu.tree_map(fetch, tree) for tree in (left, right)])


def _places(tree):
    """Which indices of each array each device has."""
    arrays = jtu.tree_leaves(eqx.filter(tree, eqx.is_array))
    return [x.sharding.devices_indices_map(x.shape) for x in arrays if x.ndim > 0]


@contextlib.contextmanager
def _compilations(name):
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    count = []
    try:
        with jax.log_compiles():
            yield count
    finally:
        logger.removeHandler(handler)
        # The type checker of the tests hides the name that a pinned step has.
        done = rf"Finished XLA compilation of jit\(({name}|traced)\)"
        count.append(sum(re.match(done, message) is not None for message in found))


def _run(algorithm, case, wrap, calls=3):
    model, hyperparams, train, val = case
    train, val, key = wrap(train), wrap(val), jr.key(7)
    start = state = algorithm.init(model, hyperparams, train=train, val=val, key=key)
    with _compilations("step") as count:
        for i in range(calls):
            state = algorithm.step(state, train, val, key=jr.fold_in(key, i))
    return start, state, count[0]


DATA = {
    "batch": lambda data: data,
    "minibatch": lambda data: hpo.Minibatch(data, 64),
    "epochs": lambda data: hpo.Minibatch(data, 64, replacement=False),
}


def _tolerance(name):
    # Conjugate gradients stop at a residual: one iteration more shows.
    return 1e-3 if name == "implicit_3" else 1e-9


def _skip_if_refused(name, kind):
    if (name, kind) == ("implicit_3", "Explicit"):
        pytest.skip("it raises, see below")


def _check_steps(name, kind, data, split_model):
    algorithm, case = _fresh(name), _case()
    _, expected, _ = _run(algorithm, case, DATA[data])
    spread = _spread(kind, case, split_model)
    start, got, count = _run(algorithm, spread, DATA[data])
    assert count == 1
    parts = lambda s: (
        s.model, s.hyperparams, s.inner_opt_state, s.memory, s.metrics.val_loss
    )  # fmt: skip
    assert _difference(parts(got), parts(expected)) < _tolerance(name)
    kept = lambda s: (s.model, s.hyperparams, s.inner_opt_state, s.outer_opt_state)
    assert _places(kept(got)) == _places(kept(start))
    assert _places(got.memory) == _places(start.memory)
    assert _places((got.model, got.hyperparams)) == _places(spread[:2])


def test_steps_on_a_mesh_equal_those_on_one_device():
    _check_steps("t1t2", "Explicit", "batch", True)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize(
    "data, split_model", [("batch", True), ("minibatch", False), ("epochs", True)]
)
@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.filterwarnings("ignore:These hyperparameters get")
def test_every_algorithm_on_a_mesh_equals_itself_on_one_device(
    name, kind, data, split_model
):
    _skip_if_refused(name, kind)
    _check_steps(name, kind, data, split_model)


def test_implicit_refuses_explicit_axes():
    algorithm = ALGORITHMS["implicit_3"](PROBLEM, SGD, SGD)
    model, hyperparams, train, val = _spread("Explicit", _case())
    state = algorithm.init(model, hyperparams)
    with pytest.raises(ValueError, match="`state.model` lies along Explicit axes"):
        algorithm.step(state, train, val)


# What is sent from device to device


def _gathered(algorithm, state, train, val):
    """The sizes of the arrays that a step puts together from several devices."""
    step = vars(hpo.AbstractAlgorithm)["step"]
    lowered = step.lower(algorithm, state, train, val, key=jr.key(0))
    text = lowered.compile().compiled.as_text()
    assert "all-reduce" in text
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    shapes += re.findall(r"= \w+\[([\d,]*)\]\S* all-to-all\(", text)
    return [math.prod(int(x) for x in shape.split(",") if x) for shape in shapes]


def _check_gathered(name, kind, data):
    algorithm = ALGORITHMS[name](PROBLEM, SGD, SGD)
    model, hyperparams, train, val = _spread(kind, _case(), False)
    train, val = DATA[data](train), DATA[data](val)
    state = algorithm.init(model, hyperparams, train=train, val=val, key=jr.key(0))
    # Each device holds a quarter of the weights of the examples.
    assert max(_gathered(algorithm, state, train, val), default=0) < EXAMPLES / 2


def test_a_step_gathers_no_hyperparameters():
    _check_gathered("t1t2", "Auto", "batch")


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("data", ["batch", "minibatch"])
@pytest.mark.parametrize("name", [x for x in ALGORITHMS if "forward" not in x])
@pytest.mark.filterwarnings("ignore:These hyperparameters get")
def test_no_algorithm_gathers_hyperparameters(name, kind, data):
    # Forward mode holds a model for each hyperparameter: it is for few.
    _skip_if_refused(name, kind)
    _check_gathered(name, kind, data)


# Drivers


def _tune(algorithm, case, wrap, **settings):
    model, hyperparams, train, val = case
    args = (algorithm, model, hyperparams, wrap(train), wrap(val))
    with _compilations("_advance") as count:
        solution = hpo.tune(*args, steps=8, key=jr.key(1), progress=False, **settings)
    return solution, count[0]


def _check_tune(kind, wrap, name="t1t2"):
    algorithm, case = _fresh(name), _case()
    spread = _spread(kind, case)
    expected, _ = _tune(algorithm, case, wrap)
    got, count = _tune(algorithm, spread, wrap)
    assert count == 1
    parts = lambda x: (x.model, x.hyperparams)
    assert _difference(parts(got), parts(expected)) < 1e-9
    assert _places((got.model, got.hyperparams)) == _places(spread[:2])
    again, count = _tune(algorithm, spread, wrap, state=got.state)
    assert count == 0
    assert _places((again.model, again.hyperparams)) == _places(spread[:2])


@pytest.mark.slow
def test_tune_leaves_arrays_where_they_are():
    _check_tune("Auto", lambda data: data)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("name", ["t1t2_3", "hyperdistill"])
def test_tune_on_batches_of_a_loader(name, kind):
    _check_tune(kind, lambda data: iter([data] * 100), name=name)


def test_batches_of_a_loader_are_stacked_where_they_are():
    _, _, train, _ = _spread("Auto", _case())
    feed = Feed(iter([train] * 3), "train", 3)
    stacked = feed.next()
    assert isinstance(stacked, hpo.Stacked)
    for x, one in zip(stacked.batches, train):
        assert x.shape == (3, *one.shape)
        expected = NamedSharding(one.sharding.mesh, P(None, "rows"))
        assert x.sharding.is_equivalent_to(expected, x.ndim)


@pytest.mark.slow
@kinds
def test_fit_leaves_the_model_where_it_is(kind):
    algorithm, case = _fresh("t1t2"), _case()
    spread = _spread(kind, case)
    args = dict(steps=20, key=jr.key(1), progress=False)
    expected = hpo.fit(algorithm, *case[:3], val=case[3], **args)
    with _compilations("_leap") as count:
        got = hpo.fit(algorithm, *spread[:3], val=spread[3], **args)
    assert count == [1]
    assert _difference(got.model, expected.model) < 1e-9
    assert _places(got.model) == _places(spread[0])


@kinds
def test_a_restart_leaves_the_state_where_it_is(kind):
    algorithm = hpo.T1T2(PROBLEM, SGD, SGD)
    case = _case()
    model, hyperparams, train, _ = _spread(kind, case)
    state = algorithm.init(model, hyperparams, train=train)
    assert state.step.sharding == NamedSharding(train[0].sharding.mesh, P())
    fresh = algorithm.restart(state, case[0])  # a model on one device
    assert _places(fresh) == _places(state)


@pytest.mark.parametrize("which", ["model", "state"])
def test_what_is_on_one_device_joins_the_data(which):
    algorithm = hpo.T1T2(PROBLEM, SGD, SGD)
    model, hyperparams, *_ = case = _case()
    train = _spread("Auto", case)[2]
    data = {"train": train} if which == "model" else {}
    state = algorithm.init(model, hyperparams, **data)
    if which == "model":
        assert state.model["w"].sharding.is_fully_replicated
        assert len(state.model["w"].sharding.device_set) == 8
    state = algorithm.step(state, train, train)
    assert state.hyperparams["weights"].raw.sharding.is_fully_replicated
    assert len(state.hyperparams["weights"].raw.sharding.device_set) == 8


# Folds


def _check_folds(name, kind, horizon):
    algorithm = hpo.MetaLearner(_fresh(name), 4, horizon=horizon)
    model, hyperparams, train, _ = _case()
    train, val = hpo.folds(train, 4)
    _, expected, _ = _run(algorithm, (model, hyperparams, train, val), DATA["batch"])
    each = NamedSharding(_mesh(kind, (4, 2), ("folds", "columns")), P("folds"))
    data = jax.device_put((train, val), each)
    start, got, count = _run(algorithm, (model, hyperparams, *data), DATA["batch"])
    assert count == 1
    parts = lambda s: (s.model, s.hyperparams, s.inner_opt_state, s.memory.lasting)
    assert _difference(parts(got), parts(expected)) < _tolerance(name)
    assert _places(got) == _places(start)
    assert got.model["w"].sharding.spec[0] == "folds"
    fresh = algorithm.restart(got, model)
    assert _places(fresh) == _places(got)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:These hyperparameters get")
def test_folds_on_a_mesh_equal_those_on_one_device():
    _check_folds("first_order", "Explicit", None)


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("horizon", [None, 12])
@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.filterwarnings("ignore:These hyperparameters get")
def test_every_algorithm_on_folds_on_a_mesh(name, kind, horizon):
    _skip_if_refused(name, kind)
    _check_folds(name, kind, horizon)


@pytest.mark.parametrize(
    "kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)]
)
def test_a_run_that_goes_on_leaves_arrays_where_they_are(kind, tmp_path):
    """Through a file, and without a further compilation."""
    model, hyperparams, train, val = _spread(kind, _case())
    algorithm = hpo.T1T2(PROBLEM, SGD, SGD)

    def tune(steps, folder=None):
        checkpoint = None if folder is None else hpo.Checkpoints(folder)
        with _compilations("_advance") as count:
            solution = hpo.tune(
                algorithm, model, hyperparams, train, val, steps=steps,
                record_every=5, key=None, progress=False, checkpoint=checkpoint,
            )  # fmt: skip
        return solution, count[0]

    whole, _ = tune(20)
    half, _ = tune(10, tmp_path / "run")
    rest, count = tune(20, tmp_path / "run")
    assert count == 0
    parts = lambda solution: (solution.state, solution.history)
    assert equal(jax.device_get(parts(rest)), jax.device_get(parts(whole)))
    assert _places(rest.state) == _places(half.state) == _places(whole.state)
    hpo.save(tmp_path / "state", whole.state)
    loaded = hpo.load(tmp_path / "state", like=half.state)
    assert _places(loaded) == _places(whole.state)
    assert equal(jax.device_get(loaded), jax.device_get(whole.state))
