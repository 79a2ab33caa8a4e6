"""A weight decay for each feature of a small data set: what do folds, an anchor and a
last training on all data save of the gain that one validation set overfits?"""

import eqx_hpo as hpo
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import PolynomialFeatures, StandardScaler


# --8<-- [start:problem]
SIZE, UPDATES, SPLITS = 200, 100, 5
x, y = load_diabetes(return_X_y=True)
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
    """Test errors of all ways, for one division into data and test."""
    order = np.random.default_rng(seed).permutation(len(y))
    rows, test_rows = order[:SIZE], order[SIZE:]
    data, test = (jnp.asarray(x[rows]), jnp.asarray(y[rows])), (x[test_rows], y[test_rows])
    ridge = RidgeCV(np.logspace(-2, 4, 25)).fit(*data)
    decay = jnp.full(x.shape[1], ridge.alpha_ / SIZE)
    start, zeros = hpo.Interval(decay, 1e-3, 10.0), jnp.zeros(x.shape[1])

    options = dict(key=None, progress=False)
    train, val = [z[:160] for z in data], [z[160:] for z in data]
    single = hpo.tune(free, zeros, start, train, val, steps=UPDATES, **options)
    options |= dict(steps=UPDATES, fit_steps=500)
    folds = hpo.tune_folds(free, zeros, start, data, **options)
    both = hpo.tune_folds(anchored, zeros, start, data, **options)
    models = {
        "decay 0.001 for all": hpo.fit(free, zeros, jnp.full(65, 1e-3), data, steps=5, key=None, progress=False).model,
        "RidgeCV": jnp.asarray(ridge.coef_),
        "one split": single.model,
        "folds": folds.final.model,
        "folds and anchor": both.final.model,
    }
    errors = [float(val_loss(w, None, test, None)) for w in models.values()]
    return list(models), errors, single.history, both.tuning.history
# --8<-- [end:compare]
import sys,time
t0=time.time()
runs = [compare(seed) for seed in range(SPLITS)]
print(np.array([r[1] for r in runs]).round(3)); print(np.array([r[1] for r in runs]).mean(0), time.time()-t0)
