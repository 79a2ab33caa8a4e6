"""The image sets of the examples, split into train, validation and untouched test."""

import gzip
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32


class Images(NamedTuple):
    """Grey images have one channel. Pixels lie between 0 and 1."""

    images: Float32[np.ndarray, "n height width channels"]
    labels: Int32[np.ndarray, " n"]


class Splits(NamedTuple):
    train: Images
    val: Images
    test: Images


class _Source(NamedTuple):
    repository: str
    revision: str  # a commit, so that the data never change under a result
    image_column: str = "image"


_SOURCES = {
    "mnist": _Source("ylecun/mnist", "77f3279092a1c1579b2250db8eafed0ad422088c"),
    "fashion_mnist": _Source(
        "zalando-datasets/fashion_mnist", "531be5e2ccc9dba0c201ad3ae567a4f3d16ecdd2"
    ),
    "cifar10": _Source(
        "uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "img"
    ),
}

_CHARACTERS = "pass as `folder` (`--folder`) a local folder with `omniglot_small1.npz`"

NAMES = ("digits", *_SOURCES)


def load(
    name: str,
    *,
    folder: str | pathlib.Path | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Splits:
    """Loads an image set and splits it.

    **Arguments:**

    - `name`: `digits` (comes with scikit-learn), `mnist`, `fashion_mnist` or `cifar10`.
    - `folder`: where the files of the last three are: `<name>.npz` with
        `train_images`, `train_labels`, `test_images` and `test_labels`, or `images`
        and `labels`; or the four IDX files of (Fashion-)MNIST, plain or compressed.
        Without it they are downloaded from Hugging Face.
    - `size`: the number of train images, and of validation images; by default each
        gets half of what is not test.
    - `seed`: of the split. The test part is the publisher's, whatever the seed; a third
        of the images where there is none.

    **Returns:** the `Splits`.
    """
    if name not in NAMES:
        raise SystemExit(f"There is no data set `{name}`; choose from {NAMES}.")
    if name == "digits":
        rest, test = _load_digits(), None
    elif folder is not None:
        rest, test = _load_folder(name, pathlib.Path(folder))
    else:
        rest, test = _download(name)
    return _split(rest, test, size, np.random.default_rng(seed))


def load_characters(
    folder: str | pathlib.Path | None = None,
) -> Float32[np.ndarray, "characters drawings height width"]:
    """Loads Omniglot: handwritten characters, 20 drawings of each, bright on dark.

    **Arguments:**

    - `folder`: where `omniglot_small1.npz` is, with `images` and `labels`. Without it
        the 964 characters of the "background" part are downloaded from Hugging Face.

    **Returns:** the drawings, of 28x28 pixels between 0 and 1.
    """
    if folder is not None:
        with np.load(pathlib.Path(folder) / "omniglot_small1.npz") as arrays:
            images, labels = arrays["images"], arrays["labels"]
    else:
        part = _load_dataset("dpdl-benchmark/omniglot", None, _CHARACTERS)["train"]
        small = [image.convert("L").resize((28, 28)) for image in part["image"]]
        images, labels = 255 - np.stack([np.asarray(x) for x in small]), part["label"]
    order = np.argsort(np.asarray(labels), kind="stable")
    return np.asarray(images[order], np.float32).reshape(-1, 20, 28, 28) / 255


def _split(
    rest: Images, test: Images | None, size: int | None, rng: np.random.Generator
) -> Splits:
    order = rng.permutation(len(rest.labels))
    if test is None:
        share = len(order) // 3
        test, order = _take(rest, order[:share]), order[share:]
    half = len(order) // 2 if size is None else size
    if not 1 <= half <= len(order) // 2:
        raise ValueError(
            f"`size` must be from 1 to {len(order) // 2}, half of the images that are "
            f"not test; got {size}."
        )
    return Splits(_take(rest, order[:half]), _take(rest, order[half : 2 * half]), test)


def _take(data: Images, rows: np.ndarray) -> Images:
    return Images(data.images[rows], data.labels[rows])


def _as_images(images: Any, labels: Any, largest: float = 255) -> Images:
    images = np.asarray(images, np.float32) / np.float32(largest)
    if images.ndim == 3:
        images = images[..., None]
    return Images(images, np.asarray(labels, np.int32))


def _load_digits() -> Images:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return _as_images(digits.images, digits.target, largest=16)


def _load_folder(name: str, folder: pathlib.Path) -> tuple[Images, Images | None]:
    archive = folder / f"{name}.npz"
    if archive.exists():
        with np.load(archive) as arrays:
            if "images" in arrays:
                return _as_images(arrays["images"], arrays["labels"]), None
            train = _as_images(arrays["train_images"], arrays["train_labels"])
            return train, _as_images(arrays["test_images"], arrays["test_labels"])
    if name == "cifar10":
        raise SystemExit(f"Found no `{archive}`; {_advise(name)}.")
    train, test = (
        _as_images(
            _read_idx(name, folder / f"{part}-images-idx3-ubyte"),
            _read_idx(name, folder / f"{part}-labels-idx1-ubyte"),
        )
        for part in ("train", "t10k")
    )
    return train, test


def _advise(name: str) -> str:
    files = f"`{name}.npz` (`train_images`, `train_labels`, `test_images`, ...)"
    if name != "cifar10":
        files += " or the four IDX files (`train-images-idx3-ubyte.gz`, ...)"
    return f"pass as `folder` (`--folder`) a local folder with {files}"


def _read_idx(name: str, path: pathlib.Path) -> np.ndarray:
    compressed = path.with_name(path.name + ".gz")
    if compressed.exists():
        content = gzip.decompress(compressed.read_bytes())
    elif path.exists():
        content = path.read_bytes()
    else:
        raise SystemExit(f"Found no `{path}`, plain or `.gz`; {_advise(name)}.")
    # The header: two zero bytes, the type, the number of axes, the length of each.
    axes = content[3]
    shape = np.frombuffer(content, ">i4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _download(name: str) -> tuple[Images, Images]:
    source = _SOURCES[name]
    parts = _load_dataset(source.repository, source.revision, _advise(name))
    train, test = (
        _as_images(
            np.stack([np.asarray(image) for image in part[source.image_column]]),
            part["label"],
        )
        for part in (parts["train"], parts["test"])
    )
    return train, test


def _load_dataset(repository: str, revision: str | None, advice: str) -> Any:
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise SystemExit(
            f"To download `{repository}`, `pip install 'eqx_hpo[datasets]'`; or "
            f"{advice}."
        ) from e
    try:
        return load_dataset(repository, revision=revision)
    except Exception as e:
        raise SystemExit(
            f"Could not download `{repository}` ({type(e).__name__}): check the "
            f"connection, or {advice}."
        ) from e
