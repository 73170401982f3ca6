"""The two products of a tile of positions as products of matrices: Intel's AMX.

    configure  before a thread's first product: how large the matrices are
    scores     as in tiles.py
    values     as in tiles.py
    reset      after the last: as it was before

A matrix register has 16 rows of 64 bytes, and one instruction multiplies two of them:

    out[i, j] += sum_k a[i, k] * b[k, j]        16 rows i, 16 columns j, 16 lanes k of two bfloat16 or four int8

where row k of b has lane k of all 16 columns side by side. Scores have positions as rows, which are loaded from the
cache as they lie there, and digits of query heads as columns. Values have digits of the weights of heads as rows and
elements of values as columns; for them the rows of `pack` positions are interleaved, as in tiles.py.
"""

from typing import Any

from llvmlite import ir

from numba_kernels.formats import Format
from numba_kernels.tiles import Fetcher, Tile, digits_together, fold, padded, walk
from numba_kernels.vectors import F32, I8, I32, I64, LINE, Vectors

ROWS = 16  # of a matrix, of one cache line each
MATRIX = ROWS * LINE  # bytes
# The registers. The first three have as many rows as there are digits of weights.
SUMS, WEIGHTS, VALUES = (0, 1), 2, (3, 4)
SCORES, KEYS, QUERY = (3, 4), (5, 6), 7
SIGNED, UNSIGNED_A, BFLOAT16 = "tdpbssd", "tdpbusd", "tdpbf16ps"


def make(form: Format) -> dict[str, Tile]:
    """The steps by name; `scores` and `values` take what those of tiles.py do."""
    tiles = (_configure(form), _reset(), _scores(form), _values(form))
    return {tile.name: tile for tile in tiles}


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


def _configure(form: Format) -> Tile:
    """(group, found): the registers' sizes, for groups of so many heads; those that this thread had are kept."""

    def body(v: Vectors, group: Any, found: Any) -> None:
        builder = v.builder
        most = ir.Constant(I64, ROWS // form.weight_digits)
        heads = builder.select(builder.icmp_signed("<", group, most), group, most)
        rows = builder.trunc(builder.mul(heads, ir.Constant(I64, form.weight_digits)), I8)
        # Byte 0: the kind of registers. From 16 on the bytes of a row, 16 bits each; from 48 on the rows.
        sizes = [1] + [0] * 15 + [LINE, 0] * 8 + [0] * 16 + [ROWS] * 8 + [0] * 8
        place = v.room(LINE)
        v.store(ir.Constant(ir.VectorType(I8, LINE), sizes), place)
        for register in (*SUMS, WEIGHTS):
            v.store(rows, v.address(place, 48 + register, 1))
        _sizes(v, "sttilecfg", found)
        _sizes(v, "ldtilecfg", place)

    return Tile("configure", 2, body)


def _reset() -> Tile:
    """(found,): what this thread had: some libraries configure a thread once for all. Nothing, for most."""
    return Tile("reset", 1, lambda v, found: _sizes(v, "ldtilecfg", found))


def _sizes(v: Vectors, name: str, address: ir.Value) -> None:
    """Store or load the registers' sizes: 64 bytes, all 0 where there are none."""
    instruction(v, name, v.builder.inttoptr(address, I8.as_pointer()))


class _Keys:
    """The keys of 16 positions, whose addresses stand one after another."""

    def __init__(self, v: Vectors, rows: ir.Value) -> None:
        builder, kind = v.builder, ir.VectorType(I64, ROWS)
        self.v, self.rows = v, rows
        addresses = v.load(rows, kind)
        self.first, second = (builder.extract_element(addresses, ir.Constant(I32, i)) for i in (0, 1))
        self.stride = builder.sub(second, self.first)
        steps = builder.mul(v.splat(self.stride, ROWS), ir.Constant(kind, list(range(ROWS))))
        same = builder.icmp_signed("==", addresses, builder.add(v.splat(self.first, ROWS), steps))
        all_of_them = ir.Constant(ir.IntType(ROWS), 2**ROWS - 1)
        self.even = builder.icmp_unsigned("==", builder.bitcast(same, all_of_them.type), all_of_them)
        self.copy = v.room(MATRIX)

    def load(self, register: int, offset: ir.Value, left: ir.Value) -> None:
        """64 bytes of each key from `offset` on, or zeros behind those that are `left`."""
        v, builder = self.v, self.v.builder
        whole = builder.icmp_signed(">=", left, ir.Constant(I64, LINE))
        with builder.if_else(builder.and_(whole, self.even)) as (there, elsewhere):
            with there:
                _load(v, register, builder.add(self.first, offset), self.stride)
            with elsewhere:
                with v.loop(ir.Constant(I64, ROWS)) as i:
                    key = v.load(v.address(self.rows, i, 8), I64)
                    part = v.load_first(builder.add(key, offset), ir.VectorType(I8, LINE), left)
                    v.store(part, v.address(self.copy, i, LINE))
                _load(v, register, self.copy, LINE)


def _scores(form: Format) -> Tile:
    """(group, query, initial, weights, out, rows, head, place, count, head_dim); see `tiles.make`.

    `query` is (matrices, lanes of D padded, 16) lanes, of which the last are the digits of as many heads as there is
    room for. `out` has room for the heads of whole matrices. `initial` has no use: keys and digits are both signed.
    """
    heads = form.query_heads

    def body(v: Vectors, group: Any, query: Any, initial: Any, weights: Any, out: Any, *rest: Any) -> None:
        del initial
        rows, head, place, count, head_dim = rest
        builder = v.builder
        kind = v.ints if form.integer else v.floats
        lines = builder.udiv(padded(v, form, head_dim), ir.Constant(I64, ROWS * form.pack))
        matrices = v.over(group, heads)
        row_bytes = builder.mul(head_dim, ir.Constant(I64, form.itemsize))
        fetcher = Fetcher(v, place, matrices)
        room = v.room(MATRIX)
        # Of the lines of the next tile, one in eight while keys are loaded and one in four while scores are put in
        # order; `values` fetches the others. If many were asked for at once, all else would wait for them.
        in_step = fetcher.times(ir.Constant(I64, 8), matrices)
        in_order = fetcher.times(v.over(builder.mul(lines, ir.Constant(I64, 16)), heads), matrices)
        with v.loop(matrices) as matrix, v.loop(v.over(count, ROWS * len(KEYS))) as block:
            first = builder.mul(block, ir.Constant(I64, ROWS * len(KEYS)))
            keys = [_Keys(v, v.address(v.address(rows, first, 8), ROWS * i, 8)) for i in range(len(KEYS))]
            for register in SCORES:
                instruction(v, "tilezero", register)
            with v.loop(lines) as line:
                offset = builder.mul(line, ir.Constant(I64, LINE))
                fetcher.fetch(in_step)
                _load(v, QUERY, v.address(query, builder.add(builder.mul(matrix, lines), line), MATRIX), LINE)
                for register, own in zip(KEYS, keys, strict=True):
                    own.load(register, builder.add(head, offset), builder.sub(row_bytes, offset))
                for total, register in zip(SCORES, KEYS, strict=True):
                    instruction(v, SIGNED if form.integer else BFLOAT16, total, register, QUERY)
            for i, register in enumerate(SCORES):
                _store(v, register, room)
                columns = v.transpose([v.load(v.address(room, p, LINE), kind) for p in range(ROWS)])
                for h in range(heads):
                    if h % 2 == 0:
                        fetcher.fetch(in_order)
                    number = builder.add(builder.mul(matrix, ir.Constant(I64, heads)), ir.Constant(I64, h))
                    digits = columns[h * form.query_digits : (h + 1) * form.query_digits]
                    factor = v.splat(v.load(v.address(weights, number, 4), F32))
                    to = v.address(
                        v.address(out, number, 4 * form.tile), builder.add(first, ir.Constant(I64, ROWS * i)), 4
                    )
                    v.store(builder.fmul(digits_together(v, form, digits), factor), to)
        fetcher.keep()

    return Tile("scores", 10, body)


def _values(form: Format) -> Tile:
    """(group, weights, fades, shares, out, rows, head, place, count, head_dim); see `tiles.make`.

    `weights` has room for the rows of whole matrices.
    """
    digits, pack = form.weight_digits, form.pack
    heads = ROWS // digits
    weight_bytes = 4 * (form.tile // pack)  # of a digit's row
    together = 4 // pack  # lines of values: more, interleaved, would not stay in the first-level cache

    def body(v: Vectors, group: Any, weights: Any, fades: Any, shares: Any, out: Any, *rest: Any) -> None:
        rows, head, place, count, head_dim = rest
        builder = v.builder
        kind = v.ints if form.integer else v.floats
        columns = padded(v, form, head_dim)
        steps = v.over(count, ROWS * pack)
        fetcher = Fetcher(v, place, ir.Constant(I64, 1))
        interleaved, sums = v.room(together * LINE * form.tile), v.room(together * MATRIX * pack)

        def step(first: ir.Value, width: int, some: ir.Value | None) -> None:
            """`width` lines of the values, or one of `some` elements."""
            offset = v.address(head, first, form.itemsize)
            with v.loop(steps) as step, v.loop(ir.Constant(I64, ROWS)) as row:
                fetcher.share(pack * width)
                lane = builder.add(builder.mul(step, ir.Constant(I64, ROWS)), row)
                here = [v.load(v.address(v.address(rows, lane, 8 * pack), i, 8), I64) for i in range(pack)]
                to = v.address(v.address(interleaved, step, MATRIX * pack), row, LINE)
                for strip in range(width):
                    read = [v.load_lanes(form, builder.add(x, offset), strip, some) for x in here]
                    for i, part in enumerate(v.interleave(read)):
                        v.store(part, v.address(to, strip * LINE * form.tile + i * MATRIX, 1))
            in_fold = fetcher.times(ir.Constant(I64, width * form.tile // 4), group)
            with v.loop(v.over(group, heads)) as matrix:
                number = builder.mul(matrix, ir.Constant(I64, heads))
                own = v.address(weights, number, digits * weight_bytes)
                for strip in range(width):
                    for begin in range(0, pack, len(SUMS)):
                        for register in SUMS:
                            instruction(v, "tilezero", register)
                        with v.loop(steps) as step:
                            _load(v, WEIGHTS, v.address(own, step, LINE), weight_bytes)
                            at = v.address(v.address(interleaved, step, MATRIX * pack), strip, LINE * form.tile)
                            for i, register in enumerate(VALUES):
                                _load(v, register, v.address(at, begin + i, MATRIX), LINE)
                            for total, register in zip(SUMS, VALUES, strict=True):
                                instruction(v, UNSIGNED_A if form.integer else BFLOAT16, total, WEIGHTS, register)
                        for i, register in enumerate(SUMS):
                            _store(v, register, v.address(sums, strip * pack + begin + i, MATRIX))
                more, most = builder.sub(group, number), ir.Constant(I64, heads)
                with v.loop(builder.select(builder.icmp_signed("<", more, most), more, most)) as h:
                    head_number = builder.add(number, h)
                    fetcher.fetch(in_fold)
                    fade, share = (v.address(x, head_number, 4) for x in (fades, shares))
                    line = v.address(out, builder.add(builder.mul(columns, head_number), first), 4)
                    for strip in range(width):
                        parts = []
                        for i in range(pack):
                            at = v.address(v.address(sums, strip * pack + i, MATRIX), h, digits * LINE)
                            found = [v.load(v.address(at, digit, LINE), kind) for digit in range(digits)]
                            parts.append(digits_together(v, form, found))
                        fold(v, form, parts, fade, share, v.address(line, strip * pack, LINE))

        walk(v, form, head_dim, together, step)
        fetcher.keep()

    return Tile("values", 10, body)
