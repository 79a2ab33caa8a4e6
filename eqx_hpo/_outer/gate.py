"""A gate that only lets hypergradients through that stand out from their noise."""

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float

from .._checks import as_number
from .update import beside_updates


def gate(
    threshold: float | Float[Array, ""],
) -> optax.GradientTransformationExtraArgs:
    r"""Leaves each hyperparameter where it is whose hypergradient does not stand out
    from its noise: where $\lvert g \rvert \leq c\, \sigma$, with $\sigma$ the standard
    error of $g$ over tasks or folds, the update is set to zero. For
    [`eqx_hpo.MetaLearner`][].

    ```python
    train, val = hpo.folds(data, 5)
    outer = optax.chain(optax.adam(1e-2), hpo.gate(2.0))
    algorithm = hpo.MetaLearner(hpo.T1T2(problem, inner, outer), tasks=5)
    ```

    It stands last in the chain, as here: the moments of an optimiser behind it would
    move a coordinate all the same. Before it they follow all hyperparameters.

    **Arguments:**

    - `threshold`: the number $c$ of standard errors, at least zero. A coordinate whose
        true hypergradient is zero passes about one time in three at 1, one in twenty at
        2 with many tasks, and one in nine at 2 with five.

    **Returns:** an `optax.GradientTransformationExtraArgs`. It sees the hypergradient
    and its standard error by the arguments `grad` and `error` of `update`, which
    every algorithm of this library passes. Without `grad` the updates stand in for it.
    Where the error is NaN, nothing is held back.

    **Raises:** a `ValueError` if `threshold` is out of range, and in `update` if there
    is no standard error.
    """
    threshold = as_number("threshold", threshold)

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, grad=None, error=None, **extra_args):
        del params, extra_args
        if error is None:
            raise ValueError(
                "`gate` needs the standard error of the hypergradient, which one model "
                "alone does not have. Wrap the algorithm in "
                "`MetaLearner(algorithm, tasks)` with two tasks at least, and give "
                "each a fold of the data: `train, val = folds(data, tasks)`. "
                "(`optax.MultiSteps` does not pass it on.)"
            )
        grad = updates if grad is None else beside_updates("grad", grad, updates)
        error = beside_updates("error", error, updates)

        def pass_on(update, grad, error):
            is_noise = jnp.abs(grad) <= threshold.astype(error.dtype) * error
            return jnp.where(is_noise, 0, update)

        return jtu.tree_map(pass_on, updates, grad, error), state

    return optax.GradientTransformationExtraArgs(init, update)
