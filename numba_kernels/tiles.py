"""The steps on a tile of positions, as functions of vector instructions.

    pack_keys     rows of the cache      -> B of scores[row, position]
    pack_values   rows of the cache      -> B of out[row, d]
    dot           C[row, column] = sum_l dot(A[row, l], B[l, column])
    combine       the digits of a row of C into one row of floats, scaled
    weigh         scores of one head     -> softmax weights as a row of A, their maximum and sum
    fold          a head's share of a tile into its running output

All take addresses as int64: they work on memory of XLA's and on scratch, and nothing there has a Python object. They
are emitted straight as LLVM IR, into a module of their own; the Numba code sees them as external functions.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from numba_kernels.formats import Format
from numba_kernels.machine import Machine
from numba_kernels.vectors import F32, I8, I16, I32, I64, Vectors

DOT_ROWS = (4, 2, 1)
LINE = 64  # bytes of a cache line
WEIGHT_ONE = 2**24 - 1  # the integer that three digits hold for a weight of 1
_INT, _FLOAT = types.int64, types.float32


class Tile(NamedTuple):
    """A function on tiles.

    Attributes:
      name: its symbol.
      signature: Numba's. All return an int64 that has no meaning.
      body: emits its code: `body(builder, *values)`.
    """

    name: str
    signature: Any
    body: Callable[..., None]

    @property
    def external(self) -> Any:
        """What Numba code calls."""
        return types.ExternalFunction(self.name, self.signature)


def make(form: Format, machine: Machine) -> dict[str, Tile]:
    """All of them, by name, for one format on one machine."""
    found = [
        _pack_keys(form, machine),
        _pack_values(form, machine),
        # The keys are the unsigned side of the scores, the weights that of the outputs.
        *(_dot(form, machine, rows, f"dot_scores{rows}", "b") for rows in DOT_ROWS),
        *(_dot(form, machine, rows, f"dot_values{rows}", "a") for rows in DOT_ROWS),
        _combine(form, machine),
        _weigh(form, machine),
        _fold(form, machine),
    ]
    return {tile.name: tile for tile in found}


def module_of(tiles: dict[str, Tile]) -> ir.Module:
    """The LLVM module with their code."""
    module = ir.Module("jax_ifa_tiles")
    kinds = {_INT: I64, _FLOAT: F32}
    for tile in tiles.values():
        function = ir.Function(module, ir.FunctionType(I64, [kinds[x] for x in tile.signature.args]), tile.name)
        builder = ir.IRBuilder(function.append_basic_block())
        tile.body(builder, *function.args)
        builder.ret(ir.Constant(I64, 0))
    return module


class _Fetcher:
    """Has the next step's rows fetched into the processor's cache, a line at a time, while this one's are worked on.

    The memory must be busy all the time and never swamped, so every step of the work fetches as many lines as it has
    time for, in the order in which they lie in memory. How far that is stands in a `plan` of five int64: the address of
    the rows' addresses, the index of the last row, the bytes of a row, and the row and the byte in it that come next.
    """

    def __init__(self, v: Vectors, plan: ir.Value) -> None:
        self.v, self.plan = v, plan
        self.rows, self.last, self.size = (v.load(v.address(plan, i, 8), I64) for i in range(3))
        self.row, self.byte = (cgutils.alloca_once(v.builder, I64) for _ in range(2))
        for i, place in ((3, self.row), (4, self.byte)):
            v.builder.store(v.load(v.address(plan, i, 8), I64), place)

    def fetch(self) -> None:
        """One line; after the last row, that one over and over, which costs nothing."""
        v, builder = self.v, self.v.builder
        row, byte = builder.load(self.row), builder.load(self.byte)
        v.prefetch(builder.add(v.load(v.address(self.rows, row, 8), I64), byte))
        next_byte = builder.add(byte, ir.Constant(I64, LINE))
        ends = builder.icmp_signed(">=", next_byte, self.size)
        builder.store(builder.select(ends, ir.Constant(I64, 0), next_byte), self.byte)
        next_row = builder.add(row, builder.zext(ends, I64))
        more = builder.icmp_signed("<", next_row, self.last)
        builder.store(builder.select(more, next_row, self.last), self.row)

    def keep(self) -> None:
        """Leave the place for the next function."""
        for i, place in ((3, self.row), (4, self.byte)):
            self.v.store(self.v.builder.load(place), self.v.address(self.plan, i, 8))


def _pack_keys(form: Format, machine: Machine) -> Tile:
    """(rows, plan, lines, blocks, head_dim, out): scores' B, (L, T) lanes, of `blocks` vectors of positions.

    L is head_dim / pack. `rows` holds the address of each position's key. Every square of them fetches `lines` lines by
    the `plan`.
    """
    lanes, step = machine.lanes, machine.lanes * form.pack

    def body(builder: ir.IRBuilder, rows: Any, plan: Any, lines: Any, blocks: Any, *rest_: Any) -> None:
        head_dim, out = rest_
        v = Vectors(builder, machine)
        fetcher = _Fetcher(v, plan)

        def square(block: ir.Value, first: ir.Value, count: ir.Value | None) -> None:
            offset = builder.mul(first, ir.Constant(I64, form.itemsize))
            read = []
            for i in range(lanes):
                position = builder.add(builder.mul(block, ir.Constant(I64, lanes)), ir.Constant(I64, i))
                row = v.load(v.address(rows, position, 8), I64)
                read.append(v.load_lanes(form, builder.add(row, offset), count))
            with v.loop(lines):
                fetcher.fetch()
            if form.integer:
                read = [builder.xor(x, v.constant(v.ints, 0x80808080 - 2**32)) for x in read]
            lane = builder.udiv(first, ir.Constant(I64, form.pack))
            for i, column in enumerate(v.transpose(read)):
                line = builder.add(lane, ir.Constant(I64, i))
                at = v.address(out, line, 4 * form.tile)
                v.store(column, v.address(at, block, 4 * lanes))

        whole = builder.udiv(head_dim, ir.Constant(I64, step))
        rest = builder.urem(head_dim, ir.Constant(I64, step))
        with v.loop(blocks) as block:
            with v.loop(whole) as part:
                square(block, builder.mul(part, ir.Constant(I64, step)), None)
            with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(I64, 0))):
                square(block, builder.mul(whole, ir.Constant(I64, step)), rest)
        fetcher.keep()

    return Tile("pack_keys", _INT(*[_INT] * 6), body)


def _pack_values(form: Format, machine: Machine) -> Tile:
    """(rows, plan, lines, groups, head_dim, columns, out): outputs' B, (groups, columns) lanes of `pack` positions.

    `rows`, `plan` and `lines` are as in `pack_keys`; `columns` is head_dim rounded up to `pack` vectors.
    """
    lanes, step = machine.lanes, machine.lanes * form.pack

    def body(builder: ir.IRBuilder, rows: Any, plan: Any, lines: Any, groups: Any, *rest_: Any) -> None:
        head_dim, columns, out = rest_
        v = Vectors(builder, machine)
        fetcher = _Fetcher(v, plan)

        def strip(group: ir.Value, first: ir.Value, count: ir.Value | None) -> None:
            offset = builder.mul(first, ir.Constant(I64, form.itemsize))
            read = []
            for i in range(form.pack):
                position = builder.add(builder.mul(group, ir.Constant(I64, form.pack)), ir.Constant(I64, i))
                row = v.load(v.address(rows, position, 8), I64)
                read.append(v.load_lanes(form, builder.add(row, offset), count))
            with v.loop(lines):
                fetcher.fetch()
            at = v.address(v.address(out, builder.mul(group, columns), 4), first, 4)
            for i, packed in enumerate(_interleaved(v, read)):
                v.store(packed, v.address(at, i, 4 * lanes))

        whole = builder.udiv(head_dim, ir.Constant(I64, step))
        rest = builder.urem(head_dim, ir.Constant(I64, step))
        with v.loop(groups) as group:
            with v.loop(whole) as part:
                strip(group, builder.mul(part, ir.Constant(I64, step)), None)
            with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(I64, 0))):
                strip(group, builder.mul(whole, ir.Constant(I64, step)), rest)
        fetcher.keep()

    return Tile("pack_values", _INT(*[_INT] * 7), body)


def _interleaved(v: Vectors, rows: list[ir.Value]) -> list[ir.Value]:
    """1, 2 or 4 rows of elements, as vectors whose lanes hold one element of each row."""
    builder = v.builder
    if len(rows) == 1:
        return rows
    if len(rows) == 2:
        halves = [builder.bitcast(row, ir.VectorType(I16, 2 * v.lanes)) for row in rows]
        return [v.as_ints(x) for x in v.interleave(*halves)]
    first, second, third, fourth = (builder.bitcast(row, ir.VectorType(I8, 4 * v.lanes)) for row in rows)
    packed = []
    for a, b in zip(v.interleave(first, second), v.interleave(third, fourth), strict=True):
        pairs = [builder.bitcast(x, ir.VectorType(I16, 2 * v.lanes)) for x in (a, b)]
        packed += [v.as_ints(x) for x in v.interleave(*pairs)]
    return packed


def _dot(form: Format, machine: Machine, rows: int, name: str, unsigned: str) -> Tile:
    """(a, a_stride, b, b_stride, length, blocks, initial, c, c_stride, plan): `rows` rows of C.

    Strides are in lanes, `blocks` in vectors. `initial` holds an int32 for each row, which an integer product starts
    from. C is float32, or int32 if the product is.

    Every step of the sum fetches one line by the `plan`.
    """

    def body(builder: ir.IRBuilder, a: Any, a_stride: Any, b: Any, b_stride: Any, length: Any, *rest: Any) -> None:
        blocks, initial, c, c_stride, plan = rest
        v = Vectors(builder, machine)
        kind = v.ints if form.integer else v.floats
        a_rows = [v.address(a, builder.mul(a_stride, ir.Constant(I64, g)), 4) for g in range(rows)]
        fetcher = _Fetcher(v, plan)

        def block(first: ir.Value, width: int) -> None:
            totals = [[cgutils.alloca_once(builder, kind) for _ in range(width)] for _ in range(rows)]
            for g, row in enumerate(totals):
                start = v.constant(v.floats, 0.0)
                if form.integer:
                    start = v.splat(v.load(v.address(initial, g, 4), I32))
                for total in row:
                    builder.store(start, total)
            base = v.address(b, first, 4 * v.lanes)

            def add(begin: ir.Value, steps: ir.Value) -> None:
                with v.loop(steps) as index:
                    fetcher.fetch()
                    step = builder.add(begin, index)
                    at = v.address(base, builder.mul(step, b_stride), 4)
                    columns = [v.load(v.address(at, i, 4 * v.lanes), v.ints) for i in range(width)]
                    for g, row in enumerate(totals):
                        lane = v.splat(v.load(v.address(a_rows[g], step, 4), I32))
                        for total, column in zip(row, columns, strict=True):
                            builder.store(v.dot(builder.load(total), lane, column, form.pack, unsigned), total)

            def places() -> Iterator[tuple[ir.Value, ir.Value]]:
                for g, row in enumerate(totals):
                    at = v.address(v.address(c, builder.mul(c_stride, ir.Constant(I64, g)), 4), first, 4 * v.lanes)
                    for i, total in enumerate(row):
                        yield total, v.address(at, i, 4 * v.lanes)

            # A sum of float32 in two halves has the smaller rounding error; the others are exact, or half as long.
            half = builder.udiv(length, ir.Constant(I64, 2)) if form.pack == 1 else ir.Constant(I64, 0)
            if form.pack == 1:
                add(ir.Constant(I64, 0), half)
                for total, place in places():
                    v.store(builder.load(total), place)
                    builder.store(v.constant(kind, 0.0), total)
            add(half, builder.sub(length, half))
            for total, place in places():
                if form.pack == 1:
                    builder.store(builder.fadd(v.load(place, kind), builder.load(total)), total)
                v.store(builder.load(total), place)

        # Wide blocks while they are whole, then narrower ones.
        done, width = ir.Constant(I64, 0), machine.columns
        while width:
            whole = builder.udiv(builder.sub(blocks, done), ir.Constant(I64, width))
            with v.loop(whole) as part:
                block(builder.add(done, builder.mul(part, ir.Constant(I64, width))), width)
            done = builder.add(done, builder.mul(whole, ir.Constant(I64, width)))
            width //= 2
        fetcher.keep()

    return Tile(name, _INT(*[_INT] * 10), body)


def _combine(form: Format, machine: Machine) -> Tile:
    """(c, stride, blocks, weight, out): out = weight * (the row of C, or its digits put together)."""

    def body(builder: ir.IRBuilder, c: Any, stride: Any, blocks: Any, weight: Any, out: Any) -> None:
        v = Vectors(builder, machine)
        weight = v.splat(weight)
        with v.loop(blocks) as block:
            total = _digits_together(v, form, v.address(c, block, 4 * v.lanes), stride, form.query_digits)
            v.store(builder.fmul(total, weight), v.address(out, block, 4 * v.lanes))

    return Tile("combine", _INT(_INT, _INT, _INT, _FLOAT, _INT), body)


def _digits_together(v: Vectors, form: Format, at: ir.Value, stride: ir.Value, digits: int) -> ir.Value:
    """A vector of C as float32: high * 2**16 + middle * 2**8 + low, or high + low of bfloat16."""
    total = v.load(at, v.floats) if not form.integer else v.builder.sitofp(v.load(at, v.ints), v.floats)
    for digit in range(1, digits):  # the highest first
        row = v.address(at, v.builder.mul(stride, ir.Constant(I64, digit)), 4)
        if form.integer:
            part = v.builder.sitofp(v.load(row, v.ints), v.floats)
            total = v.float_function("fma", total, v.constant(v.floats, 256.0), part)
        else:
            total = v.builder.fadd(total, v.load(row, v.floats))
    return total


def _weigh(form: Format, machine: Machine) -> Tile:
    """(scores, weights, stride, summary): weights = exp(score - top) of a whole tile, as rows of A.

    `stride` is between the digits' rows, in lanes. `summary` takes two float32: `top`, the largest score, -inf if all
    are; and the sum of the weights, NaN if a score is NaN.
    """
    count = form.tile // machine.lanes

    def body(builder: ir.IRBuilder, scores: Any, weights: Any, stride: Any, summary: Any) -> None:
        v = Vectors(builder, machine)
        read = [v.load(v.address(scores, i, 4 * v.lanes), v.floats) for i in range(count)]
        highest = read[0]
        for x in read[1:]:
            highest = v.float_function("maxnum", highest, x)
        top = v.reduce("maxnum", highest)
        none = builder.fcmp_ordered("==", top, ir.Constant(F32, float("-inf")))
        shift = v.splat(builder.select(none, ir.Constant(F32, 0.0), top))
        total = v.constant(v.floats, 0.0)
        for i, x in enumerate(read):
            weight = v.exp(builder.fsub(x, shift))
            total = builder.fadd(total, weight)
            _store_weight(v, form, weight, weights, stride, i)
        v.store(top, summary)
        v.store(v.reduce("fadd", total), v.address(summary, 1, 4))

    return Tile("weigh", _INT(*[_INT] * 4), body)


def _store_weight(v: Vectors, form: Format, weight: ir.Value, at: ir.Value, stride: ir.Value, index: int) -> None:
    """Vector `index` of the weights, into the row or rows of A."""
    builder, lanes = v.builder, v.lanes
    if form.pack == 1:
        v.store(weight, v.address(at, index, 4 * lanes))
    elif form.pack == 2:
        for digit in range(form.weight_digits):
            half, weight = v.round_to_bfloat16(weight)
            row = v.address(at, builder.mul(stride, ir.Constant(I64, digit)), 4)
            v.store(half, v.address(row, index, 2 * lanes))
    else:
        scaled = builder.fmul(weight, v.constant(v.floats, WEIGHT_ONE))
        # maxnum turns a NaN into a number: the sum of the weights is NaN by then, and so will the result be.
        whole = builder.fptosi(v.float_function("maxnum", scaled, v.constant(v.floats, 0.0)), v.ints)
        for digit in range(form.weight_digits):
            shift = v.constant(v.ints, 8 * (form.weight_digits - 1 - digit))
            byte = builder.trunc(builder.lshr(whole, shift), ir.VectorType(I8, lanes))
            row = v.address(at, builder.mul(stride, ir.Constant(I64, digit)), 4)
            v.store(byte, v.address(row, index, lanes))


def _fold(form: Format, machine: Machine) -> Tile:
    """(c, stride, blocks, fade, share, out): out = out * fade + share * (the row of C, its digits put together).

    A factor of 0 forgets even a NaN.
    """

    def body(builder: ir.IRBuilder, c: Any, stride: Any, blocks: Any, fade: Any, share: Any, out: Any) -> None:
        v = Vectors(builder, machine)
        if form.integer:
            share = builder.fmul(share, ir.Constant(F32, 1.0 / WEIGHT_ONE))
        forget, ignore = (builder.fcmp_ordered("==", x, ir.Constant(F32, 0.0)) for x in (fade, share))
        fade, share, zero = v.splat(fade), v.splat(share), v.constant(v.floats, 0.0)
        with v.loop(blocks) as block:
            total = _digits_together(v, form, v.address(c, block, 4 * v.lanes), stride, form.weight_digits)
            part = builder.fmul(total, share)
            part = builder.select(ignore, zero, part)
            at = v.address(out, block, 4 * v.lanes)
            old = builder.select(forget, zero, v.load(at, v.floats))
            v.store(v.float_function("fma", old, fade, part), at)

    return Tile("fold", _INT(_INT, _INT, _INT, _FLOAT, _FLOAT, _INT), body)
