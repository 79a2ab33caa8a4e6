"""Which body of a network makes ten points enough to learn a new sine wave, where only
the last layer is trained on them (ANIL)?"""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax


# --8<-- [start:tasks]
TASKS, POINTS, STEPS, EPISODES = 20, 10, 10, 3000


@eqx.filter_jit
def draw(key, tasks):
    """Ten points to train on, and ten to validate with, of each sine wave."""
    keys = jr.split(key, 3)
    amplitude = jr.uniform(keys[0], (tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jr.uniform(keys[1], (tasks, 1, 1), maxval=jnp.pi)
    x = jr.uniform(keys[2], (2, tasks, POINTS, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    return (x[0], y[0]), (x[1], y[1])


def loss(head, body, batch, key):
    x, y = batch
    net = eqx.combine(head, body)
    return jnp.mean((jax.vmap(net)(x) - y) ** 2)


# --8<-- [end:tasks]
# --8<-- [start:learn]
net = eqx.nn.MLP(1, 1, width_size=64, depth=3, key=jr.key(0))
in_body = jax.tree.map(eqx.is_inexact_array, net)
in_head = jax.tree.map(lambda _: False, net.layers[-1])
in_body = eqx.tree_at(lambda tree: tree.layers[-1], in_body, in_head)
body, head = hpo.partition(net, in_body)  # hyperparameters, and what is trained

problem, inner = hpo.Problem(loss, loss), optax.sgd(0.02)
algorithm = hpo.Unrolled(problem, inner, optax.adam(1e-3), inner_steps=STEPS)
learner = hpo.MetaLearner(algorithm, TASKS, horizon=STEPS, reptile=0.1)
state = learner.init(head, body)
for episode in range(EPISODES):
    train, val = draw(jr.key(episode), TASKS)
    state = learner.step(state, train, val)
# --8<-- [end:learn]


# --8<-- [start:test]
train, new = draw(jr.key(EPISODES), 1000)
plain = hpo.FirstOrder(problem, inner, optax.set_to_zero())
tester = hpo.MetaLearner(plain, 1000)


def test(head, body):
    """Errors on a thousand new waves, after each step of training the head."""
    state, errors = tester.init(head, body), []
    for _ in range(100):
        state = tester.step(state, train, new)
        errors.append(float(state.metrics.val_loss))
    return errors


errors = {
    "random body": test(head, body),
    "learned body": test(learner.initialisation(state), state.hyperparams),
}
axes = plt.subplots(layout="constrained")[1]
for name, values in errors.items():
    print(f"{name}: " + ", ".join(f"{values[n - 1]:.3f}" for n in (1, 10, 100)))
    axes.plot(range(1, 101), values, label=name)
# --8<-- [end:test]
axes.set(xlabel="steps on the ten points", ylabel="error on new points", yscale="log")
axes.legend()
plt.savefig("few_shot.png")
