import dataclasses
import functools as ft
import itertools

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import optax
import pytest

from .helpers import hand_unrolled, relative_error, RULES, step_temporaries
from .problems import Case, CASES, ridge


INNERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.01),
}
TOLERANCE = {"finite_difference": 1e-4}


SETTINGS = list(
    itertools.product(
        ["logistic", "ridge"], INNERS, ["loss", "rate", "both"], [1, 5, 20]
    )
)
DEFAULT_SETTINGS = [
    *[("logistic", name, "both", 5) for name in INNERS],
    ("logistic", "adam", "both", 20),
    ("logistic", "momentum", "loss", 5),
    ("ridge", "adamw", "rate", 5),
]


@ft.lru_cache
def _setting(case_name, inner_name, where, steps):
    """A problem with hyperparameters in the loss, in the learning rate, or in both;
    and its exact hypergradient."""
    case, make = CASES[case_name](), INNERS[inner_name]
    hyperparams = {"loss": case.hyperparams}
    in_loss = lambda loss: lambda w, h, batch, key: loss(w, h["loss"], batch, key)
    if where == "rate":
        fixed = hpo.unwrap(case.hyperparams)
        in_loss = lambda loss: lambda w, h, batch, key: loss(w, fixed, batch, key)
        hyperparams = {}
    problem = hpo.Problem(
        in_loss(case.problem.train_loss), in_loss(case.problem.val_loss)
    )
    inner = make(0.05)
    if where != "loss":
        hyperparams["rate"] = hpo.Positive(0.05)
        inner = lambda h: make(h["rate"])
    expected = hand_unrolled(
        problem, inner, case.model, hyperparams, case.train, case.val, steps
    )
    return case, problem, inner, hyperparams, expected


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(x, marks=[] if x in DEFAULT_SETTINGS else [pytest.mark.slow])
        for x in SETTINGS
    ],
    ids=lambda x: "-".join(map(str, x)),
)
@pytest.mark.parametrize("rule_name", RULES)
def test_equals_hand_written_unroll(rule_name, setting):
    case, problem, inner, hyperparams, expected = _setting(*setting)
    algorithm = hpo.Unrolled(
        problem, inner, optax.sgd(0.1), RULES[rule_name], inner_steps=setting[-1]
    )
    state = algorithm.init(case.model, hyperparams)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    # The first step of Adam is a sign: its derivative is what is left of terms that
    # cancel, around 1e-10.
    error = relative_error(got, expected, floor=1e-5)
    assert error < TOLERANCE.get(rule_name, 1e-10)


@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("rule_name", ["forward_over_reverse", "finite_difference"])
def test_reaches_the_closed_form_at_convergence(case_name, rule_name):
    case = CASES[case_name]()
    rule = RULES[rule_name]
    algorithm = hpo.Unrolled(
        case.problem, optax.sgd(0.3), optax.sgd(0.1), rule, inner_steps=3000
    )
    state = algorithm.init(case.model, case.hyperparams)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    expected = case.hypergradient(case.hyperparams)
    assert relative_error(got, expected) < TOLERANCE.get(rule_name, 1e-10)


def test_truncation_equals_unrolling_the_last_steps():
    case = ridge()
    inner = optax.sgd(0.1, momentum=0.9)
    make = lambda **kw: hpo.Unrolled(case.problem, inner, optax.sgd(0.0), **kw)
    truncated = make(inner_steps=7, truncation=3)
    state = truncated.init(case.model, case.hyperparams)
    got = truncated.compute_hypergradient(state, case.train, case.val)
    later = make(inner_steps=4).step(state, case.train, case.val)
    expected = make(inner_steps=3).compute_hypergradient(later, case.train, case.val)
    assert relative_error(got, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(unroll=7),
        dict(recompute=1),
        dict(recompute=2),
        dict(recompute=2, unroll=7),
        dict(recompute=2, truncation=7),
        dict(recompute=3),
        dict(recompute=5),
    ],
)
def test_how_it_is_computed_changes_nothing(kwargs):
    case = ridge()
    make = lambda **kwargs: hpo.Unrolled(
        case.problem, optax.adam(0.1), optax.sgd(0.1), inner_steps=7, **kwargs
    )
    state = make().init(case.model, case.hyperparams)
    got, expected = (
        algorithm.compute_hypergradient(state, case.train, case.val)
        for algorithm in (make(**kwargs), make())
    )
    assert relative_error(got, expected) < 1e-12


@pytest.mark.slow
def test_what_is_kept_of_the_inner_steps():
    """A loss with a large tape: without checkpoints memory grows with all of it, with
    one at each step by the weights alone, nested with their root."""

    def train_loss(model, h, batch, key):
        del key
        out = batch
        for _ in range(4):
            out = jnp.tanh(out @ model)
        return jnp.mean(out**2) + h * jnp.sum(model**2)

    problem = hpo.Problem(train_loss, train_loss)
    model, batch = jnp.eye(8), jnp.ones((200, 8))
    case = Case(problem, model, 0.1, batch, batch, lambda h: model)
    rules = hpo.ReverseOverReverse(), hpo.ForwardOverReverse()

    def growth(rule, recompute):
        """With 75 further inner steps, in units of the weights."""
        small, large = (
            step_temporaries(algorithm, algorithm.init(model, 0.1), case)
            for algorithm in (
                hpo.Unrolled(
                    problem,
                    optax.sgd(0.1),
                    optax.sgd(0.1),
                    rule,
                    inner_steps=steps,
                    recompute=recompute,
                )
                for steps in (25, 100)
            )
        )
        return (large - small) / model.nbytes

    assert growth(rules[0], 0) > 1000
    for rule, recompute in ((rules[0], 1), (rules[1], 0)):
        assert 75 <= growth(rule, recompute) < 78
    assert 10 <= growth(rules[1], 2) < 12


def test_batches_are_drawn_again_and_not_kept():
    case = ridge()
    data = (jnp.ones((400, 6)), jnp.ones(400))
    algorithms = [
        hpo.Unrolled(case.problem, optax.sgd(0.1), optax.sgd(0.1), inner_steps=steps)
        for steps in (25, 100)
    ]
    state = algorithms[0].init(case.model, case.hyperparams)
    batches = hpo.Minibatch(data, 200, replacement=False)
    case = dataclasses.replace(case, train=batches)
    small, large = (step_temporaries(x, state, case) for x in algorithms)
    assert large - small < 75 * 2 * case.model.nbytes


def test_bad_recompute():
    with pytest.raises((ValueError, TypeError), match="recompute"):
        hpo.Unrolled(
            ridge().problem,
            optax.sgd(0.1),
            optax.sgd(0.1),
            inner_steps=4,
            recompute=-1,
        )


def _nested():
    return {
        "scalar": jnp.array(0.3),
        "vector": hpo.Positive(jnp.array([0.1, 0.2])),
        "deep": [{"matrix": hpo.Simplex(jnp.full((2, 2), 0.5))}, (None, jax.nn.relu)],
    }


@pytest.mark.slow
def test_nested_hyperparameters_of_every_shape():
    def train_loss(model, h, batch, key):
        scale = h["deep"][0]["matrix"] @ h["vector"]
        return jnp.sum(scale * h["deep"][1][1](model - batch) ** 2) + h["scalar"] * (
            jnp.sum(model**2)
        )

    def val_loss(model, h, batch, key):
        return jnp.sum((model - batch) ** 2)

    problem = hpo.Problem(train_loss, val_loss)
    model, train, val = jnp.array([2.0, 3.0]), jnp.zeros(2), jnp.array([0.5, -0.5])
    algorithm = hpo.Unrolled(problem, optax.sgd(0.1), optax.adam(0.1), inner_steps=3)
    state = algorithm.init(model, _nested())
    got = algorithm.compute_hypergradient(state, train, val)
    expected = hand_unrolled(
        problem, optax.sgd(0.1), model, state.hyperparams, train, val, 3
    )
    assert relative_error(got, expected) < 1e-12
    assert got["deep"][1] == (None, None)
    assert got["vector"].raw.shape == (2,)


def test_scalar_model():
    problem = hpo.Problem(
        lambda w, h, batch, key: (w - batch) ** 2 + h * w**2,
        lambda w, h, batch, key: (w - batch) ** 2,
    )
    algorithm = hpo.Unrolled(problem, optax.sgd(0.1), optax.sgd(0.1), inner_steps=1)
    state = algorithm.init(jnp.array(1.0), 0.5)
    got = algorithm.compute_hypergradient(state, jnp.array(2.0), jnp.array(3.0))
    # w1 = 1 - 0.1 (2 (1 - 2) + 2 * 0.5 * 1) = 1.1 ; dw1/dh = -0.2
    assert jnp.allclose(got, 2 * (1.1 - 3.0) * -0.2)


@pytest.mark.parametrize("rule_name", ["forward_over_reverse", "finite_difference"])
def test_mixed_dtypes(rule_name):
    def train_loss(model, h, batch, key):
        low, high = model["low"].astype(jnp.float64), model["high"]
        return jnp.sum(h["wd"].astype(jnp.float64) * (low**2 + high**2)) + jnp.sum(
            (low + high - batch) ** 2
        )

    def val_loss(model, h, batch, key):
        return jnp.sum((model["low"].astype(jnp.float64) * model["high"] - batch) ** 2)

    model = {"low": jnp.ones(3, jnp.float32), "high": jnp.full(3, 0.5), "n": 3}
    hyperparams = {"wd": hpo.Positive(jnp.full(3, 0.1, jnp.float32))}
    algorithm = hpo.Unrolled(
        hpo.Problem(train_loss, val_loss),
        optax.sgd(0.1, momentum=0.5),
        optax.adam(0.1),
        RULES[rule_name],
        inner_steps=3,
    )
    state = algorithm.init(model, hyperparams)
    got = algorithm.compute_hypergradient(state, jnp.zeros(3), jnp.ones(3))
    assert got["wd"].raw.dtype == jnp.float32
    after = algorithm.step(state, jnp.zeros(3), jnp.ones(3))
    assert after.model["low"].dtype == jnp.float32
    assert after.model["high"].dtype == jnp.float64
    assert after.model["n"] == 3
    arrays, static = eqx.partition(model, eqx.is_array)
    wrap = lambda loss: lambda m, *rest: loss(eqx.combine(m, static), *rest)
    expected = hand_unrolled(
        hpo.Problem(wrap(train_loss), wrap(val_loss)),
        optax.sgd(0.1, momentum=0.5),
        arrays,
        state.hyperparams,
        jnp.zeros(3),
        jnp.ones(3),
        3,
    )
    tolerance = 1e-3 if rule_name == "finite_difference" else 1e-5
    assert relative_error(got, expected) < tolerance


@pytest.mark.parametrize("truncation", [0, 5, 2.0])
def test_bad_truncation(truncation):
    case = ridge()
    with pytest.raises((ValueError, TypeError), match="truncation"):
        hpo.Unrolled(
            case.problem,
            optax.sgd(0.1),
            optax.sgd(0.1),
            inner_steps=4,
            truncation=truncation,
        )
