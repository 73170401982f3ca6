"""A few vectors times a matrix whose rows are the outputs: the machine code of `product.py`.

out[b, o] = sum_i x[b, i] * matrix[o, i], float32. The matrix is read once, from its beginning to its end in as few
pieces as the threads need: that is how memory is read fastest, and reading is all that such a product waits for.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from numba_kernels.frame import ARGUMENTS, DATA, DIMS, RESULTS, answers_metadata, num_threads
from numba_kernels.machine import Machine
from numba_kernels.native import native, store_int64, word
from numba_kernels.sharing import OWN, done, leave, new_block, share, take
from numba_kernels.tiles import Tile
from numba_kernels.vectors import I64, Vectors

AT_ONCE = 4  # vectors of a row, each with a sum of its own: one alone would wait for itself
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
            threads = num_threads(frame)
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


def _dot_rows(
    v: Vectors, x: ir.Value, rows: ir.Value, out: ir.Value, count: ir.Value, batch: ir.Value, *sizes: ir.Value
) -> None:
    """(x, rows, out, count, batch, outputs, inputs): `count` rows of the matrix with `batch` rows of x."""
    builder, size = v.builder, 4 * v.lanes
    outputs, inputs = sizes
    lanes = ir.Constant(I64, v.lanes)
    totals = [cgutils.alloca_once(builder, v.floats) for _ in range(AT_ONCE)]
    span = ir.Constant(I64, v.lanes * AT_ONCE)
    blocks = builder.udiv(inputs, span)
    rest = builder.mul(blocks, span)
    strips = builder.udiv(builder.add(builder.sub(inputs, rest), ir.Constant(I64, v.lanes - 1)), lanes)
    with v.loop(count) as r, v.loop(batch) as b:
        row = v.address(rows, builder.mul(r, inputs), 4)
        vector = v.address(x, builder.mul(b, inputs), 4)
        for total in totals:
            builder.store(v.constant(v.floats, 0.0), total)

        def add(total: ir.Value, *factors: ir.Value) -> None:
            builder.store(v.float_function("fma", *factors, builder.load(total)), total)

        with v.loop(blocks) as block:
            at = builder.mul(block, ir.Constant(I64, size * AT_ONCE))
            for i, total in enumerate(totals):
                add(total, *(v.load(v.address(builder.add(base, at), i, size), v.floats) for base in (vector, row)))
        with v.loop(strips) as strip:
            first = builder.add(rest, builder.mul(strip, lanes))
            left = builder.sub(inputs, first)
            add(totals[0], *(v.load_first(v.address(base, first, 4), v.floats, left) for base in (vector, row)))
        place = builder.add(builder.mul(b, outputs), r)
        v.store(v.reduce("fadd", [builder.load(total) for total in totals]), v.address(out, place, 4))
