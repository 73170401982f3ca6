"""int8: antiquantisation of the cache folded out of the decode loop, and quantisation of the output.

The cache holds x with v = (x + offset) * scale per channel. Both are constant along the sequence, so the loop over
positions runs on the bare integers:

    keys:    q . ((k + o) * s) = (q * s) . k + (q * s) . o     the last term is the same for every position, so it
                                                               cancels in the softmax and matters only to the LSE
    values:  sum_t p_t (v_t + o) * s = s * (sum_t p_t v_t + o)     since sum_t p_t = 1 (0 for an empty row)

All of it is float32: a float16 product q * s can overflow.
"""

import jax.numpy as jnp
from jax import Array

INT8_MIN, INT8_MAX = -128, 127


def split_antiquant(antiquant: Array, *, num_kv_heads: int) -> tuple[Array, Array]:
    """The operator's scale or offset as a (K, D) or (K, 1) float32 array for the keys and one for the values.

    Args:
      antiquant: (2,) per tensor, or per channel (2, K*D), (2, K, D), (2, K, 1, D) or (2, 1, K, D); index 0 is the key.
      num_kv_heads: K.
    """
    if antiquant.ndim == 1:
        channels = jnp.broadcast_to(antiquant[:, None, None], (2, num_kv_heads, 1))
    else:
        channels = antiquant.reshape(2, num_kv_heads, -1)
    channels = channels.astype(jnp.float32)
    return channels[0], channels[1]


def antiquantize(integers: Array, scale: Array, offset: Array | None = None) -> Array:
    """The definition, for use by hand: (integers + offset) * scale in float32; `scale` must broadcast."""
    values = integers.astype(jnp.float32)
    if offset is not None:
        values = values + offset.astype(jnp.float32)
    return values * scale.astype(jnp.float32)


def fold_key_scale(query: Array, scale: Array) -> Array:
    """q * s: a query (B, K, G, D) that meets bare integer keys. `scale` is (K, D) or (K, 1); float32 out."""
    return query.astype(jnp.float32) * scale[None, :, None, :]


def key_offset_score(folded_query: Array, offset: Array, scale: Array) -> Array:
    """What the key offset adds to every score, and so to the LSE: scale * (q * s) . o, (B, K, G) float32.

    Args:
      folded_query: (B, K, G, D) from `fold_key_scale`.
      offset: (K, D) or (K, 1) float32.
      scale: (B,) or (1,) float32, the scale of the scores.
    """
    return jnp.sum(folded_query * offset[None, :, None, :], axis=-1) * scale[:, None, None]


def antiquantize_output(out: Array, scale: Array, offset: Array | None, empty: Array) -> Array:
    """s * (sum_t p_t v_t + o): the loop's result over bare integer values, antiquantised.

    Args:
      out: (B, K, G, D) float32.
      scale: (K, D) or (K, 1) float32.
      offset: like `scale`, or None.
      empty: (B, K, G) bool, rows whose weights do not sum to 1 because there are none: they stay 0.
    """
    if offset is not None:
        out = jnp.where(empty[..., None], out, out + offset[None, :, None, :])
    return out * scale[None, :, None, :]


def quantize_output(out: Array, scale: Array, offset: Array | None = None) -> Array:
    """round(out * scale + offset) in float32, half to even, saturated to int8.

    NaN has no int8 and becomes 0.

    Args:
      out: (B, K, G, D) float32.
      scale: one element (per tensor), or N*D elements in any shape, head-major (per channel).
      offset: like `scale`, or None.
    """
    out = out.astype(jnp.float32) * _per_channel(scale, out)
    if offset is not None:
        out = out + _per_channel(offset, out)
    rounded = jnp.clip(jnp.rint(out), INT8_MIN, INT8_MAX)
    return jnp.where(jnp.isnan(rounded), 0.0, rounded).astype(jnp.int8)


def _per_channel(parameter: Array, out: Array) -> Array:
    shape = (1, 1, 1, 1) if parameter.size == 1 else (1, *out.shape[1:])
    return parameter.astype(jnp.float32).reshape(shape)
