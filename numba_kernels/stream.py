"""The decode loop: one sequence's heads over part of its window, a tile of positions at a time, online softmax.

The state of a head is its output so far (not normalised), the largest score so far and the sum of the weights so far.
"""

from typing import Any

import numpy as np

from jax_ifa.masking import MASK_VALUE
from numba_kernels.call import Call, bias_at, head_state
from numba_kernels.formats import Format
from numba_kernels.machine import Machine
from numba_kernels.native import (
    fetch,
    load_byte,
    load_float32,
    load_int32,
    native,
    store_bfloat16_bits,
    store_byte,
    store_float32,
    store_int32,
    store_int64,
    up,
    word,
)
from numba_kernels.tiles import Tile, query_parts
from numba_kernels.vectors import EXP_UNDERFLOWS

F = np.float32
MINUS_INFINITY = F(-np.inf)
MASKED = F(MASK_VALUE)
MEMORY_PAGE = 4096  # bytes, at least
# By the number of digits, with a highest digit of 127. Of three, what is left of a float32 query is below its own last
# place.
LARGEST_QUERY = {2: 127 * 2**8 + 127, 3: 127 * 2**16 + 127 * 2**8}


@native
def set_rows(call: Call, pages, num_pages, table, b, head, first, count, room, zeros, rows):  # type: ignore[no-untyped-def]
    """Addresses of `count` positions of a head from `first` on, in `rows`; then the zeros, to fill `room` entries."""
    done = 0
    while done < count:
        t = first + done
        page = b
        if table != 0:
            page = load_int32(table + 4 * (b * call.pages + t // call.page_size))
            page = min(max(page, 0), num_pages - 1)
        inside = t % call.page_size
        here = min(count - done, call.page_size - inside)
        address = pages + page * call.page_stride + head * call.head_stride + inside * call.row_stride
        # The first access to a page of memory waits for its translation: all of a tile are asked for at once.
        for offset in range(0, here * call.row_stride, MEMORY_PAGE):
            fetch(address + offset)  # type: ignore[call-arg]
        for i in range(here):
            store_int64(rows + 8 * (done + i), address + i * call.row_stride)
        done += here
    for i in range(count, room):
        store_int64(rows + 8 * i, zeros)


def make_stream(form: Format, machine: Machine, tiles: dict[str, Tile]) -> Any:
    """The loop for one format, a Numba function: `stream(call, scratch, b, unit, first, last)`."""
    lanes, pack, tile = machine.lanes, form.pack, form.tile
    query_digits, integer, itemsize = form.query_digits, form.integer, form.itemsize
    largest_query = F(LARGEST_QUERY.get(query_digits, 0))
    score, weigh, add_values = (tiles[name].external for name in ("scores", "weigh", "values"))
    parts = query_parts(form, machine)

    @native
    def arrange(call, s, h, g):  # type: ignore[no-untyped-def]
        """Put query head g of the unit's kv head h from its plain rows into the part that it belongs to."""
        length = up(call.head_dim, lanes * pack) // pack
        first = 0
        for kind in range(len(parts)):
            heads, piece = parts[kind]
            whole = (call.group - first) // heads * heads
            if g < first + whole:
                break
            first += whole
        first += (g - first) // heads * heads
        to = s.query + 4 * length * query_digits * (call.group * h + first) + 4 * piece * (g - first)
        for i in range(length // piece):
            for digit in range(query_digits):
                for j in range(piece // 2):
                    store_int64(to + 8 * j, word(s.plain + 4 * (length * digit + piece * i), j))
                to += 4 * piece * heads

    @native
    def begin(call, s, b, first_head):  # type: ignore[no-untyped-def]
        """The queries of a unit of heads as digits, and their state before the first tile."""
        length = up(call.head_dim, lanes * pack) // pack
        scale = load_float32(call.scale + 4 * b)
        for i in range(call.unit_heads * call.group):
            query = call.query + 4 * call.head_dim * ((b * call.heads + first_head) * call.group + i)
            a = s.plain
            for j in range(length * query_digits):
                store_int32(a + 4 * j, 0)
            if integer:
                largest = F(0)
                total = F(0)
                for d in range(call.head_dim):
                    x = load_float32(query + 4 * d)
                    largest = max(largest, abs(x))
                    total += x * F(0)  # NaN if the query holds a NaN or an infinity
                step = max(largest, F(1e-30)) / largest_query + total
                inverse = F(1) / step
                initial = s.initial + 4 * query_digits * i
                for digit in range(query_digits):
                    store_int32(initial + 4 * digit, 0)
                for d in range(call.head_dim):
                    x = load_float32(query + 4 * d) * inverse
                    whole = 0
                    if abs(x) <= largest_query + F(2):  # not NaN
                        whole = np.int64(np.rint(x))
                    for digit in range(query_digits - 1, -1, -1):
                        low = ((whole + 128) & 255) - 128
                        whole = (whole - low) >> 8
                        store_byte(a + 4 * length * digit + d, low)
                        place = initial + 4 * digit  # what the keys are raised by is taken back
                        store_int32(place, load_int32(place) - 128 * low)
                store_float32(s.weight + 4 * i, scale * step)
            else:
                for d in range(call.head_dim):
                    x = load_float32(query + 4 * d)
                    if pack == 2:
                        store_bfloat16_bits(a + 2 * d, x)
                    else:
                        store_float32(a + 4 * d, x)
                store_float32(s.weight + 4 * i, scale)
            arrange(call, s, i // call.group, i % call.group)
        columns = up(call.head_dim, lanes * pack)
        size = head_state(call, lanes, pack)
        for i in range(call.unit_heads * size // 4):
            store_int32(s.state + 4 * i, 0)
        for h in range(call.unit_heads):
            for g in range(call.group):
                store_float32(s.state + size * h + 4 * (call.group * columns + g), MINUS_INFINITY)
        for i in range(up(itemsize * call.head_dim, 16)):
            store_byte(s.zeros + i, 0)

    @native
    def add_bias_and_mask(call, s, b, head, first, count):  # type: ignore[no-untyped-def]
        for g in range(call.group):
            scores = s.scores + 4 * tile * g
            if call.bias != 0:
                for i in range(count):
                    x = load_float32(scores + 4 * i) + bias_at(call, b, head * call.group + g, first + i)
                    store_float32(scores + 4 * i, x)
            if call.mask != 0:
                mask = call.mask + (b % call.mask_rows) * call.mask_width + first
                for i in range(count):
                    if load_byte(mask + i) != 0:
                        store_float32(scores + 4 * i, MASKED)

    @native
    def drop_masked_rows(call, s, rows, b, first, count):  # type: ignore[no-untyped-def]
        """Values of masked positions are not read where their weight is 0, so that a NaN there has no influence."""
        mask = call.mask + (b % call.mask_rows) * call.mask_width + first
        for i in range(count):
            if load_byte(mask + i) == 0:
                continue
            counts = False
            for g in range(call.group):
                top = load_float32(s.factors + 4 * g)
                counts = counts or load_float32(s.scores + 4 * (tile * g + i)) - top >= F(EXP_UNDERFLOWS)
            if not counts:
                store_int64(rows + 8 * i, s.zeros)

    @native
    def prepare(call, s, rows, b, head, first, count):  # type: ignore[no-untyped-def]
        """The addresses of the keys and values of a step, in `rows` (2, T)."""
        zeros = s.zeros
        set_rows(call, call.key, call.key_pages, call.table, b, head, first, count, tile, zeros, rows)
        values = rows + 8 * tile
        set_rows(call, call.value, call.value_pages, call.value_table, b, head, first, count, tile, zeros, values)

    @native
    def advance(call, s, rows, ahead, b, first_head, h, first, count):  # type: ignore[no-untyped-def]
        """Fold `count` positions from `first` on, at most a tile, into the state of head h of a unit."""
        values, group, head_dim = rows + 8 * tile, call.group, call.head_dim
        columns, padded = up(head_dim, lanes * pack), up(group, lanes)
        query = s.query + 4 * (columns // pack) * query_digits * group * h
        initial = s.initial + 4 * query_digits * group * h
        score(group, query, initial, s.weight + 4 * group * h, s.scores, rows, ahead, count, head_dim)
        if call.bias != 0 or call.mask != 0:
            add_bias_and_mask(call, s, b, first_head + h, first, count)
        state = s.state + head_state(call, lanes, pack) * h
        weigh(group, count, s.scores, s.weights, s.factors, state + 4 * group * columns)
        if call.mask != 0:
            drop_masked_rows(call, s, values, b, first, count)
        fades, shares = s.factors + 8 * padded, s.factors + 12 * padded
        add_values(group, s.weights, fades, shares, state, values, ahead + 8 * tile, count, head_dim)

    @native
    def stream(call, s, b, unit, first, last):  # type: ignore[no-untyped-def]
        """Positions [first, last) of one unit of heads, into the scratch's state."""
        first_head = unit * call.unit_heads
        begin(call, s, b, first_head)
        rows, ahead = s.rows, s.rows + 16 * tile
        steps = (last - first + tile - 1) // tile * call.unit_heads  # tiles, and the heads of each
        prepare(call, s, rows, b, first_head, first, min(tile, last - first))
        for step in range(steps):
            h, t = step % call.unit_heads, first + step // call.unit_heads * tile
            next_h, next_t = (step + 1) % call.unit_heads, first + (step + 1) // call.unit_heads * tile
            prepare(call, s, ahead, b, first_head + next_h, next_t, min(tile, max(last - next_t, 0)))
            advance(call, s, rows, ahead, b, first_head, h, t, min(tile, last - t))
            rows, ahead = ahead, rows

    return stream
