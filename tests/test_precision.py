"""Models in half precision with float32 masters. The truth is the same problem, from
the same numbers, in float64."""

import functools as ft
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import pytest
from jax.flatten_util import ravel_pytree

from .helpers import equal, hand_unrolled, relative_error, RULES


HALF = [jnp.bfloat16, jnp.float16]
BOUNDS = {jnp.bfloat16: 3e-2, jnp.float16: 5e-3}  # of the exact rules
ALGORITHMS = {
    "first_order": lambda *args: hpo.FirstOrder(*args[:3], inner_steps=3),
    "t1t2": ft.partial(hpo.T1T2, inner_steps=3),
    "greedy": ft.partial(hpo.Greedy, inner_steps=3),
    "hyperdistill": ft.partial(hpo.HyperDistill, inner_steps=3, horizon=3),
    "unrolled": ft.partial(hpo.Unrolled, inner_steps=3),
    "drmad": ft.partial(hpo.DrMAD, inner_steps=3),
    "forward_mode": lambda *args: hpo.ForwardMode(*args[:3], inner_steps=3),
    "implicit": ft.partial(
        hpo.Implicit, inner_steps=3, linear_solver=hpo.Neumann(4, 0.1)
    ),
}
MOMENTUM = optax.sgd(0.1, momentum=0.9)


def cast(tree, dtype):
    change = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
    return jtu.tree_map(change, tree)


def losses(model, batch):
    """Evaluated in the precision of the model, up to the last sum."""
    x, y = batch
    dtype = model["last"].dtype
    out = jnp.tanh(x.astype(dtype) @ model["first"]) @ model["last"]
    return (out.astype(jnp.promote_types(dtype, jnp.float32)) - y) ** 2


def train_loss(model, h, batch, key):
    decay = sum(jnp.exp(h[x]) * jnp.sum(model[x] ** 2) for x in ("first", "last"))
    return jnp.mean(jax.nn.sigmoid(h["examples"]) * losses(model, batch)) + decay


def val_loss(model, h, batch, key):
    smooth = 0.01 * (h["first"] ** 2 + jnp.sum(h["examples"] ** 2))
    return jnp.mean(losses(model, batch)) + smooth


PROBLEM = hpo.Problem(train_loss, val_loss)


def make(dtype):
    """A model whose numbers `dtype` holds, hyperparameters and data, in float32."""
    keys = jr.split(jr.key(0), 4)
    model = {
        "first": jr.normal(keys[0], (5, 6)) / 5**0.5,
        "last": jr.normal(keys[1], (6,)) / 6**0.5,
    }
    x = jr.normal(keys[2], (2, 16, 5))
    y = jnp.sin(x[..., 0]) + 0.1 * jr.normal(keys[3], (2, 16))
    h = {"examples": jnp.linspace(-1, 1, 16), "first": -4.0, "last": -3.0}
    h = jtu.tree_map(jnp.asarray, h)
    data = [(x[i], y[i]) for i in range(2)]
    return cast((cast(model, dtype), h, *data), jnp.float32)


def hypergradient(algorithm, model, h, train, val):
    return algorithm.compute_hypergradient(algorithm.init(model, h), train, val)


def errors(name, rule, dtype, inner=MOMENTUM):
    algorithm = lambda inner: ALGORITHMS[name](PROBLEM, inner, optax.sgd(0.1), rule)
    model, *rest = make(dtype)
    got = hypergradient(
        algorithm(hpo.mixed_precision(inner)), cast(model, dtype), *rest
    )
    assert all(x.dtype == jnp.float32 for x in jtu.tree_leaves(got))
    exact = ALGORITHMS[name](PROBLEM, inner, optax.sgd(0.1), hpo.ForwardOverReverse())
    expected = hypergradient(exact, *cast((model, *rest), jnp.float64))
    # A baseline has no more than the direct term, of which some are zero.
    return [relative_error(got[x], expected[x], floor=1e-9) for x in got]


def _cases():
    quick = {
        ("t1t2", "finite_difference", jnp.bfloat16),
        ("forward_mode", "reverse_over_reverse", jnp.float16),
    }
    for name in ALGORITHMS:
        rules = RULES if name not in ("first_order", "forward_mode") else [*RULES][:1]
        for case in [(name, rule, dtype) for rule in rules for dtype in HALF]:
            marks = [] if case in quick else [pytest.mark.slow]
            yield pytest.param(*case, marks=marks)


@pytest.mark.parametrize("name, rule, dtype", list(_cases()))
def test_hypergradients(name, rule, dtype):
    bound = 5e-2 if rule == "finite_difference" else BOUNDS[dtype]
    assert max(errors(name, RULES[rule], dtype)) < bound


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["soba", "penalty", "fixed_point", "evolution"])
def test_hypergradients_after_some_steps(name, dtype):
    """Of the algorithms whose memory starts empty, with the same noise for both."""
    make_algorithm = {
        "soba": ft.partial(hpo.SOBA, linear_rate=0.1),
        "penalty": ft.partial(hpo.Penalty, strength=2.0, inner_steps=3),
        "fixed_point": ft.partial(hpo.FixedPoint, inner_steps=3),
        "evolution": ft.partial(hpo.Evolution, inner_steps=3, pairs=3),
    }[name]
    model, h, train, val = make(dtype)

    def run(inner, model, h, train, val):
        algorithm = make_algorithm(PROBLEM, inner, optax.set_to_zero())
        state = algorithm.init(model, h)
        for _ in range(10):
            state = algorithm.step(state, train, val)
        assert int(state.total_skipped) == 0
        return algorithm.compute_hypergradient(state, train, val)

    got = run(hpo.mixed_precision(MOMENTUM), cast(model, dtype), h, train, val)
    expected = run(MOMENTUM, model, h, train, val)
    assert all(x.dtype == jnp.float32 for x in jtu.tree_leaves(got))
    errors = [relative_error(got[x], expected[x]) for x in got]
    assert max(errors) < BOUNDS[dtype], errors


@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float16]
)
def test_hypergradient_of_training_by_central_differences(dtype):
    """Of the learning rate too, by which `inner` makes the optimiser."""
    model, h, train, val = make(dtype)
    h = {"rate": jnp.float32(0.1), **h}
    inner = lambda h: optax.adam(h["rate"], eps=1e-3)
    mixed = lambda h: hpo.mixed_precision(inner(h))
    algorithm = hpo.Unrolled(PROBLEM, mixed, optax.sgd(0.1), inner_steps=4)
    # With data it warns of what it cannot reach, and here of nothing.
    state = algorithm.init(cast(model, dtype), h, train=train, val=val)
    got = algorithm.compute_hypergradient(state, train, val)

    model, h, train, val = cast((model, h, train, val), jnp.float64)
    flat, unflatten = ravel_pytree(h)

    @jax.jit
    def reached(flat):
        h = unflatten(flat)
        params, opt_state = model, inner(h).init(model)
        for _ in range(4):
            grads = jax.grad(train_loss)(params, h, train, None)
            updates, opt_state = inner(h).update(grads, opt_state)
            params = optax.apply_updates(params, updates)
        return val_loss(params, h, val, None)

    steps = 1e-5 * jnp.eye(flat.size)
    expected = [(reached(flat + e) - reached(flat - e)) / 2e-5 for e in steps]
    expected = unflatten(jnp.stack(expected))
    assert max(relative_error(got[x], expected[x]) for x in got) < BOUNDS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_a_rate_kept_in_the_state(dtype):
    inner = lambda h: optax.inject_hyperparams(optax.sgd)(jnp.exp(h["last"]))
    model, h, train, val = make(dtype)
    algorithm = hpo.Unrolled(
        PROBLEM,
        lambda h: hpo.mixed_precision(inner(h)),
        optax.sgd(0.1),
        inner_steps=4,
    )
    got = hypergradient(algorithm, cast(model, dtype), h, train, val)
    double = cast((model, h, train, val), jnp.float64)
    expected = hand_unrolled(PROBLEM, inner, *double, steps=4)
    assert max(relative_error(got[x], expected[x]) for x in got) < BOUNDS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_carried_model_state(dtype):
    """The average of the outputs that training carries from step to step."""

    def average(pair, h, batch, key):
        model, average = pair
        out = jnp.tanh(batch[0].astype(model.dtype) @ model)
        average = 0.5 * average + 0.5 * jnp.mean(out).astype(average.dtype)
        fit = jnp.mean((h["scale"] * out - batch[1]) ** 2)
        return fit + h["pull"] * (average - 1.0) ** 2, average

    val = lambda pair, h, batch, key: average(pair, h, batch, key)[0]
    problem = hpo.Problem(average, val)
    model, _, train, val_data = make(dtype)
    h = {"scale": jnp.float32(0.8), "pull": jnp.float32(0.3)}
    model = model["first"][:, 0]

    def compute(inner, dtype, wide):
        algorithm = hpo.Unrolled(problem, inner, optax.sgd(0.1), inner_steps=3)
        wider = cast((h, train, val_data), wide)
        start = algorithm.init(
            model.astype(dtype), wider[0], model_state=jnp.zeros((), wide)
        )
        return algorithm.compute_hypergradient(start, *wider[1:])

    got = compute(hpo.mixed_precision(MOMENTUM), dtype, jnp.float32)
    expected = compute(MOMENTUM, jnp.float64, jnp.float64)
    assert max(relative_error(got[x], expected[x]) for x in got) < BOUNDS[dtype]


def quadratic(root, dtype=jnp.float16):
    """Two weights `x` whose gradients are `(x - 1) * root**2`."""

    def loss(model, h, batch, key):
        target, root = batch.astype(model.dtype)
        return jnp.mean(((model - target) * root) ** 2) + 0 * h

    problem = hpo.Problem(loss, loss)
    model, batch = jnp.array([0.5, 0.25], dtype), jnp.array([1.0, root], jnp.float32)
    return problem, model, jnp.float32(0.0), batch


def train_for(steps, problem, model, h, batch, inner):
    algorithm = hpo.FirstOrder(problem, inner, optax.sgd(0.1), inner_steps=1)
    state = algorithm.init(model, h)
    for _ in range(steps):
        state = algorithm.step(state, batch, batch)
    return state


@pytest.mark.parametrize("dtype", HALF)
def test_the_model_is_the_rounding_of_masters_that_move_by_less(dtype):
    problem, model, h, batch = quadratic(1.0, dtype)
    state = train_for(
        20, problem, model, h, batch, hpo.mixed_precision(optax.sgd(1e-5))
    )
    masters = state.inner_opt_state.masters
    assert masters.dtype == jnp.float32 and state.model.dtype == dtype
    assert equal(state.model, masters.astype(dtype))
    # (x - 1)^2 in the mean over two: x grows by 1e-5 (1 - x) a step.
    start = jnp.array([0.5, 0.25])
    expected = 20 * 1e-5 * (1 - start)
    assert relative_error(masters - start, expected) < 1e-2
    alone = train_for(20, problem, model, h, batch, optax.sgd(1e-5))
    assert equal(alone.model, model)


def test_gradients_that_underflow_without_a_scale():
    problem, model, h, batch = quadratic(2.0**-14)
    alone = train_for(3, problem, model, h, batch, optax.sgd(6e4))
    assert equal(alone.model, model)
    inner = hpo.mixed_precision(optax.sgd(6e4))
    state = train_for(3, problem, model, h, batch, inner)
    expected = (1 - model.astype(float)) * (1 - (1 - 6e4 / 2**28) ** 3)
    assert relative_error(state.inner_opt_state.masters - model, expected) < 5e-3


def test_an_overflow_halves_the_scale_and_skips_the_inner_step():
    problem, model, h, batch = quadratic(2.0)
    inner = hpo.mixed_precision(optax.sgd(2e-2), loss_scale=2.0**20, period=4)
    # The gradient is -2 and -3 at first: it is finite from a scale of 2**14 on.
    state = train_for(6, problem, model, h, batch, inner)
    assert equal(state.model, model) and int(state.skipped) == 0
    assert int(state.inner_opt_state.log2_scale) == 14
    state = train_for(9, problem, model, h, batch, inner)
    assert int(state.inner_opt_state.log2_scale) == 14
    assert int(state.inner_opt_state.good_steps) == 3
    expected = 1 - (1 - model.astype(float)) * 0.92**3
    assert relative_error(state.inner_opt_state.masters, expected) < 1e-3
    state = train_for(10, problem, model, h, batch, inner)
    assert int(state.inner_opt_state.log2_scale) == 15
    assert int(state.inner_opt_state.good_steps) == 0


def test_a_skipped_step_halves_the_scale_too():
    problem, model, h, batch = quadratic(1.0)
    val = lambda model, h, batch, key: jnp.nan * jnp.sum(model)
    problem = hpo.Problem(problem.train_loss, val)
    inner = hpo.mixed_precision(optax.sgd(1e-2), loss_scale=4.0)
    state = train_for(3, problem, model, h, batch, inner)
    assert equal(state.model, model) and int(state.skipped) == 3
    assert int(state.inner_opt_state.log2_scale) == 1


def test_what_is_never_finite_is_left_to_the_guard():
    problem, model, h, batch = quadratic(1.0)
    root = lambda m, h, b, k: jnp.sum(jnp.sqrt(m - m)) + h
    problem = hpo.Problem(root, problem.val_loss)
    inner = hpo.mixed_precision(optax.sgd(1e-2), loss_scale=4.0)
    state = train_for(3, problem, model, h, batch, inner)
    assert equal(state.model, model) and int(state.skipped) == 2


def test_optax_alone():
    inner: Any = hpo.mixed_precision(optax.adam(1e-3))
    params: Any = {"half": jnp.array([1.0, -0.3], jnp.bfloat16), "single": jnp.ones(2)}
    state = inner.init(params)
    assert state.masters["single"] is None and state.log2_scale is None
    plain: Any = cast(params, jnp.float32)
    adam: Any = optax.adam(1e-3)
    expected = adam.init(plain)
    for grads in (params, params):
        updates, state = inner.update(grads, state, params)
        params: Any = optax.apply_updates(params, updates)
        moves, expected = adam.update(cast(grads, jnp.float32), expected, plain)
        plain: Any = optax.apply_updates(plain, moves)
    assert equal(state.masters["half"], plain["half"])
    assert equal(params["half"], plain["half"].astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_everything_else_takes_it(dtype, tmp_path):
    model, h, train, val = make(dtype)
    model = cast(model, dtype)
    inner = hpo.mixed_precision(optax.adam(0.01))
    algorithm = hpo.T1T2(PROBLEM, inner, optax.adam(0.1), inner_steps=2)
    kwargs: Any = dict(key=None, progress=False)
    solution = hpo.tune(algorithm, model, h, train, val, steps=30, **kwargs)
    history = solution.history
    assert history.val_loss[-1] < 0.8 * history.val_loss[0]
    hpo.save(tmp_path / "state", solution.state)
    loaded = hpo.load(tmp_path / "state", algorithm.init(model, h))
    assert equal(loaded, solution.state)
    fresh = algorithm.restart(solution.state, model)
    assert equal(fresh.inner_opt_state.masters, cast(model, jnp.float32))
    fitted = hpo.fit(algorithm, model, h, train, steps=30, **kwargs)
    assert fitted.model["first"].dtype == dtype
    masters = fitted.state.inner_opt_state.masters
    assert equal(fitted.model, cast(masters, dtype))
    assert train_loss(fitted.model, h, train, None) < 0.8 * train_loss(
        model, h, train, None
    )
    both = jtu.tree_map(lambda x, y: jnp.stack([x, y]), train, val)
    learner = hpo.MetaLearner(algorithm, tasks=2)
    state = learner.init(model, h)
    got = learner.compute_hypergradient(state, both, both)
    each = [hypergradient(algorithm, model, h, x, x) for x in (train, val)]
    mean = jtu.tree_map(lambda x, y: (x + y) / 2, *each)
    assert relative_error(got, mean) < BOUNDS[dtype]


def test_a_loss_in_a_fixed_dtype_warns():
    def fixed(model, h, batch, key):
        start = jnp.zeros((), jnp.bfloat16)
        total, _ = jax.lax.scan(lambda c, w: (c + w * w, None), start, model)
        return jnp.exp(h) * total + jnp.sum((model - batch.astype(model.dtype)) ** 2)

    problem, inner = hpo.Problem(fixed, fixed), hpo.mixed_precision(optax.sgd(0.1))
    algorithm = hpo.T1T2(problem, inner, optax.sgd(0.1))
    state = algorithm.init(jnp.array([0.5, 0.25], jnp.bfloat16), jnp.float32(0.0))
    with pytest.warns(UserWarning, match="A loss cannot be evaluated in float32"):
        got = algorithm.compute_hypergradient(state, jnp.ones(2), jnp.ones(2))
    # One step with the rate 0.1 on e^h x^2 + (x - 1)^2, both losses the same.
    w = jnp.array([0.5, 0.25])
    new = w - 0.1 * (2 * w + 2 * (w - 1))
    expected = jnp.sum(new**2) - jnp.sum(0.1 * 2 * w * (2 * new + 2 * (new - 1)))
    assert got.dtype == jnp.float32
    assert abs(got - expected) < 2e-2 * abs(expected)


def test_mistakes():
    problem, model, h, _ = quadratic(1.0)
    nested = optax.chain(optax.clip(1.0), hpo.mixed_precision(optax.sgd(0.1)))
    with pytest.raises(ValueError) as error:
        hpo.T1T2(problem, nested, optax.sgd(0.1)).init(model, h)
    assert str(error.value) == (
        "`mixed_precision` must stand outermost in `inner`: write "
        "`mixed_precision(optax.chain(...))`."
    )
    inner = hpo.mixed_precision(optax.sgd(0.1))
    with pytest.raises(ValueError, match="`mixed_precision` needs the parameters"):
        inner.update(model, inner.init(model))
    with pytest.raises(ValueError) as error:
        hpo.mixed_precision(optax.sgd(0.1), loss_scale=3.0)
    assert str(error.value) == (
        "`loss_scale` must be a power of two from 2 to 2**24; got 3.0."
    )
