"""The space of a black-box search: the coordinates of all hyperparameters, with their
names and distributions for Optuna."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._checks import check_same_structure, kind
from ._custom_types import Hyperparams
from ._discrete import AbstractDiscrete, Choice, Integer, Switch
from ._hyperparameter import canonical, is_placeholder, partition_raw, Simplex


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as e:
        raise ImportError(
            "`search` needs Optuna: `pip install 'eqx_hpo[optuna]'`."
        ) from e
    return optuna


class _Leaf(NamedTuple):
    """Describes one `raw` array. `to_raw` makes it from its parameters, for many trials
    at once: arrays of shape `[trials, parameters]` become `[trials, entries]`."""

    names: list[str]
    distributions: list[Any]
    to_raw: Callable[[np.ndarray], np.ndarray]
    shape: tuple[int, ...]
    dtype: Any


class Space:
    """Describes the box to search.

    - `low`: the lower ends, with discrete placeholders that unwrap to discrete values.
    - `distributions`: the distribution of each parameter, by its name.
    """

    def __init__(self, low: Hyperparams, high: Hyperparams):
        self.low = low = _harden(canonical(low, "low"), "low")
        high = _harden(canonical(high, "high"), "high")
        check_same_structure("high", high, low, "`low`")
        raw, constants = partition_raw(low)
        high_raw, high_constants = partition_raw(high)
        if not eqx.tree_equal(constants, high_constants):
            raise ValueError(
                "`low` and `high` must have the same constants, such as the bounds of "
                f"an `Interval`; got {constants} and {high_constants}."
            )
        leaves, self._treedef = jtu.tree_flatten_with_path(raw)
        ends = zip(leaves, jtu.tree_leaves(high_raw), strict=True)
        nodes = jtu.tree_leaves_with_path(low, is_leaf=is_placeholder)
        owners = {jtu.keystr(path): node for path, node in nodes}
        self._leaves = []
        for (path, x), y in ends:
            name = jtu.keystr(path)
            owner = owners.get(name.removesuffix(".raw"))
            found, to_raw = _parameters(name, owner, np.asarray(x), np.asarray(y))
            names = [f"{name}[{i}]" for i in range(len(found))]
            self._leaves.append(_Leaf(names, found, to_raw, x.shape, x.dtype))
        self.distributions: dict[str, Any] = {}
        for leaf in self._leaves:
            self.distributions |= zip(leaf.names, leaf.distributions, strict=True)
        if len(self.distributions) == 0:
            raise ValueError("`low` holds no hyperparameters to search for.")

    def raw(self, params: list[dict[str, Any]]) -> PyTree[np.ndarray]:
        """Makes the `raw` arrays of trials, with a leading axis, on the host."""
        arrays = []
        for leaf in self._leaves:
            values = np.array([[x[name] for name in leaf.names] for x in params])
            shape = (len(params), *leaf.shape)
            values = leaf.to_raw(values.reshape(len(params), len(leaf.names)))
            arrays.append(values.reshape(shape).astype(leaf.dtype))
        return jtu.tree_unflatten(self._treedef, arrays)


def _parameters(
    path: str, owner: Any, low: np.ndarray, high: np.ndarray
) -> tuple[list[Any], Callable[[np.ndarray], np.ndarray]]:
    """Finds the distributions of a `raw` array from `low` to `high`, and the function
    from their values to it. `owner` is the placeholder that holds it."""
    new = import_optuna().distributions
    if isinstance(owner, Choice):
        options = low.shape[-1]
        choice = new.CategoricalDistribution(range(options))
        to_raw = lambda values: np.eye(options)[values.astype(int)]
        return [choice] * (low.size // options), to_raw
    if isinstance(owner, Switch):
        switch = new.CategoricalDistribution((False, True))
        return [switch] * low.size, lambda values: np.where(values, 1.0, -1.0)
    if isinstance(owner, Integer):
        # The bounds are half a number outside.
        lower, upper = float(owner.lower), float(owner.upper)
        ends = [_as_integers(owner, raw) for raw in (low, high)]
        pairs = _pairs(*ends)
        _check_order(path, pairs, "they are")
        to_raw = lambda x: np.log(x - lower) - np.log(upper - x)
        return [new.IntDistribution(*pair) for pair in pairs], to_raw
    pairs = _pairs(low, high)
    if isinstance(owner, Simplex):
        # Not all entries of a simplex can be lower.
        pairs = [sorted(pair) for pair in pairs]
    _check_order(path, pairs, "their unconstrained values are")
    return [new.FloatDistribution(*pair) for pair in pairs], lambda values: values


def _as_integers(owner: Integer, raw: np.ndarray) -> np.ndarray:
    return np.asarray(eqx.tree_at(lambda x: x.raw, owner, raw).discretise(), int)


def _pairs(low: np.ndarray, high: np.ndarray) -> list[Any]:
    return np.stack([low, high]).reshape(2, -1).T.tolist()


def _check_order(path: str, pairs: list[Any], what: str) -> None:
    for i, (low, high) in enumerate(pairs):
        if low > high:
            raise ValueError(
                f"`low{path}` is above `high{path}`: at coordinate {i} {what} {low} "
                f"and {high}."
            )


def _harden(hyperparams: Hyperparams, name: str) -> Hyperparams:
    """Makes discrete placeholders unwrap to their discrete values, straight-through and
    without noise."""

    def harden(path, x):
        if isinstance(x, Choice):
            return Choice(x.raw, straight_through=True)
        if isinstance(x, Switch):
            return Switch(x.raw, straight_through=True)
        if isinstance(x, Integer):
            bounds = math.ceil(x.lower), math.floor(x.upper)
            return Integer(x.discretise(), *bounds, straight_through=True)
        if isinstance(x, AbstractDiscrete):
            raise ValueError(
                f"`{name}{jtu.keystr(path)}` is {kind(x)}, a discrete hyperparameter "
                "whose values `search` does not know. It knows `Choice`, `Switch` and "
                "`Integer`."
            )
        return x

    return jtu.tree_map_with_path(harden, hyperparams, is_leaf=is_placeholder)
