"""Defines the data that `step` takes: one batch for all inner steps, batches drawn on
the device, or batches made on the host."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt32

from ._checks import as_flag, as_int, check_leaves, shown
from ._custom_types import Batch, IntScalar, Key
from ._misc import as_device_arrays, is_array_or_numpy
from ._sharding import reshard_like


_NUMBERS = frozenset([int, float, complex])
_ROUNDS = 24  # of the shuffle; each leaves half of the points where they are


class AbstractBatches(eqx.Module):
    """A source of one batch for each inner step."""

    @abc.abstractmethod
    def draw(self, index: IntScalar, position: IntScalar, key: Key) -> Batch:
        """Draws the batch of one inner step.

        **Arguments:**

        - `index`: the number of the inner step within the call of `step`, from 0.
        - `position`: the number of the inner step since the start of the run, from 0.
        - `key`: a PRNG key, or `None`.

        **Returns:** a pytree of arrays.
        """


class SameBatch(AbstractBatches):
    """The same batch at every inner step. A plain pytree of arrays stands for it."""

    batch: Batch

    def draw(self, index: IntScalar, position: IntScalar, key: Key) -> Batch:
        del index, position, key
        return self.batch


class Minibatch(AbstractBatches):
    """Draws a fresh random batch at each inner step. The device holds the whole data
    and draws from them."""

    data: PyTree[Array]
    seed: UInt32[Array, ""]
    batch_size: int = eqx.field(static=True)
    replacement: bool = eqx.field(static=True)

    def __init__(
        self,
        data: PyTree[Any],
        batch_size: int,
        *,
        replacement: bool = True,
        seed: int = 0,
    ):
        """**Arguments:**

        - `data`: a pytree of arrays with the same leading axis, of length `n`.
        - `batch_size`: the number of examples in a batch, from 1 to `n`.
        - `replacement`: `True` draws each example independently, with the `key` given
            to `step`. `False` walks through shuffled epochs. Each example then comes
            once an epoch, in a new order each time. The last, incomplete batch of an
            epoch is left out. The order depends only on `seed` and on the step counter,
            so no permutation is ever stored.
        - `seed`: the seed of the shuffled epochs, an integer.

        **Raises:** a `ValueError` if `data` is empty, its leading axes differ, or
        `batch_size` is out of range.
        """
        size = leading_axis("data", data)
        self.data = as_device_arrays(data)
        self.batch_size = _as_batch_size(batch_size, size)
        self.replacement = as_flag("replacement", replacement)
        self.seed = _as_seed(seed)

    def draw(self, index: IntScalar, position: IntScalar, key: Key) -> Batch:
        del index
        size = jtu.tree_leaves(self.data)[0].shape[0]
        if self.replacement:
            if key is None:
                raise ValueError(
                    "`key` is missing: `Minibatch` draws at random. Pass `key=` to "
                    "`step`, or use `Minibatch(..., replacement=False)`."
                )
            rows = jr.randint(key, (self.batch_size,), 0, size)
        else:
            per_epoch = size // self.batch_size
            epoch, number = jnp.divmod(position, per_epoch)
            rows = number * self.batch_size + jnp.arange(self.batch_size)
            rows = _shuffle(rows, size, jr.fold_in(jr.key(self.seed), epoch))
        return jtu.tree_map(lambda x: take_rows(x, rows), self.data)


class Stacked(AbstractBatches):
    """Holds batches made on the host, one for each inner step of a call of `step`. If
    an algorithm looks further ahead, the batches repeat from the first one."""

    batches: PyTree[Array]

    def __init__(self, batches: PyTree[Any]):
        """**Arguments:**

        - `batches`: a pytree of arrays whose leading axis runs over the inner steps.
            The length of this axis is the `inner_steps` of the algorithm.

        **Raises:** a `ValueError` if it is empty or the leading axes differ.
        """
        leading_axis("batches", batches)
        self.batches = as_device_arrays(batches)

    def draw(self, index: IntScalar, position: IntScalar, key: Key) -> Batch:
        del position, key
        return jtu.tree_map(lambda x: x[index % x.shape[0]], self.batches)


def as_batches(data: Any, name: str, inner_steps: int | None) -> AbstractBatches:
    """Converts what the user gave as `train` or `val` to one form. Raises a
    `ValueError` if something is wrong with it."""
    if isinstance(data, Stacked) and inner_steps is not None:
        length = jtu.tree_leaves(data.batches)[0].shape[0]
        if length != inner_steps:
            raise ValueError(
                f"`{name}` is `Stacked` with {length} batches, but the algorithm takes "
                f"{inner_steps} inner steps; give one batch for each."
            )
    check_leaves(name, data)
    is_plain = not isinstance(data, AbstractBatches)
    batches = SameBatch(numbers_as_arrays(data)) if is_plain else data
    arrays = [x for x in jtu.tree_leaves(batches) if is_array_or_numpy(x)]
    for x in arrays:
        if x.size == 0:
            raise ValueError(
                f"`{name}` is empty: it holds an array of shape {x.shape}."
            )
    return batches


def first_batch(data: AbstractBatches, key: Key, mesh: Mesh | None) -> Batch:
    """Makes the first batch, for a state that has to hold one. It consists of
    `jax.ShapeDtypeStruct`s. On a mesh it is a real batch, since only that shows how
    batches lie on the mesh. It is `None` if the batch is always the same."""
    if isinstance(data, SameBatch):
        return None
    first = jnp.array(0)
    key = jr.key(0) if key is None else key
    if mesh is not None:
        return data.draw(first, first, key)
    return eqx.filter_eval_shape(data.draw, first, first, key)


def leading_axis(name: str, data: PyTree[Any]) -> int:
    """Finds the length of the leading axis, which all arrays of `data` must share."""
    check_leaves(name, data)
    leaves = jtu.tree_leaves(data)
    shapes = [getattr(x, "shape", None) for x in leaves]
    if len(leaves) == 0 or any(shape is None or len(shape) == 0 for shape in shapes):
        raise ValueError(
            f"`{name}` must be a pytree of arrays with a leading axis; got shapes "
            f"{shapes}."
        )
    lengths = {shape[0] for shape in shapes if shape is not None}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(
            f"`{name}` needs the same, non-empty leading axis in all arrays; got "
            f"shapes {shapes}."
        )
    return lengths.pop()


def holds_numbers(data: PyTree) -> bool:
    """Tells whether a leaf of `data` is a Python number other than a boolean."""
    return not _NUMBERS.isdisjoint(map(type, jtu.tree_leaves(data)))


def numbers_as_arrays(data: PyTree) -> PyTree:
    """Turns the Python numbers in plain data into arrays. As static values, each new
    number would compile again. Booleans stay Python booleans, since a loss may branch
    on one."""
    if not holds_numbers(data):
        return data

    def convert(x):
        dtype = jnp.result_type(type(x)) if type(x) in _NUMBERS else None
        return x if dtype is None else jnp.asarray(x, dtype)

    is_leaf = lambda x: isinstance(x, AbstractBatches)
    return jtu.tree_map(convert, data, is_leaf=is_leaf)


def examples(batch: Batch) -> Batch:
    """Selects the part of a batch that `mix_batches` can mix: its arrays, or their
    shapes, without PRNG keys."""
    return eqx.filter(batch, _is_number)


def mix_batches(
    old: Batch, new: Batch, keep: Float[Array, ""], key: PRNGKeyArray
) -> Batch:
    """Keeps a share of the examples of `old` at random places. All other places get the
    examples of `new`.

    The number of examples stays the same, and a batch that is mixed with itself does
    not change. A fractional number of kept examples is rounded up or down at random,
    which is right on average. A batch whose arrays have no common leading axis counts
    as one example.
    """
    shapes = [x.shape for x in jtu.tree_leaves(new)]
    lengths = {shape[:1] for shape in shapes}
    size = shapes[0][0] if len(lengths) == 1 and lengths != {()} else 1
    count_key, order_key = jr.split(key)
    share = keep * size + jr.uniform(count_key, dtype=keep.dtype)
    kept = _shuffle(jnp.arange(size), size, order_key) < share.astype(int)

    def mix(x, y):
        mask = kept.reshape(-1, *[1] * (x.ndim - 1)) if size > 1 else kept[0]
        return jnp.where(reshard_like(jnp.broadcast_to(mask, x.shape), x), x, y)

    return jtu.tree_map(mix, old, new)


def _is_number(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and not jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _as_batch_size(batch_size: Any, size: int) -> int:
    if getattr(batch_size, "shape", ()) != ():
        raise ValueError(
            f"`batch_size` must be an integer; got {shown(batch_size)}. `data` is one "
            "pytree: `Minibatch((x, y), batch_size)`."
        )
    number = as_int("batch_size", batch_size, 1)
    if number > size:
        raise ValueError(
            f"`batch_size` must be from 1 to the {size} examples of `data`; got "
            f"{number}."
        )
    return number


def _as_seed(seed: Any) -> UInt32[Array, ""]:
    # Each task of `MetaLearner` may have its own, made under `vmap`.
    if not isinstance(seed, Tracer):
        seed = as_int("seed", seed, 0) % 2**32
    return jnp.asarray(seed, jnp.uint32)


def take_rows(x: Array, rows: Int[Array, "... batch"]) -> Array:
    """Indexes the leading axis. On a mesh with explicit axes, the batches are split as
    the data are, if their length allows it. Otherwise each device holds them as a
    whole."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or not sharding.mesh.explicit_axes:
        return x[rows]
    first, *others = sharding.spec
    names = (first,) if isinstance(first, str) else first or ()
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    first = first if rows.shape[-1] % parts == 0 else None
    spec = jax.P(*[None] * (rows.ndim - 1), first, *others)
    return x.at[rows].get(out_sharding=jax.NamedSharding(sharding.mesh, spec))


def _shuffle(
    rows: Int[Array, " batch"], size: int, key: PRNGKeyArray
) -> Int[Array, " batch"]:
    """Sends `rows` through a pseudo-random permutation of `range(size)`.

    This is a swap-or-not network (Hoang, Morris, Rogaway, CRYPTO 2012). Each round
    pairs the points by reflection at a random centre, and a hash decides whether to
    swap each pair. It costs the same for any `size`, unlike sorting random numbers.
    """

    def swap(rows, bits):
        partner = jnp.mod((bits[0] % size).astype(rows.dtype) - rows, size)
        pair = jnp.maximum(rows, partner).astype(jnp.uint32)
        return jnp.where(_hash(pair ^ bits[1]) >> 31 == 1, partner, rows), None

    rounds = jr.bits(key, (_ROUNDS, 2), jnp.uint32)
    return lax.scan(swap, rows, rounds)[0]


def _hash(x: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
    # The 32-bit finaliser of MurmurHash3.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
