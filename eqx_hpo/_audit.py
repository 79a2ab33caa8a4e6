"""Compares the hypergradient of a run with the exact one of a longer horizon."""

from typing import Any

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from ._checks import as_int, check_key, check_leaves, check_type
from ._custom_types import Batch, Hyperparams, Key
from ._data import AbstractBatches, numbers_as_arrays
from ._exact import call_keys, cosine, exact_hypergradient
from ._meta import exact_over_tasks, MetaLearner
from ._misc import tree_norm
from ._optimizer import AbstractAlgorithm, AbstractBilevelOptimizer
from ._state import BilevelState, check_state


class Audit(eqx.Module):
    """Compares the hypergradient that an algorithm estimates with the exact one.

    **Attributes:**

    - `cosine`: the cosine of the angle between the two, over all `raw` arrays. At 1 the
        direction is right. Below 0 the hyperparameters move the wrong way.
    - `norm_ratio`: the norm of the estimate divided by that of the exact one.
    - `cosines`, `norm_ratios`: the same for each `raw` array by itself, in its place in
        the tree. The cosine over all arrays can hide a learning rate among thousands of
        decays. For a single number the cosine is 1 or -1.

    They are NaN where a hypergradient is zero or not finite.
    """

    cosine: Float[Array, ""]
    norm_ratio: Float[Array, ""]
    cosines: PyTree
    norm_ratios: PyTree

    def __str__(self) -> str:
        rows = {"": (self.cosine, self.norm_ratio)}
        ratios = jtu.tree_leaves(self.norm_ratios)
        for (path, x), y in zip(jtu.tree_leaves_with_path(self.cosines), ratios):
            rows[jtu.keystr(path)] = (x, y)
        width = max(map(len, rows))
        lines = [f"{'':{width}}{'cosine':>12}{'norm ratio':>12}"]
        for name, (x, y) in rows.items():
            # Under a map they have more than one number, and in a trace none.
            numbers = (f"{z:.4f}" if _is_number(z) else str(z) for z in (x, y))
            lines.append(f"{name:{width}}" + "".join(f"{z:>12}" for z in numbers))
        return "\n".join(lines)


def _is_number(x: Any) -> bool:
    return x.ndim == 0 and not isinstance(x, Tracer)


def audit(
    algorithm: AbstractBilevelOptimizer,
    state: BilevelState,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    *,
    horizon: int,
    key: Key,
) -> Audit:
    r"""Compares the hypergradient that `algorithm` estimates at `state` with the exact
    one over the next `horizon` inner steps. An algorithm with a short horizon prefers
    what pays at once. In the course of a run, this shows how strong the effect is.

    ```python
    log = []
    solution = hpo.tune(
        algorithm, model, hyperparams, train, val, steps=1000, key=key,
        record_every=100,
        callback=lambda state: log.append(
            hpo.audit(algorithm, state, train, val, horizon=500, key=key)
        ),
    )
    ```

    The exact one is the derivative of the validation loss after `horizon` more inner
    steps, with the hyperparameters held fixed. It is computed by reverse mode through
    all of these steps. It contains $\partial C_2 / \partial \lambda$ at the weights
    that they reach, and the effect of the hyperparameters on these weights from `state`
    on. Earlier effects do not count. Each call of `step` draws its own batches and its
    own noise. With small validation batches, the two therefore also differ by noise:
    pass a large batch as `val`. If there are episodes, none ends within the horizon.

    `state` is not changed. Memory grows with the square root of `horizon`, and time in
    proportion to it. The function compiles once for all calls, and may be called within
    `jax.jit`.

    **Arguments:**

    - `algorithm`: the algorithm. For an [`eqx_hpo.MetaLearner`][], both hypergradients
        are means over its tasks.
    - `state`: from `init` or `step` of the same algorithm.
    - `train`, `val`: as for `step`.
    - `horizon`: the number of inner steps, a multiple of the `inner_steps` of the
        algorithm. It should reach to the end of training.
    - `key`: a PRNG key, or `None` if nothing is random.

    **Returns:** an [`eqx_hpo.Audit`][].

    **Raises:** a `ValueError` if an argument has the wrong type or is out of range.
    """
    kinds = (AbstractAlgorithm, MetaLearner)
    check_type("algorithm", algorithm, kinds, "an algorithm, such as `T1T2`")
    check_state("state", state)
    check_key(key)
    horizon = as_int("horizon", horizon, 1)
    if horizon % algorithm.inner_steps != 0:
        raise ValueError(
            "`horizon` must be a multiple of the inner steps in a call of `step`, "
            f"{algorithm.inner_steps}; got {horizon}."
        )
    for name, data in (("train", train), ("val", val)):
        check_leaves(name, data)
    train, val = numbers_as_arrays(train), numbers_as_arrays(val)
    calls = horizon // algorithm.inner_steps
    return _audit(algorithm, state, train, val, key, calls)


@eqx.filter_jit
def _audit(algorithm, state, train, val, key, calls: int) -> Audit:
    keys = call_keys(key, calls)
    first = None if key is None else jr.fold_in(key, 0)
    got = algorithm.compute_hypergradient(state, train, val, key=first)
    exact = _exact(algorithm, state, train, val, keys, calls)
    ratio = lambda x, y: tree_norm(x) / tree_norm(y)
    return Audit(
        cosine=cosine(got, exact),
        norm_ratio=ratio(got, exact),
        cosines=jtu.tree_map(cosine, got, exact),
        norm_ratios=jtu.tree_map(ratio, got, exact),
    )


def _exact(algorithm, state, train, val, keys, calls: int) -> Hyperparams:
    if isinstance(algorithm, MetaLearner):
        return exact_over_tasks(algorithm, state, train, val, keys, calls)
    return exact_hypergradient(algorithm, state, train, val, (keys, keys), calls)
