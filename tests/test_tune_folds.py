"""The recipe in one call is what its three parts are."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from .helpers import equal, relative_error
from .problems import ridge


CASE = ridge()
INNER = optax.sgd(0.1, momentum=0.9)
OUTER = optax.chain(hpo.anchor(0.01), optax.adam(0.1))
ALGORITHM = hpo.Unrolled(CASE.problem, INNER, OUTER, inner_steps=3)
KEY = jr.key(2)


def _by_parts(batch_size, average):
    train, val = hpo.folds(CASE.train, 4, key=KEY)
    whole = CASE.train
    if batch_size is not None:
        batches = lambda part: hpo.Minibatch(part, batch_size)
        train, whole = eqx.filter_vmap(batches)(train), batches(whole)
    raws = []
    first, second = jr.split(KEY)
    tuning = hpo.tune(
        hpo.MetaLearner(ALGORITHM, 4),
        CASE.model,
        CASE.hyperparams,
        train,
        val,
        steps=10,
        key=first,
        progress=False,
        callback=lambda state: raws.append(state.hyperparams),
    )
    last = raws[-max(1, round(10 * average)) :]
    found = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *last)
    final = hpo.fit(
        ALGORITHM, CASE.model, found, whole, steps=7, key=second, progress=False
    )
    return final, tuning


@pytest.mark.parametrize(
    "batch_size, average", [(8, 0.5), pytest.param(None, 0.0, marks=pytest.mark.slow)]
)
def test_equals_its_parts(batch_size, average):
    final, tuning = hpo.tune_folds(
        ALGORITHM,
        CASE.model,
        CASE.hyperparams,
        CASE.train,
        steps=10,
        fit_steps=20,
        key=KEY,
        count=4,
        batch_size=batch_size,
        average=average,
        progress=False,
    )
    expected, expected_tuning = _by_parts(batch_size, average)
    assert relative_error(tuning.state, expected_tuning.state) < 1e-12
    assert relative_error(final.hyperparams, expected.hyperparams) < 1e-12
    assert relative_error(final.model, expected.model) < 1e-12
    assert int(final.state.episode_step) == 21  # at least 20, in calls of three steps
    if average == 0:
        assert equal(final.hyperparams, tuning.hyperparams)


@pytest.mark.slow
def test_finds_the_penalties_of_leave_one_out():
    """With a fold for each row and a converged inner level, the values found minimise
    the leave-one-out error by its closed form (PRESS)."""
    x, y = CASE.train
    outer = optax.adam(optax.cosine_decay_schedule(0.2, 150))
    algorithm = hpo.Unrolled(
        CASE.problem, optax.sgd(0.3, momentum=0.8), outer, inner_steps=40
    )
    found = hpo.tune_folds(
        algorithm,
        CASE.model,
        {"penalty": jnp.full(6, -2.0)},
        CASE.train,
        steps=150,
        fit_steps=400,
        key=None,
        count=len(y),
        average=0.0,
        progress=False,
    ).final

    def press(penalties):
        # Each row leaves 23 others, whose mean the train loss takes.
        n = len(y) - 1
        gram = x.T @ x + n * jnp.diag(jnp.exp(penalties))

        def error(row, target):
            rest = gram - jnp.outer(row, row)
            weights = jnp.linalg.solve(rest, x.T @ y - row * target)
            return 0.5 * (row @ weights - target) ** 2

        return jnp.mean(jax.vmap(error)(x, y))

    start = jnp.full(6, -2.0)
    adam, best = optax.adam(0.1), start

    def move(carry, _):
        penalties, state = carry
        updates, state = adam.update(jax.grad(press)(penalties), state)
        return (optax.apply_updates(penalties, updates), state), None

    (best, _), _ = jax.lax.scan(move, (best, adam.init(best)), None, 2000)
    assert press(best) <= press(found.values["penalty"]) < 1.005 * press(best)
    assert press(start) > 1.03 * press(best)


def test_wraps_the_algorithm_itself():
    learner = hpo.MetaLearner(ALGORITHM, 4)
    with pytest.raises(ValueError, match="`algorithm` must be an algorithm for one"):
        hpo.tune_folds(
            learner,
            CASE.model,
            CASE.hyperparams,
            CASE.train,
            steps=1,
            fit_steps=1,
            key=None,
        )
