import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import optax
import pytest

from .helpers import equal, relative_error
from .problems import ridge


GRAD = {"a": jnp.array([3.0, -3.0, 0.5, 0.0]), "b": hpo.Real(jnp.array(-1.0))}
ERROR = {"a": jnp.array([1.0, 2.0, jnp.nan, 0.0]), "b": hpo.Real(jnp.array(0.5))}
UPDATES = {"a": jnp.array([1.0, 2.0, 3.0, 4.0]), "b": hpo.Real(jnp.array(5.0))}


@pytest.mark.parametrize(
    "threshold, passed",
    [
        # On the boundary, as -1.0 is at 2.0, it is shut; NaN errors hold nothing back.
        (0.0, ([1.0, 2.0, 3.0, 0.0], 5.0)),
        (1.5, ([1.0, 0.0, 3.0, 0.0], 5.0)),
        (2.0, ([1.0, 0.0, 3.0, 0.0], 0.0)),
        (jnp.array(3.0), ([0.0, 0.0, 3.0, 0.0], 0.0)),
    ],
)
def test_what_passes(threshold, passed):
    outer = hpo.gate(threshold)
    state = outer.init(UPDATES)
    got, new_state = outer.update(UPDATES, state, grad=GRAD, error=ERROR)
    expected = {"a": jnp.array(passed[0]), "b": hpo.Real(jnp.array(passed[1]))}
    assert equal(got, expected) and equal(new_state, state)
    # Without `grad` the updates stand in for it.
    alone, _ = outer.update(GRAD, state, error=ERROR)
    expected = jax.tree.map(lambda x, g: jnp.where(x == 0, 0, g), expected, GRAD)
    assert equal(alone, expected)


def test_dtypes_stay():
    half = jnp.array([1.0, 2.0], jnp.bfloat16)
    got, _ = hpo.gate(1.5).update(half, optax.EmptyState(), error=jnp.ones_like(half))
    assert equal(got, jnp.array([0.0, 2.0], jnp.bfloat16))


def _run(outer, threshold):
    """The hyperparameters after three steps, and the gated ones of each."""
    case = ridge()
    data = jax.tree.map(lambda *x: jnp.concatenate(x), case.train, case.val)
    train, val = hpo.folds(data, 4)
    outer = optax.chain(outer, *([] if threshold is None else [hpo.gate(threshold)]))
    algorithm = hpo.T1T2(case.problem, optax.sgd(0.1), outer)
    algorithm = hpo.MetaLearner(algorithm, tasks=4)
    state = algorithm.init(case.model, case.hyperparams)
    shut = []
    for _ in range(3):
        grads = algorithm.compute_hypergradient(state, train, val)
        new = algorithm.step(state, train, val)
        errors = new.metrics.diagnostics.standard_error
        shut.append(jnp.abs(grads["penalty"]) <= (threshold or 0) * errors["penalty"])
        moved = new.hyperparams["penalty"] != state.hyperparams["penalty"]
        if threshold is not None:
            assert jnp.array_equal(moved, ~shut[-1])
        state = new
    return state, jnp.stack(shut)


@pytest.mark.slow
def test_behind_adam_a_coordinate_stands_still():
    """The moments of Adam would move it: the first steps are the same for all."""
    state, shut = _run(optax.adam(0.1), 2.0)
    assert jnp.any(shut) and not jnp.all(shut)
    plain, _ = _run(optax.adam(0.1), None)
    assert jnp.all(plain.hyperparams["penalty"] != ridge().hyperparams["penalty"])
    # The moments are those without a gate, of gradients that differ a little.
    assert jnp.all(state.outer_opt_state[0][0].mu["penalty"] != 0)


@pytest.mark.slow
def test_other_transformations_do_not_notice():
    """One that takes no extra arguments at all."""
    sgd = optax.sgd(0.1)

    def update(updates, state, params=None):
        return sgd.update(updates, state, params)

    bare = optax.GradientTransformation(sgd.init, update)
    left, _ = _run(bare, None)
    right, _ = _run(optax.sgd(0.1), None)
    assert relative_error(left.hyperparams, right.hyperparams) == 0


MISSING = (
    "`gate` needs the standard error of the hypergradient, which one model alone does "
    "not have. Wrap the algorithm in `MetaLearner(algorithm, tasks)` with two tasks "
    "at least, and give each a fold of the data: `train, val = folds(data, tasks)`. "
    "(`optax.MultiSteps` does not pass it on.)"
)


def test_without_an_error():
    case = ridge()
    outer = optax.chain(optax.adam(0.1), hpo.gate(2.0))
    plain = hpo.T1T2(case.problem, optax.sgd(0.1), outer)
    state = plain.init(case.model, case.hyperparams)
    with pytest.raises(ValueError) as info:
        plain.step(state, case.train, case.val)
    assert str(info.value) == MISSING
    single = hpo.MetaLearner(plain, tasks=1)
    state = single.init(case.model, case.hyperparams)
    data = [tuple(x[None] for x in data) for data in (case.train, case.val)]
    with pytest.raises(ValueError) as info:
        single.step(state, *data)
    assert str(info.value) == MISSING


@pytest.mark.parametrize("inner", [hpo.gate(1.5), hpo.select_top_k(1)])
def test_on_a_part_of_the_hyperparameters(inner):
    """The extra arguments have all of them, the masked updates a part."""
    mask = {"a": True, "b": False}
    outer = optax.masked(inner, mask)
    got, _ = outer.update(UPDATES, outer.init(UPDATES), grad=GRAD, error=ERROR)
    alone = {"a": UPDATES["a"]}
    kept = {"grad": {"a": GRAD["a"]}, "error": {"a": ERROR["a"]}}
    expected, _ = inner.update(alone, inner.init(alone), **kept)
    assert equal(got, {**expected, "b": UPDATES["b"]})
    assert not equal(expected, alone)
    parts: dict = {"in": inner, "out": optax.identity()}
    outer = optax.partition(parts, {"a": "in", "b": "out"})
    got, _ = outer.update(UPDATES, outer.init(UPDATES), grad=GRAD, error=ERROR)
    assert equal(got, {**expected, "b": UPDATES["b"]})


def test_bad_input_raises():
    text = "`threshold` must be a number of at least zero, and finite; got -1.0."
    with pytest.raises(ValueError) as info:
        hpo.gate(-1.0)
    assert str(info.value) == text
    outer = hpo.gate(1.0)
    with pytest.raises(ValueError, match="`error` .*the structure of the updates"):
        outer.update(jnp.ones(2), optax.EmptyState(), error={"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="`grad` is float64"):
        outer.update(
            jnp.ones(2), optax.EmptyState(), grad=jnp.ones(3), error=jnp.ones(2)
        )
