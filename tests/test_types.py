"""The annotations are checked while the tests run."""

import inspect
import types
from typing import Any

import eqx_hpo as hpo
import jax.numpy as jnp
import jaxtyping
import optax
import pytest
from eqx_hpo._checkpoint import save
from eqx_hpo._optimizer.settings import check_settings
from eqx_hpo._tune import check_start

from .problems import quadratic


def test_a_wrong_shape_raises():
    scalar = jnp.array(0.0)
    hpo.Metrics(scalar, scalar, scalar, None)
    with pytest.raises(jaxtyping.TypeCheckError, match="train_loss"):
        hpo.Metrics(jnp.zeros(3), scalar, scalar, None)


def test_a_wrong_dtype_raises():
    case = quadratic()
    algorithm = hpo.T1T2(case.problem, optax.sgd(0.1), optax.sgd(0.1))
    state = algorithm.init(case.model, case.hyperparams)
    with pytest.raises(jaxtyping.TypeCheckError, match="step"):
        hpo.BilevelState(
            model=state.model,
            hyperparams=state.hyperparams,
            inner_opt_state=state.inner_opt_state,
            outer_opt_state=state.outer_opt_state,
            memory=hpo.Memory(),
            model_state=None,
            step=jnp.array(0.5),
            episode_step=state.episode_step,
            skipped=state.skipped,
            total_skipped=state.total_skipped,
            first_skipped=state.first_skipped,
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


@pytest.mark.parametrize(
    "change, match",
    [
        ({"problem": lambda *args: 0.0}, "`problem` must be an `eqx_hpo.Problem"),
        ({"outer": optax.sgd}, "`outer` must be an `optax.GradientTransformation`"),
        ({"second_order": 5}, "`second_order` must be a rule"),
        ({"inner": 3}, "`inner` must be"),
    ],
)
def test_wrong_settings_are_named_without_the_checks_of_types_too(change, match):
    settings = {
        "problem": quadratic().problem,
        "inner": optax.sgd(0.1),
        "outer": optax.sgd(0.1),
        "second_order": hpo.FiniteDifference(),
        "inner_steps": 1,
        "unroll": None,
    }
    with pytest.raises(ValueError, match=match):
        check_settings(types.SimpleNamespace(**(settings | change)))


def test_what_is_no_state_is_named(tmp_path):
    solution: Any = object()
    with pytest.raises(ValueError, match="`state` must be a `BilevelState`.*`solution"):
        inspect.unwrap(save)(tmp_path / "file", solution)
    with pytest.raises(ValueError, match="`algorithm` must be an algorithm.*a dict"):
        check_start({}, None, None)
    algorithm = hpo.T1T2(quadratic().problem, optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(ValueError, match="`state` must be a `BilevelState`"):
        check_start(algorithm, None, solution)
    with pytest.raises(ValueError, match="`key` must be a PRNG key"):
        check_start(algorithm, 0, None)
