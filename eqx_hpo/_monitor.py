"""A metric that a driver watches. It ends the run once nothing better comes, and the
solution is made from the best state."""

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
    """Holds the best state that an [`eqx_hpo.Monitor`][] has seen.

    **Attributes:**

    - `state`: a copy of the state.
    - `value`: the metric of this state.
    - `step`: the number of its step.
    """

    state: BilevelState
    value: float
    step: int


class Readings(NamedTuple):
    """Holds the values that an [`eqx_hpo.Monitor`][] has read in a run, as NumPy
    arrays.

    **Attributes:**

    - `step`: the number of the step. The first entry belongs to the start of the run.
    - `value`: the metric after this step.
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

    The validation loss falls while it is tuned, so it says nothing about data that
    nobody tuned on. The metric needs no gradient. It can be an accuracy, and its data
    may be on the host. It is called without `jit`: compile the parts that run on a
    device yourself.
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
            NumPy or JAX. It must not keep the state, since the next step reuses its
            memory. NaN is not better than anything.
        - `every`: the number of steps between two calls of the metric. It is called at
            the start of a run, and after each step whose number is a multiple of
            `every`.
        - `patience`: the number of calls without a better value that ends the run.
            `None` means that the monitor never ends the run.
        - `mode`: whether a smaller value is better, `"min"`, or a larger one, `"max"`.
        - `best`: the `best` of an earlier solution, if the run continues from its
            `state`.

        **Raises:** a `ValueError` if an argument is out of range. The run raises one if
        the metric is not a real number.
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
    """Holds the readings of a monitor in a run, and the best state so far."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self.best = monitor.best
        self._steps: list[int] = []
        self._values: list[float] = []

    def look(self, state: BilevelState) -> None:
        """Reads the metric of a state. The run may donate the state afterwards."""
        value = _as_value(self._monitor.metric(state))
        self._steps.append(int(state.step))
        self._values.append(value)
        if self._is_better(value):
            copy = lambda x: jnp.copy(x) if eqx.is_array(x) else x
            self.best = Best(jtu.tree_map(copy, state), value, self._steps[-1])

    def go_on(self, readings: Readings, best: Best | None) -> None:
        """Continues after the earlier readings of the same run."""
        self.best = best
        self._steps, self._values = readings.step.tolist(), readings.value.tolist()

    def has_read(self) -> bool:
        return len(self._steps) > 0

    def is_over(self) -> bool:
        """Tells whether the patience is over."""
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
