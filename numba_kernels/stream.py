"""The decode loop: one sequence's heads over part of its window, a tile of positions at a time, online softmax.

The state of a head is its output so far (not normalised), the largest score so far and the sum of the weights so far.
"""

from typing import Any

import numpy as np

from jax_ifa.masking import MASK_VALUE
from numba_kernels.call import Call, bias_at
from numba_kernels.formats import Format
from numba_kernels.machine import Machine
from numba_kernels.native import (
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
)
from numba_kernels.tiles import DOT_ROWS, LINE, Tile
from numba_kernels.vectors import EXP_UNDERFLOWS

F = np.float32
MINUS_INFINITY = F(-np.inf)
MASKED = F(MASK_VALUE)
# Of three digits, the highest of 127: what is left of a float32 query is below its own last place.
LARGEST_QUERY = F(127 * 2**16 + 127 * 2**8)


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
        for i in range(here):
            store_int64(rows + 8 * (done + i), address + i * call.row_stride)
        done += here
    for i in range(count, room):
        store_int64(rows + 8 * i, zeros)


def _products(four: Any, two: Any, one: Any) -> Any:
    """The `dot` of any number of rows, from those of four, two and one; `initial` moves on by so many bytes a row."""

    @native
    def run(rows, a, a_stride, b, b_stride, length, blocks, initial, initial_step, c, c_stride, plan):  # type: ignore[no-untyped-def]
        r = 0
        while r < rows:
            a_row, start, c_row = a + 4 * a_stride * r, initial + initial_step * r, c + 4 * c_stride * r
            if r + 4 <= rows:
                four(a_row, a_stride, b, b_stride, length, blocks, start, c_row, c_stride, plan)
                r += 4
            elif r + 2 <= rows:
                two(a_row, a_stride, b, b_stride, length, blocks, start, c_row, c_stride, plan)
                r += 2
            else:
                one(a_row, a_stride, b, b_stride, length, blocks, start, c_row, c_stride, plan)
                r += 1

    return run


def make_stream(form: Format, machine: Machine, tiles: dict[str, Tile]) -> Any:
    """The loop for one format, a Numba function: `stream(call, scratch, b, unit, first, last)`."""
    lanes, pack, tile = machine.lanes, form.pack, form.tile
    columns_at_once = machine.columns
    query_digits, weight_digits = form.query_digits, form.weight_digits
    integer, itemsize = form.integer, form.itemsize
    pack_keys, pack_values = tiles["pack_keys"].external, tiles["pack_values"].external
    combine, weigh, fold = (tiles[name].external for name in ("combine", "weigh", "fold"))
    score_products, value_products = (
        _products(*(tiles[f"dot_{what}{rows}"].external for rows in DOT_ROWS)) for what in ("scores", "values")
    )

    @native
    def begin(call, s, b, first_head):  # type: ignore[no-untyped-def]
        """The queries of a unit of heads as A, and their state before the first tile."""
        length = up(call.head_dim, lanes * pack) // pack
        columns = up(call.head_dim, lanes * pack)
        scale = load_float32(call.scale + 4 * b)
        for i in range(call.unit_heads * call.group):
            query = call.query + 4 * call.head_dim * ((b * call.heads + first_head) * call.group + i)
            a = s.a + 4 * length * query_digits * i
            for j in range(length * query_digits):
                store_int32(a + 4 * j, 0)
            if integer:
                largest = F(0)
                total = F(0)
                for d in range(call.head_dim):
                    x = load_float32(query + 4 * d)
                    largest = max(largest, abs(x))
                    total += x * F(0)  # NaN if the query holds a NaN or an infinity
                step = max(largest, F(1e-30)) / LARGEST_QUERY + total
                inverse = F(1) / step
                sum0, sum1, sum2 = 0, 0, 0
                for d in range(call.head_dim):
                    x = load_float32(query + 4 * d) * inverse
                    whole = 0
                    if abs(x) <= LARGEST_QUERY + F(2):  # not NaN
                        whole = np.int64(np.rint(x))
                    low = ((whole + 128) & 255) - 128
                    whole = (whole - low) >> 8
                    middle = ((whole + 128) & 255) - 128
                    high = (whole - middle) >> 8
                    store_byte(a + d, high)
                    store_byte(a + 4 * length + d, middle)
                    store_byte(a + 8 * length + d, low)
                    sum0 += high
                    sum1 += middle
                    sum2 += low
                # The keys are raised by 128 to be unsigned: this takes it back.
                store_int32(s.initial + 12 * i, -128 * sum0)
                store_int32(s.initial + 12 * i + 4, -128 * sum1)
                store_int32(s.initial + 12 * i + 8, -128 * sum2)
                store_float32(s.weight + 4 * i, scale * step)
            else:
                for d in range(call.head_dim):
                    x = load_float32(query + 4 * d)
                    if pack == 2:
                        store_bfloat16_bits(a + 2 * d, x)
                    else:
                        store_float32(a + 4 * d, x)
                store_float32(s.weight + 4 * i, scale)
            state = s.state + 4 * (columns + 2) * i
            for d in range(columns):
                store_float32(state + 4 * d, F(0))
            store_float32(state + 4 * columns, MINUS_INFINITY)
            store_float32(state + 4 * columns + 4, F(0))
        for i in range(up(itemsize * call.head_dim, 16)):
            store_byte(s.zeros + i, 0)

    @native
    def plan_fetching(call, s, ahead, blocks, groups):  # type: ignore[no-untyped-def]
        """Begin with the rows of the next step; how many lines a square of keys and a strip of values are to fetch.

        The products fetch a line a step, and what they leave is for the packing, in equal parts for keys and values.
        """
        size = itemsize * call.head_dim
        store_int64(s.plan, ahead)
        store_int64(s.plan + 8, 2 * tile - 1)
        store_int64(s.plan + 16, size)
        store_int64(s.plan + 24, 0)
        store_int64(s.plan + 32, 0)
        length = (call.head_dim + pack - 1) // pack
        parts = (call.head_dim + lanes * pack - 1) // (lanes * pack)
        width = (call.head_dim + lanes - 1) // lanes
        steps = length * ((blocks + columns_at_once - 1) // columns_at_once) * ((call.group * query_digits + 3) // 4)
        steps += groups * ((width + columns_at_once - 1) // columns_at_once) * ((call.group * weight_digits + 3) // 4)
        half = max(0, 2 * tile * ((size + LINE - 1) // LINE) - steps + 1) // 2
        return (half + blocks * parts - 1) // (blocks * parts), (half + groups * parts - 1) // (groups * parts)

    @native
    def products_of_scores(call, s, h, blocks):  # type: ignore[no-untyped-def]
        length = (call.head_dim + pack - 1) // pack
        stride = up(call.head_dim, lanes * pack) // pack
        rows = call.group * query_digits
        a, initial = s.a + 4 * stride * rows * h, s.initial + 4 * rows * h
        score_products(rows, a, stride, s.packed, tile, length, blocks, initial, 4, s.product, tile, s.plan)

    @native
    def products_of_values(call, s, groups):  # type: ignore[no-untyped-def]
        columns, stride = up(call.head_dim, lanes * pack), tile // pack
        rows, blocks = call.group * weight_digits, (call.head_dim + lanes - 1) // lanes
        value_products(
            rows, s.weights, stride, s.packed, columns, groups, blocks, s.zeros, 0, s.product, columns, s.plan
        )

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
                top = load_float32(s.factors + 12 * g + 8)
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
        head = first_head + h
        blocks = (count + lanes - 1) // lanes
        columns = up(call.head_dim, lanes * pack)
        values = rows + 8 * tile
        groups = (count + pack - 1) // pack
        key_lines, value_lines = plan_fetching(call, s, ahead, blocks, groups)
        pack_keys(rows, s.plan, key_lines, blocks, call.head_dim, s.packed)
        products_of_scores(call, s, h, blocks)
        for g in range(call.group):
            scores = s.scores + 4 * tile * g
            weight = load_float32(s.weight + 4 * (h * call.group + g))
            combine(s.product + 4 * tile * query_digits * g, tile, blocks, weight, scores)
            for i in range(count, tile):
                store_float32(scores + 4 * i, MINUS_INFINITY)
        if call.bias != 0 or call.mask != 0:
            add_bias_and_mask(call, s, b, head, first, count)
        stride = tile // pack
        for g in range(call.group):
            summary = s.factors + 12 * g
            weigh(s.scores + 4 * tile * g, s.weights + 4 * stride * weight_digits * g, stride, summary)
            top, total = load_float32(summary), load_float32(summary + 4)
            state = s.state + 4 * ((columns + 2) * (h * call.group + g) + columns)
            old_top, old_total = load_float32(state), load_float32(state + 4)
            new_top = max(old_top, top)
            fade = np.exp(old_top - new_top) if old_total != F(0) else F(0)
            share = np.exp(top - new_top) if total != F(0) else F(0)
            store_float32(state, new_top)
            store_float32(state + 4, old_total * fade + total * share)
            store_float32(s.factors + 12 * g, fade)
            store_float32(s.factors + 12 * g + 4, share)
            store_float32(s.factors + 12 * g + 8, top)
        if call.mask != 0:
            drop_masked_rows(call, s, values, b, first, count)
        pack_values(values, s.plan, value_lines, groups, call.head_dim, columns, s.packed)
        products_of_values(call, s, groups)
        for g in range(call.group):
            fold(
                s.product + 4 * columns * weight_digits * g,
                columns,
                (call.head_dim + lanes - 1) // lanes,
                load_float32(s.factors + 12 * g),
                load_float32(s.factors + 12 * g + 4),
                s.state + 4 * (columns + 2) * (h * call.group + g),
            )

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
