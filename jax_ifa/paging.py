"""Paged caches: reading through the block table."""

import jax.numpy as jnp
from jax import Array

from jax_ifa.operands import KVView


def clamp_table(table: Array, num_pages: int) -> Array:
    """Block ids brought into [0, num_pages), so that garbage in unused entries never leads outside the cache."""
    return jnp.clip(table, 0, max(num_pages - 1, 0))


def identity_table(batch: int) -> Array:
    """The table of a contiguous cache, (B, 1) int32: sequence b owns page b."""
    return jnp.arange(batch, dtype=jnp.int32)[:, None]


def page_tables(kv: KVView, batch: int) -> tuple[Array, Array]:
    """The explicit tables of keys and of values, (B, M) int32 each, every entry a valid page."""
    if kv.table is None:
        table = identity_table(batch)
        return table, table
    value_table = kv.table if kv.value_table is None else kv.value_table
    return clamp_table(kv.table, kv.key.shape[0]), clamp_table(value_table, kv.value.shape[0])


def gather_pages(pages: Array, table: Array, *, head_major: bool) -> Array:
    """The pages of each sequence, joined in order: a paged cache as a contiguous one. This copies the cache.

    contiguous[b, .., t, ..] = pages[table[b, t // P], .., t % P, ..]

    The decode loop never does this; it is here for prefill, debugging, and the dense backward pass.

    Args:
      pages: (pages, K, P, D) if `head_major`, else (pages, P, K, D).
      table: (B, M) int32; ids outside [0, pages) are clamped (their rows are garbage, never out of bounds).
      head_major: the order of the axes.

    Returns:
      (B, K, M*P, D) if `head_major`, else (B, M*P, K, D).
    """
    batch, per_sequence = table.shape
    gathered = jnp.take(pages, clamp_table(table, pages.shape[0]), axis=0)  # (B, M, K, P, D) or (B, M, P, K, D)
    if head_major:
        num_kv_heads, page_size, head_dim = pages.shape[1:]
        gathered = jnp.swapaxes(gathered, 1, 2)
        return gathered.reshape(batch, num_kv_heads, per_sequence * page_size, head_dim)
    page_size, num_kv_heads, head_dim = pages.shape[1:]
    return gathered.reshape(batch, per_sequence * page_size, num_kv_heads, head_dim)
