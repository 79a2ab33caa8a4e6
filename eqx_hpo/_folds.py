"""Folds of cross-validation. `MetaLearner` trains a model on each."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from ._checks import as_int, check_key
from ._custom_types import Key
from ._data import leading_axis, take_rows
from ._misc import as_device_arrays


def folds(
    data: PyTree[Any], count: int, *, repeats: int = 1, key: Key = None
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Splits data into the folds of cross-validation. An [`eqx_hpo.MetaLearner`][] with
    `tasks=count * repeats` then trains a model on each fold. All models share the
    hyperparameters, which move by the mean hypergradient. The [`eqx_hpo.TaskReport`][]
    in `state.metrics.diagnostics` holds the standard error of this mean.

    ```python
    import eqx_hpo as hpo
    import jax.numpy as jnp
    import jax.random as jr
    import optax


    def val_loss(weights, decay, batch, key):
        x, y = batch
        return jnp.mean((x @ weights - y) ** 2)


    def train_loss(weights, decay, batch, key):
        penalty = jnp.sum(decay * weights**2)
        return val_loss(weights, decay, batch, key) + penalty


    x = jr.normal(jr.key(0), (60, 10))
    y = x[:, 0] + jr.normal(jr.key(1), (60,))
    train, val = hpo.folds((x, y), 5, repeats=2)

    problem = hpo.Problem(train_loss, val_loss)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.adam(0.05))
    algorithm = hpo.MetaLearner(algorithm, tasks=10)
    decay = hpo.Positive(jnp.full(10, 0.1))
    solution = hpo.tune(
        algorithm, jnp.zeros(10), decay, train, val, steps=100, key=jr.key(2)
    )
    ```

    The train parts of all folds together hold the data about `count` times. With large
    data, fold the indices instead: `train, val = hpo.folds(jnp.arange(len(x)), 5)`. The
    batch is then `index`, and the loss takes the rows `x[index], y[index]` of data that
    it closes over. So the data are held only once.

    All folds train at once. This takes no longer than training one after the other, and
    often half as long. Convolutions on CPUs are the exception and take about twice as
    long, since XLA has no fast code there for a separate kernel for each fold.

    To make minibatches for each fold, use
    `eqx.filter_vmap(lambda part: hpo.Minibatch(part, 32))(train)`.

    If hyperparameters have an entry for each example, the loss must know which examples
    a fold has. Add the index to the data, `hpo.folds((x, y, jnp.arange(len(x))), 5)`,
    and use `weights[index]` in the loss.

    **Arguments:**

    - `data`: a pytree of arrays with the same leading axis, of length `n`.
    - `count`: the number of folds, from 2 to `n`. With `n` folds, each holds out a
        single row.
    - `repeats`: the number of splits of the data. Further splits lower the noise of the
        mean. But they share their data, so the reported standard error is too small by
        a factor of about the square root of `repeats`.
    - `key`: a PRNG key for the order of the rows. By default it is a fixed key. The
        rows are always shuffled, since data often come sorted by class.

    **Returns:** `(train, val)`. Both have the structure of `data`, with one more axis
    at the front, of length `count * repeats`. A validation part has `n // count` rows.
    A train part has all others. In each repeat a row is held out at most once: the
    `n % count` rows that are left over stay in every train part.

    **Raises:** a `ValueError` if `data` is empty, its leading axes differ, or an
    argument is out of range.
    """
    size = leading_axis("data", data)
    count, repeats = _as_count(count, size), as_int("repeats", repeats, 1)
    check_key(key)
    keys = jr.split(jr.key(0) if key is None else key, repeats)
    orders = jax.vmap(lambda key: jr.permutation(key, size))(keys)
    held_out = size // count
    first = held_out * jnp.arange(count)[:, None]
    val = first + jnp.arange(held_out)
    train = jnp.arange(size - held_out)
    # Jumps over the rows that each fold holds out.
    train = jnp.where(train < first, train, train + held_out)
    data = as_device_arrays(data)
    return _take(data, orders[:, train]), _take(data, orders[:, val])


def _as_count(count: Any, size: int) -> int:
    number = as_int("count", count, 2)
    if number > size:
        raise ValueError(
            f"`count` must be from 2 to the {size} rows of `data`; got {number}."
        )
    return number


def _take(data: PyTree[Array], rows: Int[Array, "repeats count n"]) -> PyTree[Array]:
    rows = rows.reshape(-1, rows.shape[-1])
    return jtu.tree_map(lambda x: take_rows(x, rows), data)
