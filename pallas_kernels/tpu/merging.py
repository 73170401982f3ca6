"""Merging the parts of a call, where whole parts may be masked.

The LSE of n masked positions is MASK_VALUE + log n, and float32 has no room for the log n next to 1e12. So parts that
are masked whole look alike, whatever their size, and a row whose every part is must be merged by the sizes instead.
"""

import jax.numpy as jnp
from jax import Array

from jax_ifa.masking import MASK_VALUE, in_window
from jax_ifa.merge import merge_all
from jax_ifa.operands import Operands, repeat_rows


def masked_positions(operands: Operands, start: Array, stop: Array) -> Array:
    """(B,) float32: how many positions of the windows [start, stop) are masked."""
    if operands.mask is None:
        return jnp.zeros(operands.batch, jnp.float32)
    positions = jnp.arange(operands.mask.shape[1], dtype=jnp.int32)
    masked = in_window(positions, start, stop) & repeat_rows(operands.mask, operands.batch).astype(bool)
    return jnp.sum(masked, axis=1, dtype=jnp.float32)


def merge_parts(out: Array, lse: Array, masked: Array) -> tuple[Array, Array]:
    """Parts of a call over disjoint windows into the whole.

    Args:
      out: (parts, B, K, G, D) and lse: (parts, B, K, G), float32.
      masked: (parts, B) float32, the masked positions of each part.

    Returns:
      out: (B, K, G, D) and lse: (B, K, G).
    """
    whole, whole_lse = merge_all(out, lse)
    size = jnp.broadcast_to(jnp.log(masked)[:, :, None, None], lse.shape)
    mean, mean_lse = merge_all(out, jnp.where(jnp.isneginf(lse), lse, size))
    hidden = whole_lse < MASK_VALUE / 2
    return jnp.where(hidden[..., None], mean, whole), jnp.where(hidden, MASK_VALUE + mean_lse, whole_lse)
