"""Saves a state to a file, and loads it back."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._checks import check_path
from ._container import Container, write_file
from ._hyperparameter import is_placeholder
from ._misc import is_array_or_numpy, is_typed_key
from ._state import BilevelState, check_state


_NUMBERS = (bool, int, float, complex)


def save(path: str | os.PathLike[str], state: BilevelState) -> None:
    """Writes a state to a file.

    The file is first written under another name, with a checksum for each array. When
    it is on disk, it is moved in place. A run that dies meanwhile leaves the last good
    file.

    **Arguments:**

    - `path`: the path of the file. An existing file is replaced.
    - `state`: an [`eqx_hpo.BilevelState`][]. Arrays that are split over devices are put
        together in the memory of the host, one at a time.

    **Raises:** an `OSError` if the file cannot be written. A `ValueError` if `state` is
    something else, or is split over the devices of several processes.
    """
    check_state("state", state)
    check_path("path", path)
    check_addressable(state)
    write_file(pathlib.Path(path), facts_of(state), arrays_of(state))


def load(path: str | os.PathLike[str], like: BilevelState) -> BilevelState:
    """Reads a state from a file that [`eqx_hpo.save`][] or a run with `checkpoint`
    wrote.

    **Arguments:**

    - `path`: the path of the file.
    - `like`: a state of the same structure, shapes, dtypes and placeholders. Make it by
        `init` of the same algorithm with the same arguments.

    **Returns:** the saved state, bit for bit. Each array is placed like the one in
    `like`: on the same device, or split over devices in the same way.

    **Raises:** a `ValueError` if the file holds no such state, is damaged, or has
    another structure. An `OSError` if it cannot be read.
    """
    check_path("path", path)
    check_state("like", like)
    with Container(path) as file:
        return read_state(file, like)


def read_state(file: Container, like: BilevelState, prefix: str = "") -> BilevelState:
    """Reads the state in a file whose arrays have names that begin with `prefix`."""
    saved = {
        name.removeprefix(prefix): entry.spec()
        for name, entry in file.entries.items()
        if name.startswith(prefix + "state")
    }
    check_match(saved, file.header, like, f"`{file.path}`")
    return fill(like, file.header, lambda name: file.read(prefix + name))


def fill(
    like: BilevelState, header: Mapping[str, Any], read: Callable[[str], Any]
) -> BilevelState:
    """Replaces the arrays in `like` by saved ones of the same names, and its Python
    numbers by those in the header of the file."""
    numbers = header.get("numbers", {})

    def saved(path, x):
        name = _name(path)
        if is_array_or_numpy(x):
            return place(read(name), x)
        return _as_number(numbers[name], x) if name in numbers else x

    return jtu.tree_map_with_path(saved, like)


def check_match(
    saved: dict[str, str], header: dict[str, Any], like: BilevelState, source: str
) -> None:
    """Checks that the specs of saved arrays, and the classes in the header of a file,
    match those of a state."""
    expected = {k: f"{x.dtype}{list(x.shape)}" for k, x in arrays_of(like).items()}
    there, here = {**header.get("classes", {})}, _classes_of(like)
    for got, wanted in ((there, here), (saved, expected)):
        for name in [*got, *wanted]:
            pair = got.get(name, "nothing"), wanted.get(name, "nothing")
            if pair[0] != pair[1]:
                raise ValueError(
                    f"`like` does not match the saved state: `{name}` is {pair[0]} in "
                    f"{source} and {pair[1]} in `like`. Make `like` by `init` of the "
                    "same algorithm with the same arguments (`HyperDistill` needs "
                    "`train`)."
                )


def arrays_of(tree: PyTree, root: str = "state") -> dict[str, Any]:
    """Lists the arrays of a pytree by their paths. PRNG keys are given by their
    data."""
    return {
        _name(path, root): jr.key_data(x) if is_typed_key(x) else x
        for path, x in jtu.tree_leaves_with_path(tree)
        if is_array_or_numpy(x)
    }


def facts_of(state: BilevelState) -> dict[str, Any]:
    """Lists what the header of a file says about a state: its step, the classes in it,
    and the Python numbers among its leaves."""
    numbers = {
        _name(path): [x.real, x.imag] if isinstance(x, complex) else x
        for path, x in jtu.tree_leaves_with_path(state)
        if isinstance(x, _NUMBERS)
    }
    step = int(state.step)
    return {"step": step, "classes": _classes_of(state), "numbers": numbers}


def _classes_of(state: BilevelState) -> dict[str, str]:
    """Lists the class of each placeholder and the kind of each PRNG key, which give the
    numbers of a state their meaning."""
    nodes = jtu.tree_leaves_with_path(state, is_leaf=is_placeholder)
    names = {
        _name(path): type(x).__qualname__ for path, x in nodes if is_placeholder(x)
    }
    keys = {_name(path): str(x.dtype) for path, x in nodes if is_typed_key(x)}
    return names | keys


def check_addressable(state: BilevelState) -> None:
    """Refuses a state that no process holds as a whole."""
    for name, x in arrays_of(state).items():
        whole = not isinstance(x, jax.Array) or (
            x.is_fully_addressable or x.is_fully_replicated
        )
        if not whole:
            raise ValueError(
                f"`{name}` is split over the devices of several processes, and a file "
                'is written by one. Use `Checkpoints(folder, backend="orbax")`.'
            )


def place(array: Any, like: Any) -> Any:
    """Places an array like the one in `like`: on a device, or on several. An array of
    JAX is already there."""
    if is_typed_key(like):
        data = place(array, jr.key_data(like))
        return jr.wrap_key_data(data, impl=jr.key_impl(like))
    if isinstance(array, jax.Array) or not isinstance(like, jax.Array):
        return array
    if not like.committed:
        return jnp.asarray(array)
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: array[index]
    )


def _name(path: Any, root: str = "state") -> str:
    return root + jtu.keystr(path)


def _as_number(saved: Any, like: Any) -> Any:
    return complex(*saved) if isinstance(like, complex) else saved
