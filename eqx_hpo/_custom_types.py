"""Type aliases shared by the whole package."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree


Batch: TypeAlias = PyTree[Any]
FloatScalar: TypeAlias = Float[Array, ""]
Hyperparams: TypeAlias = PyTree[Any]
IntScalar: TypeAlias = Int[Array, ""]
Key: TypeAlias = PRNGKeyArray | None
# loss(model, hyperparams, batch, key). `Any`, because users annotate their losses in
# their own way.
Loss: TypeAlias = Callable[[Any, Any, Any, Any], Any]
Model: TypeAlias = PyTree[Any]

# A function of the unwrapped hyperparameters puts a learning rate, a momentum or a
# decay among them; a plain transformation has all its numbers fixed.
_Transformation: TypeAlias = optax.GradientTransformation | optax.MultiSteps
InnerOptimiser: TypeAlias = _Transformation | Callable[[Hyperparams], _Transformation]

# Which derivative of the inner level an algorithm takes: that of the whole update, that
# of the training gradient, or none. "differences" is none either: values are compared.
# "values" asks for no hypergradient at all.
Through: TypeAlias = Literal["update", "gradient", "differences", "values"] | None
