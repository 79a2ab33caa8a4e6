"""Errors that users of Equinox know, and dtypes under the strict setting of JAX."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest

from .helpers import ALGORITHMS
from .problems import ridge


def _checked(w, h, batch, key):
    w = eqx.error_if(w, jnp.max(batch) > 2, "a batch above two")
    return jnp.sum((w - batch) ** 2) + jnp.sum(h * w**2)


def _run(by, algorithm, state, train):
    if by == "step":
        return algorithm.step(state, train, jnp.ones(3))
    if by == "compute_hypergradient":
        return algorithm.compute_hypergradient(state, train, jnp.ones(3))
    if by == "tune from the host":
        train = iter([jnp.ones(3), jnp.ones(3), train, train, train])
    return hpo.tune(
        algorithm, jnp.ones(3), jnp.ones(3), train, jnp.ones(3), steps=5, key=None
    )


@pytest.mark.parametrize(
    "by", ["step", "compute_hypergradient", "tune", "tune from the host"]
)
def test_an_error_inside_a_loss_comes_with_its_own_text(by):
    problem = hpo.Problem(_checked, _checked)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1))
    state = algorithm.init(jnp.ones(3), jnp.ones(3))
    with pytest.raises(eqx.EquinoxRuntimeError, match="a batch above two") as info:
        _run(by, algorithm, state, 3 * jnp.ones(3))
    text = str(info.value)
    assert "jax.jit" not in text.partition("a batch above two")[0]
    assert "callback" not in text.partition("a batch above two")[0]
    assert int(algorithm.step(state, jnp.ones(3), jnp.ones(3)).skipped) == 0


def test_an_error_inside_a_loss_over_tasks():
    problem = hpo.Problem(_checked, _checked)
    algorithm = hpo.MetaLearner(hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1)), 2)
    state = algorithm.init(jnp.ones(3), jnp.ones(3))
    with pytest.raises(eqx.EquinoxRuntimeError, match="a batch above two"):
        algorithm.step(state, 3 * jnp.ones((2, 3)), jnp.ones((2, 3)))


# Single precision under x64 is the harder case.
QUICK = [(name, "float32") for name in ("t1t2_3", "hyperdistill", "implicit_3")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype",
    [
        pytest.param(
            name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.slow
        )
        for name in ALGORITHMS
        for dtype in ("float32", "float64")
    ],
)
def test_no_dtype_is_promoted_implicitly(name, dtype):
    """Under x64, where counters have 64 bits. Optax promotes inside its optimisers."""
    cast = lambda tree: jtu.tree_map(lambda x: x.astype(dtype), tree)
    case = ridge()
    model, hyperparams, train, val = cast(
        (case.model, case.hyperparams, case.train, case.val)
    )

    def val_loss(model, hyperparams, batch, key):
        return jnp.mean((batch[0] @ model - batch[1]) ** 2)

    def train_loss(model, hyperparams, batch, key):
        penalty = jnp.sum(jnp.exp(hyperparams["penalty"]) * model**2)
        return val_loss(model, hyperparams, batch, key) + penalty

    with jax.numpy_dtype_promotion("strict"):
        problem = hpo.Problem(train_loss, val_loss)
        algorithm = ALGORITHMS[name](problem, optax.adam(0.1), optax.adam(0.1))
        batches = hpo.Minibatch(train, 8, replacement=False)
        state = algorithm.init(model, hyperparams, train=batches)
        for _ in range(2):
            state = algorithm.step(state, batches, val)
        assert state.model.dtype == dtype
        assert state.hyperparams["penalty"].dtype == dtype
        assert int(state.skipped) == 0


def test_the_driver_promotes_no_dtype_implicitly():
    case = ridge()
    with jax.numpy_dtype_promotion("strict"):
        algorithm = hpo.T1T2(case.problem, optax.sgd(0.1), optax.sgd(0.1))
        solution = hpo.tune(
            algorithm, case.model, case.hyperparams, case.train, case.val,
            steps=7, key=None, record_every=2, restart_every=3,
        )  # fmt: skip
        assert solution.result == hpo.RESULTS.successful
