"""Bilevel problems with known answers.

Each has the solution of its inner level in closed form, or by Newton's method. Made
once, so that tests with the same problem share what is compiled.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
from eqx_hpo._hyperparameter import partition_raw
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem with its start, its data, and what is known of it.

    - `response`: the model that solves the inner level, for unwrapped hyperparameters.
    """

    problem: hpo.Problem
    model: Any
    hyperparams: Any
    train: Any
    val: Any
    response: Callable[[Any], Array]

    def hypergradient(self, hyperparams):
        """Of the validation loss at the response, by autodiff of the closed form."""

        raw, constants = partition_raw(hyperparams)

        def loss(raw):
            plain = hpo.unwrap(eqx.combine(raw, constants))
            return self.problem.val_loss(self.response(plain), plain, self.val, None)

        return jax.jit(jax.grad(loss))(raw)


@ft.cache
def ridge(features=6, examples=24, seed=0) -> Case:
    """Linear regression with one log-penalty for each feature."""
    keys = jr.split(jr.key(seed), 5)
    true = jr.normal(keys[0], (features,))

    def sample(x_key, noise_key):
        x = jr.normal(x_key, (examples, features))
        return x, x @ true + 0.5 * jr.normal(noise_key, (examples,))

    def val_loss(model, hyperparams, batch, key):
        del hyperparams, key
        x, y = batch
        return 0.5 * jnp.mean((x @ model - y) ** 2)

    def train_loss(model, hyperparams, batch, key):
        penalty = 0.5 * jnp.sum(jnp.exp(hyperparams["penalty"]) * model**2)
        return val_loss(model, hyperparams, batch, key) + penalty

    train = sample(keys[1], keys[2])

    def response(hyperparams):
        x, y = train
        hessian = x.T @ x / examples + jnp.diag(jnp.exp(hyperparams["penalty"]))
        return jnp.linalg.solve(hessian, x.T @ y / examples)

    hyperparams = {"penalty": jnp.linspace(-3.0, -1.0, features)}
    model = jnp.linspace(-0.5, 0.5, features)
    problem = hpo.Problem(train_loss, val_loss)
    return Case(problem, model, hyperparams, train, sample(*keys[3:]), response)


@ft.cache
def quadratic() -> Case:
    """`C1 = 0.5 (w - h)^T M (w - h)`, solved by `w = h` whatever `M` is, and
    `C2 = |w - b|^2 + 0.1 |h|^2`."""
    matrix = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    target = jnp.array([1.0, -2.0])

    def train_loss(model, hyperparams, batch, key):
        del key
        error = model - hyperparams
        return 0.5 * error @ (batch @ error)

    def val_loss(model, hyperparams, batch, key):
        del key
        return jnp.sum((model - batch) ** 2) + 0.1 * jnp.sum(hyperparams**2)

    problem = hpo.Problem(train_loss, val_loss)
    start = jnp.array([0.3, 0.4])
    return Case(problem, start, jnp.array([0.5, 0.5]), matrix, target, lambda h: h)


@ft.cache
def logistic(features=4, examples=16, seed=1) -> Case:
    """Logistic regression with one weight for each training example; the response by
    Newton's method."""
    keys = jr.split(jr.key(seed), 4)
    true = jr.normal(keys[0], (features,))

    def sample(x_key):
        x = jr.normal(x_key, (examples, features))
        return x, jnp.where(x @ true > 0, 1.0, -1.0)

    def losses(model, batch):
        x, y = batch
        return jax.nn.softplus(-y * (x @ model))

    def train_loss(model, hyperparams, batch, key):
        del key
        weighted = jnp.mean(hyperparams["weights"] * losses(model, batch))
        return weighted + 0.05 * jnp.sum(model**2)

    def val_loss(model, hyperparams, batch, key):
        del hyperparams, key
        return jnp.mean(losses(model, batch))

    train = sample(keys[1])

    def response(hyperparams):
        loss = lambda w: train_loss(w, hyperparams, train, None)
        model = jnp.zeros(features)
        for _ in range(12):
            newton = jnp.linalg.solve(jax.hessian(loss)(model), jax.grad(loss)(model))
            model = model - newton
        return model

    weights = hpo.Interval(jnp.linspace(0.3, 0.7, examples), 0.0, 1.0)
    problem = hpo.Problem(train_loss, val_loss)
    model = jnp.zeros(features)
    return Case(problem, model, {"weights": weights}, train, sample(keys[2]), response)


CASES = {"ridge": ridge, "quadratic": quadratic, "logistic": logistic}
