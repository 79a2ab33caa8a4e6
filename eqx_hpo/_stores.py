"""Stores the checkpoints of a run in a folder of files, or in one file.

A thread writes a snapshot while the run continues. So its arrays are first copied to
the host: the next step overwrites their memory.
"""

import abc
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ._checkpoint import (
    arrays_of,
    check_addressable,
    facts_of,
    read_state,
)
from ._container import Container, remove_partial, write_file
from ._processes import at_first, is_first
from ._state import BilevelState


class Snapshot(NamedTuple):
    """Holds the content of a checkpoint: a state, some small arrays by name, a header
    for JSON, and the best state that a monitor has seen, with its step."""

    step: int
    state: BilevelState
    extra: dict[str, np.ndarray]
    header: dict[str, Any]
    best: tuple[int, BilevelState] | None


class Keep(NamedTuple):
    """Lists the steps of the checkpoints and of the best states to keep."""

    steps: set[int]
    bests: set[int]


class AbstractStore(abc.ABC):
    """Stores the checkpoints of a run by the number of their step. `history` is the
    file for the rows of the history. It is `None` if each checkpoint holds them."""

    history: pathlib.Path | None

    @abc.abstractmethod
    def prepare(self, state: BilevelState, clear: bool) -> None:
        """Removes the remains of a killed process, or everything if `clear`, and checks
        that the place can be written.

        **Raises:** an `OSError`. A `ValueError` if the store cannot hold such a state.
        """

    @abc.abstractmethod
    def steps(self) -> list[int]:
        """Lists the steps of the existing checkpoints, the newest last."""

    @abc.abstractmethod
    def bests(self) -> list[int]:
        """Lists the steps of the best states beside the checkpoints."""

    @abc.abstractmethod
    def header(self, step: int) -> dict[str, Any]:
        """Reads the header of a checkpoint.

        **Raises:** a `DamagedFile` or an `OSError`.
        """

    @abc.abstractmethod
    def read(self, step: int, like: BilevelState) -> Snapshot:
        """Reads a checkpoint.

        **Raises:** a `DamagedFile` or an `OSError`. A `ValueError` if its structure
        differs from that of `like`.
        """

    @abc.abstractmethod
    def put(self, snapshot: Snapshot, keep: Keep) -> Callable[[], None]:
        """Takes a snapshot, whose arrays may change afterwards. Returns a function for
        another thread. It writes the snapshot and then removes all but `keep`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Finishes all work that the store has begun."""


class FileStore(AbstractStore):
    """Stores one checkpoint in one file, together with the best state."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.history = None

    def prepare(self, state: BilevelState, clear: bool) -> None:
        del clear  # the first snapshot replaces it
        check_addressable(state)
        at_first(lambda: _try_out(self._path))

    def steps(self) -> list[int]:
        return [0] if self._path.exists() else []

    def bests(self) -> list[int]:
        return []

    def header(self, step: int) -> dict[str, Any]:
        with Container(self._path) as file:
            return file.header

    def read(self, step: int, like: BilevelState) -> Snapshot:
        with Container(self._path) as file:
            snapshot = _read(file, like)
            if snapshot.header.get("best") is None:
                return snapshot
            best = read_state(file, like, "best.")
        return snapshot._replace(best=(snapshot.header["best"], best))

    def put(self, snapshot: Snapshot, keep: Keep) -> Callable[[], None]:
        del keep
        if not is_first():
            return lambda: None
        header, arrays = _taken(snapshot)
        if snapshot.best is not None:
            best = host_copies(arrays_of(snapshot.best[1]))
            arrays |= {f"best.{name}": x for name, x in best.items()}
        return lambda: write_file(self._path, header, arrays)

    def close(self) -> None:
        pass


class FolderStore(AbstractStore):
    """Stores checkpoints in a folder, with a file for each checkpoint and for each best
    state."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self.history = folder / "history"
        self._whole: set[int] = set()  # best states that are there, and not damaged

    def prepare(self, state: BilevelState, clear: bool) -> None:
        check_addressable(state)
        if any(self._folder.glob("step-*/")):
            raise ValueError(
                f"`checkpoint`: `{self._folder}` holds checkpoints of the backend "
                '"orbax". Give another folder, or that backend.'
            )

        def work():
            self._folder.mkdir(parents=True, exist_ok=True)
            if clear:
                self._remove(Keep(set(), set()))
            for stray in self._folder.glob(".*.ckpt.*.partial"):
                stray.unlink(missing_ok=True)
            _try_out(self._file("step", 0))

        at_first(work)

    def steps(self) -> list[int]:
        return self._numbers("step")

    def bests(self) -> list[int]:
        return self._numbers("best")

    def header(self, step: int) -> dict[str, Any]:
        with Container(self._file("step", step)) as file:
            return file.header

    def read(self, step: int, like: BilevelState) -> Snapshot:
        with Container(self._file("step", step)) as file:
            snapshot = _read(file, like)
        number = snapshot.header.get("best")
        if number is None:
            return snapshot
        with Container(self._file("best", number)) as file:
            best = read_state(file, like)
        self._whole.add(number)
        return snapshot._replace(best=(number, best))

    def put(self, snapshot: Snapshot, keep: Keep) -> Callable[[], None]:
        if not is_first():
            return lambda: None
        self._folder.mkdir(parents=True, exist_ok=True)
        files = [(self._file("step", snapshot.step), *_taken(snapshot))]
        needs = []
        if snapshot.best is not None:
            number, state = snapshot.best
            needs.append(number)
            path = self._file("best", number)
            if number not in self._whole or not path.exists():
                arrays = host_copies(arrays_of(state))
                # Before the checkpoint, which needs it.
                files.insert(0, (path, facts_of(state), arrays))

        def write():
            for path, header, arrays in files:
                write_file(path, header, arrays)
            self._whole.update(needs)
            self._remove(keep)

        return write

    def close(self) -> None:
        pass

    def _remove(self, keep: Keep) -> None:
        for kind, kept in (("step", keep.steps), ("best", keep.bests)):
            for number in set(self._numbers(kind)) - kept:
                self._file(kind, number).unlink(missing_ok=True)

    def _file(self, kind: str, number: int) -> pathlib.Path:
        return self._folder / f"{kind}-{number:010d}.ckpt"

    def _numbers(self, kind: str) -> list[int]:
        names = [x.name for x in self._folder.glob(f"{kind}-*.ckpt")]
        found = [re.fullmatch(rf"{kind}-(\d+)\.ckpt", name) for name in names]
        return sorted(int(x[1]) for x in found if x is not None)


def host_copies(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies arrays to the memory of the host. On a CPU, JAX would only return a
    view."""
    fetched = jax.device_get(arrays)
    return {k: x if x.flags.owndata else x.copy() for k, x in fetched.items()}


def _taken(snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Copies a snapshot without its best state."""
    header = facts_of(snapshot.state) | snapshot.header
    header["best"] = None if snapshot.best is None else snapshot.best[0]
    return header, host_copies(arrays_of(snapshot.state) | snapshot.extra)


def _read(file: Container, like: BilevelState) -> Snapshot:
    names = [x for x in file.entries if not x.startswith(("state", "best."))]
    extra = {name: file.read(name) for name in names}
    state = read_state(file, like)
    return Snapshot(int(state.step), state, extra, file.header, None)


def _try_out(path: pathlib.Path) -> None:
    """Checks that files can be written next to `path`, by writing and removing one."""
    trial = path.with_name(f"{path.name}.trial")
    write_file(trial, {}, {})
    trial.unlink()
    remove_partial(path)
