"""Warns if the data make `step` compile again and again.

The body of a compiled function runs once for each compilation. So the kinds of data are
counted there, at no cost for the calls.
"""

import collections
import warnings
from typing import Any

import jax.tree_util as jtu
from jaxtyping import PyTree

from .._misc import is_array_or_numpy
from .._state import BilevelState


_WARN_AT = 3  # compilations
_REMEMBERED = 128  # pairs of an algorithm and a state

# For each run, the structures and the leaves of the data of each compilation so far. Of
# algorithms and states only hashes are kept, so nothing is held in memory here.
_seen: collections.OrderedDict[int, list[Any]] = collections.OrderedDict()


def forget_compilations(algorithm: PyTree, state: BilevelState) -> None:
    """Begins a new run, which may have data of another kind."""
    _seen.pop(_key(algorithm, state), None)


def warn_of_recompilation(
    algorithm: PyTree, state: BilevelState, data: dict[str, Any]
) -> None:
    """Warns when a step of a run is traced for the third kind of `data` of the same
    structure, and names the leaf that differs from the kind before."""
    structure = jtu.tree_structure(data)
    leaves = {
        "`" + name + jtu.keystr(path) + "`": _describe(x)
        for name, tree in data.items()
        for path, x in jtu.tree_leaves_with_path(tree)
    }
    key = _key(algorithm, state)
    kinds = _seen.setdefault(key, [])
    _seen.move_to_end(key)
    if len(_seen) > _REMEMBERED:
        _seen.popitem(last=False)
    if (structure, leaves) in kinds:
        return
    kinds.append((structure, leaves))
    alike = [x for other, x in kinds if other == structure]
    if len(alike) != _WARN_AT:
        return
    name = next(name for name in leaves if leaves[name] != alike[-2][name])
    warnings.warn(
        f"A step was compiled for {_WARN_AT} kinds of data, and each compiles anew: "
        f"{name} was {alike[-2][name]} and is {leaves[name]} now. Give all batches the "
        "same shapes, for example by dropping the last, incomplete one, and make what "
        "changes an array.",
        stacklevel=2,
    )


def _key(algorithm: PyTree, state: BilevelState) -> int:
    parts = []
    for tree in (algorithm, state.model, state.hyperparams):
        leaves, treedef = jtu.tree_flatten(tree)
        parts.append(treedef)
        parts += [_describe(x) if is_array_or_numpy(x) else x for x in leaves]
    try:
        return hash(tuple(parts))
    except TypeError:
        return hash(str(parts[0]))  # something static cannot be hashed


def _describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if is_array_or_numpy(x) else repr(x)
