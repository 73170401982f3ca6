"""How rows of a matrix are read: some side by side, as vectors of float32, from their beginning to their end.

A reader is called as `each(v, rows, inputs, meet)`: for the rows at some addresses it emits loops over the inputs, and
in them calls `meet(at, weights, left)`: `weights[row]` are those of the inputs from `at` on, vectors in order. `left`
is None, or how many inputs there are from `at` on where they may be fewer than a vector has; the weights of others are
then 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from numba_kernels.blocks import BLOCK, LAYOUTS, Layout
from numba_kernels.vectors import F16, F32, I8, I16, I64, LINE, Vectors

Meet = Callable[[ir.Value, list[list[ir.Value]], ir.Value | None], None]
Reader = Callable[[Vectors, Sequence[ir.Value], ir.Value, Meet], None]
TOGETHER = 2  # vectors of a float32 row
AHEAD = 1 << 11  # bytes that are fetched ahead where there is so much to do that the processor does not by itself
BLOCKS_AHEAD = 1 << 12  # the same of blocks: what the processor fetches by itself ends with a page of memory


def _float32(v: Vectors, rows: Sequence[ir.Value], inputs: ir.Value, meet: Meet) -> None:
    builder, span = v.builder, ir.Constant(I64, TOGETHER * v.lanes)
    spans = builder.udiv(inputs, span)
    with v.loop(spans) as i:
        at = builder.mul(i, span)
        places = [v.address(row, at, 4) for row in rows]
        if len(rows) > 1:
            for place in places:
                for k in range(TOGETHER):
                    v.prefetch(v.address(place, k * 4 * v.lanes + AHEAD, 1))
        meet(at, [[v.load(v.address(p, k, 4 * v.lanes), v.floats) for k in range(TOGETHER)] for p in places], None)
    done, lanes = builder.mul(spans, span), ir.Constant(I64, v.lanes)
    more = builder.add(builder.sub(inputs, done), ir.Constant(I64, v.lanes - 1))
    with v.loop(builder.udiv(more, lanes)) as strip:
        at = builder.add(done, builder.mul(strip, lanes))
        left = builder.sub(inputs, at)
        meet(at, [[v.load_first(v.address(row, at, 4), v.floats, left)] for row in rows], left)


def _blocks(kind: str, weights: Callable[..., list[ir.Value]]) -> Reader:
    """Of rows in blocks: `weights(v, codes, *numbers)` gives those of one block, from the address of its codes."""
    layout = LAYOUTS[kind]

    def each(v: Vectors, rows: Sequence[ir.Value], inputs: ir.Value, meet: Meet) -> None:
        builder, lanes = v.builder, ir.Constant(I64, v.lanes)
        blocks = builder.udiv(inputs, ir.Constant(I64, BLOCK))
        converted = [[v.room(4 * v.lanes) for _ in range(layout.numbers)] for _ in rows]
        more = builder.add(blocks, ir.Constant(I64, v.lanes - 1))
        # The numbers of as many blocks as there are lanes are converted at once, and wait in memory.
        with v.loop(builder.udiv(more, lanes)) as strip:
            first = builder.mul(strip, lanes)
            left = builder.sub(blocks, first)
            for row in rows:
                fetch_blocks(v, row, layout, first, v.lanes)
            for row, rooms in zip(rows, converted, strict=True):
                for number, room in zip(numbers_of(v, row, layout, blocks, first, left), rooms, strict=True):
                    v.store(number, room)
            with v.loop(builder.select(builder.icmp_signed("<", left, lanes), left, lanes)) as i:
                block = builder.add(first, i)

                def weights_of(row: ir.Value, rooms: list[ir.Value]) -> list[ir.Value]:
                    numbers = [v.splat(v.load(v.address(room, i, 4), F32)) for room in rooms]
                    return weights(v, v.address(row, block, layout.codes), *numbers)

                at = builder.mul(block, ir.Constant(I64, BLOCK))
                meet(at, [weights_of(row, rooms) for row, rooms in zip(rows, converted, strict=True)], None)

    return each


def numbers_of(
    v: Vectors, row: ir.Value, layout: Layout, blocks: ir.Value, first: ir.Value, left: ir.Value | None
) -> list[ir.Value]:
    """The scales, and the minima if there are any, of as many blocks as there are lanes, from `first` on, as float32.

    `blocks` are all that the row has, `left` those from `first` on, or None if they fill the lanes.
    """
    kind = ir.VectorType(I16, v.lanes)
    places = [v.address(v.address(row, blocks, layout.codes + 2 * i), first, 2) for i in range(layout.numbers)]
    bits = [v.load(at, kind) if left is None else v.load_first(at, kind, left) for at in places]
    return [v.builder.fpext(v.builder.bitcast(x, ir.VectorType(F16, v.lanes)), v.floats) for x in bits]


def fetch_blocks(v: Vectors, row: ir.Value, layout: Layout, first: ir.Value, count: int) -> None:
    """Have fetched what lies ahead of `count` blocks of a row, from the block `first` on."""
    at = v.address(v.address(row, BLOCKS_AHEAD, 1), first, layout.size)
    for i in range(-(-count * layout.size // LINE)):
        v.prefetch(v.address(at, i, LINE))


def _q4_1(v: Vectors, codes: ir.Value, scale: ir.Value, minimum: ir.Value) -> list[ir.Value]:
    builder = v.builder
    pairs = [builder.zext(bytes_, v.ints) for bytes_ in _bytes(v, codes, BLOCK // 2)]
    low = [builder.and_(x, v.constant(v.ints, 15)) for x in pairs]
    high = [builder.lshr(x, v.constant(v.ints, 4)) for x in pairs]
    return [v.float_function("fma", builder.sitofp(x, v.floats), scale, minimum) for x in low + high]


def _q8_0(v: Vectors, codes: ir.Value, scale: ir.Value) -> list[ir.Value]:
    builder = v.builder
    return [
        builder.fmul(builder.sitofp(builder.sext(bytes_, v.ints), v.floats), scale)
        for bytes_ in _bytes(v, codes, BLOCK)
    ]


def _bytes(v: Vectors, address: ir.Value, count: int) -> list[ir.Value]:
    """So many bytes, as vectors with one in each lane."""
    return [v.load(v.address(address, i, 1), ir.VectorType(I8, v.lanes)) for i in range(0, count, v.lanes)]


READERS: dict[Any, Reader] = {None: _float32, "q4_1": _blocks("q4_1", _q4_1), "q8_0": _blocks("q8_0", _q8_0)}
"""By the kind of a `BlockMatrix`; None is a float32 array."""
