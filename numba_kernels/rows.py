"""A few vectors times a matrix whose rows are the outputs: the machine code of `product.py`.

out[b, o] = sum_i x[b, i] * matrix[o, i], float32. The matrix is read once, from its beginning to its end in as few
pieces as the threads need: that is how memory is read fastest, and reading is all that such a product waits for.
"""

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from numba_kernels.frame import ARGUMENTS, DATA, DIMS, RESULTS, answers_metadata, num_threads
from numba_kernels.machine import Machine
from numba_kernels.native import native, store_int64, word
from numba_kernels.sharing import OWN, done, leave, new_block, share, take
from numba_kernels.tiles import Tile
from numba_kernels.vectors import I64, Vectors

BESIDE = 4  # rows of x that meet a row of the matrix in registers
AHEAD = 1 << 11  # bytes that are fetched ahead where there is so much to do that the processor does not by itself
SUMS = 4  # of one row of x, so that they need not wait for each other
LEAST_BYTES = 1 << 19  # of a range: where one begins, the memory's own fetching ahead has to begin anew
RANGES_PER_THREAD = 8  # at most
X, MATRIX, OUT, BATCH, OUTPUTS, INPUTS, LENGTH, WORDS = range(OWN, OWN + 8)  # of the shared block


def make(machine: Machine) -> tuple[dict[str, Tile], tuple[Any, Any]]:
    """The tile, and two Numba functions: of a call frame's address, and of a shared block's; see `build.Kernel`."""
    tile = Tile("dot_rows", 7, _dot_rows)
    dot_rows = tile.external

    @native
    def take_ranges(block):  # type: ignore[no-untyped-def]
        """What every thread does with the shared block."""
        while True:
            number = take(block)
            if number < 0:
                break
            outputs, inputs, length = word(block, OUTPUTS), word(block, INPUTS), word(block, LENGTH)
            first = number * length
            dot_rows(
                word(block, X),
                word(block, MATRIX) + 4 * inputs * first,
                word(block, OUT) + 4 * first,
                min(length, outputs - first),
                word(block, BATCH),
                outputs,
                inputs,
            )
            done(block)
        leave(block)
        return 0

    @native
    def handle(frame):  # type: ignore[no-untyped-def]
        if answers_metadata(frame):
            return 0
        arguments = word(frame, ARGUMENTS)
        x, matrix, out = word(arguments, 0), word(arguments, 1), word(word(frame, RESULTS), 0)
        outputs, inputs = word(word(matrix, DIMS), 0), word(word(matrix, DIMS), 1)
        threads = 1
        bytes_ = 4 * outputs * inputs
        if bytes_ >= 2 * LEAST_BYTES:
            threads = max(1, num_threads(frame))
        # As many for each thread: at the end nobody waits long.
        ranges = threads * max(1, min(RANGES_PER_THREAD, bytes_ // LEAST_BYTES // threads))
        length = (outputs + ranges - 1) // ranges
        ranges = (outputs + length - 1) // length
        threads = min(threads, ranges)
        block = new_block(8 * WORDS, ranges, threads)
        if block == 0:
            return 1
        store_int64(block + 8 * X, word(x, DATA))
        store_int64(block + 8 * MATRIX, word(matrix, DATA))
        store_int64(block + 8 * OUT, word(out, DATA))
        store_int64(block + 8 * BATCH, word(word(x, DIMS), 0))
        store_int64(block + 8 * OUTPUTS, outputs)
        store_int64(block + 8 * INPUTS, inputs)
        store_int64(block + 8 * LENGTH, length)
        share(frame, block, threads)
        leave(block)
        return 0

    return {tile.name: tile}, (handle, take_ranges)


def _dot_rows(v: Vectors, x: ir.Value, matrix: ir.Value, out: ir.Value, count: ir.Value, *sizes: ir.Value) -> None:
    """(x, matrix, out, count, batch, outputs, inputs): `count` rows of the matrix with all `batch` rows of x."""
    builder, one = v.builder, ir.Constant(I64, 1)
    batch, outputs, inputs = sizes
    last = builder.sub(batch, one)

    def row_with(r: ir.Value, beside: int, group: ir.Value) -> None:
        """One row of the matrix with `beside` rows of x; beyond the last of these, with the last once more."""
        first = builder.mul(group, ir.Constant(I64, beside))
        places = [builder.add(first, ir.Constant(I64, i)) for i in range(beside)]
        places = [builder.select(builder.icmp_signed("<", b, last), b, last) for b in places]
        vectors = [v.address(x, builder.mul(b, inputs), 4) for b in places]
        dots = _dots(v, v.address(matrix, builder.mul(r, inputs), 4), vectors, inputs)
        for b, total in zip(places, dots, strict=True):
            v.store(total, v.address(out, builder.add(builder.mul(b, outputs), r), 4))

    with builder.if_else(builder.icmp_signed("==", batch, one)) as (single, several):
        with single, v.loop(count) as r:
            row_with(r, 1, ir.Constant(I64, 0))
        with several:
            groups = builder.udiv(builder.add(last, ir.Constant(I64, BESIDE)), ir.Constant(I64, BESIDE))
            with v.loop(count) as r, v.loop(groups) as group:
                row_with(r, BESIDE, group)


def _dots(v: Vectors, row: ir.Value, vectors: list[ir.Value], inputs: ir.Value) -> list[ir.Value]:
    """The dot products of a row with some vectors, all at addresses."""
    builder, size = v.builder, 4 * v.lanes
    wide = max(2, SUMS // len(vectors))
    totals = [[cgutils.alloca_once(builder, v.floats) for _ in range(wide)] for _ in vectors]
    for total in (x for one in totals for x in one):
        builder.store(v.constant(v.floats, 0.0), total)

    def add(i: int, load: Callable[[ir.Value], ir.Value]) -> None:
        weight = load(row)
        for vector, sums in zip(vectors, totals, strict=True):
            builder.store(v.float_function("fma", load(vector), weight, builder.load(sums[i])), sums[i])

    def whole(offset: ir.Value, base: ir.Value) -> ir.Value:
        return v.load(builder.add(base, offset), v.floats)

    span = ir.Constant(I64, v.lanes * wide)
    blocks = builder.udiv(inputs, span)
    with v.loop(blocks) as block:
        at = builder.mul(block, ir.Constant(I64, size * wide))
        for i in range(wide):
            if len(vectors) > 1:
                v.prefetch(v.address(builder.add(row, at), i * size + AHEAD, 1))
            add(i, functools.partial(whole, v.address(at, i, size)))
    done, lanes = builder.mul(blocks, span), ir.Constant(I64, v.lanes)
    more = builder.add(builder.sub(inputs, done), ir.Constant(I64, v.lanes - 1))
    with v.loop(builder.udiv(more, lanes)) as strip:
        at = builder.add(done, builder.mul(strip, lanes))
        add(0, lambda base: v.load_first(v.address(base, at, 4), v.floats, builder.sub(inputs, at)))
    return [v.reduce("fadd", [builder.load(total) for total in sums]) for sums in totals]
