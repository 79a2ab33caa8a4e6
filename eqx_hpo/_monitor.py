"""A metric that a driver watches: it ends the run once nothing better comes, and the
best state is the one that the solution is made of."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Float, Int

from ._checks import as_int, check_function, check_one_of, check_type, shown
from ._state import BilevelState


class Best(eqx.Module):
    """The best state that a [`eqx_hpo.Monitor`][] has seen.

    **Attributes:**

    - `state`: a copy of the state.
    - `value`: its metric.
    - `step`: its `step`.
    """

    state: BilevelState
    value: float
    step: int


class Readings(NamedTuple):
    """What a [`eqx_hpo.Monitor`][] has read in a run, as NumPy arrays.

    **Attributes:**

    - `step`: the number of the step, the start of the run first.
    - `value`: the metric after it.
    """

    step: Int[np.ndarray, " readings"]
    value: Float[np.ndarray, " readings"]


class Monitor(eqx.Module):
    """Watches a metric on data of its own, for [`eqx_hpo.tune`][] and
    [`eqx_hpo.fit`][].

    ```python
    accuracy = eqx.filter_jit(lambda state: jnp.mean(predict(state.model, x) == y))
    monitor = hpo.Monitor(accuracy, every=20, patience=5, mode="max")
    solution = hpo.tune(..., monitor=monitor)
    print(solution.best.step, solution.best.value, solution.history.monitor)
    ```

    The validation loss falls as long as it is tuned, and tells nothing of data that
    nobody tuned on. The metric needs no gradient, so it can be an accuracy, and its
    data may be on the host. It is called as it is: compile what runs on a device.
    """

    metric: Callable[[BilevelState], Any]
    every: int
    patience: int | None
    mode: str
    best: Best | None

    def __init__(
        self,
        metric: Callable[[BilevelState], Any],
        *,
        every: int,
        patience: int | None = None,
        mode: str = "min",
        best: Best | None = None,
    ):
        """**Arguments:**

        - `metric`: a function of the state that returns one real number, of Python,
            NumPy or JAX. It must not keep the state, whose memory the next step uses
            again. NaN is not better than anything.
        - `every`: it is called at the start of a run, and after each step whose number
            is a multiple of this.
        - `patience`: end the run after so many calls without a better value; `None` for
            never.
        - `mode`: whether a smaller value is better, `"min"`, or a larger one, `"max"`.
        - `best`: the `best` of an earlier solution, whose `state` the run goes on from.

        **Raises:** a `ValueError` if an argument is out of range, and in the run if the
        metric is no real number.
        """
        what = "a function of the state that returns a number"
        check_function("metric", metric, what)
        check_one_of("mode", mode, ("min", "max"))
        if best is not None:
            what = "the `best` of a `Solution`, or `None`"
            check_type("best", best, Best, what)
        self.metric = metric
        self.every = as_int("every", every, 1)
        self.patience = None if patience is None else as_int("patience", patience, 1)
        self.mode = mode
        self.best = best


class Watcher:
    """The readings of a monitor in a run, and the best state so far."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self.best = monitor.best
        self._steps: list[int] = []
        self._values: list[float] = []

    def look(self, state: BilevelState) -> None:
        """Reads the metric of a state, which the run may donate afterwards."""
        value = _as_value(self._monitor.metric(state))
        self._steps.append(int(state.step))
        self._values.append(value)
        if self._is_better(value):
            copy = lambda x: jnp.copy(x) if eqx.is_array(x) else x
            self.best = Best(jtu.tree_map(copy, state), value, self._steps[-1])

    def go_on(self, readings: Readings, best: Best | None) -> None:
        """Goes on behind what the same run has read before."""
        self.best = best
        self._steps, self._values = readings.step.tolist(), readings.value.tolist()

    def has_read(self) -> bool:
        return len(self._steps) > 0

    def is_over(self) -> bool:
        """Tells whether the patience is."""
        patience, every = self._monitor.patience, self._monitor.every
        since = self._steps[0] if self.best is None else self.best.step
        waited = self._steps[-1] // every - since // every
        return patience is not None and waited >= patience

    def readings(self) -> Readings:
        return Readings(np.asarray(self._steps, int), np.asarray(self._values, float))

    def describe(self) -> str:
        if self.best is None:
            return " The monitor's metric was never a number."
        return f" Best by the monitor: {self.best.value:.4g} at step {self.best.step}."

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        if self._monitor.mode == "min":
            return value < self.best.value
        return value > self.best.value


def _as_value(value: Any) -> float:
    array = np.asarray(value)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if array.shape != () or not any(jnp.issubdtype(array.dtype, x) for x in kinds):
        raise ValueError(f"`metric` must return one real number; got {shown(value)}.")
    return float(array)
