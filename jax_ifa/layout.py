"""Layouts: the operator's BSH, BNSD and BSND to and from the canonical operands.

All of these are reshapes of neighbouring axes: XLA makes them free, and no cache is ever transposed.
"""

from typing import Literal, get_args

from jax import Array

from jax_ifa.operands import KVView

InputLayout = Literal["BSH", "BNSD", "BSND"]
INPUT_LAYOUTS: tuple[str, ...] = get_args(InputLayout)


def split_query(query: Array, *, num_heads: int, num_kv_heads: int) -> Array:
    """One query token per sequence, in any layout, to (B, K, G, D).

    The token axis has length 1, so BSH (B, 1, N*D), BNSD (B, N, 1, D) and BSND (B, 1, N, D) hold the same numbers in
    the same order. Query head h belongs to kv head h // G, so N splits into (K, G) without moving anything.

    Args:
      query: (B, 1, N*D), (B, N, 1, D) or (B, 1, N, D).
      num_heads: N.
      num_kv_heads: K, a divisor of N.
    """
    batch = query.shape[0]
    return query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, -1)


def join_output(out: Array, *, input_layout: str) -> Array:
    """The inverse of `split_query`: (B, K, G, D) to the caller's layout.

    Args:
      out: (B, K, G, D).
      input_layout: "BSH" gives (B, 1, N*D), "BNSD" (B, N, 1, D), "BSND" (B, 1, N, D).
    """
    batch, num_kv_heads, group, head_dim = out.shape
    num_heads = num_kv_heads * group
    shapes = {
        "BSH": (batch, 1, num_heads * head_dim),
        "BNSD": (batch, num_heads, 1, head_dim),
        "BSND": (batch, 1, num_heads, head_dim),
    }
    return out.reshape(shapes[input_layout])


def view_kv(
    key: Array, value: Array, *, num_kv_heads: int, input_layout: str, block_table: Array | None = None
) -> KVView:
    """A cache in any of the operator's forms as pages and a table. Nothing is copied.

    Args:
      key, value: a contiguous cache (B, S, K*D), (B, K, S, D) or (B, S, K, D) in `input_layout`; with `block_table`, a
        paged one, (pages, P, K*D) for any layout or (pages, K, P, D) for BNSD.
      num_kv_heads: K.
      input_layout: "BSH", "BNSD" or "BSND".
      block_table: (B, M) int32 or None.
    """
    head_major = input_layout == "BNSD" and key.ndim == 4
    flat = key.ndim == 3
    if flat:
        split = (*key.shape[:2], num_kv_heads, key.shape[2] // num_kv_heads)
        key, value = key.reshape(split), value.reshape(split)
    return KVView(key=key, value=value, table=block_table, head_major=head_major, flat=flat)
