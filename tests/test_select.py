from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from eqx_hpo._hyperparameter import partition_raw
from eqx_hpo._outer.top_k import top_k_masks
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .helpers import relative_error
from .problems import quadratic, ridge


NO_TURN = (jnp.zeros((), jnp.uint32), 0)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def _updated(transformation, updates, params=None, **extra) -> tuple[Any, Any]:
    params = updates if params is None else params
    return transformation.update(updates, transformation.init(params), params, **extra)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.float16])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_masks_equal_a_full_sort(getkey, dtype, ties):
    search = jax.jit(lambda x, k: top_k_masks(x, k, *NO_TURN), static_argnums=1)
    shapes = [(7,), (3, 5), (), (1, 2, 4)]
    for number in range(3):
        keys = jr.split(jr.fold_in(getkey(), number), len(shapes))
        scores = [jnp.abs(jr.normal(k, s, dtype)) for k, s in zip(keys, shapes)]
        if ties:
            scores = [jnp.round(x) for x in scores]
        # A stable sort: of equal scores those with the lowest index come first.
        order = np.argsort(-_flat(scores).astype(float), kind="stable")
        for k in (1, 13, 30):
            expected = np.zeros(len(order), bool)
            expected[order[:k]] = True
            assert np.array_equal(_flat(search(scores, k)), expected)


def test_masks_of_extreme_scores():
    tiny = jnp.finfo(jnp.float32).tiny
    x = jnp.array([0.0, jnp.inf, tiny, 3e38, 1.0, 0.0, tiny], jnp.float32)
    expected = {1: [1], 2: [1, 3], 4: [1, 2, 3, 4], 6: [0, 1, 2, 3, 4, 6]}
    for k, selected in expected.items():
        (mask,) = top_k_masks([x], k, *NO_TURN)
        assert np.flatnonzero(mask).tolist() == selected


def test_needs_no_gather_of_the_scores():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    x = jax.device_put(jnp.round(jr.uniform(jr.key(0), (64, 8)) * 9), sharding)
    search = jax.jit(lambda x: top_k_masks([x], 100, *NO_TURN)[0])
    compiled = search.lower(x).compile()
    assert "all-gather" not in str(compiled.as_text())
    assert search(x).sharding == sharding
    one_device = jax.device_put(x, jax.devices()[0])
    assert np.array_equal(search(x), search(one_device))


def test_ranks_by_the_gradient_after_adam():
    gradient = jnp.array([1e-3, 3.0, 2.0, 1e-4])
    adam, select = optax.adam(0.1), hpo.select_top_k(2)
    outer = optax.chain(adam, select)
    params = jnp.zeros(4)
    updates, _ = _updated(outer, gradient, params, grad=gradient)
    dense, _ = _updated(adam, gradient, params)
    assert np.array_equal(updates, dense * jnp.array([0, 1, 1, 0]))


CRITERIA = {"gradient": [0, 3], "step": [1, 2], "decrease": [1, 3]}


@pytest.mark.parametrize("by", CRITERIA)
def test_criteria(by):
    gradient = jnp.array([-4.0, 2.0, 0.1, 3.0])
    step = jnp.array([0.1, -5.0, 6.0, -3.5])
    updates, _ = _updated(hpo.select_top_k(2, by=by), step, grad=gradient)
    assert np.flatnonzero(updates).tolist() == CRITERIA[by]
    assert all(updates[i] == step[i] for i in CRITERIA[by])


def test_shares_and_numbers_of_all():
    updates = {"a": jnp.arange(1.0, 5.0), "b": jnp.arange(5.0, 11.0)}
    count = lambda k: np.count_nonzero(_flat(_updated(hpo.select_top_k(k), updates)[0]))
    assert [count(k) for k in (0.01, 0.3, 1.0, 3, 10, 99)] == [1, 3, 10, 3, 10, 10]


GROUPS = {
    "functions": {"x": lambda h: (h["a"], h["b"]), "y": lambda h: h["c"]},
    "labels": {"a": "x", "b": "x", "c": "y"},
    "function_of_labels": lambda h: {"a": "x", "b": "x", "c": "y"},
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_move_as_a_whole(groups):
    updates = {"a": jnp.array([3.0]), "b": jnp.array([4.0, 0.0]), "c": jnp.full(9, 1.5)}
    select = hpo.select_top_k(1, groups=GROUPS[groups])
    got, _ = _updated(select, updates)
    assert relative_error(got, {**updates, "c": jnp.zeros(9)}) == 0
    # 9 * 1.5**2 is less than 3**2 + 4**2, but more than either.
    got, _ = _updated(hpo.select_top_k(1, groups="leaves"), updates)
    assert np.flatnonzero(_flat(got)).tolist() == list(range(3, 12))


def test_a_group_is_ranked_by_its_total_decrease():
    updates = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([0.5])}
    gradient = jax.tree.map(jnp.ones_like, updates)
    select = hpo.select_top_k(1, by="decrease", groups="leaves")
    got, _ = _updated(select, updates, grad=gradient)
    assert _flat(got).tolist() == [0, 0, 0.5]


@pytest.mark.parametrize("by", ["gradient", "decrease"])
def test_a_choice_is_one_coordinate(by):
    logits = jnp.array([[3.0, 4.0], [4.5, 0.0]])
    updates = {"c": hpo.Choice(logits), "r": jnp.array([4.7, 4.6])}
    raw, _ = partition_raw(updates)
    got, _ = _updated(hpo.select_top_k(2, by=by), raw)
    assert _flat(got).tolist() == [3.0, 4.0, 0, 0, 4.7, 0]


@pytest.mark.slow
def test_rotation_reaches_everything_and_keeps_k():
    select = hpo.select_top_k(3, rotate=0.34)  # two in turn, one by rank
    updates = {"a": jnp.array([9.0, 1.0, 1.0]), "b": jnp.ones(4)}
    state = select.init(updates)
    counts = np.zeros(7)
    for _ in range(4):
        got, state = select.update(updates, state)
        assert np.count_nonzero(_flat(got)) == 3
        counts += _flat(got) != 0
    assert counts.min() >= 1 and counts[0] == 4


@pytest.mark.parametrize("settings", [{}, {"rotate": 0.5}], ids=str)
def test_reaches_the_optimum_of_the_dense_update(settings):
    """Of a strongly convex function, which the quadratic problem has at its outer level
    once the inner level is solved."""
    case = quadratic()
    outer = optax.chain(optax.sgd(0.2), hpo.select_top_k(1, **settings))
    dense, sparse = (
        hpo.tune(
            hpo.Unrolled(case.problem, optax.sgd(0.3), update, inner_steps=60),
            case.model,
            case.hyperparams,
            case.train,
            case.val,
            steps=150,
            key=None,
        ).values
        for update in (optax.sgd(0.2), outer)
    )
    optimum = case.val / 1.1  # of |h - b|^2 + 0.1 |h|^2
    assert relative_error(dense, optimum) < 1e-6
    assert relative_error(sparse, optimum) < 1e-6


def test_within_a_step():
    case = ridge()
    outer = optax.chain(optax.adam(0.1), hpo.select_top_k(2))
    algorithm = hpo.T1T2(case.problem, optax.sgd(0.1), outer)
    state = algorithm.init(case.model, case.hyperparams)
    gradient = algorithm.compute_hypergradient(state, case.train, case.val)["penalty"]
    new = algorithm.step(state, case.train, case.val)
    moved = np.flatnonzero(new.hyperparams["penalty"] != state.hyperparams["penalty"])
    largest = np.argsort(-np.abs(gradient))[:2]
    assert set(moved) == set(largest)
    # Adam has seen them all.
    moments = optax.tree.get(new.outer_opt_state, "mu")["penalty"]
    assert np.all(moments != 0)


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, True, float("nan")])
def test_an_invalid_k_raises(k):
    with pytest.raises(ValueError, match="`k` must be an integer"):
        hpo.select_top_k(k)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("rows", "`groups` must be 'coordinates'"),
        ({"x": lambda h: h["a"]}, r"hyperparams\['b'\]` is in none"),
        ({"x": lambda h: h, "y": lambda h: h["b"]}, "in more than one: .'x', 'y'."),
        ({"x": lambda h: h, "y": lambda h: []}, "without hyperparameters: .'y'."),
        ({"a": "x"}, "does not cover"),
        ({"a": "x", "b": None}, "does not cover"),
        (lambda h: {"a": "x"}, "does not cover"),
    ],
)
def test_groups_that_do_not_fit_raise(groups, message):
    with pytest.raises(ValueError, match=message):
        hpo.select_top_k(1, groups=groups).init({"a": jnp.ones(2), "b": jnp.ones(3)})


def test_other_invalid_arguments_raise():
    with pytest.raises(ValueError, match="`by` must be"):
        hpo.select_top_k(1, by="size")
    for rotate in (-0.1, 1.1):
        with pytest.raises(ValueError, match="`rotate` must be"):
            hpo.select_top_k(1, rotate=rotate)
    select = hpo.select_top_k(1)
    with pytest.raises(ValueError, match="`grad` does not have the structure"):
        _updated(select, {"a": jnp.ones(2)}, grad=jnp.ones(2))
