"""A weight decay for each feature of a small data set: what do folds, an anchor and a
last training on all data save of the gain that one validation set overfits?"""

from typing import Any

import eqx_hpo as hpo
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import PolynomialFeatures, StandardScaler


# --8<-- [start:problem]
SIZE, UPDATES, DIVISIONS = 200, 100, 5
x, y = map(np.asarray, load_diabetes(return_X_y=True))
x = PolynomialFeatures(2, include_bias=False).fit_transform(x)  # 65 features
x, y = StandardScaler().fit_transform(x), (y - y.mean()) / y.std()


def val_loss(weights, decay, batch, key):
    x, y = batch
    return jnp.mean((x @ weights - y) ** 2)


def train_loss(weights, decay, batch, key):
    return val_loss(weights, decay, batch, key) + decay @ weights**2


problem = hpo.Problem(train_loss, val_loss)
inner, adam = optax.sgd(0.03, momentum=0.9), optax.adam(0.1)
free = hpo.Unrolled(problem, inner, adam, inner_steps=100)
# The variance of the noise is about 0.5, and the width of the anchor is 1.
outer = optax.chain(hpo.anchor(2 * 0.5 / SIZE), adam)
anchored = hpo.Unrolled(problem, inner, outer, inner_steps=100)
# --8<-- [end:problem]


# --8<-- [start:compare]
def compare(seed):
    """Trains in five ways on 200 rows, and tests on the others."""
    order = np.random.default_rng(seed).permutation(len(y))
    data, test = [
        (jnp.asarray(x[rows]), jnp.asarray(y[rows])) for rows in np.split(order, [SIZE])
    ]
    default = Ridge().fit(*data)
    ridge: Any = RidgeCV(np.logspace(-2, 4, 25)).fit(*data)

    zeros, shared = jnp.zeros(x.shape[1]), ridge.alpha_ / SIZE
    start = hpo.Interval(jnp.full(x.shape[1], shared), 1e-3, 10.0)
    train, val = [z[:160] for z in data], [z[160:] for z in data]
    options: Any = dict(steps=UPDATES, key=None, progress=False)
    single = hpo.tune(free, zeros, start, tuple(train), tuple(val), **options)
    options |= dict(fit_steps=500)
    folds = hpo.tune_folds(free, zeros, start, data, **options)
    both = hpo.tune_folds(anchored, zeros, start, data, **options)
    predictions = {
        "Ridge": default.predict(test[0]),
        "RidgeCV": ridge.predict(test[0]),
        "one split": test[0] @ single.model,
        "folds": test[0] @ folds.final.model,
        "folds, anchor": test[0] @ both.final.model,
    }
    errors = {k: float(np.mean((p - test[1]) ** 2)) for k, p in predictions.items()}
    tunings = {"one split": single, "folds": folds.tuning, "folds, anchor": both.tuning}
    return errors, {k: run.history for k, run in tunings.items()}


runs = [compare(seed) for seed in range(DIVISIONS)]
errors = {k: np.array([run[0][k] for run in runs]) for k in runs[0][0]}
for name, values in errors.items():
    print(f"{name:14} {values.mean():.3f}")
# --8<-- [end:compare]
wins = np.sum(errors["folds, anchor"] < errors["RidgeCV"])
print(f"folds and anchor before RidgeCV in {wins} of {DIVISIONS}")

left, right = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")[1]
for name, history in runs[0][1].items():
    left.plot(history.step, history.val_loss, label=name)
left.set(xlabel="update", ylabel="validation loss, first division")
left.legend()
right.plot(list(errors), list(errors.values()), "o", color="tab:gray")
right.plot([x.mean() for x in errors.values()], "_", markersize=24)
right.set(ylabel="test error, each division")
right.tick_params("x", rotation=30)
plt.savefig("folds.png")
