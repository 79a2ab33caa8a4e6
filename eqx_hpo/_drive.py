"""The loop of the drivers: it takes the steps, and acts between them."""

import contextlib
import dataclasses
import os
import signal
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

from ._callbacks import CallbackArgument, Callbacks
from ._checkpoints import Checkpoints, make_keeper
from ._checks import as_count, as_flag, as_int, check_key, check_type
from ._jit import own_error_text
from ._monitor import Monitor, Watcher
from ._optimizer import AbstractBilevelOptimizer
from ._processes import agree, is_alone
from ._progress import ProgressBar
from ._run import Run
from ._signals import catch_signals
from ._solution import describe_skipped, RESULTS, Solution
from ._state import check_state


# What may end a run between two calls; of several, the last one here.
_REASONS = [
    RESULTS.interrupted,
    RESULTS.preempted,
    RESULTS.patience,
    RESULTS.stopped,
    RESULTS.callback_failed,
]
_MANY_SKIPPED = 0.1  # the share of skipped steps from which on there is a warning


CheckpointArgument: TypeAlias = Checkpoints | str | os.PathLike[str] | None

# A number of steps, and what is done whenever it has passed: an item of `RESULTS` that
# it returns ends the run.
Event: TypeAlias = tuple[int, Callable[[], Any]]


class Companions:
    """Holds what accompanies the steps of a run: a monitor, callbacks, checkpoints and
    a progress bar, as the drivers take them."""

    def __init__(
        self,
        interval: int,
        monitor: Monitor | None,
        checkpoint: CheckpointArgument,
        checkpoint_every: int,
        callback: CallbackArgument,
        progress: bool,
    ):
        if monitor is not None:
            what = "an `eqx_hpo.Monitor(metric, every=...)`, or `None`"
            check_type("monitor", monitor, Monitor, what)
        every = as_int("checkpoint_every", checkpoint_every, 1)
        self.keeper = make_keeper(checkpoint, every)
        self.callbacks = Callbacks(callback)
        self.watcher = None if monitor is None else Watcher(monitor)
        self.progress = as_flag("progress", progress)
        self._interval = interval
        self._watch_every = 0 if monitor is None else monitor.every

    def check(self, start: int, steps: int) -> None:
        """Refuses a fresh run in which the monitor would only read the start. Its
        solution would be the model that was given."""
        if start == 0 and steps < self._watch_every:
            raise ValueError(
                f"`monitor` reads every {self._watch_every} steps, and the run has "
                f"{steps}: it would see nothing but the start. Lower its `every`."
            )

    def signals(self) -> tuple[signal.Signals, ...]:
        """Lists the signals that end the run."""
        if self.keeper is None:
            return (signal.SIGTERM,)
        return self.keeper.settings.signals

    def events(self, run: Run) -> list[Event]:
        """Lists the events that follow steps of `run`."""
        events: list[Event] = []
        if self.watcher is not None:
            events.append((self._watch_every, lambda: self.watch(run)))
        if self.callbacks:
            events.append((self._interval, lambda: self.callbacks.call(run.state)))
        keeper = self.keeper
        if keeper is not None:
            # The last: it saves what the others have done.
            save = lambda: keeper.save(run, self.watcher)
            events.append((keeper.settings.every, save))
        return events

    def watch(self, run: Run) -> Any:
        if self.watcher is None:
            return None
        self.watcher.look(run.state)
        return RESULTS.patience if self.watcher.is_over() else None

    def begin(self, run: Run, algorithm: Any, key: Any) -> Any:
        """Continues from a checkpoint of this run, if there is one. Returns an item of
        `RESULTS` if the run had ended there."""
        stopped = False
        if self.keeper is not None:
            stopped = self.keeper.begin(run, self.watcher, algorithm, key)
        if self.watcher is not None:
            if not self.watcher.has_read():
                self.watcher.look(run.state)
            if self.watcher.is_over():
                return RESULTS.patience
        if run.has_failed():
            return RESULTS.nonfinite
        return RESULTS.stopped if stopped else None


def conduct(
    run: Run,
    steps: int,
    companions: Companions,
    before: list[Event],
    tunes: bool,
    identity: tuple[Any, Any],
) -> Solution:
    """Takes `steps` steps with their companions. `identity` is the algorithm and the
    key. They tell whether a checkpoint belongs to the same run."""
    companions.check(run.step, steps)
    watcher, keeper = companions.watcher, companions.keeper
    end, result = run.began + steps, RESULTS.failed
    with (
        catch_signals(companions.signals()) as asked,
        contextlib.closing(run.rows),
    ):
        try:
            reason = companions.begin(run, *identity)
            after = companions.events(run)
            done = run.step - run.began
            with ProgressBar(steps, done, companions.progress, tunes) as bar:

                def tick():
                    bar.update(run.step - run.began, run.state)
                    if keeper is not None and keeper.is_due():
                        keeper.save(run, watcher)

                # A callback may keep its state: no later step may overwrite it.
                donate = not companions.callbacks
                step = lambda: drive(run, end, before, after, tick, asked, donate)
                result = step() if reason is None else reason
        except KeyboardInterrupt:
            if not run.is_alive():
                raise
            result = RESULTS.interrupted
        except Exception as e:
            # The others would not take part in what follows.
            keeper = keeper if is_alone() else None
            if is_alone() and run.has_begun() and run.is_alive():
                attach_solution(e, lambda: run.finish(RESULTS.failed, watcher))
            raise
        finally:
            if keeper is not None:
                keeper.finish(run, watcher, bool(result == RESULTS.stopped))
        with own_error_text():
            solution = run.finish(result, watcher)
    return _with_reports(solution, run, companions)


def _with_reports(solution: Solution, run: Run, companions: Companions) -> Solution:
    """Adds what the run itself does not know, as text of the message and as
    warnings."""
    message = solution.message + companions.callbacks.describe()
    if companions.keeper is not None:
        message += companions.keeper.describe()
    has_said_so = solution.result == RESULTS.nonfinite
    if run.share_skipped() > _MANY_SKIPPED and not has_said_so:
        warnings.warn(describe_skipped(solution.state).strip(), stacklevel=4)
    exception = companions.callbacks.exception
    return dataclasses.replace(solution, message=message, exception=exception)


def drive(
    run: Run,
    end: int,
    before: list[Event],
    after: list[Event],
    tick: Callable[[], None],
    asked: Callable[[], Any],
    donate: bool,
) -> Any:
    """Takes steps until `end`, or until there is a reason to stop. Returns an item of
    `RESULTS`. `tick` is called after each call of the device. `asked` returns the
    result that a signal asks for."""
    periods = [period for period, _ in (*before, *after)]
    with own_error_text():
        while run.step < end:
            start = run.step
            for action in _due(before, start):
                action()
            left = [period - start % period for period in periods]
            try:
                run.advance(min([end - start, *left]), donate)
            except StopIteration:
                return RESULTS.data_exhausted
            tick()
            reasons = [action() for action in _due(after, run.step)]
            reason = _agreed([*reasons, asked()])
            if reason is not None:
                return reason
            if run.has_failed():
                return RESULTS.nonfinite
    return RESULTS.successful


def _agreed(reasons: list[Any]) -> Any:
    """Finds the reason to stop, if any process has one."""
    code = agree(max([0, *[_code(x) for x in reasons if x is not None]]))
    return _REASONS[code - 1] if code > 0 else None


def _code(reason: Any) -> int:
    return 1 + next(i for i, x in enumerate(_REASONS) if x == reason)


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


def attach_solution(error: Exception, make: Callable[[], Solution]) -> None:
    """Attaches the solution so far to `error`."""
    try:
        solution = make()
    except Exception:
        return  # of the same cause
    error.solution = solution  # pyright: ignore[reportAttributeAccessIssue]
    error.add_note(
        f"The solution up to step {int(solution.state.step)} is the attribute "
        "`solution` of this exception."
    )
