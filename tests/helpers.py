"""What several test files use."""

import pathlib
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import optax
from eqx_hpo._hyperparameter import partition_raw


ROOT = pathlib.Path(__file__).parent.parent
RULES = {
    "reverse_over_reverse": hpo.ReverseOverReverse(),
    "forward_over_reverse": hpo.ForwardOverReverse(),
    "finite_difference": hpo.FiniteDifference(),
}


def _algorithm_of_the_page() -> Any:
    """The algorithm that the page on extending shows."""
    page = ROOT / "docs" / "api" / "extending.md"
    block = page.read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(block, names)
    return names["Averaged"]


# Every algorithm, as a function of (problem, inner, outer).
ALGORITHMS = {
    "first_order": hpo.FirstOrder,
    "t1t2": hpo.T1T2,
    "t1t2_3": lambda *args: hpo.T1T2(*args, inner_steps=3),
    "greedy_3": lambda *args: hpo.Greedy(*args, inner_steps=3, momentum=0.9),
    "hyperdistill": lambda *args: hpo.HyperDistill(*args, horizon=3),
    "drmad_4": lambda *args: hpo.DrMAD(*args, inner_steps=4),
    "forward_mode_2": lambda *args: hpo.ForwardMode(*args, inner_steps=2),
    "implicit_3": lambda *args: hpo.Implicit(
        *args, inner_steps=3, linear_solver=lx.CG(rtol=1e-3, atol=1e-3)
    ),
    "soba": lambda *args: hpo.SOBA(*args, linear_rate=0.1, averaging=0.5),
    "penalty_2": lambda *args: hpo.Penalty(
        *args, strength=10.0, inner_steps=2, bias_every=1, bias_steps=2
    ),
    "fixed_point_3": lambda *args: hpo.FixedPoint(*args, inner_steps=3, terms=2),
    "evolution_2": lambda *args: hpo.Evolution(*args, inner_steps=2, pairs=2),
    "unrolled_4": lambda *args: hpo.Unrolled(*args, inner_steps=4),
    "unrolled_4_2": lambda *args: hpo.Unrolled(*args, inner_steps=4, truncation=2),
    "of_the_page": _algorithm_of_the_page(),
}


def arrays(tree):
    return jtu.tree_leaves(eqx.filter(tree, eqx.is_array))


def equal(left, right) -> bool:
    """Bit for bit, NaN included."""
    same = lambda x, y: (
        x.dtype == y.dtype and bool(jnp.array_equal(x, y, equal_nan=True))
    )
    return jtu.tree_structure(left) == jtu.tree_structure(right) and all(
        same(x, y) for x, y in zip(arrays(left), arrays(right), strict=True)
    )


def relative_error(got, expected, floor=0.0) -> float:
    """The Euclidean distance of two trees, over the norm of the second or `floor`."""
    got, expected = arrays(got), arrays(expected)
    assert [x.shape for x in got] == [x.shape for x in expected]
    flat = lambda leaves: jnp.concatenate([x.ravel().astype(float) for x in leaves])
    got, expected = flat(got), flat(expected)
    scale = jnp.maximum(jnp.linalg.norm(expected), floor)
    return float(jnp.linalg.norm(got - expected) / scale)


def hand_unrolled(problem, inner, model, hyperparams, train, val, steps):
    """The exact hypergradient, by `jax.grad` of a plain scan over training steps."""
    raw, constants = partition_raw(hyperparams)

    def loss(raw):
        plain = hpo.unwrap(eqx.combine(raw, constants))
        if isinstance(inner, optax.GradientTransformation):
            optimiser = inner
        else:
            optimiser = inner(plain)

        def body(carry, _):
            params, opt_state = carry
            grads = jax.grad(problem.train_loss)(params, plain, train, None)
            updates, opt_state = optimiser.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        carry = (model, optimiser.init(model))
        (params, _), _ = jax.lax.scan(body, carry, length=steps)
        return problem.val_loss(params, plain, val, None)

    return jax.jit(jax.grad(loss))(raw)


def step_temporaries(algorithm, state, case) -> int:
    """The temporary memory of a step, in bytes."""
    carried, static = eqx.partition(state, eqx.is_array)

    def step(carried):
        state = eqx.combine(carried, static)
        return arrays(algorithm.step(state, case.train, case.val))

    memory = jax.jit(step).lower(carried).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


class CountingRule(hpo.AbstractSecondOrder):
    """Reverse mode that counts how many second-order products were computed."""

    _counts: list = eqx.field(static=True, default_factory=list)

    def count(self) -> int:
        jax.effects_barrier()
        return len(self._counts)

    def __hash__(self):
        return id(self)

    def differentiate(self, loss):
        inner = hpo.ReverseOverReverse().differentiate(loss)

        @jax.custom_vjp
        def gradient(params, rest, args):
            return inner(params, rest, args)

        def forward(params, rest, args):
            return jax.vjp(lambda p, r: inner(p, r, args), params, rest)

        def backward(pullback, cotangents):
            jax.debug.callback(lambda: self._counts.append(None))
            return *pullback(cotangents), None

        gradient.defvjp(forward, backward)
        return gradient
