"""Lets Ctrl-C, and the signals of a scheduler, end a run."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ._checks import shown
from ._solution import RESULTS


def as_signals(name: str, value: Any) -> tuple[signal.Signals, ...]:
    """Converts names or numbers of signals."""
    find = lambda x: signal.Signals[x] if isinstance(x, str) else signal.Signals(x)
    try:
        if isinstance(value, (list, tuple)):
            return tuple(map(find, value))
    except (KeyError, ValueError):
        pass
    raise ValueError(
        f"`{name}` must be a tuple of signals, such as `('SIGTERM', 'SIGUSR1')`; got "
        f"{value if isinstance(value, (list, tuple)) else shown(value)}."
    )


@contextlib.contextmanager
def catch_signals(
    preempting: tuple[signal.Signals, ...] = (),
) -> Iterator[Callable[[], Any]]:
    """Yields a function that returns an item of `RESULTS` once a signal has come, and
    `None` before.

    An exception at once would lose a state whose buffers were just donated. A second
    Ctrl-C raises it nevertheless. Signals that the process ignores, as under `nohup`,
    stay ignored. An existing handler of SIGTERM is left in place.
    """
    seen: list[int] = []
    told: list[int] = []

    def handler(number, frame):
        del frame
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.append(number)

    def asked() -> Any:
        if len(seen) == 0:
            return None
        told[:] = seen
        by_hand = seen[0] == signal.SIGINT
        return RESULTS.interrupted if by_hand else RESULTS.preempted

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *preempting):
                before = signal.getsignal(number)
                theirs = number == signal.SIGTERM and before != signal.SIG_DFL
                # `None` is a handler that Python cannot put back.
                if before not in (signal.SIG_IGN, None) and not theirs:
                    signal.signal(number, handler)
                    stack.callback(signal.signal, number, before)
        yield asked
    # What came too late to end the run is for the rest of the program.
    for number in set(seen) - {*told, signal.SIGINT}:
        os.kill(os.getpid(), number)
