"""Tunes the input noise of a small network online, by an algorithm that looks one step
back and by an exact one over windows of ten steps. Early in both runs `hpo.audit` says
what a longer horizon makes of the noise.

    python -m docs.experiments.audit
    python -m docs.experiments.audit --seeds 5
"""

from typing import Any, NamedTuple

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from .common import command, cross_entropy
from .image_data import Images, load


SIZE, BATCH, WIDTH, INNER_STEPS = 200, 50, 64, 10
START = 0.1  # noise
GRID = (0.03, 0.1, 0.2, 0.35, 0.5, 0.7)
AUDITS = (5, 10, 20, 40)  # updates after which there is one
DRAWS = 4  # of batches and noise, in each
T1T2, WINDOW, BEST = "T1T2", "Unrolled", "best of a grid"


class Verdict(NamedTuple):
    """An audit, for each draw. The hypergradients are those of one number."""

    estimate: Float[Array, " draws"]
    cosine: Float[Array, " draws"]  # 1 where the sign is right, else -1
    norm_ratio: Float[Array, " draws"]


class Row(NamedTuple):
    noise: float  # at the end
    verdicts: Verdict | None  # with a leading axis for the audits
    val_loss: float  # of a training with this noise
    test_loss: float


def train_loss(model: Any, noise: Any, batch: Images, key: PRNGKeyArray) -> Scalar:
    images = batch.images + noise * jr.normal(key, batch.images.shape)
    return cross_entropy(jax.vmap(model)(images), batch.labels)


def val_loss(model: Any, noise: Any, batch: Images, key: Any) -> Scalar:
    del noise, key
    return cross_entropy(jax.vmap(model)(batch.images), batch.labels)


PROBLEM, INNER = hpo.Problem(train_loss, val_loss), optax.sgd(0.02, momentum=0.9)
ALGORITHMS = {
    name: algorithm(PROBLEM, INNER, optax.adam(0.03), inner_steps=INNER_STEPS)
    for name, algorithm in {T1T2: hpo.T1T2, WINDOW: hpo.Unrolled}.items()
}


@eqx.filter_jit
def ask(
    algorithm: Any, state: hpo.BilevelState, train: Any, val: Any, horizon: int
) -> Verdict:
    def ask_once(key: PRNGKeyArray) -> Verdict:
        audit = hpo.audit(algorithm, state, train, val, horizon=horizon, key=key)
        # The estimate of `audit`, from the key of its first step.
        first = jr.fold_in(key, 0)
        estimate = algorithm.compute_hypergradient(state, train, val, key=first)
        return Verdict(estimate.raw, audit.cosine, audit.norm_ratio)

    return jax.vmap(ask_once)(jr.split(jr.fold_in(jr.key(0), state.step), DRAWS))


def compare(seed: int, steps: int, horizon: int) -> dict[str, Row]:
    data = load("digits", size=SIZE, seed=seed)
    parts = [Images(x.images.reshape(len(x.labels), -1), x.labels) for x in data]
    train, val, test = hpo.Minibatch(parts[0], BATCH), *parts[1:]
    model_key, key = jr.split(jr.key(seed))
    model = eqx.nn.MLP(val.images.shape[1], 10, WIDTH, 2, key=model_key)
    options: Any = dict(steps=steps, key=key, progress=False)

    def fit(noise: Any, verdicts: Verdict | None = None) -> Row:
        args = (ALGORITHMS[T1T2], model, jnp.asarray(noise), train)
        trained = hpo.fit(*args, **options).model
        losses = [float(val_loss(trained, None, part, None)) for part in (val, test)]
        return Row(float(noise), verdicts, *losses)

    def tune(algorithm: Any) -> Row:
        log = []

        def look(state: hpo.BilevelState) -> None:
            if int(state.step) in AUDITS:
                log.append(ask(algorithm, state, train, val, horizon))

        args = (algorithm, model, hpo.Positive(START), train, val)
        tuned = hpo.tune(*args, record_every=AUDITS[0], callback=look, **options)
        return fit(tuned.values, jax.tree.map(lambda *x: np.stack(x), *log))

    rows = {f"noise {x}": fit(x) for x in GRID}
    rows[BEST] = min(rows.values(), key=lambda x: x.val_loss)
    return rows | {name: tune(x) for name, x in ALGORITHMS.items()}


def print_tables(results: list[dict[str, Row]]) -> None:
    print(f"{'means over the seeds':22}{'noise':>8}{'val. loss':>12}{'test loss':>12}")
    for name in results[0]:
        rows = [result[name] for result in results]
        numbers = np.array([(x.noise, x.val_loss, x.test_loss) for x in rows])
        noise, val, test = numbers.mean(axis=0)
        print(f"{name:22}{noise:8.3f}{val:12.3f}{test:12.3f}")
    titles = ("update", "for more noise", "exact", "right sign", "size, median")
    for name in ALGORITHMS:
        verdicts = [result[name].verdicts for result in results]
        fields = (np.concatenate(x, axis=1) for x in zip(*verdicts, strict=True))
        print(f"\n{name:12}", *(f"{title:>15}" for title in titles))
        for update, estimate, cosine, ratio in zip(AUDITS, *fields, strict=True):
            signs = (estimate < 0, estimate * cosine < 0, cosine > 0)
            shares = [f"{np.mean(x):15.0%}" for x in signs]
            print(f"{'':12} {update:15}", *shares, f"{np.median(ratio):15.3f}")


QUICK = dict(steps=40, horizon=INNER_STEPS, seeds=1)


def main(
    *, steps: int = 400, horizon: int = 1000, seeds: int = 3, first: int = 0
) -> list[dict[str, Row]]:
    results = [compare(first + i, steps, horizon) for i in range(seeds)]
    print_tables(results)
    return results


if __name__ == "__main__":
    command(
        main, __doc__, QUICK, steps="updates of the noise", horizon="training steps"
    )
