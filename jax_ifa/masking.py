"""Which positions a query sees: the window of each sequence, and the mask inside it."""

import jax.numpy as jnp
from jax import Array

MASK_VALUE = -1e12
"""Score of a masked position. Finite, as on the NPU, so a fully masked row is the mean of its values, not NaN."""


def visible_window(
    *, batch: int, capacity: int, lengths: Array | None = None, left_padding: Array | None = None
) -> tuple[Array, Array]:
    """The window [start, stop) of positions that each sequence sees.

    Lengths and left padding are one thing. With n = length and pad = max(left_padding, 0), S = capacity:

        no lengths:            [0, S)              (left padding without lengths does nothing)
        lengths:               [0, n)
        lengths and padding:   [S - pad - n, S - pad), empty where S - pad - n < 0

    Lengths outside [0, S] are clamped; concrete ones have been refused before this.

    Args:
      batch: B.
      capacity: S.
      lengths: (B,) or (1,) integers, or None.
      left_padding: one integer, () or (1,), or None.

    Returns:
      start, stop: (B,) int32 each, 0 <= start <= stop <= S. Empty rows have start == stop.
    """
    if lengths is not None:
        lengths = jnp.clip(lengths, 0, capacity).astype(jnp.int32)
    start, stop = window_rows(capacity=capacity, lengths=lengths, left_padding=left_padding)
    return jnp.broadcast_to(start, (batch,)), jnp.broadcast_to(stop, (batch,))


def window_rows(*, capacity: int, lengths: Array | None, left_padding: Array | None) -> tuple[Array, Array]:
    """The windows of `visible_window` in the rows that `Operands` has: what is the same for all is there once.

    Without left padding the lengths, int32, are taken as they are: what reads the windows clamps them.

    Returns:
      start, stop: (1,) or (B,) int32 each.
    """
    if lengths is None:
        return jnp.zeros(1, jnp.int32), jnp.full(1, capacity, jnp.int32)
    if left_padding is None:
        return jnp.zeros(1, jnp.int32), lengths
    # Any padding above the capacity empties the row as the capacity + 1 does; int64 paddings then fit int32.
    stop = capacity - jnp.clip(left_padding, 0, capacity + 1).astype(jnp.int32).reshape(1)
    start = stop - jnp.clip(lengths, 0, capacity)
    fits = start >= 0
    return jnp.where(fits, start, 0), jnp.where(fits, stop, 0)


def in_window(positions: Array, start: Array, stop: Array) -> Array:
    """Which of `positions` (T,) lie in the windows [start, stop) of (B,): (B, T) bool."""
    positions, start, stop = positions[None, :], start[:, None], stop[:, None]
    return (positions >= start) & (positions < stop)


def mask_rows(atten_mask: Array, capacity: int) -> Array:
    """The operator's mask, (B, S'), (B, 1, S') or (B, 1, 1, S'), as (B, at least `capacity`).

    A mask may end where the longest sequence does: the rest is outside every window, so what fills it has no meaning.
    """
    rows = atten_mask.reshape(atten_mask.shape[0], atten_mask.shape[-1])
    missing = capacity - rows.shape[1]
    return rows if missing <= 0 else jnp.pad(rows, ((0, 0), (0, missing)))


def bias_rows(pse_shift: Array, *, num_kv_heads: int) -> Array:
    """The operator's position bias (B or 1, N, 1, S') as (B or 1, K, G, S')."""
    rows, num_heads, _, width = pse_shift.shape
    return pse_shift.reshape(rows, num_kv_heads, num_heads // num_kv_heads, width)


def mask_scores(scores: Array, mask: Array) -> Array:
    """Scores with `MASK_VALUE` wherever `mask` (same shape) is non-zero."""
    return jnp.where(mask.astype(bool), jnp.asarray(MASK_VALUE, scores.dtype), scores)
