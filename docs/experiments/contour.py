"""Draws the validation loss over two weight decays, and how a run moves on it.

    pip install 'eqx_hpo[examples]'
    python -m docs.experiments.contour

A linear regression has twenty large weights and twenty small ones, and a decay for each
group. The landscape is a grid of complete trainings. On it are the paths of two
algorithms from three starts, and their hypergradients at a few points.
"""

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .common import command


EXAMPLES, WEIGHTS, SEED = 40, 20, 2
TRAINING = 300  # inner steps of a complete training
LOW, HIGH = -8.0, 3.0  # of the logarithms of the decays
STARTS = [(-7.0, -7.0), (1.0, -6.0), (-6.0, 1.5)]
ARROWS = [(-6.0, -4.0), (-1.0, -4.5), (-5.0, 0.6), (0.0, 0.0)]
COLOURS = {"exact": "black", "T1T2": "tab:red"}


def draw_data():
    """Draws a train set and a validation set, with inputs of very different sizes."""
    keys = jr.split(jr.key(SEED), 3)
    scale = jnp.repeat(jnp.array([1.0, 0.3]), WEIGHTS)
    truth = scale * jr.normal(keys[0], (2 * WEIGHTS,))
    sizes = jnp.tile(jnp.geomspace(0.3, 1.5, WEIGHTS), 2)
    x = jr.normal(keys[1], (2 * EXAMPLES, 2 * WEIGHTS)) * sizes
    y = x @ truth + 1.5 * jr.normal(keys[2], (2 * EXAMPLES,))
    return (x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:])


def val_loss(weights, decays, batch, key):
    x, y = batch
    return jnp.mean((x @ weights - y) ** 2)


def train_loss(weights, decays, batch, key):
    squares = jnp.sum(weights.reshape(2, WEIGHTS) ** 2, axis=1)
    return val_loss(weights, decays, batch, key) + decays @ squares


PROBLEM = hpo.Problem(train_loss, val_loss)
INNER = optax.sgd(0.02, momentum=0.9)
TRAIN, VAL = draw_data()
FRESH = jnp.zeros(2 * WEIGHTS)
# The exact hypergradient of a complete training, and that of its last step.
EXACT = hpo.Unrolled(PROBLEM, INNER, optax.adam(0.2), inner_steps=TRAINING)
LAST_STEP = hpo.T1T2(PROBLEM, INNER, optax.adam(0.2), inner_steps=TRAINING)


@jax.jit
@jax.vmap
def trained_loss(logs):
    """The validation loss of a complete training with the decays `exp(logs)`."""
    state = LAST_STEP.init(FRESH, hpo.Positive(jnp.exp(logs)))
    return LAST_STEP.step(state, TRAIN, VAL).metrics.val_loss


def square(count):
    """The points of a square grid, with the two decays on the last axis."""
    line = jnp.linspace(LOW, HIGH, count)
    return jnp.stack(jnp.meshgrid(line, line), axis=-1)


def landscape(count):
    points = square(count)
    return trained_loss(points.reshape(-1, 2)).reshape(count, count)


def path(name, start):
    """Tunes from a start; returns the logarithms of the decays after each step."""
    exact = name == "exact"
    # A step of the exact one is a training from fresh weights. A step of T1T2 is a step
    # of one training that goes on.
    solution = hpo.tune(
        EXACT if exact else hpo.T1T2(PROBLEM, INNER, optax.adam(0.02)),
        FRESH,
        hpo.Positive(jnp.exp(jnp.array(start))),
        TRAIN,
        VAL,
        steps=80 if exact else 3000,
        restart_every=1 if exact else None,
        record_every=1,
        key=None,
        progress=False,
    )
    return np.vstack([start, np.log(solution.history.hyperparams)])


def hypergradient(algorithm, logs):
    state = algorithm.init(FRESH, hpo.Positive(jnp.exp(jnp.array(logs))))
    return algorithm.compute_hypergradient(state, TRAIN, VAL).raw


def draw_arrows(axes):
    for place in map(np.array, ARROWS):
        for name, algorithm in (("exact", EXACT), ("T1T2", LAST_STEP)):
            downhill = -np.asarray(hypergradient(algorithm, place))
            end = place + 1.2 * downhill / np.linalg.norm(downhill)
            style = {"color": COLOURS[name], "arrowstyle": "-|>", "lw": 2}
            axes.annotate("", end, place, arrowprops=style)


def draw_landscape(axes, losses, paths, norm):
    line = np.linspace(LOW, HIGH, len(losses))
    levels = np.geomspace(losses.min(), losses.max(), 24)
    filled = axes.contourf(line, line, losses, levels, norm=norm, cmap="Blues")
    for (name, start), points in paths.items():
        label = name if start == STARTS[0] else None
        axes.plot(*points.T, color=COLOURS[name], lw=1.2, label=label)
        axes.plot(*points[-1], "o", color=COLOURS[name])
        axes.plot(*start, "s", color="white", mec="black", ms=8)
    draw_arrows(axes)
    row, column = np.unravel_index(losses.argmin(), losses.shape)
    axes.plot(line[column], line[row], "*", color="gold", mec="black", ms=16)
    axes.legend(loc="upper right")
    return filled


def draw(losses, paths, grid):
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    norm = LogNorm(losses.min(), losses.max())
    filled = draw_landscape(left, losses, paths, norm)
    points = square(len(grid)).reshape(-1, 2)
    shades = dict(c=grid.ravel(), cmap="Blues", norm=norm, edgecolor="black")
    right.scatter(*points.T, s=250, **shades)
    right.plot(*points[grid.argmin()], "o", ms=24, mfc="none", mec="green", mew=2)
    right.set_xlim(LOW - 0.5, HIGH + 0.5)
    right.set_ylim(LOW - 0.5, HIGH + 0.5)
    ticks = [t for t in (5, 10, 20, 40) if losses.min() < t < losses.max()]
    bar = figure.colorbar(filled, ax=right, label="validation loss", ticks=ticks)
    bar.ax.set_yticklabels(map(str, ticks))
    for axes in (left, right):
        axes.set_xlabel("log of the decay of the large weights")
        axes.set_box_aspect(1)  # so that slopes stand at right angles to the contours
    left.set_ylabel("log of the decay of the small weights")
    left.set_title("Complete trainings, paths, and hypergradients")
    right.set_title("What a grid of 25 sees")
    return figure


def main(*, count=41, figure="docs/_static/contour.png"):
    losses, grid = landscape(count), landscape(5)
    paths = {(name, start): path(name, start) for name in COLOURS for start in STARTS}
    ends = jnp.array([points[-1] for points in paths.values()])
    print(
        f"least of the landscape {losses.min():.2f}, of a grid of 25 {grid.min():.2f}"
    )
    for (name, start), end, loss in zip(paths, ends, trained_loss(ends)):
        print(
            f"{name:6} from {start}: ends at ({end[0]:.2f}, {end[1]:.2f}), {loss:.2f}"
        )
    draw(np.asarray(losses), paths, np.asarray(grid)).savefig(figure, dpi=110)
    return losses, paths


QUICK = dict(count=12)

if __name__ == "__main__":
    command(main, __doc__, QUICK, count="points along each side")
