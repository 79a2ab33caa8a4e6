"""The progress bar of the driver, and its way of being stopped from the keyboard."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

import jax

from ._state import BilevelState


_REFRESH = 0.1  # seconds


class ProgressBar:
    """A line with the losses, the norm of the hypergradient and the rate; only with the
    train loss where nothing is tuned. Silent where the standard error is not a
    terminal."""

    def __init__(self, total: int, enabled: bool, tunes: bool = True):
        import tqdm  # here, as it would be a good part of the time of `import eqx_hpo`

        self._bar = tqdm.tqdm(
            total=total, disable=None if enabled else True, dynamic_ncols=True
        )
        self._tunes = tunes
        self._shown = 0.0

    def update(self, steps: int, state: BilevelState) -> None:
        """Counts `steps` more; reads the metrics of `state` from the device only when
        the line is due to be drawn."""
        if self._bar.disable:
            return
        self._bar.update(steps)
        now = time.monotonic()
        if now - self._shown < _REFRESH:
            return
        self._shown = now
        metrics, skipped = jax.device_get((state.metrics, state.skipped))
        line = f"train {metrics.train_loss:.4g}"
        if self._tunes:
            line += f", val {metrics.val_loss:.4g}"
            line += f", hypergradient {metrics.hypergradient_norm:.2g}"
        self._bar.set_postfix_str(line + (f", skipped {skipped}" if skipped else ""))

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


@contextlib.contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether Ctrl-C was pressed. A state whose buffers
    were just donated would be lost if the exception came at once; a second Ctrl-C
    raises it nevertheless."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(signum, frame):
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
