"""Errors around `inner` and `outer`, word for word."""

import functools as ft
import types
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import pytest
from eqx_hpo._optimizer.settings import check_settings

from .helpers import relative_error


OUTER = optax.sgd(0.1)
PROBLEM = hpo.Problem(
    lambda w, h, batch, key: jnp.sum(h["scale"] * (w - 1) ** 2),
    lambda w, h, batch, key: jnp.sum((w - 1.1) ** 2),
)
HYPERPARAMS = {"scale": jnp.ones(2), "rate": jnp.array(0.1)}


def _hypergradient(inner: Any, steps=1):
    algorithm = hpo.Unrolled(PROBLEM, inner, OUTER, inner_steps=steps)
    state = algorithm.init(jnp.zeros(2), HYPERPARAMS)
    return algorithm.compute_hypergradient(state, None, None)


class T1T2(types.SimpleNamespace):
    """Settings past the checks of types, which run first in the tests."""


INNER = (
    "`inner` must be an `optax.GradientTransformation`, or a function from "
    "hyperparameters to one; got "
)
CALL = (
    "the function `optax.adam`. Call it, as `optax.adam(1e-3)`, or as `lambda h: "
    "optax.adam(h.rate)`."
)
OUTER_MUST = "`outer` must be an `optax.GradientTransformation`; got "
ORDER = "The order is `T1T2(problem, inner, outer)`."
SETTINGS = [
    ({"inner": optax.adam}, INNER + CALL),
    ({"inner": ft.partial(ft.partial(optax.adam, b1=0.8), b2=0.9)}, INNER + CALL),
    ({"inner": optax.inject_hyperparams(optax.adam)}, INNER + CALL),
    (
        {"inner": optax.contrib.prodigy},
        INNER + CALL.replace("optax.adam", "optax.contrib.prodigy"),
    ),
    ({"inner": PROBLEM}, f"{INNER}a Problem. {ORDER}"),
    (
        {"outer": optax.adam},
        f"{OUTER_MUST}the function `optax.adam`. Call it, as `optax.adam(1e-2)`.",
    ),
    (
        {"outer": optax.MultiSteps(optax.adam(0.1), 2)},
        f"{OUTER_MUST}a MultiSteps. Pass its `.gradient_transformation()`.",
    ),
    (
        {"outer": lambda h: optax.sgd(h)},
        f"{OUTER_MUST}a function. Only `inner` may be a function of the "
        f"hyperparameters. {ORDER}",
    ),
    ({"outer": PROBLEM}, f"{OUTER_MUST}a Problem. {ORDER}"),
    (
        {"problem": optax.sgd(0.1), "inner": PROBLEM},
        "`problem` must be an `eqx_hpo.Problem(train_loss, val_loss)`; got a "
        f"GradientTransformationExtraArgs. {ORDER}",
    ),
]


@pytest.mark.parametrize("change, text", SETTINGS)
def test_wrong_optimisers_are_named(change, text):
    settings = {"problem": PROBLEM, "inner": optax.sgd(0.1), "outer": OUTER}
    settings |= {"second_order": hpo.FiniteDifference(), "inner_steps": 1}
    with pytest.raises(ValueError) as info:
        check_settings(T1T2(**{**settings, **change}, unroll=None))
    assert str(info.value) == text


def test_an_optimiser_that_was_not_called_raises_in_the_algorithm_itself():
    inner: Any = optax.adam
    with pytest.raises(ValueError, match="Call it, as `optax.adam"):
        hpo.T1T2(PROBLEM, inner, OUTER)


def _more(names):
    return (
        "`inner` asks for the value of the loss, or for the loss itself, in its update "
        f"({names}). Only transformations of (updates, state, params) can be used "
        "here: no line search and no reduction on a plateau."
    )


def _schedule(name):
    return (
        f"`inner` gives a hyperparameter to `optax.{name}`, which tests its value in "
        "Python and so takes only plain numbers. Write a schedule as a function of "
        "the step of your own: `lambda step: h.peak * shape(step)`, with `shape = "
        f"optax.{name}(...)` of plain numbers, say with a peak of 1."
    )


contrib, SGD = optax.contrib, optax.sgd(0.1)
OPTIMISERS = {
    "lbfgs": (optax.lbfgs(), _more("`value`, `grad`, `value_fn`")),
    "backtracking": (
        optax.chain(SGD, optax.scale_by_backtracking_linesearch(3)),
        _more("`value`, `grad`, `value_fn`"),
    ),
    "polyak": (optax.polyak_sgd(), _more("`value`")),
    "plateau": (
        optax.chain(SGD, contrib.reduce_on_plateau()),
        _more("`value`"),
    ),
    "momo": (contrib.momo(), _more("`value`")),
    "sophia": (contrib.sophia(0.1), _more("`obj_fn`")),
    "opaque sam": (contrib.sam(SGD, SGD, opaque_mode=True), _more("`grad_fn`")),
    "monitor": (
        optax.chain(optax.monitor({"norm": optax.tree.norm}), SGD),
        "`inner` changes the structure of its state in an update, as `optax.monitor` "
        "does. An inner step must keep it.",
    ),
    "lookahead": (
        optax.lookahead(SGD, 5, 0.5),
        "`inner` holds `optax.lookahead`, which trains two copies of the weights as "
        "`optax.LookaheadParams`. The model here is one copy: take `lookahead` out of "
        "`inner`.",
    ),
    "peak": (
        lambda h: optax.sgd(optax.warmup_cosine_decay_schedule(0.0, h["rate"], 2, 9)),
        _schedule("warmup_cosine_decay_schedule"),
    ),
    "decay": (
        lambda h: optax.sgd(optax.exponential_decay(0.1, 9, h["rate"])),
        _schedule("exponential_decay"),
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_optax_asks_for_is_explained(name):
    inner, text = OPTIMISERS[name]
    with pytest.raises(ValueError) as info:
        _hypergradient(inner)
    assert str(info.value) == text


def test_the_schedule_that_the_error_shows_works():
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 9)
    inner = lambda h: optax.sgd(lambda step: h["rate"] * shape(step))
    got = _hypergradient(inner, 3)["rate"]
    # Each step multiplies the distance 1 of both weights by 1 - 2 * rate * shape.
    factor = lambda rate: jnp.prod(1 - 2 * rate * shape(jnp.arange(3)))
    expected = jax.grad(lambda rate: 2 * (0.1 + factor(rate)) ** 2)(0.1)
    assert relative_error(got, expected) < 1e-6


def test_a_test_in_the_function_itself_is_not_blamed_on_optax():
    inner = lambda h: optax.sgd(h["rate"] if h["rate"] > 0 else 0.1)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        _hypergradient(inner)


def test_labels_in_the_form_of_a_model():
    model = eqx.nn.MLP(2, 2, 3, 1, key=jr.key(0))
    loss = lambda model, h, *_: h * jnp.sum(model(jnp.ones(2)) ** 2)
    params = eqx.filter(model, eqx.is_inexact_array)
    labels = jtu.tree_map(lambda x: "a", params)

    def start(labels):
        inner = optax.multi_transform({"a": SGD}, labels)
        algorithm = hpo.T1T2(hpo.Problem(loss, loss), inner, OUTER)
        return algorithm.init(model, 0.5)

    with pytest.raises(ValueError) as info:
        start(labels)
    assert str(info.value) == (
        "`inner` holds `optax.multi_transform` with labels in the form of a model "
        "(`MLP`). A model can be called, so Optax takes it for a function from the "
        "weights to the labels. Give it one: `lambda _: labels`, with `labels` of the "
        "structure of `eqx.filter(model, eqx.is_inexact_array)`."
    )
    start(lambda _: labels)


@pytest.mark.parametrize("is_function", [False, True])
def test_multi_steps_is_an_inner_optimiser(is_function):
    make = lambda rate: optax.MultiSteps(optax.sgd(rate), 2)
    inner = (lambda h: make(h["rate"])) if is_function else make(0.1)
    got = _hypergradient(inner, 4)
    # Two updates, by means of two gradients that Optax weighs in single precision.
    plain = lambda h: optax.sgd(h["rate"] if is_function else 0.1)
    expected = _hypergradient(plain, 2)
    assert relative_error(got, expected) < 1e-7
