from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest

from .helpers import relative_error, RULES


def _loss(params, rest, args):
    """Not quadratic, with a carried value, as of BatchNorm."""
    hyper, running = rest
    hidden = jnp.tanh(args["x"] @ params["w"] + hyper["b"]) * params["s"]
    carried = {"mean": 0.9 * running["mean"] + 0.1 * jnp.mean(hidden, 0)}
    loss = jnp.sum((hidden - args["y"]) ** 2) + jnp.sum(running["mean"] * params["s"])
    return loss, (carried, hidden)


def _point(getkey):
    params = {"w": jr.normal(getkey(), (3, 4)), "s": jr.normal(getkey(), (4,))}
    rest = ({"b": jr.normal(getkey(), (4,))}, {"mean": jr.normal(getkey(), (4,))})
    args = {"x": jr.normal(getkey(), (5, 3)), "y": jr.normal(getkey(), (5, 4))}
    return params, rest, args


def _cotangents(getkey, params, rest):
    like = lambda tree: jtu.tree_map(lambda x: jr.normal(getkey(), x.shape), tree)
    return like(params), like(rest[1])


@pytest.mark.parametrize("rule_name", RULES)
def test_pullback_equals_autodiff(rule_name, getkey):
    params, rest, args = _point(getkey)
    v, u = _cotangents(getkey, params, rest)
    gradient = RULES[rule_name].differentiate(_loss)
    out = lambda params, rest: gradient(params, rest, args)[:2]

    @jax.jit
    def pulled():
        value, pullback = jax.vjp(out, params, rest)
        return value, pullback((v, u))

    value, got = pulled()

    def scalar(params, rest):
        grads, (carried, _) = jax.grad(_loss, has_aux=True)(params, rest, args)
        dot = lambda x, y: sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, x, y)))
        return dot(v, grads) + dot(u, carried)

    expected = jax.jit(jax.grad(scalar, argnums=(0, 1)))(params, rest)
    tolerance = 1e-3 if rule_name == "finite_difference" else 1e-12
    assert relative_error(got, expected) < tolerance
    plain, _ = jax.grad(_loss, has_aux=True)(params, rest, args)
    assert relative_error(value[0], plain) < 1e-14


def test_finite_difference_error_is_of_second_order(getkey):
    params, rest, args = _point(getkey)
    v, u = _cotangents(getkey, params, rest)

    def pulled(rule):
        out = lambda params, rest: rule.differentiate(_loss)(params, rest, args)[:2]
        return jax.jit(lambda: jax.vjp(out, params, rest)[1]((v, u)))()

    exact = pulled(hpo.ForwardOverReverse())
    coarse, fine = [
        relative_error(pulled(hpo.FiniteDifference(epsilon)), exact)
        for epsilon in (0.04, 0.01)
    ]
    assert 12 < coarse / fine < 20


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_finite_difference_of_tiny_and_huge_vectors(scale, getkey):
    """In float32 the squares of these vectors vanish or overflow."""
    cast = lambda tree: jtu.tree_map(lambda x: x.astype(jnp.float32), tree)
    params, rest, args = cast(_point(getkey))
    v, u = cast(_cotangents(getkey, params, rest))
    v = jtu.tree_map(lambda x: x * np.float32(scale), v)
    u = jtu.tree_map(jnp.zeros_like, u)

    def pulled(rule):
        out = lambda params, rest: rule.differentiate(_loss)(params, rest, args)[:2]
        return jax.jit(lambda: jax.vjp(out, params, rest)[1]((v, u)))()

    got, exact = pulled(hpo.FiniteDifference()), pulled(hpo.ForwardOverReverse())
    if scale == 0:
        assert all(jnp.all(x == 0) for x in jtu.tree_leaves(got))
    else:
        assert relative_error(got, exact) < 1e-2


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
def test_bad_epsilon(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        hpo.FiniteDifference(epsilon)


def _with_dead_pixels():
    """A linear model on images whose first two pixels are always zero."""
    x = jr.normal(jr.key(0), (20, 5)).at[:, :2].set(0.0)
    y = x @ jnp.arange(5.0)

    def val_loss(model, h, batch, key):
        return jnp.mean((batch[0] @ model - batch[1]) ** 2)

    def train_loss(model, h, batch, key):
        return val_loss(model, h, batch, key) + h["decay"] * jnp.sum(model[2:] ** 2)

    return hpo.Problem(train_loss, val_loss), (x, y), jnp.linspace(-1.0, 1.0, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule_name, steps", [*[(name, 4) for name in RULES], ("forward_over_reverse", 1)]
)
def test_adam_with_dead_pixels(rule_name, steps):
    """The chain rule alone gives NaN; the right answer is that of the problem without
    the pixels."""
    problem, (x, y), model = _with_dead_pixels()
    hyperparams = {"decay": hpo.Positive(0.1), "rate": hpo.Positive(0.05)}
    inner = lambda h: optax.adam(h["rate"])
    algorithm = hpo.Unrolled(
        problem, inner, optax.sgd(0.1), RULES[rule_name], inner_steps=steps
    )
    state = algorithm.init(model, hyperparams)
    got = algorithm.compute_hypergradient(state, (x, y), (x, y))

    alive = hpo.Problem(
        lambda m, h, batch, key: (
            problem.val_loss(m, h, batch, key) + h["decay"] * jnp.sum(m**2)
        ),
        problem.val_loss,
    )
    algorithm = hpo.Unrolled(
        alive, inner, optax.sgd(0.1), RULES[rule_name], inner_steps=steps
    )
    data = (x[:, 2:], y)
    state = algorithm.init(model[2:], hyperparams)
    expected = algorithm.compute_hypergradient(state, data, data)
    assert relative_error(got, expected) < 1e-6


@jax.custom_vjp
def _square(x):
    return x**2


def _square_backward(x, cotangent):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return (cotangent * jax.pure_callback(lambda x: 2 * np.asarray(x), shape, x),)


_square.defvjp(lambda x: (x**2, x), _square_backward)


def test_finite_differences_need_first_derivatives_only():
    """The derivative of the loss is computed outside of JAX."""
    loss = lambda w, h, batch, key: (
        jnp.sum(_square(w - h)) + jnp.sum(_square(w - batch))
    )
    algorithm = hpo.T1T2(
        hpo.Problem(loss, lambda w, h, batch, key: jnp.sum((w - batch) ** 2)),
        optax.sgd(0.1),
        optax.sgd(0.1),
        hpo.FiniteDifference(),
    )
    state = algorithm.init(jnp.ones(2), jnp.zeros(2))
    got = algorithm.compute_hypergradient(state, jnp.zeros(2), jnp.ones(2))
    # w1 = w - 0.1 (2 (w - h) + 2 w) = 0.6 ; dw1/dh = 0.2
    assert jnp.allclose(got, 2 * (0.6 - 1) * 0.2)


class _Scaled(eqx.Module):
    """A loss that is a module with arrays of its own."""

    scale: jax.Array

    def __call__(self, model, h, batch, key):
        return jnp.sum(self.scale * (model - batch) ** 2) + h * jnp.sum(model**2)


@pytest.mark.parametrize("rule_name", RULES)
def test_a_loss_may_hold_arrays(rule_name):
    problem = hpo.Problem(_Scaled(jnp.array([1.0, 2.0])), _Scaled(jnp.ones(2)))
    algorithm = hpo.Unrolled(
        problem, optax.sgd(0.1), optax.sgd(0.1), RULES[rule_name], inner_steps=3
    )
    state = algorithm.init(jnp.ones(2), jnp.array(0.5))
    got = algorithm.compute_hypergradient(state, jnp.zeros(2), jnp.zeros(2))
    assert jnp.allclose(got, jax.grad(_by_hand)(jnp.array(0.5)), rtol=1e-6)


def _by_hand(h):
    w = jnp.ones(2)
    for _ in range(3):
        w = w - 0.1 * (2 * jnp.array([1.0, 2.0]) * w + 2 * h * w)
    return jnp.sum(w**2) + h * jnp.sum(w**2)


@pytest.mark.slow
@pytest.mark.parametrize("rule_name", ["forward_over_reverse", "finite_difference"])
def test_a_loss_may_close_over_tracers(rule_name, getkey):
    """A problem made inside `jit` and `vmap`."""

    def run(x):
        loss = lambda w, h, batch, key: jnp.sum((x @ w - batch) ** 2) + h * w @ w
        algorithm = hpo.Unrolled(
            hpo.Problem(loss, loss),
            optax.adam(0.1),
            optax.sgd(0.1),
            RULES[rule_name],
            inner_steps=3,
        )
        state = algorithm.init(jnp.ones(2), hpo.Positive(0.1))
        return algorithm.compute_hypergradient(state, jnp.ones(3), jnp.ones(3)).raw

    xs = jr.normal(getkey(), (2, 3, 2))
    expected = run(xs[0])
    assert jnp.allclose(jax.jit(jax.vmap(run))(xs)[0], expected, rtol=1e-10)
    assert jnp.allclose(jax.jit(run)(xs[0]), expected, rtol=1e-10)


def test_another_epsilon_compiles_nothing_anew():
    """It is a leaf: a scan over steps may carry it, and `vmap` may map it."""
    loss = lambda w, h, batch, key: jnp.sum((w - h) ** 4)
    problem = hpo.Problem(loss, lambda w, h, batch, key: jnp.sum(w**2))
    traces = 0

    @jax.jit
    def hypergradient(epsilon):
        nonlocal traces
        traces += 1
        rule = hpo.FiniteDifference(epsilon)
        algorithm = hpo.Unrolled(
            problem, optax.sgd(0.01), optax.sgd(0.1), rule, inner_steps=3
        )
        state = algorithm.init(jnp.ones(2), jnp.zeros(2))
        return algorithm.compute_hypergradient(state, None, None)

    coarse, fine = hypergradient(0.5), hypergradient(1e-4)
    assert traces == 1
    assert relative_error(coarse, fine) > 1e-3
    both = jax.vmap(hypergradient)(jnp.array([0.5, 1e-4]))
    assert relative_error(both, jnp.stack([coarse, fine])) < 1e-12
    leaves = jtu.tree_leaves(hpo.FiniteDifference(0.01))
    assert len(leaves) == 1 and eqx.is_array(leaves[0])


@pytest.mark.parametrize("epsilon", [0.0, -1.0, jnp.inf, None, jnp.ones(2)])
def test_epsilon_is_a_finite_number(epsilon):
    with pytest.raises(ValueError, match="`epsilon` must be a number above zero"):
        hpo.FiniteDifference(epsilon)


MATRIX = jr.normal(jr.key(0), (6, 3)) + 1j * jr.normal(jr.key(1), (6, 3))


def _complex_train_loss(w, h, batch, key):
    fit = jnp.mean(jnp.abs(MATRIX @ w - 1.0) ** 2)
    return fit + jnp.sum(jnp.exp(h) * jnp.abs(w) ** 2) + jnp.sum(jnp.abs(w) ** 4)


def _complex_val_loss(w, h, batch, key):
    return jnp.sum(jnp.abs(w - 1 + 0.5j) ** 2)


COMPLEX = hpo.Problem(_complex_train_loss, _complex_val_loss)
W, H = jnp.array([0.1 + 0.2j, 0.3 - 0.1j, -0.2j]), jnp.array([-1.0, -2.0, 0.3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_mode", "drmad", *RULES])
def test_complex_weights_in_parts(name):
    """The same as real and imaginary parts, by an optimiser that conjugates."""
    conjugate = optax.stateless(lambda updates, _: jtu.tree_map(jnp.conj, updates))
    make: Any = {
        "forward_mode": lambda *args: hpo.ForwardMode(*args, inner_steps=3),
        "drmad": lambda *args: hpo.DrMAD(*args, inner_steps=3),
    }
    default: Any = lambda *args: hpo.Unrolled(
        *args, second_order=RULES[name], inner_steps=3
    )

    def hypergradient(problem, inner, model):
        args = problem, inner, optax.sgd(0.1)
        algorithm = make[name](*args) if name in make else default(*args)
        state = algorithm.init(model, H)
        assert int(algorithm.step(state, (), ()).skipped) == 0
        return algorithm.compute_hypergradient(state, (), ())

    def in_parts(loss):
        return lambda parts, *args: loss(parts[0] + 1j * parts[1], *args)

    losses = in_parts(_complex_train_loss), in_parts(_complex_val_loss)
    momentum = optax.sgd(0.05, momentum=0.9)
    got = hypergradient(COMPLEX, optax.chain(conjugate, momentum), W)
    parts = jnp.stack([W.real, W.imag])
    expected = hypergradient(hpo.Problem(*losses), momentum, parts)
    tolerance = 1e-6 if name == "finite_difference" else 1e-12
    assert relative_error(got, expected) < tolerance


def _weighted(dtype, strict):
    """Logistic regression with a weight for each example. With `strict` the loss works
    in the precision of the model alone."""
    x = jr.normal(jr.key(0), (30, 5)).astype(dtype)
    y = jnp.where(x[:, 0] + 0.5 * x[:, 1] > 0, 1, -1).astype(dtype)

    def losses(w, batch):
        x, y = batch
        start = jnp.zeros((), dtype if strict else w.dtype)
        scale, _ = jax.lax.scan(lambda c, v: (c + v * v, None), start, w)
        return jax.nn.softplus(-y * (x @ w)) + 0.1 * scale

    train = lambda w, h, batch, key: jnp.mean(h * losses(w, batch))
    val = lambda w, h, batch, key: jnp.mean(losses(w, batch)).astype(jnp.float32)
    w, h = jnp.linspace(-0.5, 0.5, 5).astype(dtype), jnp.ones(20, dtype)
    return hpo.Problem(train, val), w, h, (x[:20], y[:20]), (x[20:], y[20:])


@pytest.mark.slow
@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
def test_finite_differences_in_half_precision(dtype, bound):
    problem, w, h, train, val = _weighted(dtype, strict=False)
    cast = lambda x: x.astype(jnp.float32)

    def hypergradient(rule, w, h, *data):
        algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1), rule)
        return algorithm.compute_hypergradient(algorithm.init(w, h), *data)

    got = hypergradient(hpo.FiniteDifference(), w, h, train, val)
    single = jtu.tree_map(cast, (w, h, train, val))
    expected = hypergradient(hpo.ForwardOverReverse(), *single)
    assert got.dtype == dtype
    assert relative_error(got, expected) < bound


def test_a_loss_that_needs_half_precision_stays_in_it():
    problem, w, h, train, val = _weighted(jnp.bfloat16, strict=True)
    rules = hpo.FiniteDifference(), hpo.ForwardOverReverse()
    got, exact = [
        x.compute_hypergradient(x.init(w, h), train, val)
        for x in (hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1), r) for r in rules)
    ]
    assert relative_error(got, exact) < 0.2
