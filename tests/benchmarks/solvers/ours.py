"""The same mathematics by the library, as functions like those of `by_hand.py`."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax.numpy as jnp
import optax

from .by_hand import Rates, STEPS, strength
from .problems import BATCH, Draw, Problem


def _solver(algorithm: Callable[..., Any], steps: int = STEPS):
    """Of `algorithm(rates, problem, inner, outer)`, whose rates are those of each
    update, of `steps` inner steps."""

    def make(problem: Problem, draw: Draw, rates: Rates):
        keyless = lambda loss: lambda theta, lam, batch, key: loss(theta, lam, batch)
        losses = hpo.Problem(keyless(problem.train_loss), keyless(problem.val_loss))
        inner = optax.sgd(lambda count: rates.inner_at(jnp.asarray(count) // steps))
        algo = algorithm(rates, losses, inner, optax.sgd(rates.outer_at))
        train, val = hpo.Minibatch(draw.train, BATCH), hpo.Minibatch(draw.val, BATCH)
        start, static = eqx.partition(algo.init(draw.theta, draw.lam), eqx.is_array)

        def step(carry, t, key):
            del t  # the state counts
            state = algo.step(eqx.combine(carry, static), train, val, key=key)
            return eqx.filter(state, eqx.is_array)

        return start, step, lambda carry: (carry.model, carry.hyperparams)

    return make


_REVERSE = hpo.ReverseOverReverse()  # as by hand


def _soba(rule: hpo.AbstractSecondOrder, rates: Rates, *levels: Any):
    return hpo.SOBA(*levels, second_order=rule, linear_rate=rates.inner_at)


def _averaged(rates: Rates, *levels: Any):
    settings = {"linear_rate": rates.inner_at, "averaging": rates.extra}
    return hpo.SOBA(*levels, second_order=_REVERSE, **settings)


def _penalty(rates: Rates, *levels: Any):
    grows = lambda t: strength(rates, t)
    return hpo.Penalty(*levels, strength=grows, inner_steps=STEPS)


def _implicit(warm_start: bool, rates: Rates, *levels: Any):
    # From zero on, the first term needs no product with the Hessian.
    terms = STEPS if warm_start else STEPS + 1
    return hpo.Implicit(
        *levels,
        second_order=_REVERSE,
        inner_steps=STEPS,
        linear_solver=hpo.Neumann(terms, rates.inner),
        warm_start=warm_start,
    )


def _t1t2(rates: Rates, *levels: Any):
    del rates
    return hpo.T1T2(*levels, second_order=_REVERSE, inner_steps=STEPS)


soba = _solver(ft.partial(_soba, _REVERSE), 1)
mixed = _solver(ft.partial(_soba, hpo.ForwardOverReverse()), 1)
averaged = _solver(_averaged, 1)
penalty = _solver(_penalty)
warm = _solver(ft.partial(_implicit, True))
cold = _solver(ft.partial(_implicit, False))
t1t2 = _solver(_t1t2)
