"""Which adjoints of Diffrax go with which second-order rule, with constant steps.

python -m docs.experiments.neural_ode_adjoints
"""

from typing import Any

import diffrax as dfx
import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax

from .common import command


RULES = (hpo.ForwardOverReverse(), hpo.ReverseOverReverse(), hpo.FiniteDifference())
ADJOINTS = {
    "DirectAdjoint": dfx.DirectAdjoint(),
    "RecursiveCheckpointAdjoint": dfx.RecursiveCheckpointAdjoint(),
    "BacksolveAdjoint": dfx.BacksolveAdjoint(),
    "ForwardMode": dfx.ForwardMode(),
}


def is_possible(adjoint: dfx.AbstractAdjoint, rule: hpo.AbstractSecondOrder) -> bool:
    """Whether `T1T2` gets a finite hypergradient of a factor of the start."""

    def train_loss(net, factor, batch, key):
        term = dfx.ODETerm(lambda t, y, net: net(y))
        args = (term, dfx.Bosh3(), 0.0, 1.0, 0.1, factor * jnp.ones(2), net)
        solution = dfx.diffeqsolve(*args, adjoint=adjoint, max_steps=16)
        assert solution.ys is not None
        return jnp.sum(solution.ys**2)

    def val_loss(net, factor, batch, key):
        return jnp.sum(net(jnp.ones(2)) ** 2)

    problem = hpo.Problem(train_loss, val_loss)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1), second_order=rule)
    net = eqx.nn.MLP(2, 2, 4, 1, jnp.tanh, key=jr.key(0))
    state = algorithm.init(net, hpo.Positive(0.1))
    try:
        hypergradient = algorithm.compute_hypergradient(state, None, None)
    except Exception:
        return False
    return all(jnp.isfinite(x).all() for x in jax.tree.leaves(hypergradient))


QUICK: dict[str, Any] = {}


def main() -> dict[str, list[bool]]:
    table = {name: [is_possible(x, y) for y in RULES] for name, x in ADJOINTS.items()}
    print(f"{'':28}" + "".join(f"{type(rule).__name__:>20}" for rule in RULES))
    for name, row in table.items():
        print(f"{name:28}" + "".join(f"{'yes' if x else 'no':>20}" for x in row))
    return table


if __name__ == "__main__":
    command(main, __doc__, QUICK)
