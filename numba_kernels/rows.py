"""A few vectors times a matrix whose rows are the outputs: the machine code of `product.py`.

out[b, o] = sum_i x[b, i] * matrix[o, i], float32. The matrix is read once, from its beginning to its end in as few
pieces as the threads need: that is how memory is read fastest, and reading is all that a product of a few rows waits
for. Many rows meet a small piece of it at a time, as float32, in the processor's caches.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba.core import cgutils

from numba_kernels.frame import ARGUMENTS, DATA, DIMS, RESULTS, answers_metadata, num_threads
from numba_kernels.machine import Machine
from numba_kernels.native import allocate, native, release, store_int64, up, word
from numba_kernels.sharing import OWN, done, leave, new_block, share, take
from numba_kernels.tiles import Tile
from numba_kernels.vectors import F32, I32, I64, LINE, Vectors
from numba_kernels.weights import READERS, Reader


class Meeting(NamedTuple):
    """How rows of x and rows of the matrix meet in registers.

    Attributes:
      vectors: rows of x.
      rows: of the matrix.
      sums: of each dot product, so that they need not wait for each other.
    """

    vectors: int
    rows: int
    sums: int


FEW = (Meeting(4, 1, 2), Meeting(2, 1, 2), Meeting(1, 1, 2))  # with one row at a time, as memory gives them
MANY = (Meeting(8, 2, 1), Meeting(4, 2, 1), Meeting(2, 2, 2), Meeting(1, 2, 2))
FROM = 5  # rows of x that are many
GROUP = MANY[0].vectors  # of many, those that meet a piece of the matrix before the next do
NEAR = 128  # rows of x: the lines of more rows of the result do not stay in the caches until all sums are in them
SLAB = 768  # inputs that they meet at a time: what of eight rows of x stays in the first-level cache
PIECE = 1 << 19  # bytes of the matrix, as float32, that many rows of x meet one group after another
LEAST_WEIGHTS = 1 << 17  # of a range: where one begins, the memory's own fetching ahead has to begin anew
RANGES_PER_THREAD = 8  # at most
X, MATRIX, OUT, BATCH, OUTPUTS, INPUTS, STRIDE, LENGTH, WORDS = range(OWN, OWN + 9)  # of the shared block


def make(machine: Machine, kind: str | None) -> tuple[dict[str, Tile], tuple[Any, Any]]:
    """The tiles, and two Numba functions: of a call frame's address, and of a shared block's; see `build.Kernel`."""
    tiles = [
        Tile("dot_few", 10, _dot_rows(READERS[kind], FEW)),
        Tile("dot_many", 10, _dot_rows(READERS[None], MANY if machine.registers >= 32 else MANY[1:])),
        Tile("expand", 5, _expand(READERS[kind])),
        Tile("copy", 3, _copy),
    ]
    dot_few, dot_many, expand, copy = (tile.external for tile in tiles)
    in_blocks = kind is not None
    itemsize = 1 if in_blocks else 4  # of the array that holds the matrix

    @native
    def multiply(block, first, end):  # type: ignore[no-untyped-def]
        """Outputs `first` to `end` of all rows of x."""
        x, out, batch = word(block, X), word(block, OUT) + 4 * first, word(block, BATCH)
        outputs, inputs, stride = word(block, OUTPUTS), word(block, INPUTS), word(block, STRIDE)
        matrix = word(block, MATRIX) + stride * first
        piece = min(max(1, PIECE // (4 * inputs)), end - first)
        line = up(4 * piece, LINE)  # bytes of the sums of one row of x
        room = allocate(GROUP * line + (4 * inputs * piece if in_blocks else 0)) if batch >= FROM else 0
        if room == 0:
            dot_few(x, matrix, out, end - first, batch, outputs, inputs, stride, 0, inputs)
            return
        for begin in range(0, end - first, piece):
            count = min(piece, end - first - begin)
            rows, step = matrix + stride * begin, stride
            if in_blocks:
                expand(rows, room + GROUP * line, count, inputs, stride)
                rows, step = room + GROUP * line, 4 * inputs
            for b in range(0, batch, GROUP):
                some = min(GROUP, batch - b)
                own = out + 4 * (outputs * b + begin)
                to, distance = (own, outputs) if batch <= NEAR else (room, line // 4)
                for at in range(0, inputs, SLAB):
                    length = min(SLAB, inputs - at)
                    dot_many(x + 4 * inputs * b, rows, to, count, some, distance, inputs, step, at, length)
                if batch > NEAR:
                    for i in range(some):
                        copy(room + line * i, own + 4 * outputs * i, count)
        release(room)

    @native
    def take_ranges(block):  # type: ignore[no-untyped-def]
        """What every thread does with the shared block."""
        while True:
            number = take(block)
            if number < 0:
                break
            length = word(block, LENGTH)
            multiply(block, number * length, min((number + 1) * length, word(block, OUTPUTS)))
            done(block)
        leave(block)
        return 0

    @native
    def handle(frame):  # type: ignore[no-untyped-def]
        if answers_metadata(frame):
            return 0
        arguments = word(frame, ARGUMENTS)
        x, matrix, out = word(arguments, 0), word(arguments, 1), word(word(frame, RESULTS), 0)
        batch, inputs = word(word(x, DIMS), 0), word(word(x, DIMS), 1)
        outputs, stride = word(word(matrix, DIMS), 0), itemsize * word(word(matrix, DIMS), 1)
        threads = 1
        weights = outputs * inputs
        if weights >= 2 * LEAST_WEIGHTS:
            threads = max(1, num_threads(frame))
        # As many for each thread: at the end nobody waits long.
        ranges = threads * max(1, min(RANGES_PER_THREAD, weights // LEAST_WEIGHTS // threads))
        length = (outputs + ranges - 1) // ranges
        ranges = (outputs + length - 1) // length
        threads = min(threads, ranges)
        block = new_block(8 * WORDS, ranges, threads)
        if block == 0:
            return 1
        store_int64(block + 8 * X, word(x, DATA))
        store_int64(block + 8 * MATRIX, word(matrix, DATA))
        store_int64(block + 8 * OUT, word(out, DATA))
        store_int64(block + 8 * BATCH, batch)
        store_int64(block + 8 * OUTPUTS, outputs)
        store_int64(block + 8 * INPUTS, inputs)
        store_int64(block + 8 * STRIDE, stride)
        store_int64(block + 8 * LENGTH, length)
        share(frame, block, threads)
        leave(block)
        return 0

    return {tile.name: tile for tile in tiles}, (handle, take_ranges)


def _expand(each: Reader) -> Any:
    """(matrix, to, count, inputs, stride): `count` rows as float32, one after another."""

    def body(v: Vectors, matrix: ir.Value, to: ir.Value, count: ir.Value, inputs: ir.Value, stride: ir.Value) -> None:
        builder = v.builder
        with v.loop(count) as r:
            place = v.address(to, builder.mul(r, inputs), 4)

            def put(at: ir.Value, weights: list[list[ir.Value]], left: ir.Value | None) -> None:
                del left  # None: blocks are whole
                for k, weight in enumerate(weights[0]):
                    v.store(weight, v.address(v.address(place, at, 4), k, 4 * v.lanes))

            each(v, [builder.add(matrix, builder.mul(r, stride))], inputs, put)

    return body


def _copy(v: Vectors, source: ir.Value, to: ir.Value, count: ir.Value) -> None:
    """(source, to, count): `count` float32."""
    builder, lanes = v.builder, ir.Constant(I64, v.lanes)
    whole = builder.udiv(count, lanes)
    with v.loop(whole) as i:
        v.store(v.load(v.address(source, i, 4 * v.lanes), v.floats), v.address(to, i, 4 * v.lanes))
    done = builder.mul(whole, lanes)
    with v.loop(builder.sub(count, done)) as i:
        at = builder.add(done, i)
        v.store(v.load(v.address(source, at, 4), F32), v.address(to, at, 4))


def _dot_rows(each: Reader, meetings: Sequence[Meeting]) -> Any:
    """(x, matrix, out, count, batch, outputs, inputs, stride, begin, length): `count` rows of the matrix, all of x.

    Of `length` inputs from `begin` on, and added to what is in `out` unless these are the first; `begin` is 0 where
    the matrix is in blocks. The last of the meetings is of one row of x.
    """

    def body(v: Vectors, x: ir.Value, matrix: ir.Value, out: ir.Value, count: ir.Value, *sizes: ir.Value) -> None:
        builder = v.builder
        batch, outputs, inputs, stride, begin, length = sizes
        x, matrix = v.address(x, begin, 4), v.address(matrix, begin, 4)
        adds = builder.icmp_signed("!=", begin, ir.Constant(I64, 0))
        done = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))
        last = builder.sub(count, ir.Constant(I64, 1))
        for meeting in meetings:
            groups = builder.udiv(builder.sub(batch, builder.load(done)), ir.Constant(I64, meeting.vectors))
            times = builder.udiv(builder.add(last, ir.Constant(I64, meeting.rows)), ir.Constant(I64, meeting.rows))
            with v.loop(groups):
                first = builder.load(done)
                numbers = [builder.add(first, ir.Constant(I64, i)) for i in range(meeting.vectors)]
                vectors = [v.address(x, builder.mul(b, inputs), 4) for b in numbers]
                places = [v.address(out, builder.mul(b, outputs), 4) for b in numbers]
                with v.loop(times) as i:
                    beginning = builder.mul(i, ir.Constant(I64, meeting.rows))
                    near = [builder.add(beginning, ir.Constant(I64, j)) for j in range(meeting.rows)]
                    if meeting.rows > 1:  # beyond the last, the last once more
                        near = [builder.select(builder.icmp_signed("<", r, last), r, last) for r in near]
                    rows = [builder.add(matrix, builder.mul(r, stride)) for r in near]
                    dots = _dots(v, each, rows, vectors, length, meeting.sums)
                    at_out = [v.address(place, r, 4) for place in places for r in near]
                    # All are read before any is written: the last may be there twice.
                    before = [builder.select(adds, v.load(at, F32), ir.Constant(F32, 0.0)) for at in at_out]
                    for at, dot, more in zip(at_out, dots, before, strict=True):
                        v.store(builder.fadd(more, dot), at)
                builder.store(builder.add(first, ir.Constant(I64, meeting.vectors)), done)

    return body


def _dots(
    v: Vectors, each: Reader, rows: list[ir.Value], vectors: list[ir.Value], inputs: ir.Value, sums: int
) -> list[ir.Value]:
    """The dot products of vectors with rows, all at addresses; those of one vector one after another."""
    builder = v.builder
    totals = [[[cgutils.alloca_once(builder, v.floats) for _ in range(sums)] for _ in rows] for _ in vectors]
    for total in (x for of_vector in totals for own in of_vector for x in own):
        builder.store(v.constant(v.floats, 0.0), total)

    def meet(at: ir.Value, weights: list[list[ir.Value]], left: ir.Value | None) -> None:
        for k in range(len(weights[0])):
            for vector, of_vector in zip(vectors, totals, strict=True):
                place = v.address(v.address(vector, at, 4), k, 4 * v.lanes)
                x = v.load(place, v.floats) if left is None else v.load_first(place, v.floats, left)
                for weight, own in zip(weights, of_vector, strict=True):
                    total = own[k % sums]
                    builder.store(v.float_function("fma", x, weight[k], builder.load(total)), total)

    each(v, rows, inputs, meet)
    whole = [functools.reduce(builder.fadd, map(builder.load, own)) for of_vector in totals for own in of_vector]
    results: list[ir.Value] = []
    for i in range(0, len(whole), v.lanes):
        part = whole[i : i + v.lanes]
        total = v.sums(part, v.lanes)
        results += [builder.extract_element(total, ir.Constant(I32, j)) for j in range(len(part))]
    return results
