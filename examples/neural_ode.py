"""Which trajectories should a neural ODE believe, where some instruments are wrong?"""

from typing import Any

import diffrax as dfx
import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax


# --8<-- [start:data]
TIMES = jnp.linspace(0.0, 4.0, 21)
SIZE = 6  # trajectories of each instrument


def solve(field, start):
    """The states at all times, of a batch of trajectories."""
    states: Any = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: field(y)),
        dfx.Bosh3(),
        TIMES[0],
        TIMES[-1],
        TIMES[1],
        start,
        saveat=dfx.SaveAt(ts=TIMES),
        adjoint=dfx.DirectAdjoint(),  # which can be differentiated twice
        max_steps=len(TIMES),
    ).ys
    return jnp.swapaxes(states, 0, 1)


def oscillator(y):
    return jnp.stack([y[:, 1], (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], axis=1)


def measure(key, size, noise=0.1, scale=1.0, clock=1.0):
    keys = jr.split(key)
    start = jr.uniform(keys[0], (size, 2), minval=-2.5, maxval=2.5)
    states = scale * solve(lambda y: clock * oscillator(y), start)
    return start, states + noise * jr.normal(keys[1], states.shape)


keys = jr.split(jr.key(0), 6)
instruments = [
    measure(keys[0], SIZE),  # a good one
    measure(keys[1], SIZE, clock=0.6),  # its clock is wrong
    measure(keys[2], SIZE, scale=1.5),
    measure(keys[3], SIZE, noise=1.0),
]
train = jax.tree.map(lambda *x: jnp.concatenate(x), *instruments)
val, test = measure(keys[4], 4), measure(keys[5], 200, noise=0.0)
# --8<-- [end:data]


# --8<-- [start:tune]
def errors(net, batch):
    start, states = batch
    return jnp.mean((solve(jax.vmap(net), start) - states) ** 2, axis=(1, 2))


def train_loss(net, weights, batch, key):
    return weights @ errors(net, batch)


def val_loss(net, weights, batch, key):
    return jnp.mean(errors(net, batch))


net = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, key=jr.key(1))
problem, outer = hpo.Problem(train_loss, val_loss), optax.adam(0.1)
algorithm = hpo.T1T2(problem, optax.adam(0.01), outer, inner_steps=5)
start = hpo.Simplex(jnp.full(4 * SIZE, 1 / (4 * SIZE)))
tuned = hpo.tune(algorithm, net, start, train, val, steps=300, key=None).values

everything = jax.tree.map(lambda *x: jnp.concatenate(x), train, val)
rows = jnp.array([SIZE, 3 * SIZE, 4])
share = lambda *each: jnp.repeat(jnp.array(each), rows)
ways = {
    "equal weights": share(1 / 24, 1 / 24, 0.0),
    "first instrument": share(1 / 6, 0.0, 0.0),
    "validation data": share(0.0, 0.0, 1 / 4),
    "tuned weights": jnp.pad(tuned, (0, 4)),
}
for name, weights in ways.items():
    fitted = hpo.fit(algorithm, net, weights, everything, steps=300, key=None).model
    print(f"{name:17} {eqx.filter_jit(val_loss)(fitted, None, test, None):.3f}")
# --8<-- [end:tune]
sums = tuned.reshape(4, SIZE).sum(axis=1)
print("weights of the instruments: " + ", ".join(f"{x:.2f}" for x in sums))

axes = plt.subplots(layout="constrained")[1]
for row in range(4):
    axes.bar(jnp.arange(SIZE) + row * SIZE, tuned[row * SIZE : (row + 1) * SIZE])
axes.legend(["good", "slow clock", "scale 1.5", "noise 1.0"])
axes.set(xlabel="trajectory", ylabel="tuned weight")
plt.savefig("neural_ode.png")
