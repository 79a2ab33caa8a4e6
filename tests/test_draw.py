"""`Solution.draw`: the lines and labels in the figure of each kind of run."""

import dataclasses
import sys
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from eqx_hpo._solution import constrained


pytest.importorskip("matplotlib", reason="needs the extra `examples`")

BATCH, VAL = (jnp.eye(3), jnp.arange(3.0)), (jnp.eye(3) + 1, jnp.ones(3))


def _val_loss(weights, hyperparams, batch, key):
    x, y = batch
    return jnp.mean((x @ weights - y) ** 2)


def _train_loss(weights, hyperparams, batch, key):
    total = sum(jnp.sum(x) for x in jax.tree.leaves(hyperparams))
    return _val_loss(weights, hyperparams, batch, key) + total * jnp.sum(weights**2)


ALGORITHM = hpo.T1T2(
    hpo.Problem(_train_loss, _val_loss), optax.sgd(0.01), optax.adam(0.1)
)


@pytest.fixture(scope="module")
def solution():
    """A run with a monitor, of which tests change the history."""
    monitor = hpo.Monitor(lambda state: state.step - 4.0, every=3, mode="max")
    return _tune({"decay": hpo.Positive(jnp.full(3, 0.1))}, monitor=monitor)


def _tune(hyperparams, algorithm=ALGORITHM, train=BATCH, val=VAL, **options):
    start = (algorithm, jnp.zeros(3), hyperparams, train, val)
    defaults: Any = dict(steps=6, record_every=1, key=None, progress=False)
    return hpo.tune(*start, **defaults | options)


def _drawn(solution, renders=False):
    """The axes by the names of their vertical axes."""
    figure = solution.draw()
    if renders:
        figure.draw_without_rendering()
    return {ax.get_ylabel(): ax for ax in figure.axes}


def _lines(ax):
    """The values of each line by its label; those without a label by their number."""
    lines = [line for line in ax.lines if line.get_marker() != "x"]
    return {line.get_label(): line.get_ydata() for line in lines}


def _with(solution, hyperparams, values=None, **columns):
    """The solution with another history of its hyperparameters."""
    history = dataclasses.replace(solution.history, hyperparams=hyperparams, **columns)
    if values is None:
        values = jax.tree.map(lambda x: jnp.asarray(x[-1]), hyperparams)
    return dataclasses.replace(solution, history=history, values=values)


def test_the_panels_show_the_history(solution):
    axes, history = _drawn(solution), solution.history
    assert list(axes) == ["loss", "monitor", "hypergradient norm", "decay"]
    losses = _lines(axes["loss"])
    assert np.array_equal(losses["train"], history.train_loss)
    assert np.array_equal(losses["validation"], history.val_loss)
    norm = axes["hypergradient norm"].lines[0].get_ydata()
    assert np.array_equal(norm, history.hypergradient_norm)
    curve, best = axes["monitor"].lines
    assert curve.get_xdata().tolist() == [0, 3, 6]
    assert curve.get_ydata().tolist() == [-4, -1, 2]
    assert (best.get_xdata(), best.get_ydata()) == ([6], [2])
    assert best.get_label() == "best: 2 at step 6"
    entries = _lines(axes["decay"])
    assert list(entries) == ["[0]", "[1]", "[2]"]
    assert np.array_equal(entries["[1]"], history.hyperparams["decay"][:, 1])
    assert {ax.get_xlabel() for ax in axes.values()} == {"step"}


def test_nothing_overlaps_and_no_legend_is_on_its_panel(solution):
    names = [f"a.long.name.of.{i}.which.there.is.no.room.for" for i in range(4)]
    rows = {name: np.linspace(1, 2, 48).reshape(6, 8) for name in names}
    figure = _with(solution, rows).draw()
    figure.draw_without_rendering()
    boxes = [ax.get_tightbbox() for ax in figure.axes]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
    for ax in figure.axes:
        legend = ax.get_legend()
        if legend is not None:
            assert legend.get_window_extent().y0 >= ax.get_window_extent().y1
    width, height = figure.bbox.width, figure.bbox.height
    assert all(0 <= b.x0 and b.x1 <= width for b in boxes)
    assert all(0 <= b.y0 and b.y1 <= height for b in boxes)


def test_large_arrays_are_a_mean_between_quartiles(solution):
    array = np.asarray(jr.uniform(jr.key(0), (6, 4, 5)))
    ax = _drawn(_with(solution, array))["hyperparameter"]
    rows = array.reshape(6, 20)
    assert np.allclose(_lines(ax)["mean"], rows.mean(axis=1))
    bands = {x.get_label(): x.get_paths()[0].vertices for x in ax.collections}
    for name, ends in {"min to max": (0, 1), "middle half": (0.25, 0.75)}.items():
        low, high = np.quantile(rows, ends, axis=1)
        corners = {(s, y) for s, y in zip(range(1, 7), low)}
        corners |= {(s, y) for s, y in zip(range(1, 7), high)}
        assert corners <= {tuple(x) for x in bands[name]}


def test_a_summary_is_a_mean_between_its_ends(solution):
    """As it is in a history of more than 100,000 numbers a row; of any size."""
    rows = np.stack([np.full(6, 0.2), np.full(6, 0.1), np.full(6, 0.4)], axis=1)
    for size in (5, 200_000):
        ax = _drawn(_with(solution, {"big": rows}, {"big": jnp.ones(size)}))["big"]
        assert list(_lines(ax)) == ["mean"]
        assert np.array_equal(_lines(ax)["mean"], rows[:, 0])
        assert [x.get_label() for x in ax.collections] == ["min to max"]


def test_many_arrays_share_the_last_panel(solution):
    rows = {f"x{i}": np.full((6, 10), i + 1.0) for i in range(12)}
    rows["x9"] = np.stack([np.full(6, x) for x in (10.0, 0.0, 50.0)], axis=1)
    values = {name: jnp.ones(10) for name in rows}
    axes = _drawn(_with(solution, rows, values))
    assert list(axes)[3:] == [*sorted(rows)[:8], "4 others, by mean"]
    means = [line.get_ydata()[0] for line in axes["4 others, by mean"].lines]
    assert means == [float(name[1:]) + 1 for name in sorted(rows)[8:]]


@pytest.mark.parametrize(
    "start, stop, scale",
    [(0.1, 1.1, "log"), (0.1, 0.9, "linear"), (0.0, 1.0, "linear")],
)
def test_scales(solution, start, stop, scale):
    ax = _drawn(_with(solution, np.linspace(start, stop, 6)))["hyperparameter"]
    assert ax.get_yscale() == scale


def test_skipped_steps_are_marked_where_they_were(solution):
    train_loss = np.array([1.0, np.nan, 1.0, np.inf, 1.0, 1.0])
    columns: Any = dict(skipped=np.array([0, 1, 1, 3, 3, 3]), train_loss=train_loss)
    changed = _with(solution, np.ones(6), **columns)
    axes = _drawn(changed)
    for name in ("loss", "hypergradient norm"):
        (marks,) = [line for line in axes[name].lines if line.get_marker() == "x"]
        assert marks.get_xdata().tolist() == [2, 4]
        assert marks.get_label() == "skipped: 3"
    assert np.isnan(_lines(axes["loss"])["train"][[1, 3]]).all()
    # Those of the run before are not marked.
    columns: Any = dict(skipped=np.array([2, 2, 2, 2, 2, 3]), step=np.arange(101, 107))
    axes = _drawn(_with(solution, np.ones(6), **columns))
    (marks,) = [line for line in axes["loss"].lines if line.get_marker() == "x"]
    assert marks.get_xdata().tolist() == [106] and marks.get_label() == "skipped: 1"


def test_a_single_record_without_hyperparameters_or_validation():
    start = (ALGORITHM, jnp.zeros(3), None, BATCH)
    axes = _drawn(hpo.fit(*start, steps=1, key=None, progress=False))
    assert list(axes) == ["loss"]
    (line,) = axes["loss"].lines
    assert line.get_label() == "train" and line.get_marker() == "."


def test_an_empty_history_and_one_of_which_nothing_is_finite(solution):
    empty = jax.tree.map(lambda x: x[:0], solution.history)
    empty = dataclasses.replace(solution, history=empty, best=None)
    assert list(_drawn(empty, renders=True)) == ["loss", "monitor", "decay"]
    nan = np.full(6, np.nan)
    columns: Any = dict(train_loss=nan, val_loss=nan, hypergradient_norm=nan)
    changed = _with(solution, np.ones(6), **columns)
    assert _drawn(changed, renders=True)["loss"].get_legend() is None


def test_placeholders_of_all_kinds(solution):
    hyperparams = {
        "choice": hpo.Choice(3),
        "half": hpo.Positive(jnp.full(9, 0.1, jnp.bfloat16)),
        "integer": hpo.Integer(2, 1, 8),
        "schedule": hpo.Schedule(hpo.Positive(jnp.array([0.1, 0.2])), every=5),
        "simplex": hpo.Simplex(jnp.array([0.5, 0.5])),
        "switch": hpo.Switch(0.1),
        "table": hpo.Positive(jnp.ones((2, 2))),
    }
    row = eqx.filter_jit(constrained)(hyperparams)
    rows = jax.tree.map(lambda x: np.stack([x] * 6), jax.device_get(row))
    axes = _drawn(_with(solution, rows, row))
    assert list(axes)[3:] == sorted(hyperparams)
    count = {name: len(ax.lines) for name, ax in axes.items()}
    assert [count[x] for x in ("choice", "half", "integer")] == [3, 1, 1]
    assert [count[x] for x in ("schedule", "simplex", "switch")] == [2, 2, 1]
    assert list(_lines(axes["table"])) == ["[0, 0]", "[0, 1]", "[1, 0]", "[1, 1]"]


@pytest.mark.slow
def test_folds():
    data = (jr.normal(jr.key(0), (12, 3)), jr.normal(jr.key(1), (12,)))
    start = (ALGORITHM, jnp.zeros(3), {"decay": hpo.Positive(0.1)}, data)
    options: Any = dict(steps=3, fit_steps=2, key=jr.key(2), count=2, progress=False)
    found = hpo.tune_folds(*start, **options)
    assert list(_drawn(found.tuning)) == ["loss", "hypergradient norm", "decay"]
    assert list(_drawn(found.final)) == ["loss", "decay"]


def test_trials_of_a_search_are_points(solution):
    step = np.array([9, 3, 9, 1, 9, 9])
    array = np.asarray(jr.uniform(jr.key(0), (6, 20)))
    columns: Any = dict(step=step, skipped=np.array([0, 2, 0, 0, 1, 0]))
    axes = _drawn(_with(solution, array, **columns))
    assert axes["loss"].get_xlabel() == "trial"
    for line in axes["loss"].lines:
        assert line.get_linestyle() == "None"
    (marks,) = [line for line in axes["loss"].lines if line.get_marker() == "x"]
    assert marks.get_xdata().tolist() == [2, 5] and marks.get_label() == "skipped: 3"
    mean = _lines(axes["hyperparameter"])["mean"]
    assert np.allclose(mean, array.mean(axis=1))


def test_no_window_and_no_state_of_pyplot(solution):
    known = sys.modules.pop("matplotlib.pyplot", None)
    try:
        solution.draw()
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if known is not None:
            sys.modules["matplotlib.pyplot"] = known


def test_without_matplotlib(solution, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError) as info:
        solution.draw()
    text = "`Solution.draw` needs Matplotlib: `pip install 'eqx_hpo[examples]'`."
    assert str(info.value) == text
