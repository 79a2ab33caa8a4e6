"""Reads and sets the position of a data loader that reports it, in a form for JSON.

PyTorch's `StatefulDataLoader` and similar loaders have `state_dict` and
`load_state_dict`. The iterators of Grain have `get_state` and `set_state`.
"""

import base64
from typing import Any

import numpy as np

from ._checks import kind


_METHODS = (("state_dict", "load_state_dict"), ("get_state", "set_state"))
_TAG = "eqx_hpo"  # the key of what JSON itself has not


def has_state(loader: Any) -> bool:
    """Tells whether a loader, or an iterator, reports its position."""
    return any(all(hasattr(loader, x) for x in pair) for pair in _METHODS)


def get_state(name: str, loader: Any) -> Any:
    """Asks a loader for its position.

    **Raises:** a `ValueError` if it holds something that cannot be written.
    """
    (getter, _) = _methods(loader)
    return _encode(f"{name}.{getter}()", getattr(loader, getter)())


def set_state(loader: Any, state: Any) -> None:
    """Moves a loader to a position."""
    (_, setter) = _methods(loader)
    getattr(loader, setter)(_decode(state))


def _methods(loader: Any) -> tuple[str, str]:
    return next(pair for pair in _METHODS if all(hasattr(loader, x) for x in pair))


def _encode(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_encode(f"{name}[{i}]", x) for i, x in enumerate(value)]
    if isinstance(value, tuple):
        return {_TAG: ["tuple", _encode(name, list(value))]}
    if isinstance(value, dict):
        items = [[k, _encode(f"{name}[{k!r}]", x)] for k, x in value.items()]
        if all(isinstance(k, str) and k != _TAG for k in value):
            return dict(items)
        return {_TAG: ["dict", [[_encode(name, k), x] for k, x in items]]}
    if isinstance(value, (bytes, bytearray)):
        return {_TAG: ["bytes", base64.b64encode(value).decode()]}
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if not array.dtype.hasobject:
            text = base64.b64encode(array.tobytes()).decode()
            return {_TAG: ["array", [str(array.dtype), list(array.shape), text]]}
    raise ValueError(
        f"`{name}` is {kind(value)}, which a checkpoint cannot hold. It may have "
        "numbers, text, bytes, arrays, and lists, tuples and dictionaries of them."
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(x) for x in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {k: _decode(x) for k, x in value.items()}
    what, content = value[_TAG]
    if what == "tuple":
        return tuple(_decode(content))
    if what == "dict":
        return {_decode(k): _decode(x) for k, x in content}
    if what == "bytes":
        return base64.b64decode(content)
    dtype, shape, text = content
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy()
