"""Mistakes that are easy to make, and what the user is told."""

import warnings
from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import optax
import pytest

from .problems import ridge


CASE = ridge()
INNER, OUTER = optax.sgd(0.1), optax.sgd(0.1)


def _scaled_loss(w, h, batch, key):
    del key
    fit = jnp.mean((batch["x"] @ w - 1.0) ** 2)
    return batch.get("scale", 1.0) * fit + jnp.sum(jnp.exp(h) * w**2)


def _val_loss(w, h, batch, key):
    del h, key
    return jnp.mean((batch["x"] @ w - 1.0) ** 2)


class _Counted:
    """The problem above, which counts how often its train loss is traced."""

    def __init__(self):
        self.traces = 0

        def train_loss(w, h, batch, key):
            self.traces += 1
            return _scaled_loss(w, h, batch, key)

        self.algorithm = hpo.T1T2(hpo.Problem(train_loss, _val_loss), INNER, OUTER)

    def run(self, batches, by):
        val = {"x": jnp.ones((4, 2))}
        model, h = jnp.ones(2), jnp.zeros(2)
        if by == "tune":
            steps = len(batches)
            hpo.tune(
                self.algorithm, model, h, iter(batches), val, steps=steps, key=None
            )
            return
        state = self.algorithm.init(model, h)
        for batch in batches:
            state = self.algorithm.step(state, batch, val)


@pytest.mark.parametrize("by", ["step", "tune"])
def test_python_numbers_in_batches_are_arrays(by):
    counted = _Counted()
    counted.run([{"x": jnp.ones((4, 2)), "scale": 0.1 * i} for i in range(2)], by)
    before = counted.traces
    counted.run([{"x": jnp.ones((4, 2)), "scale": 0.1 * i} for i in range(9)], by)
    more = 1 if by == "tune" else 0  # `tune` looks for dead hyperparameters
    assert counted.traces <= before + more


@pytest.mark.slow
@pytest.mark.parametrize("by", ["step", "tune"])
def test_shapes_that_change_are_a_warning_at_the_third_compilation(by):
    batches = [{"x": jnp.ones((4 + i, 2))} for i in range(5)]
    place = "`train.batches['x']`" if by == "tune" else "`train['x']`"
    with pytest.warns(UserWarning, match="compiled for 3 kinds of data") as record:
        _Counted().run(batches, by)
    assert len(record) == 1
    one = "1, " if by == "tune" else ""
    expected = f"{place} was float64[{one}5, 2] and is float64[{one}6, 2] now"
    assert expected in str(record[0].message)


@pytest.mark.slow
def test_strings_that_change_are_a_warning_and_none_that_stay():
    x = jnp.ones((4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _Counted().run([{"x": x, "name": "a"}] * 5, "step")
    with pytest.warns(UserWarning, match=r"`train\['name'\]` was '1' and is '2' now"):
        _Counted().run([{"x": x, "name": str(i)} for i in range(5)], "step")
    with pytest.raises(ValueError, match=r"`train\['name'\]` is '0', which cannot be"):
        _Counted().run([{"x": x, "name": str(i)} for i in range(5)], "tune")


def _start():
    algorithm = hpo.T1T2(CASE.problem, INNER, OUTER)
    return algorithm, algorithm.init(CASE.model, CASE.hyperparams)


def _tune(train=CASE.train, val=CASE.val, model=CASE.model, **kwargs):
    kwargs = {"key": None, "steps": 2, **kwargs}
    return hpo.tune(_start()[0], model, CASE.hyperparams, train, val, **kwargs)


def test_the_same_data_for_both_levels():
    text = "`val` is the same as `train`"
    algorithm, _ = _start()
    args = CASE.model, CASE.hyperparams
    with pytest.warns(UserWarning, match=text):
        algorithm.init(*args, train=CASE.train, val=CASE.train)
    both = tuple(np.asarray(x) for x in CASE.train)
    for data in (CASE.train, both, hpo.Minibatch(both, 4)):
        with pytest.warns(UserWarning, match=text):
            _tune(data, data, key=jr.key(0))
    tasks = tuple(jnp.stack([x, x]) for x in CASE.train)
    with pytest.warns(UserWarning, match=text):
        hpo.MetaLearner(algorithm, 2).init(*args, train=tasks, val=tasks)
    loader = iter([CASE.train] * 6)
    with pytest.warns(UserWarning, match="`val` is the same iterator as `train`"):
        _tune(loader, loader)


@pytest.mark.slow
def test_the_same_data_where_nothing_is_tuned():
    """`fit` may validate on what it trains on; `search` chooses by it."""
    algorithm, _ = _start()
    options: dict[str, Any] = {"steps": 2, "key": None, "progress": False}
    args = algorithm, CASE.model, CASE.hyperparams
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hpo.fit(*args, CASE.train, val=CASE.train, **options)
    pytest.importorskip("optuna")
    both = tuple(np.asarray(x) for x in CASE.train)
    for data in (CASE.train, both):
        with pytest.warns(UserWarning, match="`val` is the same as `train`"):
            hpo.search(*args, CASE.hyperparams, data, data, trials=1, **options)


def test_fit_takes_its_own_state_alone():
    algorithm, state = _start()
    args = algorithm, CASE.model, CASE.hyperparams, CASE.train
    text = "`state` does not have the structure of the state of a fresh start of `fit`"
    with pytest.raises(ValueError, match=text):
        hpo.fit(*args, steps=2, key=None, state=state)


def test_swapped_losses():
    swapped = hpo.Problem(CASE.problem.val_loss, CASE.problem.train_loss)
    algorithm = hpo.T1T2(swapped, INNER, OUTER)
    with pytest.warns(UserWarning, match="Are the two losses of the `Problem` swapped"):
        algorithm.init(CASE.model, CASE.hyperparams, train=CASE.train, val=CASE.val)


@pytest.fixture
def untyped(monkeypatch):
    """The library as users have it, without the checks of types of these tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield hpo
    jaxtyping.config.update("jaxtyping_disable", False)


def test_swapped_arguments(untyped):
    algorithm, state = _start()
    text = (
        r"^`state` must be a `BilevelState` \(that of a `Solution` is `solution.state`"
    )
    for method in (algorithm.step, algorithm.compute_hypergradient):
        with pytest.raises(ValueError, match=text):
            method(CASE.train, state, CASE.val)
    with pytest.raises(ValueError, match="^`algorithm` must be an algorithm such as"):
        untyped.tune(CASE.model, algorithm, *CASE.train, {}, steps=1, key=None)


def test_integers_of_numpy_are_integers(untyped):
    solution = _tune(
        steps=np.int64(3), record_every=np.int32(1), max_skipped=np.int8(2)
    )
    assert int(solution.state.step) == 3


def test_no_data():
    algorithm, state = _start()
    for name in ("train", "val"):
        data = {"train": CASE.train, "val": CASE.val, name: None}
        with pytest.raises(ValueError, match=f"`{name}` is `None`, and the loss fails"):
            algorithm.step(state, **data)
        with pytest.raises(ValueError, match=f"`{name}` is `None`"):
            _tune(**data)


def test_a_list_of_batches():
    batches = [CASE.train] * 3
    text = "`train` is a list of 3 equal parts, which stands for a single batch"
    with pytest.raises(ValueError, match=text):
        _tune(train=batches)
    algorithm, state = _start()
    with pytest.raises(ValueError, match=text):
        algorithm.step(state, batches, CASE.val)


def test_a_foreign_tensor():
    tensor = type("Tensor", (), {"shape": (24, 6), "dtype": "torch.float32"})()
    algorithm, state = _start()
    with pytest.raises(ValueError, match="array of neither JAX nor NumPy. Convert it"):
        algorithm.step(state, (tensor, CASE.train[1]), CASE.val)
    with pytest.raises(ValueError, match="array of neither JAX nor NumPy. Convert it"):
        _tune(train=(tensor, CASE.train[1]))


def test_nan_to_start_from():
    model = CASE.model.at[2].set(jnp.nan)
    with pytest.raises(ValueError, match="`model` must be free of NaN to start from"):
        _tune(model=model)
    algorithm, _ = _start()
    bad = {"penalty": CASE.hyperparams["penalty"].at[0].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"`hyperparams\['penalty'\]` must be finite"):
        algorithm.init(CASE.model, bad)


def test_one_algorithm_to_compare(untyped):
    algorithm, _ = _start()
    args = (CASE.model, CASE.hyperparams, CASE.train, CASE.val)
    text = r"`algorithms` must be a list .* got a T1T2. Compare a single one as `\[algo"
    with pytest.raises(ValueError, match=text):
        untyped.compare_hypergradients(algorithm, *args, key=None)


@jax.custom_vjp
def _no_second_derivative(x):
    return jnp.round(x)


def _backward(x, g):
    # What is called here has no forward-mode derivative.
    return (jax.pure_callback(lambda g, x: g, g, g, x),)


_no_second_derivative.defvjp(lambda x: (jnp.round(x), x), _backward)


def test_a_loss_that_cannot_be_differentiated_forward_on_its_gradient():
    loss = lambda w, h, batch, key: jnp.sum((_no_second_derivative(w * h) - 1.2) ** 2)
    problem = hpo.Problem(loss, lambda w, h, batch, key: jnp.sum((w - 1) ** 2))
    algorithm = hpo.T1T2(problem, INNER, OUTER)
    state = algorithm.init(jnp.ones(2), jnp.full(2, 0.7))
    with pytest.raises(ValueError, match=r"ReverseOverReverse\(\)` or `eqx_hpo.Finite"):
        algorithm.step(state, None, None)
    with pytest.raises(ValueError, match=r"ReverseOverReverse\(\)` or `eqx_hpo.Finite"):
        hpo.tune(
            algorithm, jnp.ones(2), jnp.full(2, 0.7), None, None, steps=2, key=None
        )
    by_differences = hpo.T1T2(problem, INNER, OUTER, hpo.FiniteDifference())
    assert int(by_differences.step(state, None, None).skipped) == 0


@jax.custom_vjp
def _opaque_sine(x):
    return jnp.sin(x)


@jax.custom_vjp
def _opaque_cosine(x):
    return jnp.cos(x)


_opaque_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * _opaque_cosine(x),))
_opaque_cosine.defvjp(lambda x: (jnp.cos(x), x), lambda x, g: (-g * jnp.sin(x),))


def test_a_loss_that_jax_refuses_only_as_it_lowers_the_program():
    loss = lambda w, h, batch, key: jnp.sum(h * _opaque_sine(w))
    problem = hpo.Problem(loss, lambda w, h, batch, key: jnp.sum((w - 1) ** 2))
    algorithm = hpo.Unrolled(problem, INNER, OUTER, inner_steps=2)
    w, h = jnp.ones(2), jnp.full(2, 0.7)
    text = r"no forward-mode.*JAX raised: can't apply"
    with pytest.raises(ValueError, match=text):
        hpo.tune(algorithm, w, h, None, None, steps=2, key=None)
    with pytest.raises(ValueError, match=text):
        algorithm.step(algorithm.init(w, h), None, None)
    backward = hpo.Unrolled(
        problem, INNER, OUTER, hpo.ReverseOverReverse(), inner_steps=2
    )
    assert int(backward.step(backward.init(w, h), None, None).skipped) == 0
