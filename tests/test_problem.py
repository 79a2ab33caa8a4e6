import equinox as eqx
import eqx_hpo as hpo
import jax.numpy as jnp
import optax
import pytest


def _step(train_loss, val_loss=None, has_aux=False, model_state=None):
    good = lambda w, h, batch, key: h * jnp.sum(w**2)
    if model_state is not None:
        good = lambda m, h, batch, key: (h * jnp.sum(m[0] ** 2), m[1])
    problem = hpo.Problem(train_loss or good, val_loss or good, has_aux=has_aux)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1))
    state = algorithm.init(jnp.ones(3), 0.5, model_state=model_state)
    return algorithm.step(state, jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(
    "out, match",
    [
        (lambda w: w, r"`train_loss` must return a floating-point scalar.*\(3,\)"),
        (lambda w: jnp.sum(w).astype(int), "`train_loss`.*dtype int"),
        (lambda w: (jnp.sum(w), 0.0), "has_aux=True"),
        (lambda w: {"loss": jnp.sum(w)}, "must return a scalar; got a dict"),
        (lambda w: None, "must return a scalar; got a NoneType"),
    ],
)
def test_what_is_no_scalar(out, match):
    with pytest.raises(ValueError, match=match):
        _step(lambda w, h, batch, key: out(w))
    with pytest.raises(ValueError, match=match.replace("train", "val")):
        _step(None, lambda w, h, batch, key: out(w))


def test_aux_is_missing():
    with pytest.raises(ValueError, match=r"`train_loss` must return `\(scalar, aux\)`"):
        _step(None, has_aux=True)


def _state():
    return {"mean": jnp.zeros(2)}


def test_model_state_is_missing_or_of_another_structure():
    with pytest.raises(ValueError, match=r"must return `\(scalar, model_state\)`"):
        _step(lambda m, h, batch, key: jnp.sum(m[0]), model_state=_state())
    with pytest.raises(ValueError, match="updated model state"):
        _step(lambda m, h, batch, key: (jnp.sum(m[0]), 0.0), model_state=_state())
    with pytest.raises(ValueError, match=r"\(scalar, \(model_state, aux\)\)"):
        _step(
            lambda m, h, batch, key: (jnp.sum(m[0]), m[1]),
            has_aux=True,
            model_state=_state(),
        )


def _train(m, h, batch, key):
    model, state = m
    new = {"mean": 0.5 * state["mean"] + batch}
    return h * jnp.sum(model**2), (new, "train" and jnp.array(7.0))


@pytest.mark.parametrize(
    "val_out",
    [
        lambda loss, state: (loss, (state, jnp.array(8.0))),
        lambda loss, state: (loss, jnp.array(8.0)),
    ],
)
def test_model_state_with_aux(val_out):
    def val(m, h, batch, key):
        wrong = {"mean": m[1]["mean"] + 100}
        return val_out(jnp.sum(m[0] ** 2), wrong)

    after = _step(_train, val, has_aux=True, model_state=_state())
    assert jnp.array_equal(after.model_state["mean"], jnp.ones(2))
    assert after.metrics.aux == (7.0, 8.0)


@pytest.mark.parametrize("with_state", [True, False])
def test_the_validation_loss_may_return_the_model_state(with_state):
    def val(m, h, batch, key):
        loss = jnp.sum(m[0] ** 2)
        return (loss, {"mean": m[1]["mean"] + 100}) if with_state else loss

    train = lambda *args: (_train(*args)[0], _train(*args)[1][0])
    after = _step(train, val, model_state=_state())
    assert jnp.array_equal(after.model_state["mean"], jnp.ones(2))


def test_problem_is_a_module():
    problem = hpo.Problem(lambda *_: 0.0, lambda *_: 1.0)
    assert isinstance(problem, eqx.Module) and problem.has_aux is False
