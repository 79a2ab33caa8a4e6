"""The experiments run, small."""

import gzip
import importlib
import pathlib
import struct
import sys

import jax
import numpy as np
import pytest


ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def example():
    """Imports an experiment anew, in single precision as a user has it."""
    package = "docs.experiments"
    with jax.enable_x64(False):
        yield lambda name: importlib.import_module(f"{package}.{name}")
    for name in [x for x in sys.modules if x.startswith(package)]:
        sys.modules.pop(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quickstart(example, tmp_path, capsys):
    quickstart = example("quickstart")
    figure = tmp_path / "figure.png"
    errors = quickstart.main(first=100, seeds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert set(errors) == set(quickstart.TRAININGS)
    assert all(name in printed for name in errors)
    tuned = errors.pop(quickstart.TUNED)
    # The noise alone is a twenty-fourth of the variance.
    assert 0.04 < tuned < 0.09
    assert all(error > 1.4 * tuned for error in errors.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quickstart_on_real_data(example, tmp_path):
    quickstart = example("quickstart")
    figure = tmp_path / "figure.png"
    errors = quickstart.main("diabetes", seeds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    assert all(0.3 < error < 3 for error in errors.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_greedy_toy(example, tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main = example("greedy_toy").main
    histories = main(inner_steps=(5,), steps=22, figure=str(figure))
    assert figure.stat().st_size > 10_000
    losses = {(x.reading, x.method): h.val_loss for x, h in histories.items()}
    # After 20 updates, as a prototype of the paper's figure has it.
    assert losses["warm start", "T1-T2"][20] == pytest.approx(0.86, abs=0.005)
    assert losses["warm start", "greedy 0.9"][20] == pytest.approx(0.052, abs=0.001)
    assert "0.861" in capsys.readouterr().out


@pytest.mark.slow
def test_greedy_cosines(example, monkeypatch):
    cosines = example("greedy_cosines")
    monkeypatch.setattr(
        cosines, "INNERS", {name: cosines.INNERS[name] for name in ("sgd", "momentum")}
    )
    results = cosines.main(inner_steps=(5,), tasks=20)
    mean = {
        name: {k: v.mean() for k, v in x.items()} for (name, _), x in results.items()
    }
    assert mean["sgd"]["greedy"] > 0.98
    # Momentum spoils the sum, and the two options together mend it.
    assert mean["momentum"]["greedy"] < 0.5
    assert mean["momentum"]["both"] > 0.98


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hyper_cleaning(example, tmp_path, capsys):
    hyper_cleaning = example("hyper_cleaning")
    hyper_cleaning.LAYERS = 1
    methods = hyper_cleaning.make_methods()
    few = {name: methods[name] for name in ("greedy 0.9", hyper_cleaning.EXACT)}
    hyper_cleaning.make_methods = lambda: {"T1-T2": methods["T1-T2"], **few}
    figure = tmp_path / "figure.png"
    results = hyper_cleaning.main(
        size=200, val_size=200, steps=20, seeds=1, figure=str(figure)
    )
    assert figure.stat().st_size > 10_000
    assert "greedy 0.9" in capsys.readouterr().out
    for name, (row,) in results.items():
        if name != hyper_cleaning.NONE:
            assert row.auc > 0.7 and row.cosines[0] > 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minibatch_cleaning(example, tmp_path, capsys, monkeypatch):
    cleaning = example("minibatch_cleaning")
    each, none = cleaning.T1T2_EACH, cleaning.NONE
    monkeypatch.setattr(cleaning, "RATES", {each: 0.1})
    figure, record = tmp_path / "figure.png", tmp_path / "record.json"
    results = cleaning.main(steps=500, figure=str(figure), record=str(record))
    assert figure.stat().st_size > 10_000 and record.stat().st_size > 1000
    assert cleaning.CLEANED in capsys.readouterr().out
    rows = {name: row for name, (row,) in results.items()}
    assert rows[each].auc > 0.7 and rows[none].auc == 0.5
    assert rows[each].test[-1] > rows[none].test[-1] + 0.05
    # The validation images are trained on here, and only here.
    assert rows[cleaning.VALIDATION].val[-1] > 0.98 > rows[none].val[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_feature_selection(example, tmp_path, monkeypatch):
    feature_selection = example("feature_selection")
    make = feature_selection.make_methods
    shown = (feature_selection.DENSE, feature_selection.TOP_K, "gates, L1, top k")
    few = lambda *args: {name: make(*args)[name] for name in shown}
    monkeypatch.setattr(feature_selection, "make_methods", few)
    figure = tmp_path / "figure.png"
    rows = feature_selection.main(steps=100, seeds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    dense, top_k = (rows[name][0] for name in shown[:2])
    assert top_k.found >= 19 and top_k.test < dense.test
    assert top_k.kept < dense.kept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_architecture(example, tmp_path, capsys):
    figure = tmp_path / "figure.png"
    architecture = example("architecture")
    architecture.BLOCKS = 2
    (result,) = architecture.main(size=100, steps=12, random=2, figure=str(figure))
    assert figure.stat().st_size > 10_000
    assert "hard samples, retrained" in capsys.readouterr().out
    for solution, rows in result.searches.values():
        assert solution.discretised is not None
        assert set(rows) == {"relaxed", "discretised", "retrained"}
    # Hard samples are discrete already: there is no gap.
    rows = result.searches["hard samples"].rows
    assert np.isclose(rows["relaxed"].val_loss, rows["discretised"].val_loss)


def test_digits_are_split_without_overlap(example):
    load = example("image_data").load
    first, again, other = (load("digits", size=200, seed=seed) for seed in (0, 0, 1))
    sizes = [len(part.labels) for part in first]
    assert sizes == [200, 200, 599]
    rows = np.concatenate([part.images.reshape(len(part.images), -1) for part in first])
    whole = load("digits").test.images
    assert rows.shape[1] == 64 and whole.shape[1:] == (8, 8, 1)
    assert 0 <= rows.min() and rows.max() <= 1
    assert np.array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.labels, other.train.labels)
    with pytest.raises(ValueError, match="`size` must be from 1 to"):
        load("digits", size=1000)


def _images(n, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 5, 4), np.uint8)
    return images, rng.integers(0, 10, n, np.uint8)


def _write_idx(path, array, compress):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    content = header + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("form", ["npz", "npz without test", "idx", "idx.gz"])
def test_local_folders(example, tmp_path, form):
    (images, labels), (test_images, test_labels) = _images(30), _images(12, 1)
    if form == "npz":
        np.savez(
            tmp_path / "mnist.npz",
            train_images=images,
            train_labels=labels,
            test_images=test_images,
            test_labels=test_labels,
        )
    elif form == "npz without test":
        np.savez(tmp_path / "mnist.npz", images=images, labels=labels)
    else:
        parts = [("train", images, labels), ("t10k", test_images, test_labels)]
        for name, x, y in parts:
            _write_idx(tmp_path / f"{name}-images-idx3-ubyte", x, form == "idx.gz")
            _write_idx(tmp_path / f"{name}-labels-idx1-ubyte", y, form == "idx.gz")
    data = example("image_data").load("mnist", folder=tmp_path)
    if form == "npz without test":
        assert [len(part.labels) for part in data] == [10, 10, 10]
        seen = np.concatenate([part.images for part in data])
    else:
        assert [len(part.labels) for part in data] == [15, 15, 12]
        assert np.array_equal(data.test.labels, test_labels)
        assert np.allclose(data.test.images[..., 0], test_images / 255)
        seen = np.concatenate([data.train.images, data.val.images])
    order = lambda x: x[np.lexsort(x.reshape(len(x), -1).T)]
    assert np.allclose(order(seen)[..., 0], order(images / 255))


def test_missing_data_say_what_to_do(example, tmp_path, monkeypatch):
    load = example("image_data").load
    with pytest.raises(SystemExit, match="Found no .*idx3-ubyte.*fashion_mnist.npz"):
        load("fashion_mnist", folder=tmp_path)
    with pytest.raises(SystemExit, match="choose from"):
        load("imagenet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match=r"eqx_hpo\[datasets\].*--folder"):
        load("cifar10")


def test_no_network_says_what_to_do(example, monkeypatch):
    class Offline:
        @staticmethod
        def load_dataset(repository, revision):
            assert len(revision) == 40
            raise ConnectionError

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(SystemExit, match="ConnectionError.*check the connection"):
        example("image_data").load("cifar10")


def test_downloads_become_the_same_form(example, monkeypatch):
    images, labels = _images(8)

    class Online:
        @staticmethod
        def load_dataset(repository, revision):
            part = {"image": list(images), "label": labels.tolist()}
            return {"train": part, "test": part}

    monkeypatch.setitem(sys.modules, "datasets", Online)
    data = example("image_data").load("mnist")
    assert np.allclose(data.test.images[..., 0], images / 255)
    assert data.train.images.dtype == np.float32 and len(data.train.labels) == 4


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "mnist.npz").exists(), reason="needs local data")
def test_real_mnist(example):
    data = example("image_data").load("mnist", folder=SHARED, size=1000)
    assert data.train.images.shape == (1000, 28, 28, 1)
    assert set(data.val.labels.tolist()) == set(range(10))


@pytest.mark.slow
def test_sinusoid(example, tmp_path, capsys, monkeypatch):
    sinusoid = example("sinusoid")
    for name, value in {"TEST_TASKS": 10, "WIDTH": 8, "COSINE_STEPS": (1,)}.items():
        monkeypatch.setattr(sinusoid, name, value)
    figure = tmp_path / "figure.png"
    rows = sinusoid.main(seeds=2, episodes=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    for row in rows.values():
        assert row.errors.shape == (2,)
        assert np.all(np.isfinite(row.errors))
    assert rows[f"{sinusoid.DISTILL} {sinusoid.DISCOUNT}"].scale > 0
    printed = capsys.readouterr().out
    assert "exact" in printed and "after 1 episodes" in printed


@pytest.mark.slow
def test_hyper_cleaning_cosines(example, tmp_path):
    main = example("hyper_cleaning_cosines").main
    figure = tmp_path / "figure.png"
    means = main(size=20, val_size=20, steps=1, seeds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    assert list(means) == [
        "T1-T2",
        "Greedy 0.9",
        "HyperDistill 0.5",
        "HyperDistill 0.9",
        "DrMAD",
    ]
    for cosines in means.values():
        assert np.all(np.abs(cosines) <= 1.001)
    assert means["DrMAD"][0] > means["T1-T2"][0]


@pytest.mark.slow
def test_few_shot(example, tmp_path, capsys, monkeypatch):
    """On noise instead of characters, one pattern for each."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (60, 1, 28, 28))
    images = patterns + rng.integers(0, 50, (60, 20, 28, 28))
    path = tmp_path / "omniglot_small1.npz"
    labels = np.repeat(np.arange(60), 20)
    np.savez(path, images=images.reshape(-1, 28, 28).astype(np.uint8), labels=labels)
    few_shot = example("few_shot")
    for name in ("VAL_TASKS", "TEST_TASKS", "CHUNK"):
        monkeypatch.setattr(few_shot, name, 4)
    figure = tmp_path / "figure.png"
    few_shot.main(
        folder=str(tmp_path), horizon=5, episodes=5, seeds=2, figure=str(figure)
    )
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name in (few_shot.FIRST_ORDER, few_shot.ONE_STEP, few_shot.DISTILL):
        assert name in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernel_ridge(example, tmp_path, capsys):
    kernel_ridge = example("kernel_ridge")
    figure = tmp_path / "figure.png"
    rows = kernel_ridge.main("friedman", steps=60, seeds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    each = rows[kernel_ridge.EACH][0]
    assert each.test < 0.6 * rows[kernel_ridge.SHARED][0].test
    scale = np.asarray(each.values.scale)
    assert scale[:3].max() < scale[5:].min()
    with jax.enable_x64(True):
        task = kernel_ridge.make_task("diabetes", 0)
        algorithm = kernel_ridge.make_algorithm()
        state = kernel_ridge.tune(algorithm, task, 0.0, 2)
        assert kernel_ridge.compare_gradients(algorithm, state, task) < 1e-9
        task = kernel_ridge.make_task("friedman", 0)
        assert kernel_ridge.compare_scikit(each.values, task) < 1e-8
    assert "refitted" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inner_solver(example, tmp_path, capsys, monkeypatch):
    solver = example("inner_solver")
    monkeypatch.setattr(solver, "OPTAX", {"SGD": (solver.optax.sgd(0.3), (10,))})
    monkeypatch.setattr(solver, "RUNS", (solver.CLOSE, "SGD 10"))
    figure = tmp_path / "figure.png"
    starts, results = solver.main(size=100, updates=10, seeds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    errors = [starts[f"L-BFGS {x:g}"][0].error for x in (1e-1, 1e-2, 1e-4, 1e-6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
    (close,), (sgd,) = results[solver.CLOSE], results["SGD 10"]
    assert close.records[-1].error < 0.01 < sgd.records[-1].error
    assert close.val_loss < results[solver.SHARED][0].val_loss
    assert "solved" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_neural_ode(example, tmp_path, capsys, monkeypatch):
    neural_ode = example("neural_ode")
    monkeypatch.setattr(neural_ode, "TEST", 4)
    figure = tmp_path / "figure.png"
    rows = neural_ode.main(size=2, steps=4, warmup=1, seeds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert name in printed
        assert np.all(np.isfinite(row.exact)) and np.all(row.steps > 0)
    noise = {name: np.asarray(row.course.values.noise) for name, row in rows.items()}
    assert np.all(noise["fixed"] == noise["fixed"][:, :1])
    assert np.all(noise["tuned online"][:, -1] != noise["tuned online"][:, 0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compare(example, tmp_path, capsys, monkeypatch):
    compare = example("compare")
    weights = {"weights": compare.SETTINGS["weights"]}
    monkeypatch.setattr(compare, "SETTINGS", weights)
    figure = tmp_path / "figure.png"
    results = compare.main(size=30, steps=3, warm=5, figure=str(figure))
    assert figure.stat().st_size > 10_000
    for placed in results:
        rows = {row.name: row for row in placed.comparison.rows}
        assert rows["Unrolled"].relative_error < 1e-4
        assert rows["T1T2"].relative_error > 0.1
    assert "cosine" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_million_decays(example, tmp_path, capsys, monkeypatch):
    decays = example("million_decays")
    methods = decays.make_methods()
    few = {k: methods[k] for k in (decays.IMPLICIT, decays.SWAPPED, decays.NONE)}
    monkeypatch.setattr(decays, "make_methods", lambda: few)
    figure = tmp_path / "figure.png"
    results = decays.main(hidden=(64,), size=20, steps=20, figure=str(figure))
    assert figure.stat().st_size > 10_000
    assert "4810 hyperparameters" in capsys.readouterr().out
    loss = {name: course.val_losses[-1] for name, (course,) in results.items()}
    # The same updates at other weights do not help.
    assert loss[decays.IMPLICIT] < 0.7 * min(loss[decays.SWAPPED], loss[decays.NONE])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_learning_rates(example, tmp_path, capsys, monkeypatch):
    rates = example("learning_rates")
    learn, start = rates.learn_schedule, np.full((200, 2), rates.START, np.float32)

    def learn_or_start(algorithm, model, train, val, updates):
        """The start, in place of a schedule for one order of the batches."""
        if isinstance(train, rates.hpo.Stacked):
            return rates.jnp.asarray(start)
        return learn(algorithm, model, train, val, updates)

    monkeypatch.setattr(rates, "learn_schedule", learn_or_start)
    monkeypatch.setattr(rates, "SCHEDULE_RATE", 0.3)  # few updates, so larger ones
    figure = tmp_path / "figure.png"
    results = rates.main(size=200, steps=200, updates=8, figure=str(figure))
    assert figure.stat().st_size > 10_000
    assert rates.LEARNED in capsys.readouterr().out
    (learned,), (online,) = results[rates.LEARNED], results[rates.ONLINE]
    (fixed,) = results[rates.FIXED]
    assert learned.course.rates.shape == online.course.rates.shape == (200, 2)
    # A window shares its rates, and both ways have left the start.
    windows = np.reshape(learned.course.rates, (rates.WINDOWS, -1, 2))
    assert np.all(windows == windows[:, :1])
    assert windows[1:-1].min() > 2 * rates.START
    assert np.asarray(online.course.rates).max() > 2 * rates.START
    # What was learned beats the start on an order of batches not seen before.
    assert learned.course.val_losses[-1] < 0.8 * fixed.course.val_losses[-1]


@pytest.mark.slow
def test_schedule_free_is_read_at_its_average(example):
    rates = example("learning_rates")
    train, val, _ = rates.load_data("digits", None, 200, 0)
    model, steps = rates.make_model(train.x.shape[1], 0), rates.POINTS
    batches = rates.make_batches(train, 0)
    course = rates.train_free(rates.FREE_SGD, 0.3, model, batches, val, steps)
    mix = lambda share, x, y: jax.tree_util.tree_map(
        lambda x, y: (1 - share) * x + share * y, x, y
    )
    fast = average = model
    for t in range(steps):
        batch = batches.draw(jax.numpy.array(t), jax.numpy.array(t), None)
        gradient = jax.grad(rates.loss)(mix(0.9, fast, average), None, batch, None)
        fast = jax.tree_util.tree_map(lambda z, g: z - 0.3 * g, fast, gradient)
        average = mix(1 / (t + 1), average, fast)
    pairs = zip(*map(jax.tree_util.tree_leaves, (course.model, average)))
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_regularisation(example, tmp_path, capsys, monkeypatch):
    regularisation = example("regularisation")
    few = {regularisation.T1T2: "-"}
    small = {"WIDTH": 16, "HIDDEN_LAYERS": 1, "RATES": (0.4,), "LOOKS": few}
    for name, value in small.items():
        monkeypatch.setattr(regularisation, name, value)
    figure = tmp_path / "figure.png"
    results = regularisation.main(size=60, steps=20, figure=str(figure))
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)
    values = {name: run.course[..., -1] for name, (run,) in results.items()}
    start = np.array(regularisation.DEFAULTS)[:, None]
    assert np.allclose(values[regularisation.DEFAULT], start)
    tuned = values[regularisation.T1T2]
    assert np.allclose(values[regularisation.RETRAINED], tuned)
    # A gradient reaches each of the six.
    assert np.all(np.abs(tuned / start - 1) > 1e-3)
    decay, noise, dropout = tuned
    assert np.all(decay > 0) and np.all(noise > 0)
    assert np.all((dropout > 0) & (dropout < 1))
    # Without a key nothing is disturbed; with another key it is another draw.
    network = regularisation.hpo.unwrap(
        regularisation.make_network(4, (1e-4, 0.1, 0.5), regularisation.jr.key(0))
    )
    x, keys = np.ones(4, np.float32), regularisation.jr.split(regularisation.jr.key(1))
    assert np.array_equal(network(x), network(x))
    assert not np.allclose(network(x, keys[0]), network(x, keys[1]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_audit(example, capsys, monkeypatch):
    audit = example("audit")
    for name, value in dict(GRID=(0.1,), AUDITS=(5, 10), DRAWS=3).items():
        monkeypatch.setattr(audit, name, value)
    # Over its own horizon the exact algorithm is right.
    (result,) = audit.main(steps=10, horizon=audit.INNER_STEPS, seeds=1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in result)
    exact = result[audit.WINDOW].verdicts
    assert exact.estimate.shape == (2, 3)
    assert len(np.unique(exact.estimate)) == 6
    assert np.allclose(exact.cosine, 1, atol=1e-4)
    assert np.allclose(exact.norm_ratio, 1, rtol=1e-2)
    short = result[audit.T1T2].verdicts
    assert np.allclose(np.abs(short.cosine), 1, atol=1e-4)
    assert np.max(np.abs(short.norm_ratio - 1)) > 0.1
    assert result[audit.BEST] == result["noise 0.1"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_augmentation(example, tmp_path, capsys, monkeypatch):
    augmentation = example("augmentation")
    methods = {"T1T2": augmentation.METHODS["T1T2"]}
    monkeypatch.setattr(augmentation, "METHODS", methods)
    monkeypatch.setattr(augmentation, "HIDDEN", 32)
    # Nothing is retrained: that compiles two more programs.
    row = lambda _, __, values, *rest: augmentation.Row(*np.zeros((3, len(values))))
    monkeypatch.setattr(augmentation, "train_all", row)
    figure = tmp_path / "figure.png"
    (result,) = augmentation.main(size=60, steps=30, random=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in result.rows)
    assert result.rows["T1T2, online"].test > 0.5
    strengths, weights = result.solutions["T1T2"].values
    named = dict(zip(augmentation.OPERATIONS, weights))
    assert np.isclose(sum(weights), 1)
    assert named["invert"] < named["upside down"] < 1 / 6 < named["nothing"]
    for name, largest in augmentation.LARGEST.items():
        assert 0 < strengths[name] < largest
        assert abs(strengths[name] / largest - 0.2) > 1e-3  # a gradient reaches it
    # With no strength each operation does what its name says, and nothing else.
    images, key = result.data.train.images[:5], augmentation.jr.key(0)
    none = augmentation.make_plain().strengths
    same, mirror, down, invert, *_ = augmentation.augment_all(images, none, key)
    assert np.allclose(same, images, atol=1e-5)
    assert np.allclose(mirror, images[:, :, ::-1], atol=1e-5)
    assert np.allclose(down, images[:, ::-1], atol=1e-5)
    assert np.allclose(invert, 1 - images, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_random_search(example, tmp_path, capsys, monkeypatch):
    random_search = example("random_search")
    make = random_search.make_methods
    shown = (random_search.EXACT, random_search.ONE_STEP)
    few = lambda: {name: make()[name] for name in shown}
    monkeypatch.setattr(random_search, "make_methods", few)
    figure = tmp_path / "figure.png"
    results = random_search.main(numbers=(100,), trials=5, figure=str(figure))
    assert figure.stat().st_size > 10_000
    assert random_search.TPE in capsys.readouterr().out
    courses = results[100][0].courses
    random, exact = courses[random_search.RANDOM], courses[random_search.EXACT]
    # It starts from what random search tried first, trained in the same way.
    assert exact.val_losses[0] == pytest.approx(random.val_losses[0], rel=1e-4)
    assert exact.val_losses[-1] < 0.8 * random.val_losses[-1]
    assert exact.test_loss < random.test_loss
    reached = random_search.seconds_to_reach(exact, random.val_losses[-1])
    assert exact.seconds[0] <= reached < exact.seconds[-1]
    assert len(courses[random_search.ONE_STEP].seconds) == 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_darts(example, tmp_path, capsys, monkeypatch):
    darts = example("darts")
    monkeypatch.setattr(darts, "CELLS", 1)
    make, second = darts.make_algorithms, darts.SECOND
    only = lambda inner: {second: make(inner)[second]}
    monkeypatch.setattr(darts, "make_algorithms", only)
    figure = tmp_path / "figure.png"
    (result,) = darts.main(size=100, steps=30, random=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name, search in result.searches.items():
        assert f"{name}, retrained" in printed
        # Two edges into each node, with one operation each, and not `none`.
        cell = np.asarray(search.cell)
        ends = np.array(darts.EDGES)[:, 1]
        into = [cell[ends == node].sum() for node in (2, 3, 4)]
        assert into == [2, 2, 2] and cell.max() == 1 and not cell[:, 0].any()
        # They are the strongest ones.
        strength = np.asarray(search.solution.values)[:, 1:].max(axis=1)
        for node in (2, 3, 4):
            edges = [i for i, e in enumerate(darts.EDGES) if e[1] == node]
            kept = [strength[i] for i in edges if cell[i].any()]
            left = [strength[i] for i in edges if not cell[i].any()]
            assert not left or min(kept) >= max(left)
        assert search.discretised.parameters < search.relaxed.parameters
        assert search.relaxed.val_loss < 2.2
        assert np.abs(np.asarray(search.solution.values) - 1 / 6).max() > 0.02
    # The products of matrices are convolutions and pools.
    x = np.random.default_rng(0).normal(size=(64, 2, 5)).astype(np.float32)
    square = np.pad(x.reshape(8, 8, 2, 5), [(1, 1), (1, 1), (0, 0), (0, 0)])
    shifted = [square[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    neighbours = np.asarray(darts.get_neighbours(x)).reshape(9, 8, 8, 2, 5)
    assert np.allclose(neighbours, np.stack(shifted))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scale(example, tmp_path, capsys):
    scale = example("scale")
    figure = tmp_path / "figure.png"
    rows = scale.main(smallest=1e4, largest=1e5, rounds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    assert "100172" in capsys.readouterr().out
    for row in rows:
        assert all(np.all(x > 0) for x in row.seconds.values())
    small, large = (row.megabytes for row in rows)
    for name in small:
        # In proportion to H, and a few copies of the weights. Larger states take a way
        # that saves up to three of them.
        assert 7 < large[name] / small[name] < 11
        assert large[name] < 20 * 4 * rows[1].decays / 1e6
    assert large["plain"] < large["T1T2"] <= large["Greedy"] < large["HyperDistill"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_loop(example, tmp_path, capsys, monkeypatch):
    loop = example("training_loop")
    for name, value in dict(EVERY=(5,), TIMED_STEPS=10, TIMED_BLOCKS=2).items():
        monkeypatch.setattr(loop, name, value)
    monkeypatch.setattr(loop, "LOG_EVERY", 20)
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 40)
    monkeypatch.setattr(loop, "INTERRUPT", 70)
    figure = tmp_path / "figure.png"
    options = dict(size=200, width=32, steps=120, figure=str(figure))
    results, seconds = loop.main(**options)
    assert figure.stat().st_size > 10_000
    assert "resumed: the same bits" in capsys.readouterr().out
    assert set(seconds) == set(results) == {"plain", 5}
    for (run,) in results.values():
        assert run.test > 70 and run.log[-1].step == 120
    decay = {name: run.log[-1].values.decay for name, (run,) in results.items()}
    assert np.allclose(decay["plain"], loop.DECAY)
    assert np.all(decay[5] < 0.8 * loop.DECAY)
    run = results[5][0]
    double = lambda x: 2 * x if isinstance(x, jax.Array) else x
    with pytest.raises(AssertionError):
        loop.check_equal(run, run._replace(states=jax.tree.map(double, run.states)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_library_at_every_nth_step(example, monkeypatch):
    """Is one algorithm with n inner steps, where the losses draw nothing."""
    import equinox as eqx
    import eqx_hpo as hpo

    loop = example("training_loop")
    noisy = loop.train_loss
    quiet = lambda *args: noisy(*args[:3], jax.random.key(0))
    monkeypatch.setattr(loop, "train_loss", quiet)
    data = example("image_data").load("digits", size=100)
    model = loop.make_model(data.train, 16, 0)
    start = jax.tree.map(hpo.Positive, loop.make_values())
    algorithm = loop.make_algorithm(5)
    own = algorithm.init(model, start)
    params = eqx.filter(model, eqx.is_inexact_array)
    structure = jax.tree.structure(loop.INNER.init(params))
    assert jax.tree.structure(own.inner_opt_state) == structure
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cifar10(example, tmp_path, capsys, monkeypatch):
    cifar10 = example("cifar10")
    shown = (cifar10.TPE, cifar10.T1T2)
    monkeypatch.setattr(cifar10, "METHODS", shown)
    figure = tmp_path / "figure.png"
    results = cifar10.main(size=100, steps=20, seconds=1.0, seeds=1, figure=str(figure))
    assert figure.stat().st_size > 10_000
    printed = capsys.readouterr().out
    for name, (course,) in results.items():
        assert name in printed
        losses = [record.val_loss for record in course.records]
        assert losses == sorted(losses, reverse=True)
    searched, tuned = (results[name][0].records[-1].values for name in shown)
    assert results[cifar10.T1T2][0].records[-1].val_loss < 2.2  # a guess: 2.3
    assert np.all(np.abs(np.log(tuned.dropout / 0.3)) > 0.01)  # where it started
    assert len(set(np.asarray(searched.decay).tolist())) == 4
    assert 0.01 <= searched.noise <= 1
