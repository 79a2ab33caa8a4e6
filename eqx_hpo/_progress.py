"""The progress bar of the drivers."""

import math
import sys
import time
from typing import Any

import jax

from ._processes import is_first
from ._state import BilevelState


_REFRESH = 0.1  # seconds, of the bar
_LINE = 30.0  # seconds between two lines in a file


class ProgressBar:
    """Shows a line with the losses, the norm of the hypergradient and the rate. If
    nothing is tuned, it leaves out the norm, and a validation loss that is not taken.

    In a terminal or a notebook, it is a bar that moves. If the standard error goes to a
    file, it is a plain line every half minute.
    """

    def __init__(self, total: int, done: int, enabled: bool, tunes: bool = True):
        # Here, as it would be a good part of the time of `import eqx_hpo`.
        from tqdm.auto import tqdm

        moves = _shows_a_bar(sys.stderr)
        enabled = enabled and is_first()
        disable = not (enabled and moves)
        self._bar = tqdm(total=total, initial=done, disable=disable, dynamic_ncols=True)
        self._writes = enabled and not moves
        self._tunes = tunes
        self._total, self._done, self._before = total, done, done
        self._start = time.monotonic()
        self._shown = self._start if self._writes else 0.0

    def update(self, done: int, state: BilevelState) -> None:
        """Shows the number of finished steps. It reads the metrics of `state` from the
        device only when a line is due."""
        if not self._bar.disable:
            self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._writes and now - self._shown >= _LINE:
            rate = (done - self._before) / (now - self._start)
            share = f"{self._done}/{self._total} steps, {rate:.3g} a second, "
            print(share + self._describe(state), file=sys.stderr, flush=True)
        elif self._bar.disable or now - self._shown < _REFRESH:
            return
        else:
            self._bar.set_postfix_str(self._describe(state))
        self._shown = now

    def _describe(self, state: BilevelState) -> str:
        metrics, skipped = jax.device_get((state.metrics, state.total_skipped))
        line = f"train {metrics.train_loss:.4g}"
        if self._tunes or not math.isnan(metrics.val_loss):
            line += f", val {metrics.val_loss:.4g}"
        if self._tunes:
            line += f", hypergradient {metrics.hypergradient_norm:.2g}"
        return line + (f", skipped {skipped}" if skipped else "")

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def _shows_a_bar(stream: Any) -> bool:
    """Tells whether text on `stream` can be overwritten. This is so in a terminal, and
    in a notebook, whose streams do not claim to be terminals."""
    in_notebook = type(stream).__module__.partition(".")[0] == "ipykernel"
    return in_notebook or (stream is not None and stream.isatty())
