"""Meta-learning by HyperDistill (appendix G): sinusoids `y = A sin(x - phase)` are
regressed by a network of which all layers but the last are shared between the tasks.
Those are the hyperparameters; each task trains the last layer, from a shared
initialisation that Reptile learns.

    python sinusoid.py
    python sinusoid.py --seeds 20 --first 100 --gammas 0.9 0.99 0.9999 \
        --greedy-steps 2 3 5 10 --no-cosines
    python sinusoid.py --seeds 20

An episode is thirty inner steps on each of ten new tasks. The hyperparameters move
after each step, or, where the name of a method holds a number of steps, after so many.
All methods see the same networks and tasks.

The first table holds the mean squared error on new tasks after the last episode: mean
and 95% interval over the seeds, median, difference to `T1-T2` with its interval, and
how many seeds diverged or had a step skipped. The second one holds the cosines with the
exact hypergradient after some inner steps of an episode with fixed hyperparameters,
which are those that HyperDistill has reached.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar


TASKS, TEST_TASKS, POINTS, WIDTH, HORIZON = 10, 1000, 10, 100, 30
GREEDY_DECAY = 0.9
COSINE_STEPS = (1, 3, 10, 30)
COSINE_SEEDS = 5  # over which a cosine is averaged, at most
FIRST_ORDER, ONE_STEP, DISTILL = "first order", "T1-T2", "HyperDistill"
PUBLISHED = {  # of five runs, with 95% intervals
    FIRST_ORDER: (0.567, 0.193),
    ONE_STEP: (0.670, 0.283),
    "Neumann": (0.502, 0.146),
    "DrMAD": (1.086, 0.176),
    DISTILL: (0.327, 0.052),
}


class Points(NamedTuple):
    x: Float[Array, "*tasks n 1"]
    y: Float[Array, "*tasks n 1"]


class Tasks(NamedTuple):
    train: Points
    val: Points
    test: Points


class Net(eqx.Module):
    shared: list[eqx.nn.Linear]
    last: eqx.nn.Linear

    def __init__(self, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        sizes = (1, WIDTH, WIDTH, WIDTH)
        self.shared = [
            eqx.nn.Linear(*args, key=key) for *args, key in zip(sizes, sizes[1:], keys)
        ]
        self.last = eqx.nn.Linear(WIDTH, 1, key=keys[3])

    def __call__(self, x: Float[Array, "1"]) -> Float[Array, "1"]:
        for layer in self.shared:
            x = jax.nn.relu(layer(x))
        return self.last(x)


class Course(NamedTuple):
    """What a method learned: `nets[k]` after `k` episodes."""

    nets: Net
    skipped: Int[Array, "*seeds"]
    memory: hpo.Memory


def split(net: Net) -> tuple[Net, Net]:
    """The hyperparameters and the model."""
    parts = lambda net: (net.shared, net.last)
    return hpo.partition(net, eqx.tree_at(parts, net, (True, False)))


def loss(model: Net, hyperparams: Net, batch: Points, key: None) -> Scalar:
    del key
    net = eqx.combine(model, hyperparams)
    return jnp.mean((jax.vmap(net)(batch.x) - batch.y) ** 2)


def draw_tasks(key: PRNGKeyArray, tasks: int) -> Tasks:
    keys = jr.split(key, 3)
    amplitude = jr.uniform(keys[0], (tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jr.uniform(keys[1], (tasks, 1, 1), maxval=jnp.pi)
    x = jr.uniform(keys[2], (3, tasks, POINTS, 1), minval=-5.0, maxval=5.0)
    return Tasks(*map(Points, x, amplitude * jnp.sin(x - phase)))


ARGS = (hpo.Problem(loss, loss), optax.sgd(0.01, momentum=0.9), optax.adam(1e-3))


def make_methods(
    gammas: Sequence[float], greedy_steps: Sequence[int]
) -> dict[str, hpo.AbstractBilevelOptimizer]:
    whole: dict[str, Any] = dict(inner_steps=HORIZON)
    greedy = {
        f"greedy, {steps} steps": hpo.Greedy(
            *ARGS, inner_steps=steps, decay=GREEDY_DECAY
        )
        for steps in greedy_steps
    }
    distill = {
        f"{DISTILL} {gamma}": hpo.HyperDistill(*ARGS, horizon=HORIZON, decay=gamma)
        for gamma in gammas
    }
    return {
        FIRST_ORDER: hpo.FirstOrder(*ARGS),
        ONE_STEP: hpo.T1T2(*ARGS),
        **greedy,
        **distill,
        f"DrMAD, {HORIZON} steps": hpo.DrMAD(*ARGS, **whole),
        f"exact, {HORIZON} steps": hpo.Unrolled(*ARGS, **whole),
    }


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(None, 0, None))
def learn(
    method: hpo.AbstractBilevelOptimizer, key: PRNGKeyArray, episodes: int
) -> Course:
    learner = hpo.MetaLearner(method, TASKS, horizon=HORIZON)
    net_key, key, _ = jr.split(key, 3)
    net = Net(net_key)
    hyperparams, model = split(net)
    tasks = draw_tasks(key, TASKS)
    state = learner.init(model, hyperparams, train=tasks.train, val=tasks.val)

    def run_episode(state, number):
        tasks = draw_tasks(jr.fold_in(key, number), TASKS)

        def step(state, _):
            state = learner.step(state, tasks.train, tasks.val)
            return state, state.skipped > 0

        steps = HORIZON // learner.inner_steps
        state, skipped = lax.scan(step, state, length=steps)
        net = eqx.combine(learner.initialisation(state), state.hyperparams)
        return state, (net, jnp.sum(skipped))

    state, (nets, skipped) = lax.scan(run_episode, state, jnp.arange(episodes))
    nets = jtu.tree_map(lambda x, y: jnp.concatenate([x[None], y]), net, nets)
    return Course(nets, jnp.sum(skipped), state.memory)


@eqx.filter_jit
def evaluate(nets: Net, keys: PRNGKeyArray) -> Float[Array, " seeds"]:
    """The mean squared error on new tasks, after the inner steps."""
    trainer = hpo.FirstOrder(*ARGS, inner_steps=HORIZON)
    learner = hpo.MetaLearner(trainer, TEST_TASKS, horizon=HORIZON)

    def error(net_and_key):
        net, key = net_and_key
        hyperparams, model = split(net)
        tasks = draw_tasks(jr.split(key, 3)[2], TEST_TASKS)
        state = learner.init(model, hyperparams)
        return learner.step(state, tasks.train, tasks.test).metrics.val_loss

    return lax.map(error, (nets, keys))


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(0, 0, 0, None, None))
def cosines(
    net: Net, key: PRNGKeyArray, scale: Scalar, gamma: float, inner_steps: int
) -> dict[str, Scalar]:
    """With the exact hypergradient after `inner_steps` from the start."""
    hyperparams, model = split(net)
    tasks = draw_tasks(jr.split(key, 3)[2], TASKS)
    steps: dict[str, Any] = dict(inner_steps=inner_steps)
    exact, *others = (
        _flat(
            learner.compute_hypergradient(
                learner.init(model, hyperparams, train=tasks.train),
                tasks.train,
                tasks.val,
            )
        )
        for learner in (
            hpo.MetaLearner(method, TASKS, horizon=inner_steps)
            for method in (
                hpo.Unrolled(*ARGS, **steps),
                hpo.FirstOrder(*ARGS, **steps),
                hpo.T1T2(*ARGS, **steps),
                hpo.Greedy(*ARGS, **steps, decay=GREEDY_DECAY),
                hpo.HyperDistill(*ARGS, **steps, decay=gamma, scale=scale),
            )
        )
    )
    direct = others[0]
    out = {}
    for name, x in zip((FIRST_ORDER, ONE_STEP, "greedy", DISTILL), others):
        out[name] = _cos(x, exact)
        out[name + " ind"] = _cos(x - direct, exact - direct)
        out[name + " r"] = jnp.linalg.norm(x - direct) / jnp.linalg.norm(exact - direct)
    out["share"] = jnp.linalg.norm(exact - direct) / jnp.linalg.norm(direct)
    return out


def _cos(x, y):
    return jnp.vdot(x, y) / jnp.linalg.norm(x) / jnp.linalg.norm(y)


def _flat(tree):
    return jnp.concatenate([x.ravel() for x in jtu.tree_leaves(tree)])
