"""Stores the checkpoints of a run by Orbax. Their arrays may be split over processes.

A checkpoint is a folder. It holds a folder with the arrays, which Orbax writes, and a
file of ours with the header, the checksums, and what Orbax does not take. The folder
has another name until it is complete. Each process calls the same methods in the same
order. The first process does what is to be done only once.
"""

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checkpoint import arrays_of, check_match, facts_of, fill, place
from ._checksum import checksum
from ._container import Container, DamagedFile, remove_partial, sync_folder, write_file
from ._processes import agree, at_first, is_first
from ._state import BilevelState
from ._stores import AbstractStore, host_copies, Keep, Snapshot


_KINDS = ("step", "best")
_ARRAYS, _HEADER = "arrays", "header"  # what is in a folder
_SPLIT = "split"  # where a header lists the arrays that Orbax has


def import_orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as e:
        raise ImportError(
            '`Checkpoints(backend="orbax")` needs Orbax: '
            "`pip install 'eqx_hpo[orbax]'`."
        ) from e
    return orbax.checkpoint


class OrbaxStore(AbstractStore):
    """Stores checkpoints in a folder, with a folder for each checkpoint and for each
    best state."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder.absolute()
        self.history = self._folder / "history"
        self._orbax = import_orbax()
        # Two, so that a checkpoint does not wait for the best state that it needs.
        self._savers = {kind: self._make_saver(kind) for kind in _KINDS}
        self._whole: set[pathlib.Path] = set()  # what this process has written or read

    def prepare(self, state: BilevelState, clear: bool) -> None:
        self._check(state)

        def work():
            self._tidy()
            if clear:
                self._remove(Keep(set(), set()))
            for folder in self._folder.glob("*-*/"):
                remove_partial(folder / _HEADER)
            trial = self._folder / "trial"
            write_file(trial, {}, {})
            trial.unlink()

        at_first(work)

    def steps(self) -> list[int]:
        return self._numbers("step")

    def bests(self) -> list[int]:
        return self._numbers("best")

    def header(self, step: int) -> dict[str, Any]:
        with Container(self._path("step", step) / _HEADER) as file:
            return file.header

    def read(self, step: int, like: BilevelState) -> Snapshot:
        state, header, extra = self._read(self._path("step", step), like)
        best, number = None, header.get("best")
        if number is not None:
            best = number, self._read(self._path("best", number), like)[0]
        return Snapshot(int(state.step), state, extra, header, best)

    def put(self, snapshot: Snapshot, keep: Keep) -> Callable[[], None]:
        for saver in self._savers.values():
            with contextlib.suppress(Exception):  # of a save that failed
                saver.wait_until_finished()
        at_first(self._tidy)
        header = {**snapshot.header, "best": None}
        writes = []
        if snapshot.best is not None:
            header["best"], best = snapshot.best
            path = self._path("best", header["best"])
            if not self._has(path):
                writes.append(self._begin(path, best, {}, {}, False))
        path = self._path("step", snapshot.step)
        has = self._has(path)
        writes.append(self._begin(path, snapshot.state, header, snapshot.extra, has))

        def write():
            for finish in writes:  # the best state before the checkpoint that needs it
                finish()
            if is_first():
                self._remove(keep)

        return write

    def close(self) -> None:
        for saver in self._savers.values():
            with contextlib.suppress(Exception):
                saver.close()
        if is_first():
            with contextlib.suppress(OSError):
                self._tidy()

    def _make_saver(self, kind: str) -> Any:
        options = self._orbax.options
        return self._orbax.AsyncCheckpointer(
            self._orbax.PyTreeCheckpointHandler(),
            # Else two saves at a time may take the folders of each other for theirs.
            async_options=options.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=options.MultiprocessingOptions(
                barrier_sync_key_prefix=kind
            ),
        )

    def _check(self, state: BilevelState) -> None:
        """Refuses a state that cannot be saved, before the run begins."""
        import tensorstore

        if any(self._folder.glob("*.ckpt")):
            raise ValueError(
                f"`checkpoint`: `{self._folder}` holds checkpoints of the backend "
                '"file". Give another folder, or that backend.'
            )
        for name, x in _divide(arrays_of(state))[0].items():
            try:
                tensorstore.dtype(str(x.dtype))
            except ValueError as e:
                raise ValueError(
                    f"`checkpoint`: Orbax does not save `{name}`, whose dtype is "
                    f"{x.dtype}. Use another dtype, or `Checkpoints(folder)`."
                ) from e

    def _begin(
        self,
        path: pathlib.Path,
        state: BilevelState,
        header: dict[str, Any],
        extra: Mapping[str, np.ndarray],
        has_arrays: bool,
    ) -> Callable[[], None]:
        """Begins to save a state. Returns a function that waits for the end and moves
        the checkpoint in place."""
        split, rest = _divide(arrays_of(state))
        sums = {name: checksum(x) for name, x in split.items()}
        rest, specs = host_copies({**rest, **extra}), _specs(split)
        facts = {**facts_of(state), **header}  # `finish` keeps no state alive
        saver = self._savers[path.name.partition("-")[0]]
        folder = path if has_arrays else path.with_name(f"{path.name}.partial")
        if not has_arrays:
            at_first(folder.mkdir)
            if len(split) > 0:
                args = self._orbax.args.PyTreeSave(_numbered(split))
                saver.save(folder / _ARRAYS, args=args)

        def finish():
            saver.wait_until_finished()
            found = {name: int(x) for name, x in sums.items()}
            listed = {name: [spec, found[name]] for name, spec in specs.items()}
            if is_first():
                write_file(folder / _HEADER, {**facts, _SPLIT: listed}, rest)
                if not has_arrays:
                    self._move(folder, path)
                self._whole.add(path)

        return finish

    def _read(
        self, path: pathlib.Path, like: BilevelState
    ) -> tuple[BilevelState, dict[str, Any], dict[str, np.ndarray]]:
        with Container(path / _HEADER) as file:
            split = file.header.pop(_SPLIT, {})
            specs = {k: x.spec() for k, x in file.entries.items() if _is_of_state(k)}
            specs |= {name: spec for name, (spec, _) in split.items()}
            check_match(specs, file.header, like, f"`{path}`")
            likes = arrays_of(like)
            arrays = self._restore(path, {name: likes[name] for name in split})
            for name, (_, expected) in split.items():
                if int(checksum(jnp.asarray(arrays[name]))) != expected:
                    raise _damaged(path, f"`{name}` is not as it was written")
            arrays |= {name: file.read(name) for name in file.entries}
        state = fill(like, file.header, arrays.__getitem__)
        self._whole.add(path)
        extra = {name: x for name, x in arrays.items() if not _is_of_state(name)}
        return state, file.header, extra

    def _restore(self, path: pathlib.Path, likes: dict[str, Any]) -> dict[str, Any]:
        """Reads the arrays that Orbax saved, and places each like the one in
        `likes`."""
        if len(likes) == 0:
            return {}
        wanted = {name: self._restore_args(x) for name, x in likes.items()}
        args = self._orbax.args.PyTreeRestore(restore_args=_numbered(wanted))
        found, failure = {}, None
        try:
            numbered = self._savers["step"].restore(path / _ARRAYS, args=args)
            found = {name: numbered[str(i)] for i, name in enumerate(likes)}
            if _specs(found) != _specs(likes):
                raise ValueError("its arrays are of other shapes than it says")
        except Exception as e:
            failure = e
        if agree(failure is not None):
            raise _damaged(path, str(failure).partition("\n")[0]) from failure
        return {name: place(x, likes[name]) for name, x in found.items()}

    def _restore_args(self, like: Any) -> Any:
        if isinstance(like, jax.Array) and like.committed and _is_global(like):
            return self._orbax.ArrayRestoreArgs(sharding=like.sharding)
        return self._orbax.RestoreArgs(restore_type=np.ndarray)

    def _has(self, path: pathlib.Path) -> bool:
        """Tells whether a folder exists and is complete."""
        return at_first(lambda: path in self._whole and path.exists())

    def _move(self, folder: pathlib.Path, path: pathlib.Path) -> None:
        if path.exists():
            self._discard(path)
        os.replace(folder, path)
        sync_folder(self._folder)

    def _remove(self, keep: Keep) -> None:
        for kind, kept in zip(_KINDS, (keep.steps, keep.bests)):
            for number in set(self._numbers(kind)) - kept:
                self._discard(self._path(kind, number))

    def _discard(self, path: pathlib.Path) -> None:
        """Removes a folder. No half of it ever exists under its name."""
        self._whole.discard(path)
        gone = path.with_name(f"{path.name}.gone")
        os.replace(path, gone)
        shutil.rmtree(gone)

    def _tidy(self) -> None:
        """Makes the folder, and removes incomplete checkpoints from it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if re.fullmatch(r"(step|best)-\d+\.(partial|gone)", path.name):
                shutil.rmtree(path)

    def _path(self, kind: str, number: int) -> pathlib.Path:
        return self._folder / f"{kind}-{number:010d}"

    def _numbers(self, kind: str) -> list[int]:
        found = [re.fullmatch(rf"{kind}-(\d+)", x.name) for x in self._folder.iterdir()]
        return sorted(int(x[1]) for x in found if x is not None)


def _divide(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates the arrays that Orbax saves from the rest, which each process holds as
    a whole."""
    is_split = lambda x: isinstance(x, jax.Array) and x.size > 0 and _is_global(x)
    split = {name: x for name, x in arrays.items() if is_split(x)}
    return split, {name: x for name, x in arrays.items() if name not in split}


def _is_global(array: jax.Array) -> bool:
    """Tells whether an array is shared by all processes."""
    return jax.process_count() == 1 or not array.is_fully_addressable


def _is_of_state(name: str) -> bool:
    return name.startswith("state")


def _numbered(items: Mapping[str, Any]) -> dict[str, Any]:
    """Gives Orbax numbers for names, since it takes a slash in a name for a folder."""
    return {str(i): x for i, x in enumerate(items.values())}


def _specs(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def _damaged(path: pathlib.Path, reason: str) -> DamagedFile:
    return DamagedFile(f"`{path}` cannot be read: {reason}.")
