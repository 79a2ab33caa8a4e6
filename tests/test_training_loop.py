"""The loop of the page "Your own training loop"."""

import pathlib
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import numpy as np
import pytest
from docs.experiments import training_loop as loop
from docs.experiments.image_data import load


ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def single_precision():
    with jax.enable_x64(False):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_library_at_every_nth_step(monkeypatch, single_precision):
    """Is one algorithm with n inner steps, where the losses draw nothing."""
    noisy: Any = loop.train_loss
    quiet = lambda *args: noisy(*args[:3], jax.random.key(0))
    monkeypatch.setattr(loop, "train_loss", quiet)
    data = load("digits", size=100)
    model = loop.make_model(data.train, 16, 0)
    start = jax.tree.map(hpo.Positive, loop.make_values())
    algorithm = loop.make_algorithm(5)
    own = algorithm.init(model, start)
    _, own = loop.take_last(loop.tuned_steps(algorithm, own, data, 5, 0), 20)
    problem = hpo.Problem(quiet, loop.val_loss)
    whole = hpo.T1T2(problem, loop.INNER, algorithm.outer, inner_steps=5)
    state = whole.init(model, start)
    train, val = loop.load_batches(data.train, 0), loop.load_batches(data.val, 0)
    for _ in range(4):
        batches = [next(train) for _ in range(5)]
        stacked = hpo.Stacked(jax.tree.map(lambda *x: np.stack(x), *batches))
        state = whole.step(state, stacked, next(val))
    for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(state), strict=True):
        if eqx.is_inexact_array(x):
            assert np.allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_page_of_training_loop(capsys):
    """Both scripts that the first difference on the page stands for."""
    page = (ROOT / "docs" / "experiments" / "training-loop.md").read_text()
    lines = page.split("```diff\n")[1].split("```")[0].splitlines()
    for left_out, printed in [("+", 2), ("-", 3)]:
        script = "\n".join(x[1:] for x in lines if not x.startswith(left_out))
        with jax.enable_x64(False):
            exec(compile(script, "page", "exec"), {"__name__": "page"})
        rows = capsys.readouterr().out.splitlines()
        assert [len(row.split()) for row in rows] == [printed] * 4
        assert float(rows[-1].split()[1]) < 1 < 2 < float(rows[0].split()[1])
