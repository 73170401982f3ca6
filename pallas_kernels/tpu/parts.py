"""Calls that take more than one launch, split into parts that `merge` or a concatenation puts together again.

ends      a contiguous cache whose capacity is not whole rows or lanes of memory: a copy can neither begin nor end
          inside one, so XLA attends to the last few positions
heads     a contiguous cache that has the heads of a position in one tile: as one head's cache
tables    a block table too large for scalar memory: by sequences, and, were one row too large, by columns
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from jax_ifa import xla
from jax_ifa.operands import KVView, Operands
from pallas_kernels.tpu.launch import launch
from pallas_kernels.tpu.merging import masked_positions, merge_parts
from pallas_kernels.tpu.storage import alignment, interleaved
from pallas_kernels.tpu.tuning import Tuning

MAX_TABLE_ENTRIES = 1 << 16
"""Entries of a block table in scalar memory, a quarter of its 1 MiB."""


def attend(operands: Operands, tuning: Tuning, max_table_entries: int = MAX_TABLE_ENTRIES) -> tuple[Array, Array]:
    """`Operands` to (out (B, K, G, D), lse (B, K, G)), both float32, in as many launches as it takes."""
    if interleaved(operands.kv):
        return _interleaved(operands, tuning)
    if operands.kv.table is None:
        return _contiguous(operands, tuning)
    width = operands.kv.table.shape[1]
    if width > max_table_entries:
        calls = [
            _table_columns(operands, first, min(first + max_table_entries, width))
            for first in range(0, width, max_table_entries)
        ]
        return _merged(calls, [attend(call, tuning, max_table_entries) for call in calls])
    sequences = max_table_entries // width
    if operands.batch > sequences:
        parts = [
            launch(_sequences(operands, first, min(first + sequences, operands.batch)), tuning)
            for first in range(0, operands.batch, sequences)
        ]
        return jnp.concatenate([out for out, _ in parts]), jnp.concatenate([lse for _, lse in parts])
    return launch(operands, tuning)


def _interleaved(operands: Operands, tuning: Tuning) -> tuple[Array, Array]:
    """The call on a cache of one kv head with S * K positions, of which each query head sees those of its kv head."""
    kv = operands.kv
    batch, heads, group, head_dim = operands.query.shape
    rows = (batch, 1, kv.capacity * heads, head_dim)
    one_head = dataclasses.replace(
        operands,
        query=operands.query.reshape(batch, 1, heads * group, head_dim),
        start=operands.start * heads,
        stop=operands.stop * heads,
        mask=None if operands.mask is None else _each_column(operands.mask, heads),
        kv=dataclasses.replace(kv, key=kv.key.reshape(rows), value=kv.value.reshape(rows), head_major=True),
    )
    out, lse = launch(one_head, tuning, interleaved=heads)
    return out.reshape(operands.query.shape), lse.reshape(batch, heads, group)


def _each_column(mask: Array, times: int) -> Array:
    """(R, S) to (R, S * times), 0 or 1, each column so many times.

    As a product: XLA would lay out the short axis of a plain `repeat` in 128 lanes, in more memory than may be spent.
    """
    short = 16
    rows, positions = mask.shape
    columns = jnp.pad((mask != 0).astype(jnp.bfloat16), ((0, 0), (0, -positions % short))).reshape(rows, -1, short)
    repeated = jnp.repeat(jnp.eye(short, dtype=jnp.bfloat16), times, axis=1)
    return (columns @ repeated).reshape(rows, -1)[:, : positions * times]


def _contiguous(operands: Operands, tuning: Tuning) -> tuple[Array, Array]:
    kv = operands.kv
    step = alignment(kv)
    aligned = kv.capacity // step * step
    if aligned == kv.capacity:
        return launch(operands, tuning)
    if aligned == 0:  # so small that a padded copy is one tile of memory
        return launch(_padded(operands, step), tuning)
    body = dataclasses.replace(
        operands, start=jnp.minimum(operands.start, aligned), stop=jnp.minimum(operands.stop, aligned)
    )
    end = _end(operands, aligned)
    return _merged([body, end], [launch(body, tuning), xla.attend(end)])


def _merged(calls: list[Operands], results: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The results of calls on parts of the positions as one."""
    out, lse = (jnp.stack(parts) for parts in zip(*results, strict=True))
    return merge_parts(out, lse, jnp.stack([masked_positions(call, call.start, call.stop) for call in calls]))


def _along_positions(kv: KVView) -> int:
    return 2 if kv.head_major else 1


def _padded(operands: Operands, capacity: int) -> Operands:
    """The same call on a contiguous cache of `capacity` positions."""
    kv = operands.kv
    missing = capacity - kv.capacity
    padding = [(0, 0)] * 4
    padding[_along_positions(kv)] = (0, missing)

    def wider(rows: Array | None) -> Array | None:
        return None if rows is None else jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)])

    kv = dataclasses.replace(kv, key=jnp.pad(kv.key, padding), value=jnp.pad(kv.value, padding))
    return dataclasses.replace(operands, kv=kv, mask=wider(operands.mask), bias=wider(operands.bias))


def _end(operands: Operands, first: int) -> Operands:
    """The call on the positions of a contiguous cache from `first` on."""
    kv = operands.kv
    window = (slice(None),) * _along_positions(kv) + (slice(first, None),)
    kv = dataclasses.replace(kv, key=kv.key[window], value=kv.value[window])
    return _positions(operands, kv, first)


def _table_columns(operands: Operands, first: int, last: int) -> Operands:
    """The call on the pages in columns [first, last) of the table."""
    kv = operands.kv
    assert kv.table is not None
    part = dataclasses.replace(kv, table=kv.table[:, first:last])
    return _positions(operands, part, first * kv.page_size)


def _positions(operands: Operands, kv: KVView, first: int) -> Operands:
    """The call on `kv`, which holds the positions from `first` on, as many as it can hold."""
    size = kv.capacity

    def rows(given: Array | None) -> Array | None:
        return None if given is None else given[..., first : first + size]

    return dataclasses.replace(
        operands,
        kv=kv,
        start=jnp.clip(operands.start - first, 0, size),
        stop=jnp.clip(operands.stop - first, 0, size),
        mask=rows(operands.mask),
        bias=rows(operands.bias),
    )


def _sequences(operands: Operands, first: int, last: int) -> Operands:
    """The call on sequences [first, last)."""
    kv = operands.kv
    assert kv.table is not None

    def rows(given: Array | None) -> Array | None:
        if given is None or given.shape[0] == 1:
            return given
        return jnp.take(given, jnp.arange(first, last, dtype=jnp.int32) % given.shape[0], axis=0)

    return dataclasses.replace(
        operands,
        query=operands.query[first:last],
        scale=operands.scale[first:last],
        start=operands.start[first:last],
        stop=operands.stop[first:last],
        mask=rows(operands.mask),
        bias=rows(operands.bias),
        kv=dataclasses.replace(kv, table=kv.table[first:last]),
    )
