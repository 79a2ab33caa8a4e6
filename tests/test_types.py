"""The annotations are checked while the tests run."""

import eqx_hpo as hpo
import jax.numpy as jnp
import jaxtyping
import optax
import pytest

from .problems import quadratic


def test_a_wrong_shape_raises():
    scalar = jnp.array(0.0)
    hpo.Metrics(scalar, scalar, scalar, None)
    with pytest.raises(jaxtyping.TypeCheckError, match="train_loss"):
        hpo.Metrics(jnp.zeros(3), scalar, scalar, None)


def test_a_wrong_dtype_raises():
    case = quadratic()
    optimizer = hpo.T1T2(case.problem, optax.sgd(0.1), optax.sgd(0.1))
    state = optimizer.init(case.model, case.hyperparams)
    with pytest.raises(jaxtyping.TypeCheckError, match="step"):
        hpo.BilevelState(
            model=state.model,
            hyperparams=state.hyperparams,
            inner_opt_state=state.inner_opt_state,
            outer_opt_state=state.outer_opt_state,
            memory=hpo.Memory(),
            model_state=None,
            step=jnp.array(0.5),
            skipped=state.skipped,
            metrics=state.metrics,
        )


def test_a_wrong_argument_raises():
    case = quadratic()
    with pytest.raises(jaxtyping.TypeCheckError, match="problem"):
        hpo.T1T2(
            case.problem.train_loss,  # pyright: ignore[reportArgumentType]
            optax.sgd(0.1),
            optax.sgd(0.1),
        )
