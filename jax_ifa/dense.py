"""Attention with all scores in memory at once: what the backward pass differentiates.

It gathers the pages and converts the cache to float32, so it costs what the streaming loop avoids. Training through a
decode step is rare and short; a gradient that is plainly right was worth more than one that streams.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jax_ifa.masking import in_window, mask_scores
from jax_ifa.operands import Operands, repeat_rows
from jax_ifa.paging import gather_pages, page_tables


def attend_dense(operands: Operands) -> tuple[Array, Array]:
    """`Operands` to (out (B, K, G, D), lse (B, K, G)), both float32, differentiable in every float operand."""
    operands = operands.per_sequence()
    kv = operands.kv
    batch, capacity = operands.batch, kv.capacity
    key_table, value_table = page_tables(kv, batch)
    inside = in_window(jnp.arange(capacity, dtype=jnp.int32), operands.start, operands.stop)  # (B, S)

    def visible(pages: Array, table: Array) -> Array:
        rows = gather_pages(pages, table, head_major=kv.head_major)
        rows = rows if kv.head_major else jnp.swapaxes(rows, 1, 2)  # (B, K, S, D)
        # What lies outside the window is replaced before it meets any arithmetic: 0 * NaN is NaN, forward and backward.
        return jnp.where(inside[:, None, :, None], rows.astype(jnp.float32), 0.0)

    key, value = visible(kv.key, key_table), visible(kv.value, value_table)
    if operands.mask is not None:
        masked = repeat_rows(operands.mask[:, :capacity], batch).astype(bool)
        key = jnp.where(masked[:, None, :, None], 0.0, key)  # its score is replaced, but 0 * NaN would reach the query
    query = operands.query.astype(jnp.float32) * operands.scale[:, None, None, None]
    scores = jnp.einsum("bkgd,bksd->bkgs", query, key, precision=jax.lax.Precision.HIGHEST)
    if operands.bias is not None:
        bias = repeat_rows(operands.bias[..., :capacity], batch).astype(jnp.float32)
        scores = scores + jnp.where(inside[:, None, None, :], bias, 0.0)
    inside = jnp.broadcast_to(inside[:, None, None, :], scores.shape)
    if operands.mask is not None:
        mask = repeat_rows(operands.mask[:, :capacity], batch)[:, None, None, :]
        scores = mask_scores(scores, jnp.broadcast_to(mask, scores.shape))

    top = jnp.max(jnp.where(inside, scores, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    weight = jnp.where(inside, jnp.exp(jnp.where(inside, scores - top, 0.0)), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    some = total != 0.0  # NaN, from a NaN that is visible, is passed on
    safe_total = jnp.where(some, total, 1.0)
    if operands.mask is not None:
        # Masked positions of weight 0 are dropped with their values, which may be NaN.
        unused = (jnp.max(weight, axis=2) == 0.0)[..., None]
        value = jnp.where(unused, 0.0, value)
    out = jnp.einsum("bkgs,bksd->bkgd", weight / safe_total, value, precision=jax.lax.Precision.HIGHEST)
    lse = jnp.where(some, top + jnp.log(safe_total), -jnp.inf)
    return out, jnp.squeeze(lse, -1)
