"""The steps on a tile of positions, as functions of vector instructions.

    scores    scores[head, position] = weight * sum_d query[head, d] * key[position, d]
    weigh     scores -> softmax weights; what the old output and the tile's are multiplied by
    values    out[head, d] = fade * out + share * sum_position weights[head, position] * value[position, d]

Rows of the cache are read where they lie, once for a few heads, and all that is made of them stays in registers. Only
int8 keys are packed first, for all heads. The memory is kept busy meanwhile: every step of the work has as many lines
of the next tile fetched as it reads.

All take addresses as int64: they work on memory of XLA's and on scratch, and nothing there has a Python object. They
are emitted straight as LLVM IR, into a module of their own; the Numba code sees them as external functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils

from numba_kernels.formats import Format
from numba_kernels.machine import Machine
from numba_kernels.vectors import F32, I8, I32, I64, LINE, Vectors

_INT = types.int64


class Tile(NamedTuple):
    """A function on tiles.

    Attributes:
      name: its symbol.
      arguments: how many int64 it takes. All return an int64 that has no meaning.
      body: emits its code: `body(v, *values)`.
    """

    name: str
    arguments: int
    body: Callable[..., None]

    @property
    def external(self) -> Any:
        """What Numba code calls."""
        return types.ExternalFunction(self.name, _INT(*[_INT] * self.arguments))


def make(form: Format, machine: Machine) -> dict[str, Tile]:
    """All of them, by name, for one format on one machine; what others call comes first."""
    tiles = [_weigh(form)] + ([_pack_keys(form)] if form.integer else [])
    for name, kind in (("scores", _packed_scores if form.integer else _scores), ("values", _values)):
        parts = {heads: kind(form, machine, heads) for heads in _heads_at_once(form, machine)}
        tiles += [*parts.values(), _for_a_group(name, form, parts)]
    return {tile.name: tile for tile in tiles}


def _heads_at_once(form: Format, machine: Machine) -> list[int]:
    """The numbers of query heads that `scores` and `values` are made for, largest first."""
    most = machine.registers // (8 if form.integer else 4)
    return [heads for heads in (8, 4, 2, 1) if heads <= most]


def module_of(tiles: dict[str, Tile], machine: Machine) -> ir.Module:
    """The LLVM module with their code."""
    module = ir.Module("jax_ifa_tiles")
    for tile in tiles.values():
        function = ir.Function(module, ir.FunctionType(I64, [I64] * tile.arguments), tile.name)
        builder = ir.IRBuilder(function.append_basic_block())
        tile.body(Vectors(builder, machine), *function.args)
        builder.ret(ir.Constant(I64, 0))
    return module


def _for_a_group(name: str, form: Format, parts: dict[int, Tile]) -> Tile:
    """(group, *what a part takes): the step `name` for all heads of a group, in parts of so many heads.

    Of what a part takes, the first four are moved on from part to part; see `_strides`. Instead of the rows to be
    fetched a part takes the place where the last one stopped, and how many parts there are to share the fetching.
    """

    def body(v: Vectors, group: Any, *arguments: Any) -> None:
        builder = v.builder
        *moving, rows, ahead, count, head_dim = arguments
        strides = _strides(name, v, form, head_dim)
        done = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))
        place = builder.ptrtoint(cgutils.alloca_once(builder, I64, 2), I64)
        v.store(ahead, place)
        v.store(ir.Constant(I64, 0), v.address(place, 1, 8))
        sharing, left = ir.Constant(I64, 0), group
        for heads in parts:
            sharing = builder.add(sharing, builder.udiv(left, ir.Constant(I64, heads)))
            left = builder.urem(left, ir.Constant(I64, heads))
        for heads, part in parts.items():
            with v.loop(builder.udiv(builder.sub(group, builder.load(done)), ir.Constant(I64, heads))):
                first = builder.load(done)
                moved = [builder.add(x, builder.mul(first, stride)) for x, stride in zip(moving, strides, strict=True)]
                function = builder.module.get_global(part.name)
                last = v.address(ahead, form.tile - 1, 8)
                builder.call(function, (*moved, rows, place, last, sharing, count, head_dim))
                builder.store(builder.add(first, ir.Constant(I64, heads)), done)

    return Tile(name, 9, body)


def _strides(name: str, v: Vectors, form: Format, head_dim: ir.Value) -> list[ir.Value]:
    """Bytes from a head to the next in the first four arguments of a step."""
    padded = _padded(v, form, head_dim)
    if name == "scores":
        query = v.builder.mul(padded, ir.Constant(I64, 4 // form.pack * form.query_digits))
        return [query, *(ir.Constant(I64, x) for x in (4 * form.query_digits, 4, 4 * form.tile))]
    weights = 4 * form.weight_digits * (form.tile // form.pack)
    return [*(ir.Constant(I64, x) for x in (weights, 4, 4)), v.builder.mul(padded, ir.Constant(I64, 4))]


def _padded(v: Vectors, form: Format, head_dim: ir.Value) -> ir.Value:
    """D, rounded up to whole vectors of the cache's elements."""
    size = ir.Constant(I64, v.lanes * form.pack)
    more = v.builder.add(head_dim, ir.Constant(I64, v.lanes * form.pack - 1))
    return v.builder.mul(v.builder.udiv(more, size), size)


class _Fetcher:
    """Has rows fetched into the processor's cache a line at a time, in the order in which they lie in memory.

    The memory must be busy all the time and never swamped: every step of the work fetches as many lines as it has time
    for, which is as many as it reads.
    """

    def __init__(
        self, v: Vectors, form: Format, place: ir.Value, last: ir.Value, sharing: ir.Value, *, head_dim: ir.Value
    ) -> None:
        """`place` is where the address of the next row's address and the byte in that row stand."""
        self.v, self.place, self.last, self.sharing = v, place, last, sharing
        self.size = v.builder.mul(head_dim, ir.Constant(I64, form.itemsize))
        self.row, self.byte = (
            cgutils.alloca_once_value(v.builder, v.load(v.address(place, i, 8), I64)) for i in range(2)
        )

    def fetch(self, lines: int) -> None:
        """Share in fetching so many lines; after the last row, that one over and over, which costs nothing."""
        v, builder = self.v, self.v.builder
        with builder.goto_entry_block():
            share = builder.udiv(builder.add(self.sharing, ir.Constant(I64, lines - 1)), self.sharing)
        with v.loop(share):
            row, byte = builder.load(self.row), builder.load(self.byte)
            v.prefetch(builder.add(v.load(row, I64), byte))
            next_byte = builder.add(byte, ir.Constant(I64, LINE))
            ends = builder.icmp_signed(">=", next_byte, self.size)
            builder.store(builder.select(ends, ir.Constant(I64, 0), next_byte), self.byte)
            next_row = builder.select(ends, v.address(row, 1, 8), row)
            more = builder.icmp_signed("<", row, self.last)
            builder.store(builder.select(more, next_row, self.last), self.row)

    def keep(self) -> None:
        """Leave the place for the next part."""
        for i, x in enumerate((self.row, self.byte)):
            self.v.store(self.v.builder.load(x), self.v.address(self.place, i, 8))


def _walk(v: Vectors, form: Format, head_dim: ir.Value, wide: int, step: Callable[..., None]) -> None:
    """`step(first, width, count)` for all elements of a row: `width` vectors of them from element `first` on.

    As many vectors at a time as `wide` says while there are, then half as many, and so on; then, with one vector, the
    `count` elements that are left. Otherwise count is None.
    """
    builder, size = v.builder, v.lanes * form.pack
    done = ir.Constant(I64, 0)
    while wide:
        span = ir.Constant(I64, size * wide)
        whole = builder.udiv(builder.sub(head_dim, done), span)
        with v.loop(whole) as index:
            step(builder.add(done, builder.mul(index, span)), wide, None)
        done = builder.add(done, builder.mul(whole, span))
        wide //= 2
    rest = builder.sub(head_dim, done)
    with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(I64, 0))):
        step(done, 1, rest)


def _scores(form: Format, machine: Machine, heads: int) -> Tile:
    """(query, initial, weights, out, rows, *fetching, count, head_dim): scores of `heads` query heads.

    `query` is (heads, D padded) lanes, `weights` a float32 for each head, `out` (heads, T) float32. `rows` holds the
    addresses of a tile's keys, of which `count` count.
    """
    positions = machine.registers // 2 // heads  # for these, sums fill half of the registers

    def body(v: Vectors, query: Any, _: Any, weights: Any, out: Any, rows: Any, *rest: Any) -> None:
        *fetching, count, head_dim = rest
        builder, size = v.builder, 4 * v.lanes
        blocks = builder.udiv(builder.add(count, ir.Constant(I64, positions - 1)), ir.Constant(I64, positions))
        stride = builder.mul(_padded(v, form, head_dim), ir.Constant(I64, 4 // form.pack))
        queries = [builder.add(query, builder.mul(stride, ir.Constant(I64, h))) for h in range(heads)]
        totals = [[cgutils.alloca_once(builder, v.floats) for _ in range(positions)] for _ in queries]
        factors = [v.load(v.address(weights, h, 4), F32) for h in range(heads)]
        fetcher = _Fetcher(v, form, *fetching, head_dim=head_dim)

        with v.loop(blocks) as block:
            first_position = builder.mul(block, ir.Constant(I64, positions))
            here = [v.load(v.address(v.address(rows, first_position, 8), p, 8), I64) for p in range(positions)]
            for total in (x for row in totals for x in row):
                builder.store(v.constant(v.floats, 0.0), total)

            def step(first: ir.Value, width: int, count: ir.Value | None) -> None:
                offset = builder.mul(first, ir.Constant(I64, form.itemsize))
                at = builder.mul(first, ir.Constant(I64, 4 // form.pack))
                fetcher.fetch(max(1, positions * width * form.itemsize * form.pack * v.lanes // LINE))
                for i in range(width):
                    keys = [v.load_lanes(form, builder.add(row, offset), i, count) for row in here]
                    for start, sums in zip(queries, totals, strict=True):
                        q = v.load(v.address(builder.add(start, at), i, size), v.ints)
                        for key, total in zip(keys, sums, strict=True):
                            builder.store(v.dot(builder.load(total), q, key, form.pack, "b"), total)

            _walk(v, form, head_dim, max(1, LINE // (v.lanes * form.pack * form.itemsize)), step)
            together = [builder.load(total) for row in totals for total in row]
            group = min(len(together), v.lanes)
            run = min(group, positions)
            for begin in range(0, len(together), group):
                sums = v.sums(together[begin : begin + group])
                for i in range(0, group, run):
                    h, p = divmod(begin + i, positions)
                    part = v.shuffle(sums, sums, range(i, i + run))
                    part = builder.fmul(part, v.splat(factors[h], run))
                    line = v.address(out, h * form.tile + p, 4)
                    v.store(part, v.address(line, first_position, 4))
        fetcher.keep()

    return Tile(f"scores{heads}", 10, body)


def _pack_keys(form: Format) -> Tile:
    """(rows, count, head_dim, out): a tile of int8 keys with positions side by side, raised by 128 to be unsigned.

    `out` is (D padded / 4, T) lanes of 4 elements.
    """

    def body(v: Vectors, rows: Any, count: Any, head_dim: Any, out: Any) -> None:
        builder, lanes = v.builder, v.lanes
        blocks = builder.udiv(builder.add(count, ir.Constant(I64, lanes - 1)), ir.Constant(I64, lanes))
        with v.loop(blocks) as block:
            place = v.address(rows, block, 8 * lanes)
            here = [v.load(v.address(place, i, 8), I64) for i in range(lanes)]

            def square(first: ir.Value, _: int, count: ir.Value | None) -> None:
                read = [v.load_lanes(form, builder.add(row, first), 0, count) for row in here]
                turned = v.transpose([builder.xor(x, v.constant(v.ints, 0x80808080 - 2**32)) for x in read])
                at = builder.add(v.address(out, first, form.tile), v.address(ir.Constant(I64, 0), block, 4 * lanes))
                for i, column in enumerate(turned):
                    v.store(column, v.address(at, i, 4 * form.tile))

            _walk(v, form, head_dim, 1, square)

    return Tile("pack_keys", 4, body)


def _packed_scores(form: Format, machine: Machine, heads: int) -> Tile:
    """(query, initial, weights, out, packed, *fetching, count, head_dim): scores of `heads` query heads for int8 keys.

    `query` is (heads, digits, D padded) int8; `initial` holds an int32 for each digit, from which its sums start: it
    takes back what the keys are raised by. `weights` is a float32 for each head, `out` (heads, T) float32, `packed` as
    `pack_keys` leaves it.
    """
    digits = form.query_digits
    columns = min(machine.registers // 4 // heads, machine.registers // 8)  # vectors of positions at a time
    passes = form.tile // machine.lanes // columns

    def body(v: Vectors, query: Any, initial: Any, weights: Any, out: Any, packed: Any, *rest: Any) -> None:
        *fetching, _, head_dim = rest
        builder, size = v.builder, 4 * v.lanes
        stride = _padded(v, form, head_dim)
        queries = [builder.add(query, builder.mul(stride, ir.Constant(I64, i))) for i in range(heads * digits)]
        totals = [[cgutils.alloca_once(builder, v.ints) for _ in range(columns)] for _ in queries]
        length = builder.udiv(builder.add(head_dim, ir.Constant(I64, 3)), ir.Constant(I64, 4))
        fetcher = _Fetcher(v, form, *fetching, head_dim=head_dim)

        with v.loop(ir.Constant(I64, passes)) as number:
            for i, row in enumerate(totals):
                for total in row:
                    builder.store(v.splat(v.load(v.address(initial, i, 4), I32)), total)
            base = v.address(packed, number, size * columns)
            with v.loop(length) as step:
                fetcher.fetch(max(1, 4 * form.tile // LINE // passes))
                at = v.address(base, step, 4 * form.tile)
                keys = [v.load(v.address(at, i, size), v.ints) for i in range(columns)]
                for start, sums in zip(queries, totals, strict=True):
                    q = v.splat(v.load(v.address(start, step, 4), I32))
                    for key, total in zip(keys, sums, strict=True):
                        builder.store(v.dot(builder.load(total), q, key, form.pack, "b"), total)
            for h in range(heads):
                factor = v.splat(v.load(v.address(weights, h, 4), F32))
                for i in range(columns):
                    sums = [builder.load(totals[h * digits + digit][i]) for digit in range(digits)]
                    score = builder.fmul(_digits_together(v, form, sums), factor)
                    v.store(score, v.address(v.address(out, number, size * columns), h * form.tile + i * v.lanes, 4))
        fetcher.keep()

    return Tile(f"scores{heads}", 10, body)


def _digits_together(v: Vectors, form: Format, digits: list[ir.Value]) -> ir.Value:
    """Sums of digits, the highest first, as float32: high * 2**16 + middle * 2**8 + low."""
    if not form.integer:
        (total,) = digits
        return total
    total, *lower = (v.builder.sitofp(digit, v.floats) for digit in digits)
    for digit in lower:
        total = v.float_function("fma", total, v.constant(v.floats, 256.0), digit)
    return total


def _weigh(form: Format) -> Tile:
    """(heads, count, scores, weights, factors, state): weights = exp(score - top), as the digits `values` reads.

    `scores` is (heads, T) float32, of which `count` count; `weights` (heads, digits, T / pack) lanes. `factors` is
    (4, H) float32, where H is `heads` rounded up to whole vectors: `top`, each head's largest score, -inf if all are;
    the sum of its weights, NaN if a score is NaN; and what the output so far and the tile's are multiplied by. `state`
    is (2, H) float32, the largest score and the sum of weights so far, and is brought up to date.
    """

    def body(v: Vectors, heads: Any, count: Any, scores: Any, weights: Any, factors: Any, state: Any) -> None:
        builder, vectors = v.builder, form.tile // v.lanes
        count = v.splat(builder.trunc(count, I32))
        blocks = builder.udiv(builder.add(heads, ir.Constant(I64, v.lanes - 1)), ir.Constant(I64, v.lanes))
        size = builder.mul(blocks, ir.Constant(I64, 4 * v.lanes))
        tops, totals, fades, shares = (builder.add(factors, builder.mul(size, ir.Constant(I64, i))) for i in range(4))
        nothing, zero = v.constant(v.floats, float("-inf")), v.constant(v.floats, 0.0)

        with v.loop(heads) as h:
            row = v.address(scores, h, 4 * form.tile)
            read = []
            for i in range(vectors):
                score = v.load(v.address(row, i, 4 * v.lanes), v.floats)
                place = ir.Constant(v.ints, list(range(v.lanes * i, v.lanes * (i + 1))))
                read.append(builder.select(builder.icmp_signed("<", place, count), score, nothing))
            top = v.reduce("max", read)
            none = builder.fcmp_ordered("==", top, ir.Constant(F32, float("-inf")))
            shift = v.splat(builder.select(none, ir.Constant(F32, 0.0), top))
            exps = [v.exp(builder.fsub(x, shift)) for x in read]
            line = v.address(weights, h, 4 * form.weight_digits * (form.tile // form.pack))
            exps = [_store_weight(v, form, weight, line, i) for i, weight in enumerate(exps)]
            v.store(top, v.address(tops, h, 4))
            v.store(v.reduce("fadd", exps), v.address(totals, h, 4))

        with v.loop(blocks) as block:
            top, total, old_top, old_total = (
                v.load(v.address(base, block, 4 * v.lanes), v.floats)
                for base in (tops, totals, state, builder.add(state, size))
            )
            new_top = v.float_function("maxnum", old_top, top)
            fade, share = (
                builder.select(builder.fcmp_ordered("==", sum_, zero), zero, v.exp(builder.fsub(x, new_top)))
                for x, sum_ in ((old_top, old_total), (top, total))
            )
            total = builder.fadd(builder.fmul(old_total, fade), builder.fmul(total, share))
            for value, base in ((fade, fades), (share, shares), (new_top, state), (total, builder.add(state, size))):
                v.store(value, v.address(base, block, 4 * v.lanes))

    return Tile("weigh", 6, body)


def _weight_of_one(form: Format) -> int:
    """The integer that the digits of a weight of 1 hold."""
    return int(256**form.weight_digits) - 1


def _store_weight(v: Vectors, form: Format, weight: ir.Value, at: ir.Value, index: int) -> ir.Value:
    """Vector `index` of a head's weights, into the row or rows of its digits; and what to sum of it.

    Two bytes are rounded, and the sum is of what they hold, so that many weights too small for them do no harm. Three
    hold more than a float32 of 1 does in its last place, and are cut off.
    """
    builder, lanes, summed = v.builder, v.lanes, weight
    rows = [v.address(at, i, 4 * (form.tile // form.pack)) for i in range(form.weight_digits)]
    if form.pack == 1:
        v.store(weight, v.address(rows[0], index, 4 * lanes))
    elif form.pack == 2:
        for row in rows:
            half, weight = v.round_to_bfloat16(weight)
            v.store(half, v.address(row, index, 2 * lanes))
    else:
        one = _weight_of_one(form)
        scaled = builder.fmul(weight, v.constant(v.floats, one))
        if form.weight_digits < 3:
            scaled = v.float_function("rint", scaled)
            summed = builder.fmul(scaled, v.constant(v.floats, 1.0 / one))
        # maxnum turns a NaN into a number: the sum of the weights is NaN by then, and so will the result be.
        whole = builder.fptosi(v.float_function("maxnum", scaled, v.constant(v.floats, 0.0)), v.ints)
        for digit, row in enumerate(rows):
            shift = v.constant(v.ints, 8 * (form.weight_digits - 1 - digit))
            byte = builder.trunc(builder.lshr(whole, shift), ir.VectorType(I8, lanes))
            v.store(byte, v.address(row, index, lanes))
    return summed


def _values(form: Format, machine: Machine, heads: int) -> Tile:
    """(weights, fades, shares, out, rows, *fetching, count, head_dim): the outputs of `heads` query heads.

    The first three are as `weigh` leaves them, from the first of the heads on; `out` is (heads, D padded) float32.
    `rows` holds the addresses of a tile's values, of which `count` count. A factor of 0 forgets even a NaN.
    """
    digits, tile_lanes = form.weight_digits, form.tile // form.pack
    sums = digits if form.integer else 1  # digits that are floats are summed as one
    wide = 1 if form.integer else max(1, min(8, machine.registers // 2 // heads) // form.pack)  # vectors of a row
    at_once = 2 if form.integer else form.pack  # of the `pack` vectors that these become: more would not fit

    def body(v: Vectors, weights: Any, fades: Any, shares: Any, out: Any, rows: Any, *rest: Any) -> None:
        *fetching, positions, head_dim = rest
        builder, size = v.builder, 4 * v.lanes
        kind = v.ints if form.integer else v.floats
        columns = _padded(v, form, head_dim)
        fetcher = _Fetcher(v, form, *fetching, head_dim=head_dim)
        groups = builder.udiv(builder.add(positions, ir.Constant(I64, form.pack - 1)), ir.Constant(I64, form.pack))

        def products(first: ir.Value, width: int, count: ir.Value | None, which: range) -> list[list[list[ir.Value]]]:
            """[head][strip][which] sums over the tile, of some of the vectors that the rows' vectors become."""
            offset = builder.mul(first, ir.Constant(I64, form.itemsize))
            totals = [
                [[[cgutils.alloca_once(builder, kind) for _ in range(sums)] for _ in which] for _ in range(width)]
                for _ in range(heads)
            ]
            for total in (x for head in totals for strip in head for column in strip for x in column):
                builder.store(v.constant(kind, 0), total)
            with v.loop(groups) as group:
                place = v.address(rows, group, 8 * form.pack)
                here = [v.load(v.address(place, i, 8), I64) for i in range(form.pack)]
                fetcher.fetch(max(1, len(which) * width * v.lanes * form.pack * form.itemsize // LINE))
                lines = v.address(weights, group, 4)
                lanes = [
                    [v.splat(v.load(v.address(lines, (h * digits + i) * tile_lanes, 4), I32)) for i in range(digits)]
                    for h in range(heads)
                ]
                for strip in range(width):
                    read = [v.load_lanes(form, builder.add(row, offset), strip, count) for row in here]
                    found = v.interleave(read)
                    for h in range(heads):
                        for i, column in enumerate(which):
                            for digit in range(digits):
                                total = totals[h][strip][i][digit % sums]
                                product = v.dot(builder.load(total), lanes[h][digit], found[column], form.pack, "a")
                                builder.store(product, total)
            return [
                [[_digits_together(v, form, [builder.load(x) for x in column]) for column in strip] for strip in head]
                for head in totals
            ]

        def step(first: ir.Value, width: int, count: ir.Value | None) -> None:
            halves = [
                products(first, width, count, range(begin, begin + at_once)) for begin in range(0, form.pack, at_once)
            ]
            for h in range(heads):
                fade, share = (v.load(v.address(base, h, 4), F32) for base in (fades, shares))
                if form.integer:
                    share = builder.fmul(share, ir.Constant(F32, 1.0 / _weight_of_one(form)))
                forget, ignore = (builder.fcmp_ordered("==", x, ir.Constant(F32, 0.0)) for x in (fade, share))
                fade, share, zero = v.splat(fade), v.splat(share), v.constant(v.floats, 0.0)
                line = builder.add(
                    out, builder.mul(builder.add(builder.mul(columns, ir.Constant(I64, h)), first), ir.Constant(I64, 4))
                )
                for strip in range(width):
                    parts = [part for half in halves for part in half[h][strip]]
                    for i, part in enumerate(v.in_order(parts)):
                        at = v.address(line, strip * form.pack + i, size)
                        part = builder.select(ignore, zero, builder.fmul(part, share))
                        old = builder.select(forget, zero, v.load(at, v.floats))
                        v.store(v.float_function("fma", old, fade, part), at)

        _walk(v, form, head_dim, wide, step)
        fetcher.keep()

    return Tile(f"values{heads}", 10, body)
