"""The implementation for every platform: one tile of key/value positions at a time, online softmax in float32.

A loop over sequences (or groups of them) around a loop over the tiles of their windows. Nothing grows with the cache:
the float32 tiles are the only temporaries. Nothing outside the window is read but what shares a tile with it, and the
number of tiles is known only at run time, so a short window in a long cache is cheap.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ifa.masking import mask_scores
from jax_ifa.operands import Operands

# Elements of a tile over all of its sequences and heads, by bytes per element of the cache, on CPU. Wide enough to hide
# the loop's overhead, narrow enough to stay small beside the cache (measured: benchmarks/README.md).
CPU_TILE_ELEMENTS = {4: 1 << 19, 2: 1 << 18, 1: 1 << 17}
# Elsewhere launching an operation is dear, so tiles are larger and hold many sequences. Reasoned, not measured.
ACCELERATOR_TILE_ELEMENTS = {4: 1 << 22, 2: 1 << 22, 1: 1 << 22}
WIDEST_TILE = 1024  # positions: few small heads would make tiles of many thousands
NARROW_TILE = 128  # positions: the end of the window goes in these, so that a short one stays cheap


class _Online(NamedTuple):
    """The state of the online softmax over the tiles so far."""

    top: Array  # (R, K, G) largest score, -inf before the first
    total: Array  # (R, K, G) sum of exp(score - top)
    out: Array  # (R, K, G, D) sum of exp(score - top) * value


def unsupported_reason(operands: Operands) -> str | None:
    """Always None: this implementation does every call that the rules allow."""
    del operands
    return None


def attend(operands: Operands) -> tuple[Array, Array]:
    """`Operands` to (out (B, K, G, D) float32, lse (B, K, G) float32)."""
    size = operands.kv.key.dtype.itemsize
    return lax.platform_dependent(
        operands,
        cpu=functools.partial(_stream, tile_elements=CPU_TILE_ELEMENTS[size], grouped=False),
        default=functools.partial(_stream, tile_elements=ACCELERATOR_TILE_ELEMENTS[size], grouped=True),
    )


def _stream(operands: Operands, *, tile_elements: int, grouped: bool) -> tuple[Array, Array]:
    """The loop over sequences, R at a time: one if not `grouped`, else as many as a narrow tile has room for."""
    batch, num_kv_heads, _, head_dim = operands.query.shape
    position_elements = num_kv_heads * head_dim
    room = max(1, tile_elements // (NARROW_TILE * position_elements)) if grouped else 1
    rows = max(r for r in range(1, min(room, batch) + 1) if batch % r == 0)
    wide = min(WIDEST_TILE, max(1, tile_elements // (rows * position_elements)))

    run = functools.partial(_attend_rows, operands, rows=rows, tiles=(wide, min(wide, NARROW_TILE)))
    if rows == batch:
        return run(jnp.int32(0))
    out, lse = lax.map(run, jnp.arange(0, batch, rows, dtype=jnp.int32))
    return out.reshape(batch, *out.shape[2:]), lse.reshape(batch, *lse.shape[2:])


def _attend_rows(operands: Operands, row: Array, *, rows: int, tiles: tuple[int, int]) -> tuple[Array, Array]:
    """Sequences row, ..., row + R - 1: (R, K, G, D) and (R, K, G)."""
    kv = operands.kv
    # The loop counts in units that a tile can begin at: positions if a sequence is one page, else pages.
    unit, units = (1, kv.page_size) if kv.pages_per_sequence == 1 else (kv.page_size, kv.pages_per_sequence)
    start, stop = (lax.dynamic_slice_in_dim(edge, row, rows) for edge in (operands.start, operands.stop))
    scale = lax.dynamic_slice_in_dim(operands.scale, row, rows)
    query = lax.dynamic_slice_in_dim(operands.query, row, rows).astype(jnp.float32) * scale[:, None, None, None]

    empty = start >= stop
    begin = jnp.min(jnp.where(empty, kv.capacity, start)) // unit
    end = -(-jnp.max(jnp.where(empty, 0, stop)) // unit)
    left = jnp.maximum(end - begin, 0)  # units to read

    zero = jnp.zeros_like(query[..., 0])  # like: in a `shard_map`, it varies as the query does
    state = _Online(top=zero - jnp.inf, total=zero, out=jnp.zeros_like(query))
    # Wide tiles while they are whole, then narrow ones.
    lengths = sorted({min(units, max(1, tile // unit)) for tile in tiles}, reverse=True)
    for length in lengths:
        count = -(-left // length) if length == lengths[-1] else left // length
        fold = functools.partial(
            _fold_tile, operands, query, start, stop, row=row, origin=begin, length=length, unit=unit, units=units
        )
        state = lax.fori_loop(0, count, fold, state)
        begin, left = begin + count * length, left - count * length

    some = state.total > 0.0
    out = jnp.where(some[..., None], state.out / jnp.where(some, state.total, 1.0)[..., None], 0.0)
    # A NaN among the visible scores has made the total NaN: that is the caller's, and is passed on.
    out = jnp.where(jnp.isnan(state.total)[..., None], jnp.nan, out)
    return out, state.top + jnp.log(state.total)


def _fold_tile(
    operands: Operands,
    query: Array,
    start: Array,
    stop: Array,
    i: Array,
    state: _Online,
    *,
    row: Array,
    origin: Array,
    length: int,
    unit: int,
    units: int,
) -> _Online:
    """The state with tile i of `length` units, counted from unit `origin`, in it."""
    kv = operands.kv
    rows = query.shape[0]
    tile = length * unit  # T
    nominal = origin + i * length
    begin = jnp.minimum(nominal, units - length)  # the last tile moves back so as not to leave the cache ...
    position = begin * unit + jnp.arange(tile, dtype=jnp.int32)[None, :]
    seen = (position >= jnp.maximum(start[:, None], nominal * unit)) & (position < stop[:, None])  # ... and overlaps

    key = _load(kv.key, kv.table, kv.head_major, row, begin, rows=rows, length=length)
    # With the positions in front this is a product that XLA:CPU does not transpose the tile for.
    scores = jnp.einsum("rktd,rkgd->rktg", key, query, precision=lax.Precision.HIGHEST).swapaxes(2, 3)
    if operands.bias is not None:
        scores = scores + _to_float32(_columns(operands.bias, row, rows, begin * unit, tile))
    hidden = None
    if operands.mask is not None:
        hidden = _columns(operands.mask, row, rows, begin * unit, tile).astype(bool)
        scores = mask_scores(scores, jnp.broadcast_to(hidden[:, None, None, :], scores.shape))
    scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)

    top = jnp.maximum(state.top, jnp.max(scores, axis=-1))
    shift = jnp.where(jnp.isneginf(top), 0.0, top)  # while all scores are -inf: weights 0, not NaN
    weight = jnp.exp(scores - shift[..., None])
    fade = jnp.exp(state.top - shift)
    out = state.out * fade[..., None]
    # 0 * NaN is NaN: values that do not count are selected away, not only weighted by 0.
    counts = seen[:, None, :]
    if hidden is not None:
        counts = counts & (~hidden[:, None, :] | jnp.any(weight != 0.0, axis=2))
        out = jnp.where(fade[..., None] == 0.0, 0.0, out)  # values of masked positions, while nothing else was seen
    # The barrier has the tile of keys done with first, so that the values may take its buffer.
    weight, begin = lax.optimization_barrier((weight, begin))
    table = kv.table if kv.value_table is None else kv.value_table
    value = _load(kv.value, table, kv.head_major, row, begin, rows=rows, length=length)
    value = jnp.where(jnp.broadcast_to(counts[..., None], value.shape), value, 0.0)
    return _Online(
        top=top,
        total=state.total * fade + jnp.sum(weight, axis=-1),
        out=out + jnp.einsum("rkgt,rktd->rkgd", weight, value, precision=lax.Precision.HIGHEST),
    )


def _load(
    pages: Array, table: Array | None, head_major: bool, row: Array, begin: Array, *, rows: int, length: int
) -> Array:
    """Units begin, ..., begin + length - 1 of sequences row, ..., row + R - 1 as a float32 tile (R, K, T, D)."""
    pages, begin = _sliceable(pages, begin)
    if table is None or table.shape[1] == 1:
        tile = _slice_pages(pages, table, head_major, row, begin, rows=rows, length=length)
    else:
        # Garbage ids, which only entries outside the window may hold, are clipped into the cache.
        ids = lax.dynamic_slice(table, (row, begin), (rows, length))
        tile = jnp.take(pages, ids, axis=0, mode="clip")  # (R, pages, K, P, D), or (R, pages, P, K, D)
        tile = jnp.moveaxis(tile, 2 if head_major else 3, 1)
        tile = tile.reshape(rows, tile.shape[1], -1, tile.shape[4])
    return _to_float32(tile)


def _sliceable(array: Array, begin: Array) -> tuple[Array, Array]:
    """A large array, and where a tile of it begins, such that XLA slices first and converts the tile only.

    The barrier ties the array to the loop's index: else XLA may convert or reinterpret all of it once, before the loop,
    and keep the result. And XLA:CPU in JAX 0.10 converts the whole operand of a bfloat16 slice, so bfloat16 travels as
    its bits.
    """
    array, begin = lax.optimization_barrier((array, begin))
    if array.dtype == jnp.bfloat16:
        array = lax.bitcast_convert_type(array, jnp.uint16)
    return array, begin


def _to_float32(tile: Array) -> Array:
    """A tile of a `_sliceable` array, converted; the bits of a bfloat16 are the upper half of a float32."""
    if tile.dtype == jnp.uint16:
        return lax.bitcast_convert_type(tile.astype(jnp.uint32) << 16, jnp.float32)
    return tile.astype(jnp.float32)


def _slice_pages(
    pages: Array, table: Array | None, head_major: bool, row: Array, begin: Array, *, rows: int, length: int
) -> Array:
    """Positions begin, ..., begin + T - 1 of sequences that are one page each: (R, K, T, D) in the cache's dtype."""

    def positions(page: Array, count: int) -> Array:
        shape = (count, pages.shape[1], length, pages.shape[3]) if head_major else (count, length, *pages.shape[2:])
        zero = jnp.zeros_like(begin)  # a Python 0 would be int64 in x64 mode
        origin = (page, zero, begin, zero) if head_major else (page, begin, zero, zero)
        return lax.dynamic_slice(pages, origin, shape)

    if table is None:
        tile = positions(row, rows)
    elif rows == 1:
        tile = positions(table[row, 0], 1)  # dynamic_slice clamps
    else:
        ids = lax.dynamic_slice_in_dim(table[:, 0], row, rows)
        tile = jax.vmap(lambda page: positions(page, 1)[0])(ids)
    return tile if head_major else jnp.swapaxes(tile, 1, 2)


def _columns(table: Array, row: Array, rows: int, begin: Array, length: int) -> Array:
    """Columns begin, ..., begin + length - 1 of the mask's or the bias's rows for R sequences, by the modulo rule."""
    table, begin = _sliceable(table, begin)
    columns = lax.dynamic_slice_in_dim(table, begin, length, axis=-1)
    which = (row + jnp.arange(rows, dtype=jnp.int32)) % table.shape[0]
    return jnp.take(columns, which, axis=0, mode="clip")
