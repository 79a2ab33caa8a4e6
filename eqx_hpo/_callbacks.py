"""The callbacks of a driver: functions of the state, called as a run goes on."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ._checks import check_function
from ._solution import RESULTS
from ._state import BilevelState


Callback: TypeAlias = Callable[[BilevelState], Any]
CallbackArgument: TypeAlias = Callback | Sequence[Callback] | None


class Callbacks:
    """Holds one function or several. `exception` is what one of them has raised, or
    `None`."""

    def __init__(self, callback: CallbackArgument):
        several = isinstance(callback, (list, tuple))
        functions: Any = () if callback is None else callback if several else [callback]
        for function in functions:
            what = "a function of the state, several in a list, or `None`"
            check_function("callback", function, what)
        self._functions = tuple(functions)
        self.exception: Exception | None = None

    def __bool__(self) -> bool:
        return len(self._functions) > 0

    def call(self, state: BilevelState) -> Any:
        """Calls all functions. Returns an item of `RESULTS` if the run is to end."""
        try:
            answers = [function(state) for function in self._functions]
        except Exception as e:
            self.exception = e
            return RESULTS.callback_failed
        return RESULTS.stopped if any([*map(_as_flag, answers)]) else None

    def describe(self) -> str:
        """Describes what was raised, and warns of it. Returns an empty string if
        nothing was raised."""
        error = self.exception
        if error is None:
            return ""
        text = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"A callback ended the run with an exception ({text}). It is the attribute "
            "`exception` of the solution.",
            stacklevel=5,
        )
        return f" It was a {text}"


def _as_flag(answer: Any) -> bool:
    if answer is None:
        return False
    try:
        return bool(answer)
    except Exception as e:
        raise ValueError(
            "`callback` must return a boolean, or `None`; got a "
            f"{type(answer).__name__}."
        ) from e
