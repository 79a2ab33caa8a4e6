"""Decides which trials of a round end early, by their validation losses at a few
steps."""

import abc
import math
import warnings
from typing import Any

import equinox as eqx
import numpy as np

from ._checks import as_int, shown
from ._space import import_optuna


_FACTOR = 3  # of the successive halving


class AbstractPruning(eqx.Module):
    """A rule that ends trials early.

    **Attributes:**

    - `rungs`: the steps of a trial at which its validation loss is taken. The last rung
        is the end of the trial.
    - `sizes`: the numbers of trials that compiled programs may hold, from the largest
        to the smallest.
    """

    rungs: eqx.AbstractVar[list[int]]
    sizes: eqx.AbstractVar[list[int]]

    @abc.abstractmethod
    def go_on(self, trials: list[Any], losses: np.ndarray, step: int) -> list[bool]:
        """Chooses the trials of a round that are worth more steps. A trial whose loss
        is NaN has failed."""


class NoPruning(AbstractPruning):
    rungs: list[int]
    sizes: list[int]

    def go_on(self, trials: list[Any], losses: np.ndarray, step: int) -> list[bool]:
        del losses, step
        return [True] * len(trials)


class Halving(AbstractPruning):
    """Successive halving. The best third, rounded up, continues for three times the
    steps."""

    rungs: list[int]
    sizes: list[int]

    def go_on(self, trials: list[Any], losses: np.ndarray, step: int) -> list[bool]:
        kept = math.ceil(len(trials) / _FACTOR)
        order = np.argsort(np.where(np.isnan(losses), np.inf, losses), kind="stable")
        best = set(order[:kept].tolist())
        going_on = [i in best and not np.isnan(x) for i, x in enumerate(losses)]
        for trial, loss in zip(trials, losses.tolist(), strict=True):
            _report(trial, loss, step)
        return going_on


class OptunaPruning(AbstractPruning):
    """Asks a pruner of Optuna, which belongs to the study of the trials."""

    rungs: list[int]
    sizes: list[int]

    def go_on(self, trials: list[Any], losses: np.ndarray, step: int) -> list[bool]:
        going_on = []
        for trial, loss in zip(trials, losses.tolist(), strict=True):
            _report(trial, loss, step)
            going_on.append(not math.isnan(loss) and not trial.should_prune())
        return going_on


def _report(trial: Any, loss: float, step: int) -> None:
    with warnings.catch_warnings():
        # An earlier call that left this trial unfinished may have reported the same.
        warnings.filterwarnings("ignore", "The reported value is ignored")
        trial.report(loss, step)


def make_pruning(
    pruner: Any, steps: int, parallel: int, report_every: int | None
) -> AbstractPruning:
    every = max(1, steps // 10)
    if report_every is not None:
        every = as_int("report_every", report_every, 1)
        if pruner is None or isinstance(pruner, str):
            raise ValueError(
                "`report_every` is for a pruner of `optuna.pruners`, and `pruner` is "
                f"{pruner!r}. Leave it out."
            )
    if pruner is None:
        return NoPruning([steps], [parallel])
    if isinstance(pruner, str) and pruner == "halving":
        return _make_halving(steps, parallel)
    if not isinstance(pruner, import_optuna().pruners.BasePruner):
        raise ValueError(
            "`pruner` must be 'halving', a pruner of `optuna.pruners`, or `None`; got "
            f"{shown(pruner)}."
        )
    sizes = [parallel]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return OptunaPruning([*range(every, steps, every), steps], sizes)


def _make_halving(steps: int, parallel: int) -> AbstractPruning:
    for name, number in (("parallel", parallel), ("steps", steps)):
        if number < _FACTOR:
            raise ValueError(
                "`pruner='halving'` lets the best third of the trials of a round go on "
                f"for three times the steps, so `{name}` must be at least {_FACTOR}; "
                f"got {number}."
            )
    count = 0
    while _FACTOR ** (count + 1) <= min(steps, parallel):
        count += 1
    powers = [_FACTOR**i for i in range(count + 1)]
    rungs = [steps // power for power in reversed(powers)]
    return Halving(rungs, [math.ceil(parallel / power) for power in powers])
