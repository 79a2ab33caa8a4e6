"""Draws the figure of a run, for `Solution.draw`."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Float, PyTree, Shaped

from ._custom_types import Hyperparams


# Those of Okabe and Ito, which the colour-blind can tell apart; brown for their yellow,
# which is too light for a line.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C6D31",
)
_LINES = len(_COLOURS)  # entries of an array up to which each has a line
_PANELS = 9  # of hyperparameters; the last one is for all others, if there are more
_MARKED = 20  # records up to which each has a mark
_SORTED = 10**7  # numbers in an array up to which quartiles are worth their time
_NAME = 26  # characters of a name for which there is room

Draw = Callable[[Any], None]


class _Course(NamedTuple):
    """Holds the horizontal axis of all panels: its values, its name, and the look of
    lines."""

    x: Shaped[np.ndarray, " records"]
    name: str
    style: dict[str, Any]


class _Trajectory(NamedTuple):
    """Holds a hyperparameter over the records. The last axis of the array holds its
    entries, each with a label, or its mean, minimum and maximum if it is a summary."""

    name: str
    array: Float[np.ndarray, "records entries"]
    labels: list[str]
    is_summary: bool


def draw_run(history: Any, values: Hyperparams, best: Any) -> Any:
    """Draws the fields of a `Solution` that have the names of the arguments."""
    Figure = _import_figure()
    course = _course(history.step)
    panels: list[Draw] = [ft.partial(_draw_losses, history, course)]
    if history.monitor is not None:
        panels.append(ft.partial(_draw_monitor, history.monitor, best))
    # It is zero throughout where nothing was tuned.
    if np.any(_finite(history.hypergradient_norm)[1] != 0):
        panels.append(ft.partial(_draw_norm, history, course))
    panels += _hyperparameter_panels(history.hyperparams, values, course)
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, draw in zip(axes, panels):
        draw(ax)
        _finish(ax, course)
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure


def _import_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError(
            "`Solution.draw` needs Matplotlib: `pip install 'eqx_hpo[examples]'`."
        ) from e
    return Figure


def _course(step: Shaped[np.ndarray, " records"]) -> _Course:
    marked = {"marker": ".", "markersize": 5} if len(step) <= _MARKED else {}
    if np.all(np.diff(step) > 0):
        return _Course(step, "step", marked)
    # The records of `search` are trials, each with the number of its steps.
    style = {"marker": ".", "markersize": 5, "linestyle": "none"}
    return _Course(np.arange(1, len(step) + 1), "trial", style)


def _draw_losses(history: Any, course: _Course, ax: Any) -> None:
    losses = {"train": history.train_loss, "validation": history.val_loss}
    for colour, (name, loss) in zip(_COLOURS, losses.items()):
        if np.any(np.isfinite(loss)):
            _line(ax, course, loss, color=colour, label=name)
    _mark_skipped(history, course, ax)
    ax.set_ylabel("loss")
    _set_scale(ax, *losses.values())


def _draw_monitor(monitor: Any, best: Any, ax: Any) -> None:
    course = _course(monitor.step)
    _line(ax, course, monitor.value, color=_COLOURS[2])
    if best is not None:
        label = f"best: {best.value:.4g} at step {best.step}"
        star = dict(marker="*", markersize=11, linestyle="none", color=_COLOURS[1])
        ax.plot(best.step, best.value, label=label, **star)
    ax.set_ylabel("monitor")
    _set_scale(ax, monitor.value)


def _draw_norm(history: Any, course: _Course, ax: Any) -> None:
    _line(ax, course, history.hypergradient_norm, color=_COLOURS[3])
    _mark_skipped(history, course, ax)
    ax.set_ylabel("hypergradient norm")
    norm = history.hypergradient_norm
    _set_scale(ax, norm[norm > 0])


def _mark_skipped(history: Any, course: _Course, ax: Any) -> None:
    skipped = _newly_skipped(history, course)
    rows = np.flatnonzero(skipped)
    if len(rows) == 0:
        return
    ax.margins(y=0.12)  # room for the marks, below the curves
    label = f"skipped: {skipped.sum()}"
    mark = dict(marker="x", linestyle="none", color=_COLOURS[6], markersize=4)
    where, low = ax.get_xaxis_transform(), np.full(len(rows), 0.03)
    ax.plot(course.x[rows], low, transform=where, label=label, **mark)


def _newly_skipped(history: Any, course: _Course) -> Shaped[np.ndarray, " records"]:
    """Counts the steps that were skipped since the last record."""
    if course.name == "trial":
        return history.skipped
    new, gaps = np.diff(history.skipped, prepend=0), np.diff(history.step)
    if gaps.size > 0 and history.step[0] > gaps.max():
        new[0] = 0  # those of a run before, from which this one went on
    return new


def _hyperparameter_panels(
    recorded: PyTree[Any], values: Hyperparams, course: _Course
) -> list[Draw]:
    found = _trajectories(recorded, values)
    count = len(found) if len(found) <= _PANELS else _PANELS - 1
    panels: list[Draw] = [ft.partial(_draw_one, x, course) for x in found[:count]]
    if len(found) > count:
        panels.append(ft.partial(_draw_others, found[count:], course))
    return panels


def _trajectories(recorded: PyTree[Any], values: Hyperparams) -> list[_Trajectory]:
    arrays = jtu.tree_leaves(eqx.filter(values, eqx.is_array))
    found = []
    leaves = jtu.tree_leaves_with_path(recorded)
    for (path, x), value in zip(leaves, arrays, strict=True):
        name = jtu.keystr(path, simple=True, separator=".") or "hyperparameter"
        few = range(value.size) if value.size <= _LINES else []
        indices = [np.unravel_index(i, value.shape) for i in few]
        labels = [str([int(i) for i in index]) for index in indices]
        array = np.asarray(x, float).reshape(len(x), math.prod(x.shape[1:]))
        found.append(_Trajectory(name, array, labels, x.shape[1:] != value.shape))
    return found


def _draw_one(found: _Trajectory, course: _Course, ax: Any) -> None:
    if found.is_summary or found.labels == []:
        _draw_band(found, course, ax)
    else:
        is_one = len(found.labels) == 1
        for colour, y, label in zip(_COLOURS, found.array.T, found.labels):
            _line(ax, course, y, color=colour, label=None if is_one else label)
    ax.set_ylabel(_shorten(found.name))
    _set_scale(ax, found.array)


def _draw_band(found: _Trajectory, course: _Course, ax: Any) -> None:
    array, bands = found.array, []
    if found.is_summary:
        mean, low, high = array.T
    else:
        mean, low, high = array.mean(axis=1), array.min(axis=1), array.max(axis=1)
    bands.append(("min to max", 0.15, low, high))
    if not found.is_summary and array.size <= _SORTED:
        quartiles = np.quantile(array, [0.25, 0.75], axis=1)
        bands.append(("middle half", 0.35, *quartiles))
    _line(ax, course, mean, color=_COLOURS[0], label="mean")
    for label, alpha, low, high in bands:
        how = dict(color=_COLOURS[0], alpha=alpha, label=label)
        if course.name == "trial":
            ax.vlines(course.x, low, high, linewidth=3, **how)
        else:
            ax.fill_between(course.x, low, high, linewidth=0, **how)


def _draw_others(others: list[_Trajectory], course: _Course, ax: Any) -> None:
    means = [x.array[:, 0] if x.is_summary else x.array.mean(axis=1) for x in others]
    for number, mean in enumerate(means):
        _line(ax, course, mean, color=_COLOURS[number % _LINES], linewidth=0.8)
    ax.set_ylabel(f"{len(others)} others, by mean")
    _set_scale(ax, *means)


def _line(ax: Any, course: _Course, y: np.ndarray, **how: Any) -> None:
    ax.plot(course.x, _finite(y)[0], **{"linewidth": 1.2} | course.style | how)


def _finite(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replaces numbers that are not finite by NaN. Returns this array, and the finite
    numbers alone."""
    x = np.concatenate([np.asarray(x, float).ravel() for x in arrays])
    is_finite = np.isfinite(x)
    return np.where(is_finite, x, np.nan), x[is_finite]


def _set_scale(ax: Any, *arrays: np.ndarray) -> None:
    """Switches to a logarithmic scale if positive numbers differ tenfold."""
    _, numbers = _finite(*arrays)
    if numbers.size > 0 and 0 < 10 * numbers.min() < numbers.max():
        ax.set_yscale("log", nonpositive="mask")


def _shorten(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _finish(ax: Any, course: _Course) -> None:
    ax.set_xlabel(course.name, fontsize=8)
    ax.yaxis.label.set_fontsize(8)
    ax.tick_params(labelsize=7, which="both")
    ax.yaxis.get_offset_text().set_fontsize(7)
    if len(course.x) == 1:
        ax.set_xticks(course.x)
    else:
        ax.locator_params(axis="x", integer=True)
    ax.grid(alpha=0.3, linewidth=0.5)
    ax.spines[["right", "top"]].set_visible(False)
    # Above the panel, where no curve is.
    if len(ax.get_legend_handles_labels()[1]) > 0:
        ax.legend(
            bbox_to_anchor=(0, 1.02),
            borderaxespad=0,
            columnspacing=1,
            fontsize=7,
            frameon=False,
            handlelength=1.2,
            loc="lower left",
            ncols=4,
        )
