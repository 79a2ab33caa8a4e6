"""A gate that only passes hypergradients that stand out from their noise."""

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float

from .._checks import as_number
from .update import beside_updates


def gate(
    threshold: float | Float[Array, ""],
) -> optax.GradientTransformationExtraArgs:
    r"""Does not move hyperparameters whose hypergradient $g$ does not stand out from
    its noise. Where $\lvert g \rvert \leq c\, \sigma$, the update is set to zero. Here
    $\sigma$ is the standard error of $g$ over tasks or folds. It comes from
    [`eqx_hpo.MetaLearner`][] or [`eqx_hpo.Evolution`][].

    ```python
    train, val = hpo.folds(data, 5)
    outer = optax.chain(optax.adam(1e-2), hpo.gate(2.0))
    algorithm = hpo.MetaLearner(hpo.T1T2(problem, inner, outer), tasks=5)
    ```

    Place this last in `optax.chain`. The moments of an optimiser that comes after it
    would still move a held coordinate. The moments of an optimiser that comes before it
    follow all hyperparameters.

    **Arguments:**

    - `threshold`: the number $c$ of standard errors, at least zero. It decides how
        often a coordinate passes whose true hypergradient is zero. At 1 this happens
        about one time in three. At 2 it happens one time in twenty with many tasks, and
        one time in nine with five.

    **Returns:** an `optax.GradientTransformationExtraArgs`. It gets the hypergradient
    and its standard error as the arguments `grad` and `error` of `update`, which every
    algorithm of this library passes. Without `grad` it uses the updates instead. Where
    the error is NaN, nothing is held back.

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
