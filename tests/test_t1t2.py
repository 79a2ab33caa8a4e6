import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from .benchmarks import scale
from .helpers import arrays, relative_error
from .problems import CASES, ridge


@pytest.mark.parametrize(
    "case_name, inner",
    [
        ("quadratic", optax.sgd(0.1)),
        ("ridge", optax.sgd(0.1, momentum=0.9)),
        ("logistic", optax.adam(0.01)),
    ],
)
def test_equals_unrolled_one_step(case_name, inner):
    case = CASES[case_name]()
    exact = hpo.Unrolled(case.problem, inner, optax.adam(0.1), inner_steps=1)
    state = exact.init(case.model, case.hyperparams)
    for _ in range(3):
        state = exact.step(state, case.train, case.val)
    expected = exact.compute_hypergradient(state, case.train, case.val)
    t1t2 = hpo.T1T2(case.problem, inner, optax.adam(0.1))
    got = t1t2.compute_hypergradient(state, case.train, case.val)
    assert relative_error(got, expected) < 1e-14


def test_closed_form_on_the_quadratic(getkey):
    """One SGD step from `w`: `w1 = w - r M (w - h)`, so `dw1/dh = r M`."""
    case = CASES["quadratic"]()
    algorithm = hpo.T1T2(case.problem, optax.sgd(0.2), optax.sgd(0.1))
    state = algorithm.init(case.model, case.hyperparams)
    w, h, m, b = case.model, case.hyperparams, case.train, case.val
    reached = w - 0.2 * m @ (w - h)
    expected = 2 * (reached - b) @ (0.2 * m) + 0.2 * h
    got = algorithm.compute_hypergradient(state, m, b)
    assert jnp.allclose(got, expected, rtol=1e-12)
    state = algorithm.step(state, m, b)
    assert jnp.allclose(state.model, reached, rtol=1e-12)
    assert jnp.allclose(state.hyperparams, h - 0.1 * expected, rtol=1e-12)
    assert jnp.allclose(state.metrics.train_loss, 0.5 * (w - h) @ m @ (w - h))
    assert jnp.allclose(
        state.metrics.val_loss, jnp.sum((reached - b) ** 2) + 0.1 * jnp.sum(h**2)
    )
    assert jnp.allclose(state.metrics.hypergradient_norm, jnp.linalg.norm(expected))


def test_inner_steps_are_plain_training_but_the_last():
    case, inner = ridge(), optax.sgd(0.1, momentum=0.9)
    make = lambda **kw: hpo.T1T2(case.problem, inner, optax.sgd(0.0), **kw)
    state = make().init(case.model, case.hyperparams)
    got = make(inner_steps=4).compute_hypergradient(state, case.train, case.val)
    for _ in range(3):
        state = make().step(state, case.train, case.val)
    expected = make().compute_hypergradient(state, case.train, case.val)
    assert relative_error(got, expected) < 1e-12


def test_first_order_is_the_direct_term():
    case = CASES["quadratic"]()
    algorithm = hpo.FirstOrder(case.problem, optax.sgd(0.2), optax.sgd(0.1))
    state = algorithm.init(case.model, case.hyperparams)
    got = algorithm.compute_hypergradient(state, case.train, case.val)
    assert jnp.allclose(got, 0.2 * case.hyperparams, rtol=1e-14)
    t1t2 = hpo.T1T2(case.problem, optax.sgd(0.2), optax.sgd(0.1))
    trained = [o.step(state, case.train, case.val).model for o in (algorithm, t1t2)]
    assert jnp.allclose(*trained, rtol=1e-14)


def test_first_order_warns_of_a_learning_rate():
    problem = CASES["quadratic"]().problem
    with pytest.warns(UserWarning, match="direct term"):
        hpo.FirstOrder(problem, lambda h: optax.sgd(h["rate"]), optax.sgd(0.1))


def test_tuning_finds_the_optimum():
    """On the quadratic the response is `w = h`, so the best `h` is `b / 1.1`."""
    case = CASES["quadratic"]()
    algorithm = hpo.Unrolled(
        case.problem, optax.sgd(0.3), optax.sgd(0.05), inner_steps=60
    )
    solution = hpo.tune(
        algorithm, case.model, case.hyperparams, case.train, case.val,
        steps=300, key=None,
    )  # fmt: skip
    assert jnp.allclose(solution.values, case.val / 1.1, atol=1e-6)


def _model():
    return eqx.nn.MLP(32, 10, 256, 6, key=jr.key(0))


def _temporaries(second_order, data_rows) -> int:
    """Bytes of XLA temporaries of a step for input noise, the hyperparameter that
    needs all of the second-order terms."""
    x, y = jnp.zeros((data_rows, 32), jnp.float32), jnp.zeros(data_rows, int)

    def val_loss(model, h, batch, key):
        logits = jax.vmap(model)(batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return jnp.mean(losses)

    def train_loss(model, h, batch, key):
        noise = jr.normal(jr.key(0), batch[0].shape, batch[0].dtype)
        return val_loss(model, h, (batch[0] + h * noise, batch[1]), key)

    algorithm = hpo.T1T2(
        hpo.Problem(train_loss, val_loss), optax.sgd(0.1), optax.sgd(0.1), second_order
    )
    state = algorithm.init(_model(), jnp.array(0.1, jnp.float32))
    state_arrays, static = eqx.partition(state, eqx.is_array)

    def step(state_arrays, data):
        state = algorithm.step(eqx.combine(state_arrays, static), data, data)
        return arrays(state)

    compiled = jax.jit(step).lower(state_arrays, (x, y)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def _gradient_temporaries(data_rows) -> int:
    x, y = jnp.zeros((data_rows, 32), jnp.float32), jnp.zeros(data_rows, int)
    params, static = eqx.partition(_model(), eqx.is_array)

    def loss(params, x, y):
        logits = jax.vmap(eqx.combine(params, static))(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return jnp.mean(losses)

    compiled = jax.jit(jax.grad(loss)).lower(params, x, y).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_a_step():
    """Finite differences hold little more than one gradient. The exact mixed product
    needs the tape of the training gradient while the validation gradient runs, and the
    tangents beside it, but nothing of second order."""
    rows = 8192
    gradient = _gradient_temporaries(rows)
    assert _temporaries(hpo.FiniteDifference(), rows) < 1.3 * gradient
    assert _temporaries(hpo.ForwardOverReverse(), rows) < 2.8 * gradient


@pytest.mark.parametrize(
    "outer, inner_steps, copies",
    [(optax.sgd(0.1), 1, 4), (optax.adam(0.1), 1, 6), (optax.sgd(0.1), 5, 5)],
)
def test_copies_of_the_weights_that_a_large_step_holds(outer, inner_steps, copies):
    """The least there can be: weights and decays, a moment each of Adam, the new
    weights and their gradient. With more than one inner step the old weights wait
    beside those before the last step."""
    problem = hpo.Problem(scale.train_loss, scale.val_loss)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), outer, inner_steps=inner_steps)
    width = 1100
    step = scale.compile_step(algorithm, width, jnp.float32)
    assert copies <= scale.planned(step) / (4 * width**2) < copies + 0.1
