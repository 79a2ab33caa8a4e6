"""Type aliases shared by the whole package."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree


Batch: TypeAlias = PyTree[Any]
Checkpoint: TypeAlias = Literal["step", "nested"] | None
FloatScalar: TypeAlias = Float[Array, ""]
Hyperparams: TypeAlias = PyTree[Any]
IntScalar: TypeAlias = Int[Array, ""]
Key: TypeAlias = PRNGKeyArray | None
# loss(model, hyperparams, batch, key). `Any`: a user annotates them as they are.
Loss: TypeAlias = Callable[[Any, Any, Any, Any], Any]
# "values": of training without a derivative.
Through: TypeAlias = Literal["update", "gradient", "values"] | None
Model: TypeAlias = PyTree[Any]

# A function of the unwrapped hyperparameters puts a learning rate, a momentum or a
# decay among them; a plain transformation has all its numbers fixed.
InnerOptimiser: TypeAlias = (
    optax.GradientTransformation | Callable[[Hyperparams], optax.GradientTransformation]
)
