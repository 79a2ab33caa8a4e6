"""Computes a checksum of an array on the devices that hold its parts."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32


@jax.jit
def checksum(array: Array) -> UInt32[Array, ""]:
    """Computes the sum over a mixture of each entry and its place, modulo 2^32.

    The order does not matter, so the checksum is the same however the array is split
    over devices. For a given place the mixture is one to one. So a change of one 32-bit
    number always changes the sum. Any other change goes unnoticed only once in 2^32.
    """
    place = jnp.uint32(0)
    for axis, size in enumerate(array.shape):
        along = lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = place * jnp.uint32(size) + along
    total = jnp.uint32(0)
    for i, numbers in enumerate(_bits(array)):
        salt = _mix(_mix(place) + jnp.uint32(i + 1))
        total += jnp.sum(_mix(numbers ^ salt), dtype=jnp.uint32)
    return total


def _bits(array: Array) -> list[UInt32[Array, "..."]]:
    """Lists the bits of an array, as arrays of its shape."""
    dtype = array.dtype
    if dtype == jnp.bool_:
        return [array.astype(jnp.uint32)]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return [*_bits(array.real), *_bits(array.imag)]
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    width = info(dtype).bits
    if width == 64:
        pairs = lax.bitcast_convert_type(array, jnp.uint32)
        return [pairs[..., 0], pairs[..., 1]]
    unsigned = lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}"))
    return [unsigned.astype(jnp.uint32)]


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Permutes the 32-bit numbers. Each bit of the result depends on all bits (the end
    of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
