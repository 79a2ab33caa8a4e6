"""Which trajectories should a neural ODE believe, where some instruments are wrong?"""

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
    states = dfx.diffeqsolve(
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
    """Van der Pol's."""
    return jnp.stack([y[:, 1], (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], axis=1)


def measure(key, size, noise=0.1, scale=1.0, clock=1.0):
    keys = jr.split(key)
    start = jr.uniform(keys[0], (size, 2), minval=-2.5, maxval=2.5)
    states = scale * solve(lambda y: clock * oscillator(y), start)
    return start, states + noise * jr.normal(keys[1], states.shape)


keys = jr.split(jr.key(0), 6)
instruments = [
    measure(keys[0], SIZE),  # a good one
    measure(keys[1], SIZE, clock=0.6),  # its clock runs fast
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

import sys,time
t0=time.time()
inner=int(sys.argv[1]); rate=float(sys.argv[2]); steps=int(sys.argv[3])
net = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, key=jr.key(1))
n = len(train[0])
equal = jnp.full(n, 1 / n)
algorithm = hpo.T1T2(hpo.Problem(train_loss, val_loss), optax.adam(0.01), optax.adam(rate), inner_steps=inner)
solution = hpo.tune(algorithm, net, hpo.Simplex(equal), train, val, steps=steps//inner, key=None)
print(time.time()-t0)
print(solution.values.reshape(4,SIZE).round(3), solution.history.val_loss[::10])
err=lambda m: float(val_loss(m, None, test, None))
print("online", err(solution.model))
mon=hpo.Monitor(eqx.filter_jit(lambda s: val_loss(s.model, None, val, None)), every=20)
both = jax.tree.map(lambda a: a, (jnp.concatenate([train[0], val[0]]), jnp.concatenate([train[1], val[1]],1)))if False else None
for name, w in {"equal": equal, "tuned": solution.values, "avg": solution.history.hyperparams[len(solution.history.step)//2:].mean(0), "good": jnp.repeat(jnp.array([1.,0,0,0]),SIZE)/SIZE}.items():
    s=hpo.fit(algorithm, net, jnp.asarray(w), train, steps=steps//inner, key=None, monitor=mon)
    print(name, err(s.model), s.best.step, err(s.state.model), time.time()-t0)
s=hpo.fit(algorithm, net, jnp.full(4,.25), val, steps=steps//inner, key=None)
print("val alone", err(s.model))
