"""A warning where the data make `step` compile again and again.

The body of a compiled function runs once for each compilation. So what it sees is
counted there, at no cost for the calls.
"""

import collections
import warnings
from typing import Any

import jax.tree_util as jtu
from jaxtyping import PyTree

from .._misc import is_array_or_numpy


_WARN_AT = 3  # compilations
_REMEMBERED = 128  # pairs of an algorithm and a state

# What each leaf of the data was, in each compilation so far. Of algorithms and states
# only hashes are kept, so nothing is held in memory here.
_Leaves = dict[str, str]
_seen: collections.OrderedDict[int, list[_Leaves]] = collections.OrderedDict()


def warn_of_recompilation(algorithm: PyTree, state: PyTree, data: dict[str, Any]):
    """Warns when a step of this algorithm and this state is traced for the third kind
    of `data`, and names the leaf that differs from the kind before."""
    try:
        structure = jtu.tree_structure(data)
        key = hash((_fingerprint(algorithm), _fingerprint(state), structure))
    except TypeError:
        return  # something static cannot be hashed
    leaves = {
        "`" + name + jtu.keystr(path) + "`": _describe(x)
        for name, tree in data.items()
        for path, x in jtu.tree_leaves_with_path(tree)
    }
    kinds = _seen.setdefault(key, [])
    _seen.move_to_end(key)
    if len(_seen) > _REMEMBERED:
        _seen.popitem(last=False)
    if leaves in kinds:
        return
    kinds.append(leaves)
    if len(kinds) != _WARN_AT:
        return
    name = next(name for name in leaves if leaves[name] != kinds[-2][name])
    warnings.warn(
        f"A step was compiled for {_WARN_AT} kinds of data, and each compiles anew: "
        f"{name} was {kinds[-2][name]} and is {leaves[name]} now. Give all batches the "
        "same shapes, for example by dropping the last, incomplete one, and make what "
        "changes an array.",
        stacklevel=2,
    )


def _fingerprint(tree: PyTree) -> tuple[Any, ...]:
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef, *(_describe(x) if is_array_or_numpy(x) else x for x in leaves)


def _describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if is_array_or_numpy(x) else repr(x)
