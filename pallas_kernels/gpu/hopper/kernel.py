"""The kernel: one pass over the tiles of a share of one window, for the query heads of one kv head.

The operands of the products are swapped: a tile of keys is the left side of the first and a tile of values, transposed,
of the second, so that the 64 rows a wgmma has anyway are positions and channels, and the few query heads of a group are
its columns, of which it can have as few as 8.

    scores^T (T, columns)  = keys (T, D) @ query^T
    out^T (padded, columns) = values^T (padded, T) @ weights^T

Copies of the next tiles run while one is computed; the slot of a tile of keys is refilled as soon as its scores are
there, that of values after the second product. Softmax in base 2.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ifa.masking import MASK_VALUE
from pallas_kernels.gpu.hopper.plan import DIGIT, NARROWEST_PRODUCT, ROW_GROUP, SIDE_BY_SIDE, M, Plan, largest_number

LOG2_E = math.log2(math.e)
LAYOUT = plgpu.Layout.WGMMA
PER_COLUMN = LAYOUT.reduce(0)  # what is left of a (positions, columns) array without its positions
PER_POSITION = LAYOUT.reduce(1)


class Refs(NamedTuple):
    """Where everything is. Optional ones are None where the plan has no use for them.

    In the device's memory:
      query: (B * K, blocks * columns or fewer, D), or for int8 (B * K * blocks, query_terms * columns, D).
      query_top: (B * K * blocks, columns) float32, the largest number of each row, which the largest digits stand for.
      key, value: (pages * K * P, D) if head-major, else (pages * P, K, D).
      start, stop: (rows,) int32. scale: (rows,) float32. table, value_table: (B * M,) int32.
      mask: (rows * width,) int8. bias: (rows, K, heads, width).
      out: (B * K, heads, D) in the caller's dtype, or of each split, not yet divided by the total, (splits, B * K or
        more, heads, D) float32.
      top, total: (splits, B * K, blocks * columns) float32: the largest score in base 2, and the sum of the weights.
    In shared memory: the slots that copies land in, and what products and copies read.
    """

    query: Any
    query_top: Any
    key: Any
    value: Any
    start: Any
    stop: Any
    scale: Any
    table: Any
    value_table: Any
    mask: Any
    bias: Any
    out: Any
    top: Any
    total: Any
    query_s: Any
    query_top_s: Any
    key_s: Any
    value_s: Any
    weights_s: Any
    staged_s: Any
    staged_keys_s: Any
    mask_s: Any
    bias_s: Any
    out_s: Any
    top_s: Any
    total_s: Any
    query_arrived: Any
    key_arrived: Any
    value_arrived: Any


def absent(plan: Plan) -> set[str]:
    """The fields of `Refs` that a plan has no use for."""
    optional = {
        "query_top": plan.staged,
        "query_top_s": plan.staged,
        "staged_s": plan.staged,
        "staged_keys_s": plan.stages_keys,
        "table": plan.table_width > 0,
        "value_table": plan.value_table,
        "mask": plan.masked,
        "mask_s": plan.masked,
        "bias": plan.bias_dtype is not None,
        "bias_s": plan.bias_dtype is not None,
    }
    return {name for name, present in optional.items() if not present}


def scratch(plan: Plan) -> list[Any]:
    """Shared memory and barriers, in the order of `Refs`, but without those of `shared_slots`."""
    stages, tile = plan.stages, plan.tile
    query_rows = plan.query_terms * plan.columns
    copies = plan.chunks + plan.masked + (plan.bias_dtype is not None)
    arrays = {
        "query_s": _tiled(query_rows, plan.head_dim, dtype=plan.query_dtype, swizzle=plan.query_swizzle),
        "query_top_s": plgpu.SMEM((plan.columns,), jnp.float32),
        "value_s": _tiled(stages, tile, plan.padded, dtype=plan.key_dtype, swizzle=plan.key_swizzle),
        "weights_s": _tiled(
            plan.weight_terms * plan.columns, tile, dtype=plan.weight_dtype, swizzle=plan.value_swizzle
        ),
        "staged_s": _tiled(tile, plan.padded, dtype=plan.weight_dtype, swizzle=plan.value_swizzle),
        "staged_keys_s": _tiled(tile, plan.head_dim, dtype=plan.query_dtype, swizzle=plan.query_swizzle),
        "mask_s": plgpu.SMEM((stages, plan.mask_width), jnp.int8),
        "bias_s": plgpu.SMEM((stages, plan.columns, tile), plan.bias_dtype or jnp.float32),
        "top_s": plgpu.SMEM((plan.columns,), jnp.float32),
        "total_s": plgpu.SMEM((plan.columns,), jnp.float32),
        "query_arrived": plgpu.Barrier(num_arrivals=2 if plan.staged else 1),
        "key_arrived": plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        "value_arrived": plgpu.Barrier(num_barriers=stages, num_arrivals=plan.chunks),
    }
    return [array for name, array in arrays.items() if name not in absent(plan)]


def shared_slots(plan: Plan) -> Any:
    """`key_s` and `out_s`, in one place: the result is stored when the last keys have been read."""
    keys = (plan.stages, plan.tile, plan.head_dim)
    return plgpu.RefUnion(
        _tiled(*keys, dtype=plan.key_dtype, swizzle=plan.key_swizzle),
        _tiled(plan.columns, plan.padded, dtype=plan.kernel_out_dtype, swizzle=plan.out_swizzle),
    )


def _tiled(*shape: int, dtype: Any, swizzle: int) -> Any:
    elements = swizzle // jnp.dtype(dtype).itemsize
    transforms: tuple[Any, ...] = (plgpu.TilingTransform((ROW_GROUP, elements)),)
    if swizzle >= NARROWEST_PRODUCT:
        transforms += (plgpu.SwizzleTransform(swizzle),)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class _Window(NamedTuple):
    """A thread block's work: so many tiles, from `first` on, of the positions [start, stop).

    `lead` rows of the first tile lie before the sequence's first position: copies begin at whole groups of 8 rows.
    """

    sequence: Array
    head: Array
    block: Array
    split: Array
    item: Array
    start: Array
    stop: Array
    lead: Array | int
    first: Array
    tiles: Array


def decode_kernel(*refs: Any, plan: Plan, mask_rows: tuple[int, int], bias_rows: int) -> None:
    """See the module. `refs` are those of `Refs` that the plan has, in that order.

    Args:
      refs: see above.
      plan: of the launch.
      mask_rows: rows of the mask, and positions of a row.
      bias_rows: rows of the bias.
    """

    def body(slots: Any) -> None:
        given = iter(refs)
        key_s, out_s = slots
        shared = {"key_s": key_s, "out_s": out_s} | dict.fromkeys(absent(plan))
        decode(Refs(*(shared[name] if name in shared else next(given) for name in Refs._fields)), plan, rows)

    rows = (mask_rows, bias_rows)
    pl.run_scoped(body, shared_slots(plan))


def decode(r: Refs, plan: Plan, rows: tuple[tuple[int, int], int]) -> None:
    """The work of a thread block; `rows` are those of mask and bias."""
    work = _work(r, plan)
    fetch = _Fetch(r, plan, work, *rows)

    for slot in range(plan.stages):

        @pl.when(slot < work.tiles)
        def _fill(slot: int = slot) -> None:
            pages = fetch.pages(jnp.int32(slot))
            fetch.keys(jnp.int32(slot), slot, pages)
            fetch.values(jnp.int32(slot), slot, pages)
            fetch.mask_and_bias(jnp.int32(slot), slot)

    plgpu.copy_gmem_to_smem(fetch.query(), r.query_s, r.query_arrived)
    if plan.staged:
        plgpu.copy_gmem_to_smem(r.query_top.at[work.item], r.query_top_s, r.query_arrived)
    plgpu.barrier_wait(r.query_arrived)
    scale = r.scale[_rem(work.sequence, r.scale.shape[0])] * LOG2_E
    if plan.staged:
        scale = _load(r.query_top_s, PER_COLUMN) / float(largest_number(plan.query_terms)) * scale
    size = plan.product_rows
    parts = [(begin, min(size, plan.padded - begin)) for begin in range(0, plan.padded, size)]

    def visit(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        out, top, total, pages = carry
        # An only slot is 0, but as a number that the compiler takes to vary: if it knew that addresses stay the same,
        # it would keep one for each part of the tiles in registers.
        slot = _rem(i, plan.stages) if plan.stages > 1 else _div(i, 2**30)
        following = i + plan.stages
        plgpu.barrier_wait(r.key_arrived.at[slot])
        scores = _scores(r, plan, slot, scale)
        seen = _seen(plan, work, i, (plan.tile, plan.columns), LAYOUT)
        scores = jnp.where(seen, scores, -jnp.inf)

        @pl.when(following < work.tiles)
        def _refill_keys() -> None:
            fetch.keys(following, slot, pages)

        new_top = jnp.maximum(top, jnp.max(scores, axis=0))
        finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # exp2(-inf - -inf) would be NaN
        shift = finite_top - plan.headroom
        decay = jnp.exp2(top - finite_top)
        weights = jnp.exp2(scores - _over_rows(shift, scores.shape))
        if plan.sums_late:
            total = total * _over_rows(decay, total.shape) + weights
        else:
            total = total * decay + jnp.sum(weights, axis=0)
        _store_weights(r, plan, weights)
        plgpu.barrier_wait(r.value_arrived.at[slot])
        out = [part * _over_rows(decay, part.shape) for part in out]
        if plan.staged:
            _stage(r.value_s.at[slot], r.staged_s, max(M, plan.key_swizzle))
        elif plan.masked or plan.bias_dtype is not None:
            # What a fully masked beginning has gathered vanishes, NaN or not; so do values without weight.
            out = [jnp.where(_over_rows(decay, part.shape) == 0.0, 0.0, part) for part in out]
            used = jnp.max(weights, axis=1) > 0.0
            _select_values(r, plan, slot, lambda shape: lax.broadcast_in_dim(used, shape, [0]))
        else:
            begin = (work.first + i) * plan.tile - work.lead

            @pl.when((begin < work.start) | (begin + plan.tile > work.stop))
            def _edge() -> None:
                _select_values(r, plan, slot, lambda shape: _seen(plan, work, i, shape, LAYOUT))

        plgpu.commit_smem()
        values = r.staged_s if plan.staged else r.value_s.at[slot]
        for n, channels in enumerate(parts):
            part = values.at[:, pl.ds(*channels)].transpose((1, 0))
            terms = _products(part, r.weights_s, plan.weight_terms, jnp.float32)
            out[n] = functools.reduce(jnp.add, terms, out[n])

        @pl.when(following < work.tiles)
        def _refill_values() -> None:
            fetch.values(following, slot, pages)
            fetch.mask_and_bias(following, slot)  # read by threads, which only `commit_smem` orders before a copy

        return out, new_top, total, fetch.pages(following + 1)

    def full(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    columns = plan.columns
    state = (
        [full((size, columns), 0.0, LAYOUT) for _, size in parts],
        full((columns,), -jnp.inf, PER_COLUMN),
        full((plan.tile, columns), 0.0, LAYOUT) if plan.sums_late else full((columns,), 0.0, PER_COLUMN),
        fetch.pages(jnp.int32(plan.stages)),
    )
    out, top, total, _ = lax.fori_loop(jnp.int32(0), work.tiles, visit, state)
    if plan.sums_late:
        total = jnp.sum(total, axis=0)
    if plan.splits == 1:
        factor = jnp.where(total == 0.0, 0.0, 1.0 / total)
    else:
        factor = jnp.full_like(total, 2.0**-plan.headroom)
    for channels, part in zip(parts, out, strict=True):
        part = (part * _over_rows(factor, part.shape)).astype(plan.kernel_out_dtype)
        r.out_s.at[:, pl.ds(*channels)].transpose((1, 0))[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
    r.top_s[...] = top
    r.total_s[...] = total * 2.0**-plan.headroom
    plgpu.commit_smem()
    row = work.sequence * plan.num_heads + work.head
    # What is beyond the heads and channels that there are is not written. See `_Fetch._tile` for the traced 0.
    heads = pl.ds(pl.multiple_of(work.block * plan.columns, ROW_GROUP), plan.columns)
    whole = pl.ds(pl.multiple_of(work.block * 0, M), plan.padded)
    here = (row,) if plan.splits == 1 else (work.split, row)
    plgpu.copy_smem_to_gmem(r.out_s, r.out.at[*here, heads, whole])
    plgpu.copy_smem_to_gmem(r.top_s, r.top.at[work.split, row, heads])
    plgpu.copy_smem_to_gmem(r.total_s, r.total.at[work.split, row, heads])
    plgpu.wait_smem_to_gmem(0)


def _work(r: Refs, plan: Plan) -> _Window:
    """The share of this thread block."""
    rest = lax.axis_index("unit")
    rest, block = _div(rest, plan.blocks), _rem(rest, plan.blocks)
    rest, head = _div(rest, plan.num_heads), _rem(rest, plan.num_heads)
    sequence, split = _div(rest, plan.splits), _rem(rest, plan.splits)
    start = jnp.clip(r.start[_rem(sequence, r.start.shape[0])], 0, plan.capacity)
    stop = jnp.clip(r.stop[_rem(sequence, r.stop.shape[0])], 0, plan.capacity)
    lead = _rem(_first_row(plan, sequence, head), ROW_GROUP) if plan.ragged else 0
    first = _div(start + lead, plan.tile)
    tiles = jnp.where(start < stop, _div(stop + lead + (plan.tile - 1), plan.tile) - first, 0)
    # Shares differ by one tile at most. (tiles * split could leave 32 bits.)
    each, more = _div(tiles, plan.splits), _rem(tiles, plan.splits)
    begin = each * split + jnp.minimum(split, more)
    mine = each + (split < more).astype(jnp.int32)
    item = (sequence * plan.num_heads + head) * plan.blocks + block
    return _Window(sequence, head, block, split, item, start, stop, lead, first + begin, mine)


def _div(x: Array, n: int) -> Array:
    """x // n for numbers that are not negative, in 32 bits also where JAX makes 64 of a Python number."""
    return lax.div(x, np.int32(n))


def _rem(x: Array, n: int) -> Array:
    """x % n, likewise."""
    return lax.rem(x, np.int32(n))


def _first_row(plan: Plan, page: Array, head: Array) -> Array:
    """Where a page begins among the rows of a cache."""
    return (page * plan.num_heads + head if plan.head_major else page) * plan.page


def _load(ref: Any, layout: Any, *, optimized: bool = True) -> Array:
    """What lies in shared memory, in registers; if `optimized`, only from where that takes no more than it must."""
    load: Any = plgpu.load  # its arguments differ in a JAX that this kernel does not run on, but type checkers do
    return load(ref, layout=layout, optimized=optimized)


def _over_rows(columns: Array, shape: tuple[int, ...]) -> Array:
    """(columns,) as (rows, columns)."""
    return lax.broadcast_in_dim(columns, shape, [1])


def _seen(plan: Plan, work: _Window, i: Array, shape: tuple[int, int], layout: Any) -> Array:
    """Which positions of tile i lie in the window, along the rows of `shape`."""
    position = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 0), layout)
    origin = (work.first + i) * plan.tile - work.lead
    return (position >= work.start - origin) & (position < work.stop - origin)


def _products(left: Any, right: Any, terms: int, dtype: Any) -> list[Array]:
    """left @ part^T for each of the `terms` parts that the rows of `right` are."""
    rows, columns = left.shape[0], right.shape[0] // terms

    def multiply(right: Any, accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
        return accumulator[...]

    if right.shape[0] <= SIDE_BY_SIDE:
        accumulator = plgpu.ACC((rows, right.shape[0]), dtype)
        whole = pl.run_scoped(functools.partial(multiply, right), accumulator)
        return [whole[:, t * columns : (t + 1) * columns] for t in range(terms)] if terms > 1 else [whole]
    parts = [right.at[pl.ds(t * columns, columns)] for t in range(terms)]
    return [pl.run_scoped(functools.partial(multiply, part), plgpu.ACC((rows, columns), dtype)) for part in parts]


def _scores(r: Refs, plan: Plan, slot: Array, scale: Array) -> Array:
    """The scores of a tile in base 2, with bias and mask: (T, columns). `scale` is a scalar, or for int8 (columns,)."""
    keys = r.key_s.at[slot]
    if plan.stages_keys:
        _stage(keys, r.staged_keys_s, plan.head_dim)
        plgpu.commit_smem()
        keys = r.staged_keys_s
    if plan.staged:
        dtype = jnp.float32 if plan.stages_keys else jnp.int32  # digits are whole numbers, and exact, in either
        digits = [d.astype(jnp.float32) for d in _products(keys, r.query_s, plan.query_terms, dtype)]
        scores = functools.reduce(lambda high, low: high * float(DIGIT) + low, digits)
        scores = scores * _over_rows(scale, scores.shape)
    else:
        (scores,) = _products(keys, r.query_s, 1, jnp.float32)
        scores = scores * scale
    if plan.bias_dtype is not None:
        # float32 has no fast way into the products' layout but by this one. Where sequences begin inside a group of 8
        # rows, tiles begin inside the squares that the fast ways want, so the bias lies as it comes.
        across = plgpu.Layout.WGMMA_TRANSPOSED if plan.bias_dtype == jnp.float32 else LAYOUT
        bias = _load(r.bias_s.at[slot].transpose((1, 0)), across, optimized=not plan.ragged)
        bias = plgpu.layout_cast(bias, LAYOUT)
        scores = scores + bias.astype(jnp.float32) * LOG2_E
    if plan.masked:
        mask = _load(r.mask_s.at[slot, pl.ds(0, plan.tile)], PER_POSITION)
        hidden = lax.broadcast_in_dim(mask, scores.shape, [0]) != 0
        scores = jnp.where(hidden, MASK_VALUE * LOG2_E, scores)
    return scores


def _store_weights(r: Refs, plan: Plan, weights: Array) -> None:
    """Softmax weights into shared memory as the numbers whose sum they are.

    At once, since each store waits at two barriers, unless there are so many that registers would not hold them.
    """
    terms = split(weights, plan.weight_dtype, plan.weight_terms)
    if plan.weight_terms * plan.columns <= SIDE_BY_SIDE:
        terms = [jnp.concatenate(terms, axis=1)]
    rows = r.weights_s.shape[0] // len(terms)
    for n, term in enumerate(terms):
        part = r.weights_s.at[pl.ds(n * rows, rows)]
        part.transpose((1, 0))[...] = plgpu.layout_cast(term, plgpu.Layout.WGMMA_TRANSPOSED)


def split(x: Array, dtype: Any, terms: int) -> list[Array]:
    """A float32 array, rounded, as one array of a 16-bit dtype, or as several whose sum it is.

    The low bits are cut off through integers: a compiler may take a rounding there and back for nothing.
    """
    parts = []
    mantissa = jnp.finfo(dtype).nmant
    for _ in range(terms - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << (23 - mantissa)))
        head = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(head.astype(dtype))
        x = x - head
    return [*parts, x.astype(dtype)]


def _select_values(r: Refs, plan: Plan, slot: Array, keep: Any) -> None:
    """Zeros for the values of positions that do not count: 0 * NaN is NaN. `keep` takes a shape, (T, channels)."""
    for begin in range(0, plan.padded, M):
        part = r.value_s.at[slot, :, pl.ds(begin, M)]
        values = _load(part, LAYOUT)
        part[...] = jnp.where(keep(values.shape), values, jnp.zeros_like(values))


def _stage(source: Any, target: Any, width: int) -> None:
    """An int8 tile as a 16-bit one, which a wgmma can transpose; `width` channels at a time."""
    for begin in range(0, source.shape[1], width):
        channels = pl.ds(begin, width)
        values = _load(source.at[:, channels], plgpu.Layout.WGMMA_UPCAST_2X)
        target.at[:, channels][...] = values.astype(target.dtype)


class _Fetch:
    """The copies into shared memory."""

    def __init__(self, refs: Refs, plan: Plan, work: _Window, mask_rows: tuple[int, int], bias_rows: int):
        self.refs, self.plan, self.work = refs, plan, work
        self.mask_rows, self.bias_rows = mask_rows, bias_rows

    def query(self) -> Any:
        """Where the query is."""
        r, plan, work = self.refs, self.plan, self.work
        if plan.staged:
            return r.query.at[work.item]
        heads = pl.ds(pl.multiple_of(work.block * plan.columns, ROW_GROUP), plan.columns)
        return r.query.at[work.sequence * plan.num_heads + work.head, heads]

    def pages(self, i: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Pages of keys and of values for each chunk of tile i; a chunk outside the window has one inside it.

        Looked up a tile before they are needed. No entry outside the window is read; where there is no window, none of
        what is read is followed.
        """
        plan, work = self.plan, self.work
        if plan.table_width == 0:
            return (), ()
        low = _div(work.start, plan.page)
        high = jnp.maximum(_div(work.stop - 1, plan.page), low)
        keys, values = [], []
        for j in range(plan.chunks):
            index = _div((work.first + i) * plan.chunks + j, plan.page // plan.chunk)
            entry = work.sequence * plan.table_width + jnp.clip(jnp.clip(index, low, high), 0, plan.table_width - 1)
            keys.append(jnp.clip(self.refs.table[entry], 0, plan.pages - 1))
            if plan.value_table:
                values.append(jnp.clip(self.refs.value_table[entry], 0, self._value_pages - 1))
        return tuple(keys), tuple(values)

    @property
    def _value_pages(self) -> int:
        plan = self.plan
        return self.refs.value.shape[0] // (plan.page * (plan.num_heads if plan.head_major else 1))

    def keys(self, i: Array, slot: Any, pages: tuple[tuple[Array, ...], tuple[Array, ...]]) -> None:
        """Starts the copies of tile i of keys into a slot."""
        self._tile(self.refs.key, self.refs.key_s, self.refs.key_arrived, i, slot, pages[0])

    def mask_and_bias(self, i: Array, slot: Any) -> None:
        """Starts the copies of the mask's and the bias's part of tile i into a slot; they arrive as keys do."""
        r, plan, work = self.refs, self.plan, self.work
        origin = (work.first + i) * plan.tile - work.lead
        if plan.masked:
            rows, width = self.mask_rows
            first = _rem(work.sequence, rows) * width + (ROW_GROUP if plan.ragged else 0)
            source = r.mask.at[pl.ds(first + origin, plan.mask_width)]
            plgpu.copy_gmem_to_smem(source, r.mask_s.at[slot], r.key_arrived.at[slot])
        if plan.bias_dtype is not None:
            positions = pl.ds(origin + (ROW_GROUP if plan.ragged else 0), plan.tile)
            heads = pl.ds(work.block * plan.columns, plan.columns)
            source = r.bias.at[_rem(work.sequence, self.bias_rows), work.head, heads, positions]
            plgpu.copy_gmem_to_smem(source, r.bias_s.at[slot], r.key_arrived.at[slot])

    def values(self, i: Array, slot: Any, pages: tuple[tuple[Array, ...], tuple[Array, ...]]) -> None:
        """Starts the copies of tile i of values into a slot."""
        r = self.refs
        self._tile(r.value, r.value_s, r.value_arrived, i, slot, pages[1] if self.plan.value_table else pages[0])

    def _tile(self, source: Any, slots: Any, arrived: Any, i: Array, slot: Any, pages: tuple[Array, ...]) -> None:
        plan, work = self.plan, self.work
        # Beyond D a copy finds zeros. It begins at a traced 0, since JAX refuses a static slice that leaves the array.
        begin = 0 if slots.shape[2] == plan.head_dim else pl.multiple_of(work.sequence * 0, M)
        channels = pl.ds(begin, slots.shape[2])
        for j in range(plan.chunks):
            if plan.table_width:
                page = pages[j]
                part = _rem((work.first + i) * plan.chunks + j, plan.page // plan.chunk) * plan.chunk
            else:
                page, part = work.sequence, (work.first + i) * plan.tile - work.lead
            rows = pl.ds(pl.multiple_of(_first_row(plan, page, work.head) + part, ROW_GROUP), plan.chunk)
            tile = source.at[rows, channels] if plan.head_major else source.at[rows, work.head, channels]
            target = slots.at[slot] if plan.chunks == 1 else slots.at[slot, pl.ds(j * plan.chunk, plan.chunk)]
            plgpu.copy_gmem_to_smem(tile, target, arrived.at[slot])
