"""Each experiment runs, small, and is right where the truth is known."""

import importlib
import sys
from typing import Any

import eqx_hpo as hpo
import jax
import numpy as np
import pytest


@pytest.fixture
def experiment():
    """Imports an experiment anew, in single precision as a user has it."""
    package = "docs.experiments"
    with jax.enable_x64(False):
        yield lambda name: importlib.import_module(f"{package}.{name}")
    for name in [x for x in sys.modules if x.startswith(package)]:
        sys.modules.pop(name)


def quickstart(module: Any, errors: Any):
    tuned = errors[module.TUNED]
    # The noise alone is a twenty-fourth of the variance.
    assert 0.04 < tuned < 0.09
    assert all(x > 1.4 * tuned for name, x in errors.items() if name != module.TUNED)


def greedy_toy(module: Any, histories: Any):
    losses = {(x.reading, x.method): h.val_loss for x, h in histories.items()}
    # After 20 updates, as a prototype of the paper's figure has it.
    assert losses["warm start", "T1-T2"][20] == pytest.approx(0.86, abs=0.005)
    assert losses["warm start", "greedy 0.9"][20] == pytest.approx(0.052, abs=0.001)


def greedy_cosines(module: Any, results: Any):
    mean = {
        name: {k: np.mean(v) for k, v in x.items()} for (name, _), x in results.items()
    }
    assert mean["sgd"]["greedy"] > 0.98
    # Momentum spoils the sum, and the two options together mend it.
    assert mean["momentum"]["greedy"] < 0.5 < 0.98 < mean["momentum"]["both"]


def hyper_cleaning(module: Any, results: Any):
    for name, (row,) in results.items():
        assert name == module.NONE or row.auc > 0.7 and row.cosines[0] > 0.2


def hyper_cleaning_cosines(module: Any, means: Any):
    assert all(np.all(np.abs(x) <= 1.001) for x in means.values())
    assert means["DrMAD"][0] > means["T1-T2"][0]


def minibatch_cleaning(module: Any, results: Any):
    rows = {name: row for name, (row,) in results.items()}
    each, none = rows[module.T1T2_EACH], rows[module.NONE]
    assert each.auc > 0.7 and none.auc == 0.5
    # The validation images are trained on here, and only here.
    assert rows[module.VALIDATION].val[-1] > 0.98 > none.val[-1]


def feature_selection(module: Any, rows: Any):
    dense, top_k = (rows[name][0] for name in (module.DENSE, module.TOP_K))
    assert top_k.found >= 19 and top_k.test < dense.test
    assert top_k.kept < dense.kept


def architecture(module: Any, results: Any):
    rows = results[0].searches["hard samples"].rows
    # Hard samples are discrete already: there is no gap.
    assert np.isclose(rows["relaxed"].val_loss, rows["discretised"].val_loss)


def sinusoid(module: Any, rows: Any):
    assert all(np.all(np.isfinite(row.errors)) for row in rows.values())
    assert rows[f"{module.DISTILL} {module.DISCOUNT}"].scale > 0


def kernel_ridge(module: Any, rows: Any):
    each = rows[module.EACH][0]
    assert each.test < 0.6 * rows[module.SHARED][0].test
    assert max(each.values.scale[:3]) < min(each.values.scale[5:])
    with jax.enable_x64(True):
        task = module.make_task("friedman", 0)
        algorithm = module.make_algorithm()
        state = module.tune(algorithm, task, 0.0, 2)
        assert module.compare_gradients(algorithm, state, task) < 1e-9
        assert module.compare_scikit(each.values, task) < 1e-8


def inner_solver(module: Any, found: Any):
    starts, results = found
    errors = [starts[f"L-BFGS {x:g}"][0].error for x in (1e-1, 1e-2, 1e-4, 1e-6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
    (close,), (sgd,) = results[module.CLOSE], results["SGD 10"]
    assert close.records[-1].error < 0.01 < sgd.records[-1].error
    assert close.val_loss < results[module.SHARED][0].val_loss


def neural_ode(module: Any, rows: Any):
    assert all(
        np.all(np.isfinite(x.exact)) and np.all(x.steps > 0) for x in rows.values()
    )
    noise = {name: np.asarray(row.course.values.noise) for name, row in rows.items()}
    assert np.all(noise["fixed"] == noise["fixed"][:, :1])
    assert np.all(noise["tuned online"][:, -1] != noise["tuned online"][:, 0])


def neural_ode_adjoints(module: Any, table: Any):
    possible = {name: "".join("ny"[x] for x in row) for name, row in table.items()}
    expected = dict(DirectAdjoint="yyy", ForwardMode="nnn", BacksolveAdjoint="nny")
    assert possible == expected | {"RecursiveCheckpointAdjoint": "nny"}


def compare(module: Any, results: Any):
    for placed in results:
        rows = {row.name: row for row in placed.comparison.rows}
        assert (
            rows["Unrolled"].relative_error < 1e-4 < 0.1 < rows["T1T2"].relative_error
        )


def million_decays(module: Any, results: Any):
    loss = {name: course.val_losses[-1] for name, (course,) in results.items()}
    # The same updates at other weights do not help.
    assert loss[module.IMPLICIT] < 0.7 * min(loss[module.SWAPPED], loss[module.NONE])


def learning_rates(module: Any, results: Any):
    (learned,), (online,) = results[module.LEARNED], results[module.ONLINE]
    # A window shares its rates, and both ways have left the start.
    windows = np.reshape(learned.course.rates, (module.WINDOWS, -1, 2))
    assert np.all(windows == windows[:, :1])
    assert windows[1:-1].min() > 1.2 * module.START
    assert np.max(online.course.rates) > 2 * module.START


def regularisation(module: Any, results: Any):
    values = {name: run.course[..., -1] for name, (run,) in results.items()}
    start = np.array(module.DEFAULTS)[:, None]
    tuned = values[module.T1T2]
    assert np.allclose(values[module.DEFAULT], start)
    assert np.allclose(values[module.RETRAINED], tuned)
    assert np.all(np.abs(tuned / start - 1) > 1e-3)  # a gradient reaches each
    # Without a key nothing is disturbed; with another key it is another draw.
    network = module.make_network(4, (1e-4, 0.1, 0.5), jax.random.key(0))
    network, x = hpo.unwrap(network), np.ones(4, np.float32)
    first, second = jax.random.split(jax.random.key(1))
    assert np.array_equal(network(x), network(x))
    assert not np.allclose(network(x, first), network(x, second))


def audit(module: Any, results: Any):
    exact, short = (results[0][x].verdicts for x in (module.WINDOW, module.T1T2))
    # Over its own horizon the exact algorithm is right.
    assert np.allclose(exact.cosine, 1, atol=1e-4)
    assert np.allclose(exact.norm_ratio, 1, rtol=1e-2)
    assert np.max(np.abs(short.norm_ratio - 1)) > 0.1


def augmentation(module: Any, results: Any):
    (result,) = results
    strengths, weights = result.solutions["T1T2"].values
    assert np.isclose(sum(weights), 1)
    for name, largest in module.LARGEST.items():
        assert abs(strengths[name] / largest - 0.2) > 1e-3  # a gradient reaches it
    # With no strength each operation does what its name says, and nothing else.
    images, none = result.data.train.images[:5], module.make_plain().strengths
    changed = module.augment_all(images, none, jax.random.key(0))
    expected = (images, images[:, :, ::-1], images[:, ::-1], 1 - images)
    assert np.allclose(changed[:4], np.stack(expected), atol=1e-5)


def random_search(module: Any, results: Any):
    courses = results[100][0].courses
    random, exact = courses[module.RANDOM], courses[module.EXACT]
    # It starts from what random search tried first, trained in the same way.
    assert exact.val_losses[0] == pytest.approx(random.val_losses[0], rel=1e-4)
    assert exact.val_losses[-1] < 0.8 * random.val_losses[-1]


def darts(module: Any, results: Any):
    for search in results[0].searches.values():
        # Two edges into each node, with one operation each, and not `none`.
        cell, ends = np.asarray(search.cell), np.array(module.EDGES)[:, 1]
        assert [cell[ends == node].sum() for node in (2, 3, 4)] == [2, 2, 2]
        assert cell.max() == 1 and not cell[:, 0].any()
    # The products of matrices are convolutions and pools.
    x = np.random.default_rng(0).normal(size=(64, 2, 5)).astype(np.float32)
    square = np.pad(x.reshape(8, 8, 2, 5), [(1, 1), (1, 1), (0, 0), (0, 0)])
    shifted = [square[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    neighbours = np.asarray(module.get_neighbours(x)).reshape(9, 8, 8, 2, 5)
    assert np.allclose(neighbours, np.stack(shifted))


def scale(module: Any, rows: Any):
    small, large = (row.megabytes for row in rows)
    # In proportion to H. Larger states take a way that saves up to three copies.
    assert all(7 < large[name] / small[name] < 11 for name in small)
    assert large["plain"] < large["T1T2"] <= large["Greedy"] < large["HyperDistill"]


def training_loop(module: Any, found: Any):
    results, seconds = found
    assert set(seconds) == set(results)
    decay = {name: run.log[-1].values.decay for name, (run,) in results.items()}
    assert np.allclose(decay["plain"], module.DECAY)
    assert np.all(decay[5] < module.DECAY)
    # The run asserts that the resumed bits are equal. It could have failed:
    run = results[5][0]
    double = lambda x: 2 * x if isinstance(x, jax.Array) else x
    with pytest.raises(AssertionError):
        module.check_equal(run, run._replace(states=jax.tree.map(double, run.states)))


def contour(module: Any, found: Any):
    """The exact hypergradient is the slope of the landscape, and leads to its least."""
    place, step = np.array([-1.0, -4.5]), 0.05
    around = place + step * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    right, left, up, down = module.trained_loss(around)
    slope = np.array([right - left, up - down]) / (2 * step)
    exact = module.hypergradient(module.EXACT, place)
    np.testing.assert_allclose(exact, slope, rtol=0.01)
    for (name, _), path in found[1].items():
        low, high = (0.99, 1.005) if name == "exact" else (1.05, 1.15)
        assert low * 4.31 < module.trained_loss(path[None, -1])[0] < high * 4.31


def cifar10(module: Any, results: Any):
    for (course,) in results.values():
        losses = [record.val_loss for record in course.records]
        assert losses == sorted(losses, reverse=True)
    tuned = results[module.T1T2][0].records[-1].values
    assert np.all(np.abs(np.log(tuned.dropout / 0.3)) > 0.01)  # where it started


EXPERIMENTS = """architecture audit augmentation cifar10 compare contour darts
feature_selection greedy_cosines greedy_toy hyper_cleaning hyper_cleaning_cosines
inner_solver kernel_ridge learning_rates million_decays minibatch_cleaning
neural_ode neural_ode_adjoints quickstart random_search regularisation scale sinusoid
training_loop""".split()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(experiment, tmp_path, capsys, name):
    module, figure = experiment(name), tmp_path / "figure.png"
    draws = name not in ("audit", "greedy_cosines", "neural_ode_adjoints")
    found = module.main(**module.QUICK, **({"figure": str(figure)} if draws else {}))
    printed = capsys.readouterr().out
    assert not draws or figure.stat().st_size > 10_000
    methods = found if isinstance(found, dict) else ()
    assert all(x in printed for x in methods if isinstance(x, str))
    globals()[name](module, found)


@pytest.mark.slow
def test_schedule_free_is_read_at_its_average(experiment):
    rates = experiment("learning_rates")
    train, val, _ = rates.load_data("digits", None, 200, 0)
    model, steps = rates.make_model(train.x.shape[1], 0), rates.POINTS
    batches = rates.make_batches(train, 0)
    course = rates.train_free(rates.FREE_SGD, 0.3, model, batches, val, steps)
    mix = lambda share, x, y: jax.tree.map(
        lambda x, y: (1 - share) * x + share * y, x, y
    )
    fast = average = model
    for t in range(steps):
        batch = batches.draw(jax.numpy.array(t), jax.numpy.array(t), None)
        gradient = jax.grad(rates.loss)(mix(0.9, fast, average), None, batch, None)
        fast = jax.tree.map(lambda z, g: z - 0.3 * g, fast, gradient)
        average = mix(1 / (t + 1), average, fast)
    for x, y in zip(*map(jax.tree.leaves, (course.model, average))):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.slow
def test_few_shot(experiment, tmp_path, capsys, monkeypatch):
    """On noise instead of characters, one pattern for each."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (60, 1, 28, 28)) + rng.integers(
        0, 50, (60, 20, 28, 28)
    )
    labels, images = np.repeat(np.arange(60), 20), images.reshape(-1, 28, 28)
    path = tmp_path / "omniglot_small1.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    few_shot = experiment("few_shot")
    for name in ("VAL_TASKS", "TEST_TASKS", "CHUNK"):
        monkeypatch.setattr(few_shot, name, 4)
    figure = tmp_path / "figure.png"
    rows = few_shot.main(folder=str(tmp_path), figure=str(figure), **few_shot.QUICK)
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert len(rows) == 4 and all(name in printed for name in rows)
