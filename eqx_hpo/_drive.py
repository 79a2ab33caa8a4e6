"""The loop of the drivers: steps, and what is done between them."""

import os
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from ._checkpoint import save
from ._checks import (
    as_count,
    as_flag,
    as_int,
    check_function,
    check_key,
    check_path,
    check_type,
)
from ._jit import own_error_text
from ._monitor import Monitor, Watcher
from ._optimizer import AbstractBilevelOptimizer
from ._progress import catch_interrupt, ProgressBar
from ._run import Run
from ._solution import describe_skipped, RESULTS, Solution
from ._state import BilevelState, check_state


_MANY_SKIPPED = 0.1  # the share of skipped steps from which on there is a warning


# A number of steps, and what is done whenever it has passed: an item of `RESULTS` that
# it returns ends the run.
Event: TypeAlias = tuple[int, Callable[[], Any]]


class Companions:
    """What goes along with the steps of a run: a monitor, checkpoints, a callback and
    a progress bar, as the drivers take them."""

    def __init__(
        self,
        interval: int,
        monitor: Monitor | None,
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: int,
        callback: Callable[[BilevelState], Any] | None,
        progress: bool,
    ):
        if monitor is not None:
            what = "an `eqx_hpo.Monitor(metric, every=...)`, or `None`"
            check_type("monitor", monitor, Monitor, what)
        if checkpoint is not None:
            check_path("checkpoint", checkpoint)
        if callback is not None:
            check_function("callback", callback, "a function of the state, or `None`")
        self.watcher = None if monitor is None else Watcher(monitor)
        self.callback = callback
        self.progress = as_flag("progress", progress)
        self._interval = interval
        self._watch_every = 0 if monitor is None else monitor.every
        self._checkpoint = checkpoint
        self._checkpoint_every = as_int("checkpoint_every", checkpoint_every, 1)

    def check(self, start: int, steps: int) -> None:
        """Refuses a fresh run in which the monitor would read the start alone, and the
        solution be the model as it was given."""
        if start == 0 and steps < self._watch_every:
            raise ValueError(
                f"`monitor` reads every {self._watch_every} steps, and the run has "
                f"{steps}: it would see nothing but the start. Lower its `every`."
            )

    def events(self, run: Run) -> list[Event]:
        """Makes what is done after steps of `run`."""
        events = []
        if self.watcher is not None:
            events.append((self._watch_every, lambda: self.watch(run)))
        if self._checkpoint is not None:
            events.append((self._checkpoint_every, lambda: self.save(run)))
        if self.callback is not None:
            events.append((self._interval, lambda: self.call_back(run)))
        return events

    def watch(self, run: Run) -> Any:
        if self.watcher is None:
            return None
        self.watcher.look(run.state)
        return RESULTS.patience if self.watcher.is_over() else None

    def save(self, run: Run) -> None:
        if self._checkpoint is not None and run.is_alive():
            save(self._checkpoint, run.state)

    def call_back(self, run: Run) -> Any:
        assert self.callback is not None
        return RESULTS.stopped if asks_to_stop(self.callback, run.state) else None


def conduct(
    run: Run, steps: int, companions: Companions, before: list[Event], tunes: bool
) -> Solution:
    """Takes `steps` steps, with all that goes along."""
    companions.check(run.step, steps)
    after, watcher = companions.events(run), companions.watcher
    try:
        with ProgressBar(steps, companions.progress, tunes) as bar:
            companions.watch(run)
            # A callback may keep its state: no later step may overwrite it.
            donate = companions.callback is None
            result = drive(run, run.step + steps, before, after, bar, donate)
    except KeyboardInterrupt:
        result = RESULTS.interrupted
    except Exception as e:
        if run.has_begun() and run.is_alive():
            attach_solution(e, lambda: run.finish(RESULTS.failed, watcher))
        raise
    finally:
        companions.save(run)
    with own_error_text():
        solution = run.finish(result, watcher)
    has_said_so = solution.result == RESULTS.nonfinite
    if run.share_skipped() > _MANY_SKIPPED and not has_said_so:
        warnings.warn(describe_skipped(solution.state).strip(), stacklevel=3)
    return solution


def drive(
    run: Run,
    end: int,
    before: list[Event],
    after: list[Event],
    bar: ProgressBar,
    donate: bool,
) -> Any:
    """Steps until `end`, or until there is a reason to stop; returns an item of
    `RESULTS`."""
    periods = [period for period, _ in (*before, *after)]
    try:
        with own_error_text(), catch_interrupt() as interrupted:
            while run.step < end:
                start = run.step
                for action in _due(before, start):
                    action()
                left = [period - start % period for period in periods]
                try:
                    run.advance(min([end - start, *left]), donate)
                except StopIteration:
                    return RESULTS.data_exhausted
                bar.update(run.step - start, run.state)
                reasons = [action() for action in _due(after, run.step)]
                for reason in reasons:
                    if reason is not None:
                        return reason
                if run.has_failed():
                    return RESULTS.nonfinite
                if interrupted():
                    return RESULTS.interrupted
    except KeyboardInterrupt:
        return RESULTS.interrupted
    return RESULTS.successful


def _due(events: list[Event], step: int) -> list[Callable[[], Any]]:
    return [action for period, action in events if step > 0 and step % period == 0]


def check_start(algorithm: Any, key: Any, state: Any) -> None:
    what = "an algorithm such as `T1T2`, before `model` and `hyperparams`"
    check_type("algorithm", algorithm, AbstractBilevelOptimizer, what)
    if state is not None:
        check_state("state", state)
    check_key(key)


def as_interval(record_every: Any, steps: int) -> int:
    """Returns the number of steps between two records."""
    if record_every is None:
        return max(1, steps // 100)
    return as_count("record_every", record_every)


def asks_to_stop(callback: Callable[[BilevelState], Any], state: BilevelState) -> bool:
    """Calls the callback of a driver."""
    answer = callback(state)
    if answer is None:
        return False
    try:
        return bool(answer)
    except Exception as e:
        raise ValueError(
            "`callback` must return a boolean, or `None`; got a "
            f"{type(answer).__name__}."
        ) from e


def attach_solution(error: Exception, make: Callable[[], Solution]) -> None:
    """Saves what was learned before `error`."""
    try:
        solution = make()
    except Exception:
        return  # of the same cause
    error.solution = solution  # pyright: ignore[reportAttributeAccessIssue]
    error.add_note(
        f"The solution up to step {int(solution.state.step)} is the attribute "
        "`solution` of this exception."
    )
