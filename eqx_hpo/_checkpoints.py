"""The checkpoints of a run: when they are made, what they hold, and how the same call
continues from them."""

import concurrent.futures
import contextlib
import importlib.metadata
import os
import pathlib
import time
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from ._checks import as_flag, as_int, as_number, check_one_of, check_path, shown
from ._container import DamagedFile
from ._misc import is_typed_key
from ._monitor import Best, Readings, Watcher
from ._orbax_store import OrbaxStore
from ._processes import agree, at_first
from ._run import Run
from ._signals import as_signals
from ._solution import Course
from ._stores import AbstractStore, FileStore, FolderStore, Keep, Snapshot


_BACKENDS = ("file", "orbax")
_COURSE = ("first", "best", "best_step")
_PACKAGES = ("eqx_hpo", "jax", "equinox", "optax", "numpy")


class Checkpoints(eqx.Module):
    """Saves a run of [`eqx_hpo.tune`][] or [`eqx_hpo.fit`][] as it goes. The same
    script, started again, continues where the last one ended.

    ```python
    checkpoint = hpo.Checkpoints("runs/decay", every=500)
    solution = hpo.tune(..., steps=10_000, checkpoint=checkpoint)
    ```

    The result then equals that of an uninterrupted run bit for bit, with the whole
    history. If the earlier run had finished, the call returns its solution at once.

    A checkpoint holds the state, the best state and the readings of a monitor, and the
    position of the data. It also holds the key, the class of the algorithm and the
    class of each placeholder, to be compared with those of the call. The history is
    kept in a separate file. Nothing is ever unpickled.

    A save that fails does not end the run. There is a warning, the run tries again at
    the next save, and `solution.message` mentions it.
    """

    folder: str = eqx.field(static=True)
    every: int = eqx.field(static=True)
    minutes: float | None = eqx.field(static=True)
    keep_last: int = eqx.field(static=True)
    keep_best: int = eqx.field(static=True)
    backend: str = eqx.field(static=True)
    resume: bool = eqx.field(static=True)
    signals: tuple[Any, ...] = eqx.field(static=True)

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 1000,
        minutes: float | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        backend: str = "file",
        resume: bool = True,
        signals: tuple[Any, ...] = ("SIGTERM",),
    ):
        """**Arguments:**

        - `folder`: the folder of the checkpoints. It is created if it does not exist. A
            folder belongs to one run.
        - `every`: the number of steps between two saves. The run is saved after each
            step whose number is a multiple of it. The run does not wait for the disk: a
            save that falls due while the last one is still being written is left out.
        - `minutes`: the run is also saved when this many minutes have passed since the
            last save. `None` means that time does not count.
        - `keep_last`: the number of checkpoints to keep. If the newest cannot be read,
            the run continues from the one before.
        - `keep_best`: the number of best states to keep, of those that were the best by
            a `monitor` when they came.
        - `backend`: how arrays are written. Use `"file"` if one process holds each
            array as a whole. Use `"orbax"` if arrays are split over the devices of
            several processes. It needs the extra `orbax`, and all processes must see
            the folder.
        - `resume`: whether to continue from the checkpoints in the folder. `False`
            begins anew and removes them.
        - `signals`: the names or numbers of the signals at which the run saves and
            returns with `RESULTS.preempted`. A scheduler sends SIGTERM before it kills.
            It sends SIGUSR1 if asked to (`sbatch --signal=USR1@60`).

        **Raises:** a `ValueError` if an argument is out of range. The run raises one if
        the folder cannot be written or holds another run.
        """
        check_path("folder", folder)
        check_one_of("backend", backend, _BACKENDS)
        self.folder = os.fspath(folder)
        self.every = as_int("every", every, 1)
        self.minutes = None
        if minutes is not None:
            self.minutes = float(as_number("minutes", minutes, zero=False))
        self.keep_last = as_int("keep_last", keep_last, 1)
        self.keep_best = as_int("keep_best", keep_best, 1)
        self.backend = backend
        self.resume = as_flag("resume", resume)
        self.signals = as_signals("signals", signals)


class Keeper:
    """Saves a run, and restores it."""

    def __init__(self, checkpoints: Checkpoints, store: AbstractStore):
        self.settings = checkpoints
        self._store = store
        self._place = pathlib.Path(checkpoints.folder)
        self._needs: dict[int, int | None] = {}  # by checkpoint, the best state's step
        # The step of the snapshot under way, the best state it needs, and its end.
        self._writing: tuple[int, int | None, concurrent.futures.Future] | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._saved: Any = None  # the step of the last snapshot, and whether it stopped
        self._saved_at = time.monotonic()
        self._failures: list[tuple[int, str]] = []
        self._facts: dict[str, Any] = {}
        self._is_ready = False

    def begin(
        self, run: Run, watcher: Watcher | None, algorithm: Any, key: Any
    ) -> bool:
        """Checks that the place can be written, and continues from a checkpoint if
        there is one. Returns whether the callback had ended that run."""
        self._facts = {
            "algorithm": _name(algorithm),
            "key": _numbers_of(key),
            "began": run.began,
            "versions": {x: importlib.metadata.version(x) for x in _PACKAGES},
        }
        run.check_positions()
        try:
            self._store.prepare(run.state, clear=not self.settings.resume)
            snapshot = self._newest(run) if self.settings.resume else None
            kept = 0 if snapshot is None else self._restore(run, watcher, snapshot)
            history = self._store.history
            if history is not None:
                at_first(lambda: run.rows.write_to(history, kept))
        except OSError as e:
            raise ValueError(
                f"`checkpoint` cannot be written to `{self._place}`: {e}"
            ) from e
        self._is_ready = True
        return snapshot is not None and snapshot.header["stopped"]

    def is_due(self) -> bool:
        """Tells whether the minutes between two saves are over."""
        minutes = self.settings.minutes
        if minutes is None:
            return False
        return agree(time.monotonic() - self._saved_at >= 60 * minutes) == 1

    def save(self, run: Run, watcher: Watcher | None) -> None:
        """Starts to save a run, unless the last save is still under way."""
        is_busy = self._writing is not None and not self._writing[2].done()
        if agree(is_busy) == 0:
            self._collect()
            self._try(run, watcher, stopped=False)

    def finish(self, run: Run, watcher: Watcher | None, stopped: bool) -> None:
        """Saves the end of a run, and waits until it is written."""
        self._collect()
        if self._is_ready and run.has_begun() and run.is_alive():
            self._try(run, watcher, stopped)
            self._collect()
        self._writer.shutdown()
        self._store.close()

    def describe(self) -> str:
        """Describes the saves that failed. Returns an empty string if there are
        none."""
        if len(self._failures) == 0:
            return ""
        step, reason = self._failures[-1]
        return (
            f" Saves that failed: {len(self._failures)}, the last one at step {step}: "
            f"{reason}."
        )

    def _newest(self, run: Run) -> Snapshot | None:
        """Reads the newest readable checkpoint, if it belongs to this run."""
        steps, reasons = self._store.steps(), []
        for number in reversed(steps):
            try:
                header = self._store.header(number)
                if not self._is_ours(header, run.began):
                    return None
                snapshot = self._store.read(number, run.state)
            except (DamagedFile, OSError) as e:
                reasons.append(str(e))
                continue
            for reason in reasons:
                warnings.warn(f"{reason} The run goes on from step {snapshot.step}.")
            self._note_kept(steps, number)
            return snapshot
        if len(reasons) > 0:
            raise ValueError(
                f"{reasons[0]} (`checkpoint`: to begin anew in its place, give "
                "`Checkpoints(..., resume=False)`.)"
            )
        return None

    def _is_ours(self, header: dict[str, Any], began: int) -> bool:
        """Tells whether a checkpoint belongs to this run, and not to an earlier one
        whose last state this run continues from."""
        if header.get("began") != began and header["step"] == began:
            return False
        for name, what in (
            ("began", "the step at which the run began"),
            ("algorithm", "the algorithm"),
            ("key", "`key`"),
        ):
            there = header.get(name, "unknown")  # as where `save` wrote the file
            if there != self._facts[name]:
                raise ValueError(
                    f"`checkpoint`: `{self._place}` is of another run: {what} is "
                    f"{there} there and {self._facts[name]} here. Give "
                    "another place, or `Checkpoints(..., resume=False)` to begin anew."
                )
        return True

    def _note_kept(self, steps: list[int], newest: int) -> None:
        for step in (x for x in steps if x <= newest):
            with contextlib.suppress(DamagedFile, OSError):
                self._needs[step] = self._store.header(step).get("best")

    def _restore(self, run: Run, watcher: Watcher | None, snapshot: Snapshot) -> int:
        """Continues the run from a snapshot. Returns the number of rows of the
        history."""
        extra, header = snapshot.extra, snapshot.header
        if self._store.history is None:
            count = run.rows.restore(extra["history"], snapshot.step)
        else:
            count = run.rows.restore_file(self._store.history, snapshot.step)
        if count != header["rows"]:
            warnings.warn(
                f"The history at `{self._place}` is damaged: {count} of "
                f"{header['rows']} rows are left."
            )
        course = Course(*(jnp.asarray(extra[f"course.{x}"]) for x in _COURSE))
        run.go_on(snapshot.state, course, header["data"])
        if watcher is not None and "monitor.step" in extra:
            best = snapshot.best
            if best is not None:
                best = Best(best[1], header["best_value"], best[0])
            readings = Readings(extra["monitor.step"], extra["monitor.value"])
            watcher.go_on(readings, best)
        self._saved = snapshot.step, header["stopped"]
        return count

    def _try(self, run: Run, watcher: Watcher | None, stopped: bool) -> None:
        if self._saved == (run.step, stopped):
            return
        self._saved_at = time.monotonic()
        try:
            snapshot = self._snapshot(run, watcher, stopped)
            write = self._store.put(snapshot, self._keep(snapshot))
            run.rows.flush()

            def work():
                run.rows.sync()
                write()

            need = None if snapshot.best is None else snapshot.best[0]
            self._writing = run.step, need, self._writer.submit(work)
            self._saved = run.step, stopped
        except Exception as e:
            self._fail(run.step, e)

    def _snapshot(self, run: Run, watcher: Watcher | None, stopped: bool) -> Snapshot:
        run.record_rows()
        course = jax.device_get(run.course)
        extra = {f"course.{x}": getattr(course, x) for x in _COURSE}
        header = self._facts | {
            "data": run.positions(),
            "rows": run.rows.count(),
            "stopped": stopped,
        }
        best = None
        if self._store.history is None:
            extra["history"] = run.rows.content().reshape(-1)
        if watcher is not None:
            readings = watcher.readings()
            extra |= {"monitor.step": readings.step, "monitor.value": readings.value}
            if watcher.best is not None:
                best = watcher.best.step, watcher.best.state
                header["best_value"] = watcher.best.value
        return Snapshot(run.step, run.state, extra, header, best)

    def _keep(self, snapshot: Snapshot) -> Keep:
        """Chooses what to keep once `snapshot` is written."""
        needs = {**self._needs, snapshot.step: snapshot.best and snapshot.best[0]}
        steps = sorted(needs)[-self.settings.keep_last :]
        bests = {best for x in steps if (best := needs[x]) is not None}
        newest = sorted({*self._store.bests(), *bests})[-self.settings.keep_best :]
        self._needs = {x: needs[x] for x in steps if x in self._needs}
        return Keep({*steps}, {*bests, *newest})

    def _collect(self) -> None:
        """Waits for the save under way, if there is one."""
        if self._writing is None:
            return
        (step, need, written), self._writing = self._writing, None
        error = written.exception()
        if agree(error is not None) == 0:
            self._needs[step] = need
            return
        self._saved = None
        self._fail(step, error or OSError("another process could not write"))

    def _fail(self, step: int, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._failures.append((step, reason))
        warnings.warn(
            f"The checkpoint of step {step} could not be saved ({reason}). The run "
            "goes on, and tries again at the next one.",
            stacklevel=2,
        )


def make_keeper(checkpoint: Any, every: int) -> Keeper | None:
    """Makes the object that saves a run, from the argument `checkpoint` of a driver.
    This is a `Checkpoints`, or the path of a folder or of a file. With a path, the run
    is saved after every `every` steps."""
    if checkpoint is None:
        return None
    if not isinstance(checkpoint, Checkpoints):
        if not isinstance(checkpoint, (str, os.PathLike)) or checkpoint == "":
            raise ValueError(
                "`checkpoint` must be an `eqx_hpo.Checkpoints`, the path of a file, or "
                f"`None`; got {shown(checkpoint)}."
            )
        checkpoint = Checkpoints(checkpoint, every=every)
        path = pathlib.Path(checkpoint.folder)
        if not path.is_dir():
            return Keeper(checkpoint, FileStore(path))
    make = OrbaxStore if checkpoint.backend == "orbax" else FolderStore
    return Keeper(checkpoint, make(pathlib.Path(checkpoint.folder)))


def _name(algorithm: Any) -> str:
    inner = getattr(algorithm, "algorithm", None)
    name = type(algorithm).__qualname__
    return name if inner is None else f"{name}({_name(inner)})"


def _numbers_of(key: Any) -> Any:
    if key is None:
        return None
    data = jr.key_data(key) if is_typed_key(key) else key
    return np.asarray(data).tolist()
