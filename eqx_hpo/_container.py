"""A file of named arrays, each with a checksum, and a header.

The arrays come first, one after the other. Then comes the header as JSON, with the
name, dtype, shape and checksum of each array. Last comes the length and the checksum of
the header itself. So only one array at a time is in memory, and nothing is ever
unpickled. A file that was cut short, changed or made by something else is detected
before it is used.
"""

import contextlib
import glob
import json
import math
import os
import pathlib
import secrets
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


_MAGIC = b"eqx_hpo "
_VERSION = b"00000002\n"
_FOOTER = struct.Struct("<QI4s")  # length and checksum of the header, end mark
_END = b"done"
_LONGEST_HEADER = 2**28


class DamagedFile(ValueError):
    """A file that this package did not write, or that is no longer whole."""


class Entry(NamedTuple):
    """Describes an array in a file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    checksum: int
    offset: int

    def size(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def spec(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def write_file(
    path: pathlib.Path, header: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Writes a file under another name and moves it in place. A process that dies
    meanwhile leaves the last good file.

    **Raises:** an `OSError`. Nothing is left behind then.
    """
    remove_partial(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    # With the mode that the umask gives, unlike the files of `tempfile`.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + _VERSION)
            index = [[name, *_write_array(file, x)] for name, x in arrays.items()]
            text = json.dumps({**header, "arrays": index}).encode()
            file.write(text)
            file.write(_FOOTER.pack(len(text), zlib.crc32(text), _END))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def remove_partial(path: pathlib.Path) -> None:
    """Removes the remains that a killed process left of `path`."""
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            stray.unlink()


def sync_folder(folder: pathlib.Path) -> None:
    """Forces the names in a folder to disk, if the system can do so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_array(file: Any, array: Any) -> list[Any]:
    array = np.asarray(array, order="C")
    content = array.reshape(-1).view(np.uint8)
    file.write(content)
    return [str(array.dtype), list(array.shape), zlib.crc32(content)]


class Container:
    """Holds a file that `write_file` wrote, open for reading. The constructor reads the
    header.

    **Raises:** a `DamagedFile` if the file is not of this kind or is not whole. An
    `OSError` if it cannot be read.
    """

    def __init__(self, path: Any):
        self.path = path
        self._file = open(path, "rb")
        try:
            self.header = self._read_header()
            self.entries = self._read_entries()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """Reads an array, and compares its checksum."""
        entry = self.entries[name]
        content = bytearray(entry.size())
        self._file.seek(entry.offset)
        self._file.readinto(content)
        if zlib.crc32(content) != entry.checksum:
            raise self.damaged(f"`{name}` is not as it was written")
        return np.frombuffer(content, entry.dtype).reshape(entry.shape)

    def damaged(self, reason: str) -> DamagedFile:
        return DamagedFile(
            f"`{self.path}` is damaged: {reason}. Take an older file, or delete it and "
            "start anew."
        )

    def _read_header(self) -> dict[str, Any]:
        size = os.fstat(self._file.fileno()).st_size
        start = len(_MAGIC) + len(_VERSION)
        first = self._file.read(start)
        if not first.startswith(_MAGIC):
            raise DamagedFile(f"`{self.path}` is not a state saved by `eqx_hpo.save`.")
        if first[len(_MAGIC) :] != _VERSION:
            version = first[len(_MAGIC) :].strip().lstrip(b"0").decode(errors="replace")
            raise DamagedFile(
                f"`{self.path}` has version {version} of the file format; this eqx_hpo "
                f"reads version {int(_VERSION)}."
            )
        if size < start + _FOOTER.size:
            raise self.damaged("it was cut short")
        self._file.seek(size - _FOOTER.size)
        length, checksum, end = _FOOTER.unpack(self._file.read(_FOOTER.size))
        self._end_of_arrays = size - _FOOTER.size - length
        if end != _END or self._end_of_arrays < start or length > _LONGEST_HEADER:
            raise self.damaged("it was cut short, or has no end that makes sense")
        self._file.seek(self._end_of_arrays)
        text = self._file.read(length)
        if zlib.crc32(text) != checksum:
            raise self.damaged("its header is not as it was written")
        return self._parsed(text)

    def _parsed(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict) or not isinstance(header.get("arrays"), list):
            raise self.damaged("its header is no header")
        return header

    def _read_entries(self) -> dict[str, Entry]:
        offset, entries = len(_MAGIC) + len(_VERSION), {}
        try:
            for name, dtype, shape, checksum in self.header.pop("arrays"):
                entry = Entry(jnp.dtype(dtype), tuple(shape), checksum, offset)
                if entry.dtype.hasobject or min(entry.shape, default=0) < 0:
                    raise ValueError
                entries[name] = entry
                offset += entry.size()
        except (TypeError, ValueError):
            raise self.damaged("its header lists no arrays") from None
        if offset != self._end_of_arrays:
            raise self.damaged("its arrays are not of the size that they should have")
        return entries
