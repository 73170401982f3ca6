"""The decode loop: one sequence's heads over part of its window, a tile of positions at a time, online softmax.

The state of a head is its output so far (not normalised), the largest score so far and the sum of the weights so far.
"""

import numpy as np

from jax_ifa.masking import MASK_VALUE
from numba_kernels import linked
from numba_kernels.call import (
    bias_at,
    columns_of,
    group_lanes,
    group_of,
    head_state,
    joined,
    query_head,
    query_size,
    window,
)
from numba_kernels.fetching import Place
from numba_kernels.frame import WORD
from numba_kernels.native import (
    fetch,
    load_byte,
    load_float32,
    load_int32,
    native,
    store_float32,
    store_int32,
    store_int64,
    up,
    word,
)
from numba_kernels.records import record_of
from numba_kernels.tiles import HEADS, SERIES
from numba_kernels.vectors import EXP_VANISHES

_, put_place = record_of(Place)
F = np.float32
MINUS_INFINITY = F(-np.inf)
MASKED = F(MASK_VALUE)
MEMORY_PAGE = 4096  # bytes, at least
# One line of memory has the translations of eight such pages. Those of so many tiles are asked for at once.
TRANSLATED, TRANSLATED_TILES = 8 * MEMORY_PAGE, 16


@native
def head_of_page(call, pages, num_pages, table, b, t, head):  # type: ignore[no-untyped-def]
    """Where a head begins in the page of position t; without a table every sequence is one page."""
    page = b
    if table != 0:
        page = load_int32(table + 4 * (b * call.pages + t // call.page_size))
        page = min(max(page, 0), num_pages - 1)
    return pages + page * call.page_stride + head * call.head_stride


@native
def lying_together(call, pages, num_pages, table, b, head, t, last):  # type: ignore[no-untyped-def]
    """The address of position t of a head, and how many positions of [t, last) lie together there, in one page."""
    inside = t % call.page_size
    address = head_of_page(call, pages, num_pages, table, b, t, head) + inside * call.row_stride
    return address, min(last - t, call.page_size - inside)


@native
def set_rows(call, pages, num_pages, table, b, head, first, count, zeros, rows):  # type: ignore[no-untyped-def]
    """Addresses of `count` positions of a head from `first` on, in `rows`; then the zeros, to fill a tile."""
    done = 0
    while done < count:
        address, here = lying_together(call, pages, num_pages, table, b, head, first + done, first + count)
        # The first access to a page of memory waits for its translation: all of a tile are asked for at once.
        for offset in range(0, here * call.row_stride, MEMORY_PAGE):
            fetch(address + offset)
        linked.series(rows + WORD * done, address, call.row_stride, here)
        done += here
    linked.series(rows + WORD * count, zeros, 0, call.tile - count)


@native
def arrange_parts(call, s, h, g):  # type: ignore[no-untyped-def]
    """Put query head g of the unit's kv head h from its plain rows to where `scores` wants it."""
    length = columns_of(call) // linked.pack()
    heads = HEADS[0]
    while g >= group_of(call) // heads * heads:  # it is in none of the parts of so many heads
        heads //= 2
    first, piece = g // heads * heads, linked.piece(heads)
    to = s.query + query_size(call) * h + 4 * length * linked.query_digits() * first + 4 * piece * (g - first)
    for i in range(length // piece):
        for digit in range(linked.query_digits()):
            for j in range(piece // 2):
                store_int64(to + 8 * j, word(s.plain + 4 * (length * digit + piece * i), j))
            if piece == 1:
                store_int32(to, load_int32(s.plain + 4 * (length * digit + i)))
            to += 4 * piece * heads


@native
def arrange_columns(call, s, h, g):  # type: ignore[no-untyped-def]
    """The same for the matrices of amx.py, of which every digit of a head is a column."""
    length = columns_of(call) // linked.pack()
    heads, columns = linked.query_heads(), linked.query_lanes()
    to = s.query + query_size(call) * h + 4 * columns * length * (g // heads) + 4 * (g % heads)
    for digit in range(linked.query_digits()):
        for i in range(length):
            store_int32(to + 4 * (columns * i + heads * digit), load_int32(s.plain + 4 * (length * digit + i)))


@native
def begin(call, s, b, first_head):  # type: ignore[no-untyped-def]
    """The queries of a unit of heads as digits, and their state before the first tile."""
    group = group_of(call)
    for i in range(call.unit_heads * group):
        h, g = i // group, i % group
        query = call.query + 4 * call.head_dim * query_head(call, b, first_head + h, g)
        initial = s.initial + 4 * linked.query_digits() * i
        linked.split(query, call.scale + 4 * b, initial, s.weight + 4 * i, s.plain, call.head_dim)
        if linked.amx() != 0:
            arrange_columns(call, s, h, g)
        else:
            arrange_parts(call, s, h, g)
    columns = columns_of(call)
    size = head_state(call)
    linked.series(s.state, 0, 0, call.unit_heads * size // WORD)
    for h in range(call.unit_heads):
        for g in range(group):
            store_float32(s.state + size * h + 4 * (group * columns + g), MINUS_INFINITY)
    linked.series(s.zeros, 0, 0, up(linked.itemsize() * call.head_dim, WORD) // WORD)


@native
def add_bias_and_mask(call, s, b, head, first, count):  # type: ignore[no-untyped-def]
    """To the scores of `count` positions of a head from `first` on."""
    for g in range(group_of(call)):
        scores = s.scores + 4 * linked.tile() * g
        if call.bias != 0:
            for i in range(count):
                x = load_float32(scores + 4 * i) + bias_at(call, b, head, g, first + i)
                store_float32(scores + 4 * i, x)
        if call.mask != 0:
            mask = call.mask + (b % call.mask_rows) * call.mask_width + first
            for i in range(count):
                if load_byte(mask + i) != 0:
                    store_float32(scores + 4 * i, MASKED)


@native
def drop_masked_rows(call, s, rows, offset, b, first, count):  # type: ignore[no-untyped-def]
    """Values of masked positions are not read where their weight is 0, so that a NaN there has no influence."""
    mask = call.mask + (b % call.mask_rows) * call.mask_width + first
    for i in range(count):
        if load_byte(mask + i) == 0:
            continue
        counts = False
        for g in range(group_of(call)):
            top = load_float32(s.factors + 4 * g)
            counts = counts or load_float32(s.scores + 4 * (linked.tile() * g + i)) - top > F(EXP_VANISHES)
        if not counts:
            store_int64(rows + 8 * i, s.zeros - offset)


@native
def set_values(call, s, rows, zeros, b, head, first, count):  # type: ignore[no-untyped-def]
    """The addresses of the values of a tile, in `rows` (2, T)."""
    values = rows + WORD * call.tile
    set_rows(call, call.value, call.value_pages, call.value_table, b, head, first, count, zeros, values)


@native
def prepare(call, s, rows, b, head, first, count):  # type: ignore[no-untyped-def]
    """The addresses of the keys and values of a tile, of the first head of a unit, in `rows` (2, T), in turn."""
    set_rows(call, call.key, call.key_pages, call.table, b, head, first, count, s.zeros, rows)
    set_values(call, s, rows, s.zeros, b, head, first, count)


@native
def set_pieces(call, pages, num_pages, table, b, head, first, count, pieces):  # type: ignore[no-untyped-def]
    """Addresses of the parts of pages that hold a tile of a unit, from `head` on. Returns the end of the list."""
    for t in range(first - first % call.page_size, first + count, call.page_size):
        address = head_of_page(call, pages, num_pages, table, b, t, head)
        for offset in range(0, call.unit_heads * call.head_stride, MEMORY_PAGE):
            fetch(address + offset)
        store_int64(pieces, address)
        pieces += WORD
    return pieces


@native
def begin_to_fetch(call, s, rows, b, head, first, count):  # type: ignore[no-untyped-def]
    """A tile of all heads of a unit, from the first key to the last value, in pieces as large as lie together."""
    if joined(call) and count > 0:
        end = set_pieces(call, call.key, call.key_pages, call.table, b, head, first, count, s.pieces)
        end = set_pieces(call, call.value, call.value_pages, call.value_table, b, head, first, count, end)
        put_place(s.place, (s.pieces, 0, end - WORD, call.unit_heads * call.head_stride))
    else:
        size = call.unit_heads * call.head_dim * linked.itemsize()
        put_place(s.place, (rows, 0, rows + WORD * (2 * call.tile - 1), size))


@native
def advance(call, s, rows, b, first_head, h, offset, first, count):  # type: ignore[no-untyped-def]
    """Fold `count` positions from `first` on, at most a tile, into the state of head h of a unit.

    Its elements are `offset` bytes behind `rows`, which are those of the first head.
    """
    values, group, head_dim = rows + WORD * call.tile, group_of(call), call.head_dim
    columns, padded = columns_of(call), group_lanes(call)
    if offset > 0 and count < call.tile:  # what fills the tile is the same for all heads
        for i in range(count, call.tile):
            store_int64(rows + WORD * i, s.zeros - offset)
            store_int64(values + WORD * i, s.zeros - offset)
    query = s.query + query_size(call) * h
    initial, weight = s.initial + 4 * linked.query_digits() * group * h, s.weight + 4 * group * h
    linked.scores(group, query, initial, weight, s.scores, rows, offset, s.place, count, head_dim)
    if call.bias != 0 or call.mask != 0:
        add_bias_and_mask(call, s, b, first_head + h, first, count)
    state = s.state + head_state(call) * h
    linked.weigh(group, count, s.scores, s.weights, s.factors, state + 4 * group * columns, s.place, head_dim)
    if call.mask != 0:
        if offset > 0:  # again with those that the head before had no use for
            set_values(call, s, rows, s.zeros - offset, b, first_head, first, count)
        drop_masked_rows(call, s, values, offset, b, first, count)
    fades, shares = s.factors + 8 * padded, s.factors + 12 * padded
    linked.values(group, s.weights, fades, shares, state, values, offset, s.place, count, head_dim)


@native
def prepare_next(call, s, rows, b, unit, first, last, next_b, next_unit):  # type: ignore[no-untyped-def]
    """The tile from `first` on, and fetch it; behind the `last` position what will probably come next."""
    if first >= last:
        b, unit, last = next_b, next_unit, first
        if b < call.batch:
            first, last = window(call, b)
    head, count = unit * call.unit_heads, min(call.tile, last - first)
    prepare(call, s, rows, b, head, first, count)
    begin_to_fetch(call, s, rows, b, head, first, count)


@native
def ask_for_translations(call, pages, num_pages, table, b, head, first, last):  # type: ignore[no-untyped-def]
    """Fetch what translates the addresses of positions [first, last) of a head that is read by itself.

    It may come from memory itself, and a core waits for it however far ahead it fetches: for several lines no longer
    than for one. Heads that are read together, and small pages, have several in every tile, which asks for them itself.
    """
    t = first
    while t < last:
        address, here = lying_together(call, pages, num_pages, table, b, head, t, last)
        for line in range(address - address % TRANSLATED, address + here * call.row_stride, TRANSLATED):
            fetch(line)
        t += here


@native
def stream(call, s, b, unit, first, last, next_b, next_unit):  # type: ignore[no-untyped-def]
    """Positions [first, last) of one unit of heads, into the scratch's state, and fetch what comes next."""
    first_head = unit * call.unit_heads
    begin(call, s, b, first_head)
    rows, ahead = s.rows, s.rows + WORD * (2 * call.tile + SERIES)
    prepare(call, s, rows, b, first_head, first, min(call.tile, last - first))
    by_itself = call.unit_heads == 1 and call.head_stride >= call.row_stride and call.page_size >= call.tile
    for t in range(first, last, call.tile):
        prepare_next(call, s, ahead, b, unit, t + call.tile, last, next_b, next_unit)
        if by_itself and (t - first) % (TRANSLATED_TILES * call.tile) == 0:
            far, until = t + 2 * call.tile, min(last, t + (2 + TRANSLATED_TILES) * call.tile)
            ask_for_translations(call, call.key, call.key_pages, call.table, b, first_head, far, until)
            ask_for_translations(call, call.value, call.value_pages, call.value_table, b, first_head, far, until)
        for h in range(call.unit_heads):
            advance(call, s, rows, b, first_head, h, call.head_stride * h, t, min(call.tile, last - t))
        rows, ahead = ahead, rows
