"""A pull that keeps many hyperparameters near a common value."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import as_number, check_one_of


def anchor(
    strength: float | Float[Array, ""], *, to: str = "mean"
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a pull to the hypergradient, $g \leftarrow g + s\, (\text{raw} - c)$, which
    is the gradient of $\frac{s}{2} \lVert \text{raw} - c \rVert^2$. Thousands of
    hyperparameters then stay near a common value unless the validation data insist.
    Place this first in `optax.chain`.

    ```python
    outer = optax.chain(hpo.anchor(1 / 300), optax.adam(0.1))
    ```

    If the validation loss is the mean of $n$ negative log-likelihoods,
    $s = 1 / (n w^2)$ is a Gaussian prior of width $w$ on `raw`. For
    [`eqx_hpo.Positive`][] this is a prior on logarithms. A mean squared error is such a
    loss in units of twice the variance of the noise. So for it, multiply $s$ by twice
    the validation loss.

    The pull needs a hypergradient of the right size, not only of the right direction.
    Those of [`eqx_hpo.Unrolled`][], [`eqx_hpo.Implicit`][] and
    [`eqx_hpo.HyperDistill`][] have it. That of [`eqx_hpo.T1T2`][] is too small, by a
    factor of about the number of steps that training takes to respond. The pull then
    holds the hyperparameters in place.

    **Arguments:**

    - `strength`: the strength $s$, at least zero.
    - `to`: the centre $c$. `"mean"` is the present mean of each array, and leaves the
        common value free to move. `"start"` is the values with which each array began.

    **Returns:** an `optax.GradientTransformationExtraArgs`.

    **Raises:** a `ValueError` if an argument is out of range.
    """
    pull = as_number("strength", strength)
    check_one_of("to", to, ("mean", "start"))

    def init(params: PyTree) -> PyTree:
        if to == "mean":
            return optax.EmptyState()
        return jtu.tree_map(jnp.copy, params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any):
        del extra
        if params is None:
            raise ValueError(
                "`anchor` needs the parameters: call `update(updates, state, params)`."
            )
        centres = jtu.tree_map(jnp.mean, params) if to == "mean" else state

        def add(update, raw, centre):
            return update + pull.astype(raw.dtype) * (raw - centre)

        return jtu.tree_map(add, updates, params, centres), state

    return optax.GradientTransformationExtraArgs(init, update)
