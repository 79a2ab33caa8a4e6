"""Saving a state to a file, and loading it back."""

import json
import os
import pathlib
import tempfile
from typing import Any

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu

from ._checks import check_path
from ._misc import is_array_or_numpy, is_typed_key
from ._state import BilevelState, check_state


_FORMAT = "eqx_hpo.BilevelState"
_VERSION = 1


def save(path: str | os.PathLike[str], state: BilevelState) -> None:
    """Writes a state to a file.

    The file is first written under another name and then moved in place. A run that
    dies meanwhile leaves the last good file.

    **Arguments:**

    - `path`: of the file. An existing one is replaced.
    - `state`: a [`eqx_hpo.BilevelState`][].

    **Raises:** an `OSError` if the file cannot be written; a `ValueError` if `state` is
    something else.
    """
    check_state("state", state)
    check_path("path", path)
    path = pathlib.Path(path)
    header = {"format": _FORMAT, "version": _VERSION, "leaves": _specs(state)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write((json.dumps(header) + "\n").encode())
            eqx.tree_serialise_leaves(file, _without_keys(state))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str], like: BilevelState) -> BilevelState:
    """Reads a state that [`eqx_hpo.save`][] wrote.

    **Arguments:**

    - `path`: of the file.
    - `like`: a state of the same structure, shapes and dtypes: make it by `init` of
        the same algorithm with the same arguments.

    **Returns:** the saved state, bit for bit.

    **Raises:** a `ValueError` if the file is not such a state, or of another structure.
    """
    check_path("path", path)
    check_state("like", like)
    with open(path, "rb") as file:
        header = _read_header(file.readline(), path)
        _check_specs(header["leaves"], _specs(like))
        keyless = eqx.tree_deserialise_leaves(file, _without_keys(like))
    restore = lambda x, y: (
        jr.wrap_key_data(x, impl=jr.key_impl(y)) if is_typed_key(y) else x
    )
    return jtu.tree_map(restore, keyless, like)


def _read_header(line: bytes, path: Any) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"`{path}` is not a state saved by `eqx_hpo.save`.")
    if header["version"] != _VERSION:
        raise ValueError(
            f"`{path}` has version {header['version']} of the file format; this "
            f"eqx_hpo reads version {_VERSION}."
        )
    return header


def _check_specs(saved: dict[str, str], like: dict[str, str]) -> None:
    for name in [*saved, *like]:
        got, expected = saved.get(name, "nothing"), like.get(name, "nothing")
        if got != expected:
            raise ValueError(
                f"`like` does not match the saved state: `state{name}` is {got} in the "
                f"file and {expected} in `like`. Make `like` by `init` of the same "
                "algorithm with the same arguments (`HyperDistill` needs `train`)."
            )


def _specs(state: BilevelState) -> dict[str, str]:
    """Lists the shape and dtype of each array, by its place in the state."""
    leaves = jtu.tree_leaves_with_path(state)
    return {
        jtu.keystr(path): f"{x.dtype}{list(x.shape)}"
        for path, x in leaves
        if is_array_or_numpy(x)
    }


def _without_keys(state: BilevelState) -> BilevelState:
    return jtu.tree_map(lambda x: jr.key_data(x) if is_typed_key(x) else x, state)
