"""What a user may do with the steps of any algorithm: loops, maps, files, folds."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import pytest

from .helpers import ALGORITHMS, equal, relative_error
from .problems import ridge


SGD: optax.GradientTransformation = optax.sgd(0.1)
STEPS = 3
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", ALGORITHMS)]


def _make(name, outer: optax.GradientTransformation = SGD):
    case = ridge()
    return case, ALGORITHMS[name](case.problem, optax.adam(0.05), outer)


def _run(algorithm, state, train, val, start=0, stop=STEPS):
    for i in range(start, stop):
        state = algorithm.step(state, train, val, key=jr.key(i))
    return state


def test_a_scan_equals_a_loop(name):
    case, algorithm = _make(name)
    start = algorithm.init(case.model, case.hyperparams, train=case.train)
    looped = _run(algorithm, start, case.train, case.val)
    carry, static = eqx.partition(start, eqx.is_array)

    def body(carry, i):
        key = jax.vmap(jr.key)(i[None])[0]
        state = eqx.combine(carry, static)
        new = algorithm.step(state, case.train, case.val, key=key)
        return eqx.filter(new, eqx.is_array), None

    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(STEPS)))(carry)
    assert int(scanned.total_skipped) == 0
    # A diagnostic that was not asked for is NaN.
    ends = [eqx.tree_at(lambda x: x.metrics, end, None) for end in (scanned, looped)]
    # Conjugate gradients stop at a residual, a rounding error earlier or later.
    assert relative_error(*ends) < (1e-2 if "implicit" in name else 1e-10)


def test_a_map_over_starts_equals_single_runs(name):
    case, algorithm = _make(name)

    def run(model):
        state = algorithm.init(model, case.hyperparams, train=case.train)
        state = _run(algorithm, state, case.train, case.val)
        return eqx.filter((state.model, state.hyperparams), eqx.is_array)

    models = jnp.stack([case.model, case.model + 0.1, -case.model])
    mapped = jax.jit(jax.vmap(run))(models)
    for i, model in enumerate(models):
        row = jtu.tree_map(lambda x: x[i], mapped)
        assert relative_error(row, run(model)) < 1e-10


def test_through_a_file_it_goes_on_bit_for_bit(name, tmp_path):
    case, algorithm = _make(name)
    start = algorithm.init(case.model, case.hyperparams, train=case.train)
    half = _run(algorithm, start, case.train, case.val, 0, 1)
    hpo.save(tmp_path / "state", half)
    again = hpo.load(tmp_path / "state", start)
    ends = [
        _run(algorithm, state, case.train, case.val, 1, STEPS)
        for state in (half, again)
    ]
    assert equal(*ends)


@pytest.mark.filterwarnings("ignore:These hyperparameters get a hypergradient of zero")
def test_on_folds_it_is_the_mean(name):
    case, algorithm = _make(name, optax.set_to_zero())
    train, val = hpo.folds(case.train, 3)
    learner = hpo.MetaLearner(algorithm, 3)
    state = learner.init(case.model, case.hyperparams, train=train, val=val)
    single = []
    for i in range(3):
        rows = jtu.tree_map(lambda x: x[i], (train, val))
        start = algorithm.init(case.model, case.hyperparams, train=rows[0])
        for _ in range(STEPS):
            start = algorithm.step(start, *rows)
        single.append(algorithm.compute_hypergradient(start, *rows))
    for _ in range(STEPS):
        state = learner.step(state, train, val)
    got = learner.compute_hypergradient(state, train, val)
    expected = jtu.tree_map(lambda *x: sum(x) / 3, *single)
    if name == "hyperdistill":  # whose scale is that of the mean
        cosine = optax.tree.vdot(got, expected) / (
            optax.tree.norm(got) * optax.tree.norm(expected)
        )
        assert cosine > 0.95
    elif name == "first_order":  # nothing acts but through training
        assert equal(got, expected)
    else:
        assert relative_error(got, expected) < 1e-9
