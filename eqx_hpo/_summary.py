"""Summarises a state as named numbers, for anything that keeps or draws them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ._custom_types import Hyperparams
from ._hyperparameter import is_placeholder, Schedule
from ._misc import is_typed_key
from ._solution import constrained, mean_min_max, RESULTS
from ._state import BilevelState, check_state, float_scalar, Metrics


def summary(state: BilevelState) -> dict[str, float]:
    """Summarises a state as named numbers, for any logger. [Logging](../logging.md) has
    recipes for files, TensorBoard and Weights & Biases.

    ```python
    hpo.tune(..., callback=lambda state: wandb.log(hpo.summary(state)))
    ```

    A name is a path with dots. A scalar becomes one number. Any other array `a` becomes
    three: `a.mean`, `a.min` and `a.max`.

    - `step`, `episode_step`: the counters of the state.
    - `skipped`: the number of skipped steps in all, as in the history.
    - `train_loss`, `val_loss`, `hypergradient_norm`: the metrics of the last step.
    - `hyperparams`: the constrained values, at the centre of their noise. Discrete ones
        are relaxed, so a choice gives three numbers about its weights.
    - `diagnostics`: the algorithm's own report. `diagnostics.result` is 1 if a solve
        was successful, and otherwise 0. The standard error of a hyperparameter is that
        of the hypergradient of its `raw`.
    - `train_aux`, `val_aux`: the `aux` that the losses return.

    Leaves that are not numbers, such as functions and PRNG keys, are left out.
    Everything is computed on the device, at least in single precision, and arrives in
    one transfer.

    **Arguments:**

    - `state`: from `init` or `step`, also of an [`eqx_hpo.MetaLearner`][].

    **Returns:** a `dict` of Python floats. Its names and their order are the same in
    every step of a run.
    """
    check_state("state", state)
    counts = [state.step, state.episode_step, state.total_skipped]
    names, numbers = _summarise(state.hyperparams, state.metrics)
    # The counts by themselves: single precision does not hold them all.
    counts, numbers = jax.device_get((counts, numbers))
    values = [*map(float, counts), *numbers.tolist()]
    return dict(zip(["step", "episode_step", "skipped", *names], values, strict=True))


@eqx.filter_jit
def _summarise(
    hyperparams: Hyperparams, metrics: Metrics
) -> tuple[list[str], Float[Array, " numbers"]]:
    found: dict[str, Array] = {
        "train_loss": metrics.train_loss,
        "val_loss": metrics.val_loss,
        "hypergradient_norm": metrics.hypergradient_norm,
    }
    found |= _numbers("hyperparams", constrained(hyperparams))
    found |= _numbers("diagnostics", metrics.diagnostics)
    if metrics.aux is not None:
        train_aux, val_aux = metrics.aux
        found |= _numbers("train_aux", train_aux) | _numbers("val_aux", val_aux)
    return list(found), jnp.stack([float_scalar(x) for x in found.values()])


def _numbers(name: str, tree: PyTree[Any]) -> dict[str, Array]:
    """Finds the numbers in a tree, under names that begin with `name`."""
    found: dict[str, Array] = {}
    bare = jtu.tree_map(_bare, tree, is_leaf=_is_node)
    for path, x in jtu.tree_leaves_with_path(bare):
        if not _is_number(x):
            continue
        keys = jtu.keystr(path, simple=True, separator=".")
        full = f"{name}.{keys}" if keys else name
        x = jnp.asarray(x, jnp.result_type(float))
        if x.ndim == 0:
            found[full] = x
        elif x.size > 0:
            kinds = [f"{full}.{kind}" for kind in ("mean", "min", "max")]
            found |= zip(kinds, mean_min_max(x), strict=True)
    return found


def _is_number(x: Any) -> bool:
    is_real = eqx.is_array_like(x) and not is_typed_key(x)
    return is_real and not jnp.iscomplexobj(x)


def _is_node(x: Any) -> bool:
    return is_placeholder(x) or isinstance(x, (Schedule, RESULTS))


def _bare(x: Any) -> Any:
    """Takes the array out of a node. Its path then ends with the node."""
    if isinstance(x, RESULTS):
        return x == RESULTS.successful
    if isinstance(x, Schedule):
        return _bare(x.value)
    return x.raw if is_placeholder(x) else x
