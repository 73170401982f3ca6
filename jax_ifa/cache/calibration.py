"""int8 caches: what is stored for a value, and the scales that fit given data.

A cache holds the integer x that stands for v' = (x + offset) * scale. Here is the way there: rounding to the nearest x,
and the choice of scale and offset per channel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jax_ifa.cache.rules import check_integers, check_size
from jax_ifa.conversion import as_array, as_int32, numpy_value
from jax_ifa.errors import fail
from jax_ifa.layout import INPUT_LAYOUTS
from jax_ifa.quantization import INT8_MAX, INT8_MIN

# Below this, arithmetic on v or x * scale could meet subnormal numbers, which hardware may flush to 0.
SMALLEST_SCALE = 2.0**-120
# Scale over magnitude: keeps |offset| <= 2**15, so that x + offset is exact to 2**-8 in float32.
SMALLEST_RELATIVE_SCALE = 2.0**-15


def quantize_kv(values: Array, scale: Array, offset: Array | None = None) -> Array:
    """The inverse of `antiquantize`: x = saturate(round(values / scale - offset)) as int8, half to even, in float32.

    Within the range that int8 covers, (-128 + offset) * scale to (127 + offset) * scale, the error |v - v'| is at most
    scale / 2. Outside, infinities included, x saturates. NaN has no int8 and becomes 0.

    Args:
      values: floating point, any shape.
      scale: broadcasts against `values`; positive.
      offset: likewise; None means 0.
    """
    quotient = values.astype(jnp.float32) / scale.astype(jnp.float32)
    if offset is not None:
        quotient = quotient - offset.astype(jnp.float32)
    rounded = jnp.clip(jnp.rint(quotient), INT8_MIN, INT8_MAX)
    return jnp.where(jnp.isnan(rounded), 0.0, rounded).astype(jnp.int8)


def calibrate_antiquant(
    key: ArrayLike,
    value: ArrayLike,
    *,
    input_layout: str = "BNSD",
    num_kv_heads: int | None = None,
    counts: ArrayLike | None = None,
    symmetric: bool = True,
    headroom: float = 1.0,
    per_tensor: bool = False,
) -> tuple[Array, Array | None]:
    """Scales (and offsets) for an int8 cache from sample keys and values, such as those of a first prompt.

    Per channel (k, d), over every token of the sample:

    .. code-block:: text

        symmetric:    scale = headroom * max|v| / 127
        asymmetric:   scale = headroom * (max v - min v) / 2 / 127,    offset = (max v + min v) / 2 / scale

    so that the sample's range, times headroom around its middle, lies in [-127, 127]. A value in that range is restored
    to within scale / 2 (and float32 rounding); one beyond it saturates. Some channels, of keys above all, keep far from
    zero: for them asymmetric scales are several times finer, and the offset costs nothing during decoding.

    No channel divides by zero: one that is always 0 gets scale 1 and stays 0. An asymmetric scale is at least 2**-15 of
    the channel's largest magnitude, so that a channel that hardly varies does not lose its variation in the offset.

    Args:
      key, value: floating point samples, with any leading axes (batches, layers' inputs): (..., K, T, D) in BNSD,
        (..., T, K, D) in BSND, (..., T, K*D) in BSH, T tokens each.
      input_layout: "BNSD", "BSND" or "BSH".
      num_kv_heads: K; needed in BSH only.
      counts: integers in the shape of the leading axes: only the first counts[...] of T tokens are looked at, so that
        right padding is not calibrated on. None means all.
      symmetric: no offset, or one.
      headroom: at least 1; widens the range for values that the sample does not show.
      per_tensor: one scale for all keys and one for all values.

    Returns:
      antiquant_scale and antiquant_offset, float32, (2, K, D) or per tensor (2,); index 0 for the key. The offset is
      None if symmetric. A sample that is traced and not finite gives scales that are not finite.

    Raises:
      ValueError: a shape, an empty sample, or concrete data or counts that are not finite or out of range.
      TypeError: samples that are not floating point, counts that are not integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_ifa import antiquantize
      >>> from jax_ifa.cache import ContiguousCache, calibrate_antiquant
      >>> key, value = jax.random.normal(jax.random.key(0), (2, 1, 4, 32, 64))        # each (B=1, K=4, T=32, D=64)
      >>> scale, offset = calibrate_antiquant(key, value, symmetric=False, headroom=1.25)
      >>> scale.shape, offset.shape
      ((2, 4, 64), (2, 4, 64))
      >>> kv = ContiguousCache.create(1, 128, 4, 64, jnp.int8, antiquant_scale=scale, antiquant_offset=offset)
      >>> kv = kv.append(key, value, lengths=[0])
      >>> key_scale, key_offset = scale[None, 0, :, None], offset[None, 0, :, None]        # (1, K, 1, D)
      >>> restored = antiquantize(kv.key[:, :, :32], key_scale, key_offset)
      >>> bool(jnp.all(jnp.abs(restored - key) <= 0.501 * key_scale))
      True
    """
    headroom = _check_headroom(headroom)
    samples = [
        _tokens(name, sample, input_layout=input_layout, num_kv_heads=num_kv_heads)
        for name, sample in (("key", key), ("value", value))
    ]
    if samples[0].shape != samples[1].shape:
        fail("value has the shape of key", expected=jnp.shape(key), got=jnp.shape(value))
    counted = _counted(counts, samples[0].shape[:-2])
    scale, offset, finite = _calibrated(*samples, counted, jnp.float32(headroom), symmetric, per_tensor)
    for name, is_finite in zip(("key", "value"), finite, strict=True):
        if numpy_value(is_finite) == np.False_:
            fail(f"{name} is a sample to calibrate on", expected="finite values", got="infinity or NaN")
    return scale, offset


@functools.partial(jax.jit, static_argnums=(4, 5))
def _calibrated(
    keys: Array, values: Array, counted: Array, headroom: Array, symmetric: bool, per_tensor: bool
) -> tuple[Array, Array | None, list[Array]]:
    """Scale, offset, and whether keys and values are finite, from (..., T, K, D) samples."""
    samples = keys, values
    low, high = (jnp.stack(bounds) for bounds in zip(*(_range(sample, counted) for sample in samples), strict=True))
    if per_tensor:
        low, high = low.min(axis=(1, 2)), high.max(axis=(1, 2))
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    if symmetric:
        scale = headroom * (largest / INT8_MAX)
    else:
        scale = headroom * ((high / 2 - low / 2) / INT8_MAX)  # halves first: the difference could overflow
        scale = jnp.maximum(scale, largest * SMALLEST_RELATIVE_SCALE)
    scale = jnp.where(largest == 0, 1.0, jnp.maximum(scale, SMALLEST_SCALE))
    finite = [(jnp.isfinite(sample) | ~counted[..., None, None]).all() for sample in samples]
    return scale, None if symmetric else (high / 2 + low / 2) / scale, finite


def _range(tokens: Array, counted: Array) -> tuple[Array, Array]:
    """Least and largest of each channel over the counted tokens, (K, D) float32; 0 and 0 if there are none."""
    axes = tuple(range(tokens.ndim - 2))
    which = counted[..., None, None]
    low = jnp.min(tokens, axis=axes, where=which, initial=jnp.inf)
    high = jnp.max(tokens, axis=axes, where=which, initial=-jnp.inf)
    some = counted.any()
    return jnp.where(some, low, 0.0), jnp.where(some, high, 0.0)


def _tokens(name: str, sample: ArrayLike, *, input_layout: str, num_kv_heads: int | None) -> Array:
    """A sample in any layout as (..., T, K, D) float32."""
    array = as_array(name, sample)
    if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
        fail(
            f"{name} is a sample of the values to quantise",
            expected="a floating point array",
            got=None if array is None else array.dtype,
            error=TypeError,
        )
    array = array.astype(jnp.float32)
    if input_layout not in INPUT_LAYOUTS:
        fail("input_layout names the axes", expected=f"one of {INPUT_LAYOUTS}", got=repr(input_layout))
    if input_layout == "BSH":
        if num_kv_heads is None:
            fail("BSH joins heads and channels, so it needs num_kv_heads", expected="an integer", got=None)
        heads = check_size("num_kv_heads", num_kv_heads)
        if array.ndim < 2 or array.shape[-1] % heads:
            fail(f"{name} in BSH", expected=f"(..., T, K*D) with K = {heads}", got=array.shape)
        return array.reshape(*array.shape[:-1], heads, -1)
    if array.ndim < 3:
        axes = "(..., K, T, D)" if input_layout == "BNSD" else "(..., T, K, D)"
        fail(f"{name} in {input_layout}", expected=axes, got=array.shape)
    array = jnp.swapaxes(array, -2, -3) if input_layout == "BNSD" else array
    if num_kv_heads is not None and num_kv_heads != array.shape[-2]:
        fail(f"{name} has num_kv_heads heads", expected=num_kv_heads, got=array.shape[-2])
    return array


def _counted(counts: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """Which tokens, (..., T) bool, are looked at."""
    num_tokens = shape[-1]
    integers = check_integers("counts", np.full(shape[:-1], num_tokens) if counts is None else counts, shape[:-1])
    values = numpy_value(integers)
    if values is not None and ((values < 0) | (values > num_tokens)).any():
        fail("counts says how many tokens to look at", expected=f"0 to {num_tokens}", got=values.tolist())
    if values is not None and not values.sum():
        fail("calibration needs data", expected="at least one token", got=f"none in a sample of shape {shape}")
    token = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return token < as_int32(integers)[..., None]


def _check_headroom(headroom: Any) -> float:
    headroom = float(headroom)
    if not 1.0 <= headroom < np.inf:
        fail("headroom widens the range that the sample shows", expected="a factor of at least 1", got=headroom)
    return headroom
