"""The two products of a tile of positions as products of matrices: Intel's AMX.

    configure  before a thread's first product: how large the matrices are
    scores     as in dots.py
    weigh      as in tiles.py
    values     as in dots.py
    reset      after the last: as it was before

A matrix register has 16 rows of 64 bytes, and one instruction multiplies two of them:

    out[i, j] += sum_k a[i, k] * b[k, j]        16 rows i, 16 columns j, 16 lanes k of two bfloat16 or four int8

where row k of b has lane k of all 16 columns side by side. Scores have positions as rows, which are loaded from the
cache as they lie there, and digits of query heads as columns.

Values have digits of the weights of heads as rows and elements of values as columns. Those of int8 are interleaved for
that, four positions in a lane, as in dots.py. Rows of bfloat16 are loaded as they lie: a lane has two elements of one
position then, and the weights are there twice, beside a zero for the other element: one row has the sums of all even
elements and another of the odd ones. (0 times what is not finite is no number: where a sum is none, the element beside
it may be to blame, and both are summed up anew.) With four elements in a lane there would be four times as many
products.
"""

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from numba_kernels.fetching import Fetcher
from numba_kernels.formats import Format
from numba_kernels.tiles import (
    Tile,
    digits_together,
    fold,
    lanes_with_weights,
    number,
    padded,
    rows_of_lane,
    walk,
    weigh,
)
from numba_kernels.vectors import F32, I8, I32, I64, LINE, Vectors

ROWS = 16  # of a matrix, of one cache line each
HALF = ROWS // 2  # columns that are turned at a time
MATRIX = ROWS * LINE  # bytes
# The registers.
SUMS, WEIGHTS, VALUES = (0, 1, 2, 3), 4, (5, 6)
SCORES, QUERY, KEYS = (0, 1, 2, 3), 4, (5, 6)
SIGNED, UNSIGNED_A, BFLOAT16 = "tdpbssd", "tdpbusd", "tdpbf16ps"
ODD = 0xFFFF0000 - 2**32  # the bits of the second of two bfloat16
UNEVEN = -1  # no distance between rows
# The lines of the next tile are fetched all the time, so many percent of them in each part of the work; the numbers
# that these are at a time are rounded up. If many were asked for at once, all else would wait for them.
PERCENT = {"keys": 20, "order": 12, "weigh": 15, "values": 25, "fold": 20}


def make(form: Format) -> dict[str, Tile]:
    """The steps by name; `scores`, `weigh` and `values` take what those of tiles.py and dots.py do."""
    tiles = [_configure(), _reset(), _scores(form), weigh(form, PERCENT["weigh"], stay_awake), _values(form)]
    tiles.append(number("piece", 0, arguments=1))  # of a query that vectors meet
    return {tile.name: tile for tile in tiles}


def stay_awake(v: Vectors) -> None:
    """A product of no use. About 1100 cycles after the last one the unit goes to sleep, and takes some 800 to wake.

    It does not come for free either (50 to 150 cycles among vector instructions), so it is not to be overdone.
    """
    instruction(v, BFLOAT16, SUMS[0], WEIGHTS, VALUES[0])


def instruction(v: Vectors, name: str, *arguments: ir.Value | int) -> None:
    """An AMX instruction, of numbers of registers (int), addresses and strides."""
    values = [ir.Constant(I8, x) if isinstance(x, int) else x for x in arguments]
    function = v.function(f"llvm.x86.{name}", ir.VoidType(), [x.type for x in values])
    v.builder.call(function, values)


def _load(v: Vectors, register: int, address: ir.Value, stride: ir.Value | int) -> None:
    """The rows of a matrix, so many bytes apart."""
    stride = ir.Constant(I64, stride) if isinstance(stride, int) else stride
    instruction(v, "tileloadd64", register, v.builder.inttoptr(address, I8.as_pointer()), stride)


def _store(v: Vectors, register: int, address: ir.Value) -> None:
    """All rows of a matrix, one after another."""
    instruction(v, "tilestored64", register, v.builder.inttoptr(address, I8.as_pointer()), ir.Constant(I64, LINE))


def _configure() -> Tile:
    """(group, found): the registers' sizes; those that this thread had are kept."""

    def body(v: Vectors, group: Any, found: Any) -> None:
        # Byte 0: the kind of registers. From 16 on the bytes of a row, 16 bits each; from 48 on the rows.
        sizes = [1] + [0] * 15 + [LINE, 0] * 8 + [0] * 16 + [ROWS] * 8 + [0] * 8
        place = v.room(LINE)
        v.store(ir.Constant(ir.VectorType(I8, LINE), sizes), place)
        _sizes(v, "sttilecfg", found)
        _sizes(v, "ldtilecfg", place)

    return Tile("configure", 2, body)


def _reset() -> Tile:
    """(found,): what this thread had: some libraries configure a thread once for all. Nothing, for most."""
    return Tile("reset", 1, lambda v, found: _sizes(v, "ldtilecfg", found))


def _sizes(v: Vectors, name: str, address: ir.Value) -> None:
    """Store or load the registers' sizes: 64 bytes, all 0 where there are none."""
    instruction(v, name, v.builder.inttoptr(address, I8.as_pointer()))


class _Rows:
    """Matrices of the cache's rows as they lie there, of 16 positions each."""

    width = 4  # lines of a row that are found together

    def __init__(self, v: Vectors, form: Format, rows: ir.Value) -> None:
        """`rows` holds the addresses of a tile's."""
        builder, kind, matrices = v.builder, ir.VectorType(I64, ROWS), form.tile // ROWS
        self.v, self.form, self.rows = v, form, rows
        self.copy = v.room(self.width * LINE * form.tile)
        # From one row to the next, `UNEVEN` where that differs; and for the lines that were found where they are.
        self.distances, self.starts, self.strides = (v.room(8 * matrices) for _ in range(3))
        for i in range(matrices):
            addresses = v.load(v.address(rows, i * ROWS, 8), kind)
            first, second = (builder.extract_element(addresses, ir.Constant(I32, j)) for j in (0, 1))
            distance = builder.sub(second, first)
            steps = builder.mul(v.splat(distance, ROWS), ir.Constant(kind, list(range(ROWS))))
            same = builder.icmp_signed("==", addresses, builder.add(v.splat(first, ROWS), steps))
            all_of_them = ir.Constant(ir.IntType(ROWS), 2**ROWS - 1)
            even = builder.icmp_unsigned("==", builder.bitcast(same, all_of_them.type), all_of_them)
            v.store(builder.select(even, distance, ir.Constant(I64, UNEVEN)), v.address(self.distances, i, 8))

    def find(self, matrices: ir.Value, offset: ir.Value, width: int, some: ir.Value | None) -> None:
        """Find `width` lines of each row from `offset` on, or one of `some` elements, where `load` has them.

        They are copied where rows are not at equal distances, or end in the middle of a line.
        """
        v, builder = self.v, self.v.builder
        with v.loop(matrices) as matrix:
            rows = v.address(self.rows, matrix, 8 * ROWS)
            distance = v.load(v.address(self.distances, matrix, 8), I64)
            v.store(builder.add(v.load(rows, I64), offset), v.address(self.starts, matrix, 8))
            v.store(distance, v.address(self.strides, matrix, 8))
            uneven = builder.icmp_signed("==", distance, ir.Constant(I64, UNEVEN))
            with builder.if_then(uneven if some is None else ir.Constant(ir.IntType(1), 1)):
                own = v.address(self.copy, matrix, width * MATRIX)
                with v.loop(ir.Constant(I64, ROWS)) as i:
                    row = builder.add(v.load(v.address(rows, i, 8), I64), offset)
                    for strip in range(width):
                        (line,) = v.load_parts(self.form, row, strip, some)
                        v.store(line, v.address(v.address(own, i, width * LINE), strip, LINE))
                v.store(own, v.address(self.starts, matrix, 8))
                v.store(ir.Constant(I64, width * LINE), v.address(self.strides, matrix, 8))

    def load(self, register: int, matrix: ir.Value, strip: int) -> None:
        """One of the lines that were found, of each row of a matrix."""
        start, stride = (self.v.load(self.v.address(x, matrix, 8), I64) for x in (self.starts, self.strides))
        _load(self.v, register, self.v.address(start, strip, LINE), stride)


class _Interleaved:
    """Matrices of the cache's rows with `pack` positions side by side in a lane, of `pack` * 16 positions each."""

    width = 2  # lines of a row that are found together: one is not worked on as soon as it has been stored

    def __init__(self, v: Vectors, form: Format, rows: ir.Value, fetcher: Fetcher) -> None:
        """`rows` holds the addresses of a tile's."""
        self.v, self.form, self.rows, self.fetcher = v, form, rows, fetcher
        self.copy = v.room(self.width * LINE * form.tile)

    def find(self, matrices: ir.Value, offset: ir.Value, width: int, some: ir.Value | None) -> None:
        """Interleave `width` lines of each row from `offset` on, or one of `some` elements."""
        v, builder, pack = self.v, self.v.builder, self.form.pack
        each = pack * PERCENT["values"] * 2 // 100  # of the lines that are read half are keys
        for strip in range(width):
            stay_awake(v)
            with v.loop(matrices) as matrix, v.loop(ir.Constant(I64, ROWS)) as lane:
                self.fetcher.share(each)
                number = builder.add(builder.mul(matrix, ir.Constant(I64, ROWS)), lane)
                here = [builder.add(row, offset) for row in rows_of_lane(v, self.form, self.rows, number)]
                parts = v.interleave([part for row in here for part in v.load_parts(self.form, row, strip, some)])
                for i, part in enumerate(parts):
                    v.store(part, v.address(self._place(matrix, strip * pack + i), lane, LINE))

    def load(self, register: int, matrix: ir.Value, part: int) -> None:
        """Of each `pack` parts the vectors that a line becomes."""
        _load(self.v, register, self._place(matrix, part), LINE)

    def _place(self, matrix: ir.Value, part: int) -> ir.Value:
        """Where a matrix of one of the parts is."""
        at = self.v.address(self.copy, part, MATRIX * (self.form.tile // ROWS // self.form.pack))
        return self.v.address(at, matrix, MATRIX)


def _pair_of_rows(v: Vectors, matrix: ir.Value, row: int, offset: int, kind: ir.VectorType) -> ir.Value:
    """Half a row of a matrix from an offset in bytes on, and as much of the row that is half a matrix behind."""
    half = ir.VectorType(kind.element, HALF)
    a, b = (v.load(v.address(matrix, r * LINE + offset, 1), half) for r in (row, row + HALF))
    return v.shuffle(a, b, range(ROWS))


def _scores(form: Format) -> Tile:
    """(group, query, initial, weights, out, rows, head, place, count, head_dim); see `dots.make`.

    `query` is (matrices, lanes of D padded, 16) lanes, of which the last are the first digits of as many heads as there
    is room for, then their second ones, and so on. `out` has room for the heads of whole matrices. `initial` has no
    use: keys and digits are both signed.
    """
    heads = form.query_heads
    stops = 4  # to fetch at, among the heads whose scores are put in order

    def body(v: Vectors, group: Any, query: Any, initial: Any, weights: Any, out: Any, *rest: Any) -> None:
        del initial
        rows, head, place, count, head_dim = rest
        builder = v.builder
        kind = v.ints if form.integer else v.floats
        lines = builder.udiv(padded(v, form, head_dim), ir.Constant(I64, ROWS * form.pack))
        matrices = v.over(group, heads)
        fetcher, keys = Fetcher(v, place, matrices), _Rows(v, form, rows)
        room = v.room(len(SCORES) * MATRIX + LINE)  # half a row may end behind it
        in_step = fetcher.portion(ir.Constant(I64, 2 * form.tile * PERCENT["keys"] // 100), matrices)
        at_a_stop = v.over(fetcher.part(form, head_dim, PERCENT["order"]), len(SCORES) * stops)
        in_order = fetcher.portion(at_a_stop, matrices, together=1)
        with v.loop(matrices) as matrix:
            queries = v.address(query, builder.mul(matrix, lines), MATRIX)
            for register in SCORES:
                instruction(v, "tilezero", register)

            def step(first: ir.Value, width: int, some: ir.Value | None) -> None:
                keys.find(ir.Constant(I64, len(SCORES)), v.address(head, first, form.itemsize), width, some)
                line = builder.udiv(first, ir.Constant(I64, ROWS * form.pack))
                for strip in range(width):
                    fetcher.fetch(in_step)
                    _load(v, QUERY, v.address(v.address(queries, line, MATRIX), strip, MATRIX), LINE)
                    for i, register in enumerate(SCORES):
                        keys.load(KEYS[i % 2], ir.Constant(I64, i), strip)
                        instruction(v, SIGNED if form.integer else BFLOAT16, register, KEYS[i % 2], QUERY)

            walk(v, form, head_dim, _Rows.width, step)
            for i, register in enumerate(SCORES):
                _store(v, register, v.address(room, i, MATRIX))
            begin = builder.mul(matrix, ir.Constant(I64, heads))
            with v.loop(v.over(count, ROWS)) as block:
                own = v.address(room, block, MATRIX)
                for first in range(0, heads, HALF):
                    number = builder.add(begin, ir.Constant(I64, first))
                    with builder.if_then(builder.icmp_signed("<", number, group)):
                        pairs = []
                        for i in range(HALF):
                            if first == 0 and i % (HALF // stops) == 0:
                                fetcher.fetch(in_order)
                            places = [4 * (digit * heads + first) for digit in range(form.query_digits)]
                            digits = [_pair_of_rows(v, own, i, at, kind) for at in places]
                            pairs.append(digits_together(v, form, digits))
                        for h, row in enumerate(v.transpose_blocks(pairs)[: heads - first]):
                            at = builder.add(number, ir.Constant(I64, h))
                            factor = v.splat(v.load(v.address(weights, at, 4), F32))
                            to = v.address(v.address(out, at, 4 * form.tile), block, LINE)
                            v.store(builder.fmul(row, factor), to)
        fetcher.keep()

    return Tile("scores", 10, body)


def _values(form: Format) -> Tile:
    """(group, weights, fades, shares, out, rows, head, place, count, head_dim); see `dots.make`.

    `weights` has room for the rows of whole matrices.
    """
    digits, pack, rows_of_head = form.weight_digits, form.pack, form.weight_rows
    heads = ROWS // rows_of_head
    weight_bytes = 4 * form.weight_lanes  # of a row
    parts_of_line = pack if form.interleaved else 1  # matrices with sums of one line of the values
    width = (_Interleaved if form.interleaved else _Rows).width

    def turns(lines: int) -> Iterator[list[tuple[int, int]]]:
        """Registers and matrices of sums, as many at a time as there are registers."""
        for begin in range(0, lines * parts_of_line, len(SUMS)):
            yield list(zip(SUMS, range(begin, lines * parts_of_line), strict=False))

    def body(v: Vectors, group: Any, weights: Any, fades: Any, shares: Any, out: Any, *rest: Any) -> None:
        rows, head, place, count, head_dim = rest
        builder = v.builder
        kind = v.ints if form.integer else v.floats
        columns = padded(v, form, head_dim)
        fetcher = Fetcher(v, place, ir.Constant(I64, 1))
        values = _Interleaved(v, form, rows, fetcher) if form.interleaved else _Rows(v, form, rows)
        sums = v.room(width * parts_of_line * MATRIX)
        matrices, blocks = v.over(group, heads), v.over(lanes_with_weights(v, form, count), ROWS)
        in_step = fetcher.portion(ir.Constant(I64, 2 * ROWS * PERCENT["values"] // 100), matrices)
        in_fold = fetcher.portion(ir.Constant(I64, 2 * form.tile * PERCENT["fold"] // 100), group)

        def place_of(h: ir.Value, strip: int, element: int, digit: int) -> ir.Value:
            """Where the sums of a head are, of every `pack` elements of a line one."""
            matrix, row = (strip * pack + element, digit) if form.interleaved else (strip, digit * pack + element)
            own = v.address(sums, h, rows_of_head * LINE)
            return v.address(v.address(own, matrix, MATRIX), row, LINE)

        def parts_of(h: ir.Value, strip: int) -> list[ir.Value]:
            """The sums of a head for each of `pack` elements, as float32."""
            places = [[place_of(h, strip, element, digit) for digit in range(digits)] for element in range(pack)]
            return [digits_together(v, form, [v.load(place, kind) for place in found]) for found in places]

        def keep_apart(h: ir.Value, number: ir.Value, offset: ir.Value, strip: int, some: ir.Value | None) -> None:
            """Where sums are not finite, those of the two elements of all lanes once more, each for itself."""
            differences = [builder.fsub(part, part) for part in parts_of(h, strip)]
            wrong = builder.fcmp_unordered("uno", *differences)
            wrong = builder.bitcast(wrong, ir.IntType(v.lanes))
            with builder.if_then(builder.icmp_unsigned("!=", wrong, ir.Constant(wrong.type, 0)), likely=False):
                own = v.address(weights, number, rows_of_head * weight_bytes)
                totals = [v.variable(v.floats) for _ in range(pack)]
                for total in totals:
                    builder.store(v.constant(v.floats, 0.0), total)
                with v.loop(count) as position:
                    row = builder.add(v.load(v.address(rows, position, 8), I64), offset)
                    (pairs,) = v.load_parts(form, row, strip, some)
                    elements = builder.shl(pairs, v.constant(v.ints, 16)), builder.and_(pairs, v.constant(v.ints, ODD))
                    at = v.address(own, position, 4)
                    found = [v.load(v.address(at, digit * pack, weight_bytes), I32) for digit in range(digits)]
                    found = [v.as_floats(v.splat(builder.shl(x, ir.Constant(I32, 16)))) for x in found]
                    weight = digits_together(v, form, found)
                    for total, element in zip(totals, elements, strict=True):
                        product = v.float_function("fma", weight, v.as_floats(element), builder.load(total))
                        builder.store(product, total)
                for element, total in enumerate(totals):
                    for digit in range(digits):
                        found = builder.load(total) if digit == 0 else v.constant(v.floats, 0.0)
                        v.store(found, place_of(h, strip, element, digit))

        def step(first: ir.Value, lines: int, some: ir.Value | None) -> None:
            """Lines of the values, or one of `some` elements."""
            offset = v.address(head, first, form.itemsize)
            values.find(blocks, offset, lines, some)
            with v.loop(matrices) as matrix:
                own = v.address(weights, matrix, heads * rows_of_head * weight_bytes)
                for turn in turns(lines):
                    for register, _ in turn:
                        instruction(v, "tilezero", register)
                    with v.loop(blocks) as block:
                        _load(v, WEIGHTS, v.address(own, block, LINE), weight_bytes)
                        for register, part in turn:
                            if not form.interleaved:
                                fetcher.fetch(in_step)
                            values.load(VALUES[part % 2], block, part)
                            product = UNSIGNED_A if form.integer else BFLOAT16
                            instruction(v, product, register, WEIGHTS, VALUES[part % 2])
                    for register, part in turn:
                        _store(v, register, v.address(sums, part, MATRIX))
                begin = builder.mul(matrix, ir.Constant(I64, heads))
                left, most = builder.sub(group, begin), ir.Constant(I64, heads)
                with v.loop(builder.select(builder.icmp_signed("<", left, most), left, most)) as h:
                    number = builder.add(begin, h)
                    fade, share = (v.address(x, number, 4) for x in (fades, shares))
                    line = v.address(out, builder.add(builder.mul(columns, number), first), 4)
                    for strip in range(lines):
                        fetcher.fetch(in_fold)
                        if not form.interleaved:
                            keep_apart(h, number, offset, strip, some)
                        fold(v, form, parts_of(h, strip), fade, share, v.address(line, strip * pack, LINE))

        walk(v, form, head_dim, width, step)
        fetcher.keep()

    return Tile("values", 10, body)
