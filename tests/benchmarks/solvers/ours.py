"""The same mathematics by the library, as functions like those of `by_hand.py`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import optax

from .by_hand import Rates, STEPS, strength
from .problems import BATCH, Draw, Problem


def _solver(algorithm: Callable[..., Any], steps: int = STEPS):
    """Of `algorithm(rates, problem, inner, outer)`, whose rates are those of each
    update, of `steps` inner steps."""

    def make(problem: Problem, draw: Draw, rates: Rates):
        keyless = lambda loss: lambda theta, lam, batch, key: loss(theta, lam, batch)
        losses = hpo.Problem(keyless(problem.train_loss), keyless(problem.val_loss))
        inner = optax.sgd(lambda count: rates.inner_at(count // steps))
        algo = algorithm(rates, losses, inner, optax.sgd(rates.outer_at))
        train, val = hpo.Minibatch(draw.train, BATCH), hpo.Minibatch(draw.val, BATCH)
        start, static = eqx.partition(algo.init(draw.theta, draw.lam), eqx.is_array)

        def step(carry, t, key):
            del t  # the state counts
            state = algo.step(eqx.combine(carry, static), train, val, key=key)
            return eqx.filter(state, eqx.is_array)

        return start, step, lambda carry: (carry.model, carry.hyperparams)

    return make


def _neumann(terms: int, rates: Rates):
    return {"inner_steps": STEPS, "linear_solver": hpo.Neumann(terms, rates.inner)}


def _soba(rates: Rates, *levels):
    # Made while tracing, `averaging=0.0` would be a tracer, and no longer none at all.
    with jax.ensure_compile_time_eval():
        return hpo.SOBA(*levels, linear_rate=rates.inner_at)


def _averaged(rates: Rates, *levels):
    return hpo.SOBA(*levels, linear_rate=rates.inner_at, averaging=rates.extra)


def _penalty(rates: Rates, *levels):
    grows = lambda t: strength(rates, t)
    return hpo.Penalty(*levels, strength=grows, inner_steps=STEPS)


soba = _solver(_soba, 1)
averaged = _solver(_averaged, 1)
penalty = _solver(_penalty)
# Warm, all terms but none need a product with the Hessian; cold, the first needs none.
warm = _solver(lambda rates, *levels: hpo.Implicit(*levels, **_neumann(STEPS, rates)))
cold = _solver(
    lambda rates, *levels: hpo.Implicit(
        *levels, **_neumann(STEPS + 1, rates), warm_start=False
    )
)
t1t2 = _solver(lambda rates, *levels: hpo.T1T2(*levels, inner_steps=STEPS))
