"""A pull of many hyperparameters towards a common value."""

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
    hyperparameters then stay near a common value unless the validation data insist. To
    stand first in `optax.chain`.

    ```python
    outer = optax.chain(hpo.anchor(1 / 300), optax.adam(0.1))
    ```

    For a validation loss that is the mean of $n$ negative log-likelihoods, $s = 1 / (n
    w^2)$ is a Gaussian prior of width $w$ on `raw`: for [`eqx_hpo.Positive`][] on
    logarithms. A mean squared error is such a loss in units of twice the variance of
    the noise: multiply by twice the validation loss.

    All that needs a hypergradient of the right size, not only of the right direction:
    that of [`eqx_hpo.Unrolled`][], [`eqx_hpo.Implicit`][] or
    [`eqx_hpo.HyperDistill`][]. The one of [`eqx_hpo.T1T2`][] is too small by about the
    number of steps that training takes to respond, so the pull holds it in place.

    **Arguments:**

    - `strength`: $s$, at least zero.
    - `to`: what $c$ is: `"mean"`, the present mean of each array, so that the common
        value is free to move; or `"start"`, the values that each array began with.

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
