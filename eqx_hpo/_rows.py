"""Holds the rows of a history as bytes, in memory or in a file of their own.

All rows have the same length, and each has a checksum. They are written as they come. A
run that continues cuts off the rows after its checkpoint.
"""

import contextlib
import json
import math
import os
import pathlib
import zlib
from typing import Any

import jax.tree_util as jtu
import numpy as np
from jaxtyping import UInt8

from ._solution import Record


_CHECKSUM = 4  # bytes at the end of each row


class Rows:
    """Holds rows of a history. Rows that could not be written to the file wait in
    memory."""

    def __init__(self, row: Record):
        """**Arguments:**

        - `row`: a record of arrays, or of `jax.ShapeDtypeStruct`s.
        """
        leaves, self._treedef = jtu.tree_flatten(row)
        self._fields = [(np.dtype(x.dtype), tuple(x.shape)) for x in leaves]
        self._sizes = [dtype.itemsize * math.prod(s) for dtype, s in self._fields]
        self._length = sum(self._sizes) + _CHECKSUM
        fields = [[str(dtype), shape] for dtype, shape in self._fields]
        self._head = (json.dumps({"eqx_hpo history": fields}) + "\n").encode()
        self._waiting: list[UInt8[np.ndarray, "rows bytes"]] = []
        self._path: pathlib.Path | None = None
        self._file: Any = None
        self._written = 0  # rows in the file

    def append(self, block: Record) -> None:
        """Adds rows: a record whose arrays have a leading axis."""
        self._waiting.append(self._encode(block))
        if self._file is not None:
            with contextlib.suppress(OSError):  # `flush` will tell
                self.flush()

    def count(self) -> int:
        """Counts all rows."""
        return self._written + sum(map(len, self._waiting))

    def load(self) -> Record:
        """Returns all rows, as one record with a leading axis."""
        return self._decode(self.content())

    def content(self) -> UInt8[np.ndarray, "rows bytes"]:
        """Returns all rows as bytes."""
        return np.concatenate([self._read(), *self._waiting])

    def restore(self, content: np.ndarray, until: int) -> int:
        """Reads the rows up to step `until` from bytes. Returns their number."""
        count = len(content) // self._length
        rows = content[: count * self._length].reshape(count, self._length)
        steps = self._decode(rows).step
        good = (self._checksums(rows) == rows[:, -_CHECKSUM:]).all(1) & (steps <= until)
        count = count if good.all() else int(np.argmin(good))
        self._waiting = [rows[:count]]
        return count

    def restore_file(self, path: pathlib.Path, until: int) -> int:
        """Reads the rows up to step `until` from a file. Returns their number, which is
        0 if the file does not hold such rows."""
        try:
            content = path.read_bytes()
        except OSError:
            return 0
        if not content.startswith(self._head):
            return 0
        rows = np.frombuffer(content, np.uint8, offset=len(self._head))
        return self.restore(rows, until)

    def write_to(self, path: pathlib.Path, kept: int) -> None:
        """Keeps the rows in a file from now on. The file already holds the first `kept`
        rows.

        **Raises:** an `OSError`.
        """
        self._path = path
        self._open("r+b" if kept > 0 else "w+b", kept)
        self._file.truncate(self._end())

    def flush(self) -> None:
        """Writes all rows to the file.

        **Raises:** an `OSError`. The rows then wait for another try.
        """
        if self._path is None:
            return
        if not self._is_in_place():
            self._open("w+b", 0)
        if len(self._waiting) > 0:
            rows = np.concatenate(self._waiting)
            head = self._head if self._written == 0 else b""
            _write_at(self._file, self._end(), head + rows.tobytes())
            self._waiting, self._written = [], self._written + len(rows)

    def sync(self) -> None:
        """Forces the written rows to disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _open(self, mode: str, kept: int) -> None:
        """Opens a file that holds the first `kept` rows. The others wait."""
        assert self._path is not None
        content = self.content()
        file = open(self._path, mode, buffering=0)
        self.close()
        self._file, self._written, self._waiting = file, kept, [content[kept:]]

    def _end(self) -> int:
        if self._written == 0:
            return 0
        return len(self._head) + self._written * self._length

    def _is_in_place(self) -> bool:
        """Tells whether the file is still there."""
        assert self._path is not None
        if self._file is None:
            return False
        try:
            there = os.stat(self._path)
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._file.fileno()))

    def _read(self) -> UInt8[np.ndarray, "rows bytes"]:
        if self._written == 0:
            return np.empty((0, self._length), np.uint8)
        # A file that was deleted can still be read.
        self._file.seek(len(self._head))
        content = np.fromfile(self._file, np.uint8, self._written * self._length)
        return content.reshape(-1, self._length)

    def _encode(self, block: Record) -> UInt8[np.ndarray, "rows bytes"]:
        leaves = [np.asarray(x, order="C") for x in jtu.tree_leaves(block)]
        count = len(leaves[0])
        parts = [x.reshape(count, -1).view(np.uint8) for x in leaves if x.size > 0]
        rows = np.concatenate([*parts, np.zeros((count, _CHECKSUM), np.uint8)], axis=1)
        rows[:, -_CHECKSUM:] = self._checksums(rows)
        return rows

    def _decode(self, rows: UInt8[np.ndarray, "rows bytes"]) -> Record:
        leaves, start = [], 0
        for (dtype, shape), size in zip(self._fields, self._sizes):
            part = np.ascontiguousarray(rows[:, start : start + size])
            leaves.append(part.view(dtype).reshape(len(rows), *shape))
            start += size
        return jtu.tree_unflatten(self._treedef, leaves)

    def _checksums(
        self, rows: UInt8[np.ndarray, "rows bytes"]
    ) -> UInt8[np.ndarray, "rows 4"]:
        sums = [zlib.crc32(row[:-_CHECKSUM]) for row in np.ascontiguousarray(rows)]
        return np.array(sums, "<u4").reshape(-1, 1).view(np.uint8)


def _write_at(file: Any, start: int, content: bytes) -> None:
    """Writes to the end of a file, over the remains of a failed try."""
    file.truncate(start)
    file.seek(start)
    left = memoryview(content)
    while len(left) > 0:
        left = left[file.write(left) :]
