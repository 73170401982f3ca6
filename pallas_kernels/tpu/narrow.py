"""A float32 operand as the few narrow ones that a matrix unit takes in its place."""

import jax.numpy as jnp
from jax import Array, lax

DIGIT_BITS = 8  # one of a digit counts 256 of the next
MOST_PRODUCTS = 512  # of two digits with an int8 number each, whose sum stays inside int32


def largest(count: int) -> int:
    """What `count` digits are used for, in steps: of the last digit no more, so that a rounding has room."""
    return 127 << (count - 1) * DIGIT_BITS


def split_bfloat16(x: Array, terms: int) -> list[Array]:
    """A float32 array as float32 arrays whose sum it is, of which bfloat16 holds all but the last; of three, all.

    The low bits are cut off, not rounded, through integers: a compiler may take a rounding there and back for nothing.
    """
    parts = []
    for _ in range(terms - 1):
        head = lax.bitcast_convert_type(
            lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536), jnp.float32
        )  # the upper 16 bits
        parts.append(head)
        x = x - head
    return [*parts, x]


def int8_digits(x: Array, count: int) -> tuple[list[Array], Array]:
    """Each row of a float32 array in digits, to half a step: of three, x = ((high * 256 + middle) * 256 + low) * step.

    Returns the digits, the highest first, int32 in [-128, 127], and the steps, (rows, 1) float32: the largest number of
    a row over `largest(count)`, or NaN if one is not finite.
    """
    size = jnp.abs(x)
    finite = jnp.min(jnp.where(size < jnp.inf, 1.0, 0.0), axis=1, keepdims=True) > 0.0
    top = jnp.maximum(jnp.max(jnp.where(size < jnp.inf, size, 0.0), axis=1, keepdims=True), 2.0**-100)
    rest = jnp.floor(jnp.where(size < jnp.inf, x, 0.0) * (largest(count) / top) + 0.5).astype(jnp.int32)
    digits: list[Array] = []
    for _ in range(count - 1):
        following = (rest + (1 << (DIGIT_BITS - 1))) >> DIGIT_BITS
        digits.insert(0, rest - (following << DIGIT_BITS))
        rest = following
    return [rest, *digits], jnp.where(finite, top / largest(count), jnp.nan)


def from_digits(products: list[Array]) -> Array:
    """The int32 products of two or three digits, the highest first, as float32 products in steps.

    Sums of up to `MOST_PRODUCTS` of the upper two digits stay inside int32; of three they would not.
    """
    high, middle, *low = products
    whole = ((high << DIGIT_BITS) + middle).astype(jnp.float32)
    return whole * (1 << DIGIT_BITS) + low[0].astype(jnp.float32) if low else whole
