"""The image sets of the experiments: splits, forms of files, downloads."""

import gzip
import pathlib
import struct
import sys

import numpy as np
import pytest
from docs.experiments.image_data import load


def test_digits_are_split_without_overlap():
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
def test_local_folders(tmp_path, form):
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
    data = load("mnist", folder=tmp_path)
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


def test_missing_data_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="Found no .*idx3-ubyte.*fashion_mnist.npz"):
        load("fashion_mnist", folder=tmp_path)
    with pytest.raises(SystemExit, match="choose from"):
        load("imagenet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match=r"eqx_hpo\[datasets\].*--folder"):
        load("cifar10")


def test_no_network_says_what_to_do(monkeypatch):
    class Offline:
        @staticmethod
        def load_dataset(repository, revision):
            assert len(revision) == 40
            raise ConnectionError

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(SystemExit, match="ConnectionError.*check the connection"):
        load("cifar10")


def test_downloads_become_the_same_form(monkeypatch):
    images, labels = _images(8)

    class Online:
        @staticmethod
        def load_dataset(repository, revision):
            part = {"image": list(images), "label": labels.tolist()}
            return {"train": part, "test": part}

    monkeypatch.setitem(sys.modules, "datasets", Online)
    data = load("mnist")
    assert np.allclose(data.test.images[..., 0], images / 255)
    assert data.train.images.dtype == np.float32 and len(data.train.labels) == 4


SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "mnist.npz").exists(), reason="needs local data")
def test_real_mnist():
    data = load("mnist", folder=SHARED, size=1000)
    assert data.train.images.shape == (1000, 28, 28, 1)
    assert set(data.val.labels.tolist()) == set(range(10))
