"""The kernel: one pass over the tiles of every item, fetching ahead across items.

Each core runs `items / cores` grid steps. A step is one item; in it a loop runs over the tiles of the item's window.
The fetches run ahead of that loop: a cursor (item, tile), kept in scalar memory, names the tile to fetch next, and goes
on into the following items, so that memory is never idle between sequences. A slot is refilled only in the step after
the one that read it.

A tile that lies wholly inside its window is computed at once, without masks and with one wait for all its copies. Where
the tile to fetch next does so too, its copies are started in straight line among the arithmetic, which hides them. Of
other tiles exactly the chunks that the window touches are copied, the arithmetic goes over blocks of them, and whatever
lies outside the window is replaced before it meets any, since 0 * NaN is NaN.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ifa.masking import MASK_VALUE
from pallas_kernels.tpu.narrow import from_digits, int8_digits, split_bfloat16
from pallas_kernels.tpu.plan import Plan
from pallas_kernels.tpu.storage import LANES

ROW_GROUP = 8
"""Rows of a tile in HBM. Both sides of a copy are viewed in groups of 8 rows, or their tilings differ."""


class Refs(NamedTuple):
    """Where everything is. Optional ones are None where the plan has no use for them.

    start, stop: (items,) int32, scale: (items,) float32, table: (B * M,) int32, all in scalar memory.
    query: (1, 1, groups, rows, own_width) float32 of this item, in VMEM.
    key, value: the caches in HBM. mask: (R, 1, S) float32, bias: (R, head_blocks, groups * rows, S), in HBM.
    out: (1, groups, rows, own_width), lse: (1, groups * rows, 128), of this item.
    *_tile: the slots of VMEM that copies land in. semaphores: (slots, 4).
    cursor: (3,) int32 in scalar memory: the slot to read next, and the item and tile to fetch next.
    top, total: (groups * rows, 128) float32, running maximum and sum, the same in every lane.
    accumulator: (groups * rows, width) float32.
    packed_query: (groups, query_rows, width), this item's query: its terms in float32, or its digits in int8.
    step: (groups * rows, 128) float32, what the digits' products of a row are multiplied by, the same in every lane.
    """

    start: Any
    stop: Any
    scale: Any
    table: Any
    query: Any
    key: Any
    value: Any
    mask: Any
    bias: Any
    out: Any
    lse: Any
    key_tile: Any
    value_tile: Any
    mask_tile: Any
    bias_tile: Any
    semaphores: Any
    cursor: Any
    top: Any
    total: Any
    accumulator: Any
    packed_query: Any
    step: Any


KEY, VALUE, MASK, BIAS = range(4)  # columns of the semaphores

SCORES_SHARE, SOFTMAX_SHARE, VALUES_SHARE = 0.3, 0.1, 0.6
"""Where the copies of a tile are started if they are many. Beside the softmax few, or scalar registers run out."""


def decode_kernel(*refs: Any, plan: Plan, rows_of_bias: int, rows_of_mask: int) -> None:
    """See the module. `refs` are those of `Refs` that the plan has, in that order."""
    absent = {
        "table": plan.table_width == 0,
        "mask": not plan.masked,
        "mask_tile": not plan.masked,
        "bias": not plan.biased,
        "bias_tile": not plan.biased,
        "step": not plan.digits,
    }
    given = iter(refs)
    r = Refs(*(None if absent.get(name) else next(given) for name in Refs._fields))
    fetch = _Fetch(r, plan, rows_of_bias, rows_of_mask)
    per_core = plan.items // plan.tuning.cores
    item = pl.program_id(0) * per_core + pl.program_id(1)
    end_item = (pl.program_id(0) + 1) * per_core
    slots = plan.tuning.slots

    @pl.when(pl.program_id(1) == 0)
    def _fill() -> None:
        next_item, next_tile = item, fetch.first_tile(item)
        for slot in range(slots - 1):

            @pl.when(next_item < end_item)
            def _start(next_item: Any = next_item, next_tile: Any = next_tile, slot: Any = slot) -> None:
                fetch.start_some(next_item, next_tile, slot)

            next_item, next_tile = fetch.advance(next_item, next_tile, end_item)
        r.cursor[0] = jnp.int32(0)
        r.cursor[1], r.cursor[2] = next_item, next_tile

    r.top[...] = jnp.full_like(r.top, -jnp.inf)
    r.total[...] = jnp.zeros_like(r.total)
    r.accumulator[...] = jnp.zeros_like(r.accumulator)
    _pack_query(r, plan, item)

    def visit(tile: Array, _: None) -> None:
        slot, next_item, next_tile = r.cursor[0], r.cursor[1], r.cursor[2]
        freed = jnp.where(slot == 0, slots - 1, slot - 1)  # read in the step before
        more = next_item < end_item
        next_item = jnp.minimum(next_item, end_item - 1)
        full = fetch.is_full(item, tile)
        hot = full & more & fetch.is_full(next_item, next_tile)
        following = fetch.advance(next_item, next_tile, end_item)
        r.cursor[0] = jnp.where(slot == slots - 1, 0, slot + 1)
        r.cursor[1] = jnp.where(more, following[0], end_item)
        r.cursor[2] = following[1]

        part = functools.partial(_accumulate, r, plan, item, tile, slot)

        @pl.when(hot)
        def _hot() -> None:
            fetch.wait_full(slot)
            meanwhile = fetch.start_along(next_item, next_tile, freed)
            part(0, plan.chunks, edge=False, stages=plan.stages, cuts=plan.cuts, meanwhile=meanwhile)

        @pl.when(more & jnp.logical_not(hot))
        def _start() -> None:
            fetch.start_some(next_item, next_tile, freed)

        @pl.when(full & jnp.logical_not(hot))
        def _full() -> None:
            fetch.wait_full(slot)
            part(0, plan.chunks, edge=False, stages=plan.stages)

        @pl.when(jnp.logical_not(full))
        def _edge() -> None:
            low, high = fetch.wait_some(item, tile, slot)

            def block(index: Array, _: None) -> None:
                part(index * plan.edge_chunks, plan.edge_chunks, edge=True)

            lax.fori_loop(lax.div(low, plan.edge_chunks), pl.cdiv(high, plan.edge_chunks), block, None)

    lax.fori_loop(fetch.first_tile(item), fetch.end_tile(item), visit, None)

    total = r.total[...]
    some = total != 0.0  # NaN stays NaN
    safe = jnp.where(some, total, 1.0)
    r.lse[0] = jnp.where(some, r.top[...] + jnp.log(safe), -jnp.inf)
    out = jnp.where(some[:, :1], r.accumulator[...] / safe[:, :1], 0.0)
    if plan.own_width < plan.width:
        out, *others = jnp.split(out, plan.width // plan.own_width, axis=1)
        for i, other in enumerate(others, 1):
            out = jnp.where(_own_lanes(plan, total.shape[0]) == i, other, out)
    r.out[0] = out.reshape(r.out.shape[1:])


def _pack_query(r: Refs, plan: Plan, item: Array) -> None:
    """The item's query block diagonal over all lanes of a group, in terms or digits; once, for all tiles."""
    places = plan.width // plan.own_width
    for group in range(plan.groups):
        query = r.query[0, 0, group]
        if places > 1:
            own = _own_lanes(plan, plan.rows)
            query = jnp.concatenate([jnp.where(own == i, query, 0.0) for i in range(places)], axis=1)
        if not plan.digits:
            r.packed_query[group] = jnp.concatenate(split_bfloat16(query, plan.query_terms), axis=0)
            continue
        digits, step = int8_digits(query, plan.digits)
        if spare := plan.query_rows - plan.digits * plan.rows:
            digits.append(jnp.zeros((spare, plan.width), jnp.int32))
        r.packed_query[group] = jnp.concatenate(digits, axis=0).astype(jnp.int8)
        r.step[pl.ds(group * plan.rows, plan.rows)] = jnp.broadcast_to(step * r.scale[item], (plan.rows, LANES))


def _own_lanes(plan: Plan, rows: int) -> Array:
    """(rows, 1): of a group's `width` lanes, which `own_width` ones each row has its own head in."""
    row = lax.rem(lax.broadcasted_iota(jnp.int32, (rows, 1), 0), plan.rows)
    return lax.div(row, plan.own_width // plan.head_dim * plan.group)


class _Fetch:
    """The copies from HBM: which chunks a tile has, and starting and awaiting them."""

    def __init__(self, refs: Refs, plan: Plan, rows_of_bias: int, rows_of_mask: int):
        self.refs, self.plan = refs, plan
        self.rows_of = {BIAS: rows_of_bias, MASK: rows_of_mask}

    def first_tile(self, item: Array) -> Array:
        return lax.div(self.refs.start[item], self.plan.tile)

    def end_tile(self, item: Array) -> Array:
        """At least one tile, so that the cursor and the loop agree on items without positions too."""
        return jnp.maximum(pl.cdiv(self.refs.stop[item], self.plan.tile), self.first_tile(item) + 1)

    def is_full(self, item: Array, tile: Array) -> Array:
        """Whether the tile lies wholly inside the item's window."""
        begin = tile * self.plan.tile
        return (self.refs.start[item] <= begin) & (begin + self.plan.tile <= self.refs.stop[item])

    def advance(self, item: Array, tile: Array, end_item: Array) -> tuple[Array, Array]:
        """The tile after this one, in this item or the next."""
        known = jnp.minimum(item, end_item - 1)
        last = tile + 1 >= self.end_tile(known)
        following = jnp.minimum(item + 1, end_item - 1)
        return jnp.where(last, item + 1, item), jnp.where(last, self.first_tile(following), tile + 1)

    def _chunks(self, item: Array, tile: Array) -> tuple[Array, Array]:
        """The chunks [low, high) of the tile that the window touches."""
        plan, begin = self.plan, tile * self.plan.chunks
        low = jnp.clip(lax.div(self.refs.start[item], plan.chunk) - begin, 0, plan.chunks)
        high = jnp.clip(pl.cdiv(self.refs.stop[item], plan.chunk) - begin, 0, plan.chunks)
        return low, high

    def _place(self, item: Array) -> tuple[Array, Array]:
        """The item's sequence and block of heads."""
        row = lax.div(item, self.plan.head_blocks)
        return lax.rem(row, self.plan.batch), lax.rem(item, self.plan.head_blocks)

    def _start(self, item: Array, tile: Array, j: Any, slot: Array, parts: Sequence[int] = (KEY, VALUE)) -> None:
        """Starts the copies of chunk j of the tile, of keys and values, which share what finds the page."""
        plan, refs = self.plan, self.refs
        sequence, block = self._place(item)
        chunk = tile * plan.chunks + j
        page_index, piece = (
            (chunk, 0)
            if plan.chunks_per_page == 1
            else (
                lax.div(chunk, plan.chunks_per_page),
                lax.rem(chunk, plan.chunks_per_page),
            )
        )
        page = sequence if refs.table is None else self._page(sequence, tile, j, page_index)
        offset = piece * plan.chunk
        heads = pl.ds(block * plan.item_heads, plan.item_heads)
        rows: tuple[Any, ...] = (pl.ds(offset, plan.chunk),)
        if plan.row_groups:
            rows = (pl.ds(lax.div(offset, ROW_GROUP), plan.chunk // ROW_GROUP), slice(None))
        match plan.form:
            case "heads":
                index: tuple[Any, ...] = (page, heads, *rows)
            case "columns":
                lanes = pl.ds(pl.multiple_of(offset, LANES), plan.chunk)  # type: ignore[arg-type]
                index = (page, heads, ..., lanes)
            case "lanes":
                width = plan.item_heads * plan.head_dim
                lanes = pl.ds(pl.multiple_of(block * width, LANES) if plan.head_blocks > 1 else 0, width)
                index = (page, *rows, lanes)
        for part in parts:
            pages, tiles = (refs.key, refs.key_tile) if part == KEY else (refs.value, refs.value_tile)
            pltpu.make_async_copy(pages.at[index], tiles.at[slot, j], refs.semaphores.at[slot, part]).start()

    def _page(self, sequence: Array, tile: Array, j: Any, column: Array) -> Array:
        """The id of a sequence's page in a column of the table, where chunk j of the tile lies."""
        plan, table = self.plan, self.refs.table
        many = plan.cuts > 1 and plan.chunks <= table.shape[0]
        if not many or not isinstance(j, int) or plan.chunks_per_page > 1:
            return table[sequence * plan.table_width + column]
        # A whole tile of many: its entries are at constant distances from the first, which their loads add for nothing.
        following = table.at[pl.ds(j, table.shape[0] - plan.chunks + 1)]
        return following[sequence * plan.table_width + tile * plan.chunks]

    def _row_copies(self, item: Array, tile: Array, slot: Array) -> list[Any]:
        """The copies of the mask's and the bias's part of a tile."""
        plan, refs, copies = self.plan, self.refs, []
        sequence, block = self._place(item)
        positions = pl.ds(pl.multiple_of(tile * plan.tile, LANES), plan.tile)
        if plan.masked:
            source = refs.mask.at[lax.rem(sequence, self.rows_of[MASK]), :, positions]
            copies.append(pltpu.make_async_copy(source, refs.mask_tile.at[slot], refs.semaphores.at[slot, MASK]))
        if plan.biased:
            source = refs.bias.at[lax.rem(sequence, self.rows_of[BIAS]), block, :, positions]
            copies.append(pltpu.make_async_copy(source, refs.bias_tile.at[slot], refs.semaphores.at[slot, BIAS]))
        return copies

    def start_full(self, item: Array, tile: Array, slot: Array, parts: Sequence[int], chunks: range) -> None:
        """Starts the copies of some chunks of a whole tile, of KEY, VALUE or both."""
        for j in chunks:
            self._start(item, tile, j, slot, parts)

    def start_along(self, item: Array, tile: Array, slot: Array) -> Callable[[float], None]:
        """Begins to start the copies of a whole tile; the function that comes back goes on.

        It is called between steps of the arithmetic, with the share of its time that is over. The compiler keeps
        copies and reads of one array in order. So the copies of values can hide behind the scores, which read keys
        only, and those of keys behind what follows. Where there are so many copies that starting them takes longer
        than the arithmetic, keys and values are started together, which costs less, and spread over all steps.
        """
        self.start_rows(item, tile, slot)
        chunks, started = self.plan.chunks, 0
        many = self.plan.cuts > 1
        if not many:
            self.start_full(item, tile, slot, [VALUE], range(chunks))

        def start(share: float) -> None:
            nonlocal started
            until = round(share * chunks) if many else chunks if share > 0.99 * SCORES_SHARE else 0
            self.start_full(item, tile, slot, [KEY, VALUE] if many else [KEY], range(started, until))
            started = until

        return start

    def start_rows(self, item: Array, tile: Array, slot: Array) -> None:
        """Starts the copies of the mask's and the bias's part of a tile."""
        for copy in self._row_copies(item, tile, slot):
            copy.start()

    def start_some(self, item: Array, tile: Array, slot: Array) -> None:
        low, high = self._chunks(item, tile)

        def start(j: Array, _: None) -> None:
            self._start(item, tile, j, slot)

        lax.fori_loop(low, high, start, None)

        @pl.when(low < high)
        def _rows() -> None:
            self.start_rows(item, tile, slot)

    def wait_full(self, slot: Array) -> None:
        """One wait for all copies into a slot: a semaphore counts bytes."""
        refs = self.refs
        for tiles, which in ((refs.key_tile, KEY), (refs.value_tile, VALUE)):
            pltpu.make_async_copy(tiles.at[slot], tiles.at[slot], refs.semaphores.at[slot, which]).wait()
        self._wait_rows(slot)

    def wait_some(self, item: Array, tile: Array, slot: Array) -> tuple[Array, Array]:
        """Waits for the chunks of a tile that the window touches, and returns them: [low, high)."""
        low, high = self._chunks(item, tile)
        refs = self.refs

        def wait(j: Array, _: None) -> None:
            for tiles, which in ((refs.key_tile, KEY), (refs.value_tile, VALUE)):
                landed = tiles.at[slot, j]
                pltpu.make_async_copy(landed, landed, refs.semaphores.at[slot, which]).wait()

        lax.fori_loop(low, high, wait, None)

        @pl.when(low < high)
        def _rows() -> None:
            self._wait_rows(slot)

        return low, high

    def _wait_rows(self, slot: Array) -> None:
        refs = self.refs
        for tiles, which in ((refs.mask_tile, MASK), (refs.bias_tile, BIAS)):
            if tiles is not None:
                pltpu.make_async_copy(tiles.at[slot], tiles.at[slot], refs.semaphores.at[slot, which]).wait()


def _accumulate(
    r: Refs,
    plan: Plan,
    item: Array,
    tile: Array,
    slot: Array,
    first: Any,
    chunks: int,
    *,
    edge: bool,
    stages: int = 1,
    cuts: int = 1,
    meanwhile: Callable[[float], None] = lambda share: None,
) -> None:
    """Some chunks of a tile into the running softmax: all scores, then softmax and products with values by stages.

    All heads go through each step together: one head at a time would wait for the matrix unit's latency each time.
    While it multiplies the values of one stage of the positions, the vector units go on to the softmax of the next. The
    scalar units are idle, and `meanwhile`, called with the share of all this that is over, starts copies; stages in so
    many `cuts` give it more places.
    """
    each = chunks // stages // cuts
    size = each * cuts * plan.chunk  # positions of a stage
    of_stage = [[(slot, first + (stage * cuts + cut) * each, each) for cut in range(cuts)] for stage in range(stages)]
    steps, share = plan.groups * stages * cuts, 0.0

    def passed(part: float) -> None:
        nonlocal share
        share += part
        meanwhile(share)

    scores_of = []
    for places in of_stage:
        of_groups = []
        for group in range(plan.groups):
            pieces = []
            for place in places:
                pieces.append(_scores(r, plan, place, group))
                passed(SCORES_SHARE / steps)
            of_groups.append(jnp.concatenate(pieces, axis=1))
        scores_of.append(jnp.concatenate(of_groups, axis=0))

    # Positions without weight are dropped with their values, which may be NaN. Without a mask or a bias only those
    # outside the window are.
    selects = jnp.issubdtype(r.value_tile.dtype, jnp.floating)
    by_weight = selects and (plan.masked or plan.biased)
    top, total, accumulated = r.top[...], r.total[...], r.accumulator[...]
    for stage, (scores, places) in enumerate(zip(scores_of, of_stage, strict=True)):
        offset = first * plan.chunk + stage * size
        begin = tile * plan.tile + offset
        low, high = r.start[item] - begin, r.stop[item] - begin  # the window, in these positions

        def inside(shape: tuple[int, int], axis: int, low: Array = low, high: Array = high) -> Array:
            position = lax.broadcasted_iota(jnp.int32, shape, axis)
            return (low <= position) & (position < high)

        positions = pl.ds(offset if isinstance(offset, int) else pl.multiple_of(offset, LANES), size)
        scores = scores * (r.step[:, :1] if plan.digits else r.scale[item])
        if plan.biased:
            scores = scores + r.bias_tile[slot, :, positions].astype(jnp.float32)
        if plan.masked:
            scores = jnp.where(r.mask_tile[slot, :, positions] != 0.0, jnp.float32(MASK_VALUE), scores)
        if edge:
            scores = jnp.where(inside((1, size), 1), scores, -jnp.inf)
        if plan.interleaved > 1:
            head_of_row = lax.div(lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0), plan.group // plan.interleaved)
            head_of_position = lax.rem(begin + lax.broadcasted_iota(jnp.int32, (1, size), 1), plan.interleaved)
            scores = jnp.where(head_of_row == head_of_position, scores, -jnp.inf)

        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # exp(-inf - -inf) would be NaN
        weights = jnp.exp(scores - finite_top[:, :1])
        decay = jnp.exp(top - finite_top)
        top = new_top
        total = total * decay + jnp.sum(weights, axis=1, keepdims=True)
        terms = split_bfloat16(weights, plan.weight_terms)
        passed(SOFTMAX_SHARE / stages)

        products = []
        for group in range(plan.groups):
            rows = slice(group * plan.rows, (group + 1) * plan.rows)
            pieces = []
            for cut, place in enumerate(places):
                these = slice(cut * each * plan.chunk, (cut + 1) * each * plan.chunk)
                value = _load(r.value_tile, plan, place, group)
                value, transposed = _for_terms(plan, value, transposed=plan.form == "columns")
                if by_weight:
                    used = jnp.max(weights[rows, these], axis=0, keepdims=True) > 0.0  # (1, positions)
                    value = _select(value, used if plan.form == "columns" else _as_column(used))
                elif edge and selects:
                    axis = 1 if plan.form == "columns" else 0
                    value = _select(value, inside((1, size) if axis else (size, 1), axis))
                weight = _stacked([term[rows, these] for term in terms], value.dtype)
                if plan.apart and plan.interleaved > 1:
                    pieces.append(_products_apart(plan, weight, value, begin + cut * each * plan.chunk))
                else:
                    pieces.append(_product(weight, value, plan.weight_terms, transposed=transposed))
                passed(VALUES_SHARE / steps)
            products.append(functools.reduce(jnp.add, pieces))
        accumulated = accumulated * decay[:, :1]
        if by_weight:  # what a fully masked beginning has gathered vanishes, NaN or not
            accumulated = jnp.where(decay[:, :1] == 0.0, 0.0, accumulated)
        accumulated = accumulated + jnp.concatenate(products, axis=0)
    r.top[...], r.total[...], r.accumulator[...] = top, total, accumulated


Place = tuple[Any, Any, int]
"""A slot, and the first and the number of the chunks in it."""


def _load(tiles: Any, plan: Plan, place: Place, group: int) -> Array:
    """Positions of one group of heads, as stored: (size, width), or (width, size) in columns."""
    heads = range(group * plan.packed, (group + 1) * plan.packed)
    slot, first, chunks = place
    size, these = chunks * plan.chunk, pl.ds(first, chunks)
    match plan.form:
        case "heads":
            parts = [tiles[slot, these, h].reshape(size, plan.head_dim) for h in heads]
            tile = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        case "lanes":
            lanes = slice(group * plan.width, (group + 1) * plan.width)
            tile = tiles[slot, these, ..., lanes].reshape(size, plan.width)
        case "columns":
            columns = []
            for j in range(chunks):
                stacked = [tiles[slot, first + j, h].reshape(plan.head_dim, plan.chunk) for h in heads]
                columns.append(stacked[0] if len(stacked) == 1 else jnp.concatenate(stacked, axis=0))
            tile = columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1)
    return tile


def _for_terms(plan: Plan, tile: Array, *, transposed: bool) -> tuple[Array, bool]:
    """Keys or values in a dtype that terms of float32 numbers have, and whether they are still to be transposed.

    bfloat16 holds every int8.
    """
    if tile.dtype != jnp.int8:
        return tile, transposed
    if transposed and plan.tuning.turns_int8:
        return tile.T.astype(jnp.bfloat16), False
    return tile.astype(jnp.bfloat16), transposed


def _scores(r: Refs, plan: Plan, place: Place, group: int) -> Array:
    """q . k for one group of heads: (rows, size) float32, unscaled."""
    key = _load(r.key_tile, plan, place, group)
    transposed = plan.form != "columns"
    if plan.digits:
        products = _dot(r.packed_query[group], key, transposed=transposed)
        return from_digits([products[i * plan.rows : (i + 1) * plan.rows] for i in range(plan.digits)])
    key, transposed = _for_terms(plan, key, transposed=transposed)
    query = r.packed_query[group].astype(key.dtype)
    if not plan.apart or plan.packed == 1:
        return _product(query, key, plan.query_terms, transposed=transposed)

    def of_head(j: int, size: int, shape: tuple[int, int]) -> Array:
        index = lax.broadcasted_iota(jnp.int32, shape, 0 if shape[1] == 1 else 1)
        return (j * size <= index) & (index < (j + 1) * size)

    scores = jnp.zeros((plan.rows, 1), jnp.float32)
    for j in range(plan.packed):
        mine = of_head(j, plan.head_dim, (1, plan.width) if transposed else (plan.width, 1))
        alone = _product(query, _select(key, mine), plan.query_terms, transposed=transposed)
        scores = jnp.where(of_head(j, plan.group, (plan.rows, 1)), alone, scores)
    return scores


def _products_apart(plan: Plan, weights: Array, value: Array, begin: Array) -> Array:
    """The weights of each head times its own values among interleaved ones: (rows, D) float32."""
    head_of_row = lax.div(lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0), plan.group // plan.interleaved)
    head_of_position = lax.rem(begin + lax.broadcasted_iota(jnp.int32, (value.shape[0], 1), 0), plan.interleaved)

    def add(head: Array, products: Array) -> Array:
        alone = _product(weights, _select(value, head_of_position == head), plan.weight_terms, transposed=False)
        return jnp.where(head_of_row == head, alone, products)

    return lax.fori_loop(0, plan.interleaved, add, jnp.zeros((plan.rows, value.shape[1]), jnp.float32))


def _stacked(terms: list[Array], dtype: jnp.dtype) -> Array:
    """`terms`, each (rows, n) float32, as one operand of the matrix unit: (terms * rows, n).

    They are stacked before they are narrowed, since a tile of a 16-bit array has more rows than one of them.
    """
    return (terms[0] if len(terms) == 1 else jnp.concatenate(terms, axis=0)).astype(dtype)


def _product(stacked: Array, right: Array, terms: int, *, transposed: bool) -> Array:
    """The sum of the terms, each (rows, n), that `_stacked` stacked, times `right`, in its dtype: (rows, m) float32."""
    products = _dot(stacked, right, transposed=transposed)
    return functools.reduce(jnp.add, jnp.split(products, terms, axis=0))


def _dot(left: Array, right: Array, *, transposed: bool) -> Array:
    """left @ right, or left @ right.T, in float32, or of int8 in int32; every bit of float32 operands counts."""
    precision = lax.Precision.HIGHEST if right.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    accumulator = jnp.int32 if right.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=accumulator)


def _select(value: Array, keep: Array) -> Array:
    """`value` where `keep`, else 0; through float32, since not every TPU selects 16-bit numbers."""
    return jnp.where(keep, value.astype(jnp.float32), 0.0).astype(value.dtype)


def _as_column(row: Array) -> Array:
    """(1, size) bool as (size, 1)."""
    column = jnp.broadcast_to(row.astype(jnp.float32), (ROW_GROUP, row.shape[1])).T
    return column[:, :1] > 0.0
