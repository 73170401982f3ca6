"""vmap, folded into the batch: a mapped call is one call with more sequences, and an unmapped cache is not copied."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from jax_ifa.operands import KVView, Operands
from jax_ifa.paging import clamp_table, identity_table


def fold_into_batch(operands: Operands, mapped: Any, size: int) -> Operands:
    """`Operands` whose leaves may carry a mapped leading axis of `size`, as `Operands` of a batch of size * B.

    Row v * B + b of the result is sequence b of example v.

    Args:
      operands: leaves with the mapped axis in front where mapped.
      mapped: the same tree with a bool at every leaf.
      size: of the mapped axis.
    """
    batch = operands.query.shape[1 if mapped.query else 0]

    def per_sequence(leaf: Array, is_mapped: bool) -> Array:
        if not is_mapped:
            leaf = jnp.broadcast_to(leaf[None], (size, *leaf.shape))
        return _join(leaf)

    def rows(leaf: Array, is_mapped: bool) -> Array:
        # Row b reads row b % R: an unmapped leaf serves as it is, a mapped one must have all B rows of each example.
        if not is_mapped:
            return leaf
        return _join(jnp.tile(leaf, (1, batch // leaf.shape[1]) + (1,) * (leaf.ndim - 2)))

    return dataclasses.replace(
        operands,
        query=per_sequence(operands.query, mapped.query),
        scale=rows(operands.scale, mapped.scale),
        start=rows(operands.start, mapped.start),
        stop=rows(operands.stop, mapped.stop),
        mask=None if operands.mask is None else rows(operands.mask, mapped.mask),
        bias=None if operands.bias is None else rows(operands.bias, mapped.bias),
        kv=_fold_kv(operands.kv, mapped.kv, size, batch),
    )


def unfold_from_batch(leaf: Array, size: int) -> Array:
    """(size * B, ...) to (size, B, ...)."""
    return leaf.reshape(size, leaf.shape[0] // size, *leaf.shape[1:])


def _join(leaf: Array) -> Array:
    return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])


def _fold_kv(kv: KVView, mapped: Any, size: int, batch: int) -> KVView:
    """Mapped pages become more pages; the tables of each example point to its own, or to the ones shared by all."""
    key = _join(kv.key) if mapped.key else kv.key
    value = _join(kv.value) if mapped.value else kv.value
    if kv.table is None and mapped.key and mapped.value:
        return dataclasses.replace(kv, key=key, value=value)  # still page b of sequence b

    def fold_table(table: Array | None, is_mapped: bool, pages: Array, has_mapped_pages: bool) -> Array:
        if table is None:
            table, is_mapped = identity_table(batch), False
        num_pages = pages.shape[1 if has_mapped_pages else 0]
        table = clamp_table(table, num_pages)
        if not is_mapped:
            table = jnp.broadcast_to(table[None], (size, *table.shape))
        if has_mapped_pages:
            table = table + num_pages * jnp.arange(size, dtype=jnp.int32)[:, None, None]
        return _join(table)

    key_table = fold_table(kv.table, bool(mapped.table), kv.key, bool(mapped.key))
    if kv.value_table is not None:
        value_table = fold_table(kv.value_table, bool(mapped.value_table), kv.value, bool(mapped.value))
    elif bool(mapped.key) != bool(mapped.value):
        value_table = fold_table(kv.table, bool(mapped.table), kv.value, bool(mapped.value))
    else:
        value_table = None
    return dataclasses.replace(kv, key=key, value=value, table=key_table, value_table=value_table)
