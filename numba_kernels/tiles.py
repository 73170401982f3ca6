"""The steps on a tile of positions, as functions of vector instructions.

    scores    scores[head, position] = weight * sum_d query[head, d] * key[position, d]
    weigh     scores -> softmax weights; what the old output and the tile's are multiplied by
    values    out[head, d] = fade * out + share * sum_position weights[head, position] * value[position, d]

Rows of the cache are read where they lie, once for a few heads, and all that is made of them stays in registers. The
memory is kept busy meanwhile: every line that is read has the same line of the next tile's row fetched.

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

WEIGHT_ONE = 2**24 - 1  # the integer that three digits hold for a weight of 1
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
    tiles = [_weigh(form)]
    for name, kind in (("scores", _scores), ("values", _values)):
        parts = {heads: kind(form, machine, heads) for heads in _heads_at_once(form, machine)}
        tiles += [*parts.values(), _for_a_group(name, form, parts)]
    return {tile.name: tile for tile in tiles}


def _heads_at_once(form: Format, machine: Machine) -> list[int]:
    """The numbers of query heads that `scores` and `values` are made for, largest first."""
    most = machine.registers // (16 if form.integer else 4)
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

    Of what a part takes, the first four are moved on from part to part; see `_strides`. The next tile is fetched once.
    """

    def body(v: Vectors, group: Any, *arguments: Any) -> None:
        builder = v.builder
        *moving, rows, ahead, count, head_dim = arguments
        strides = _strides(name, v, form, head_dim)
        done, next_ = cgutils.alloca_once_value(builder, ir.Constant(I64, 0)), cgutils.alloca_once_value(builder, ahead)
        for heads, part in parts.items():
            times = builder.udiv(builder.sub(group, builder.load(done)), ir.Constant(I64, heads))
            with v.loop(times):
                first = builder.load(done)
                moved = [builder.add(x, builder.mul(first, stride)) for x, stride in zip(moving, strides, strict=True)]
                function = builder.module.get_global(part.name)
                builder.call(function, (*moved, rows, builder.load(next_), count, head_dim))
                builder.store(builder.add(first, ir.Constant(I64, heads)), done)
                builder.store(rows, next_)

    return Tile(name, 9, body)


def _strides(name: str, v: Vectors, form: Format, head_dim: ir.Value) -> list[ir.Value]:
    """Bytes from a head to the next in the first four arguments of a step."""
    padded = _padded(v, form, head_dim)
    if name == "scores":
        query = v.builder.mul(padded, ir.Constant(I64, 4 // form.pack * form.query_digits))
        return [query, *(ir.Constant(I64, x) for x in (4 * v.lanes * form.query_digits, 4, 4 * form.tile))]
    weights = 4 * form.weight_digits * (form.tile // form.pack)
    return [*(ir.Constant(I64, x) for x in (weights, 4, 4)), v.builder.mul(padded, ir.Constant(I64, 4))]


def _padded(v: Vectors, form: Format, head_dim: ir.Value) -> ir.Value:
    """D, rounded up to whole vectors of the cache's elements."""
    size = ir.Constant(I64, v.lanes * form.pack)
    more = v.builder.add(head_dim, ir.Constant(I64, v.lanes * form.pack - 1))
    return v.builder.mul(v.builder.udiv(more, size), size)


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
    """(query, initial, weights, out, rows, ahead, count, head_dim): scores of `heads` query heads.

    `query` holds their digits, each a padded row; `initial` a vector for each, from which an integer sum starts;
    `weights` a float32 for each head; `out` is (heads, T) float32. `rows` and `ahead` hold the addresses of a tile's
    keys, of which `count` count, and the next one's.
    """
    digits = form.query_digits
    positions = machine.registers // (4 if form.integer else 2) // heads  # for these, sums fill the registers

    def body(v: Vectors, query: Any, initial: Any, weights: Any, out: Any, *rest: Any) -> None:
        rows, ahead, count, head_dim = rest
        builder, size = v.builder, 4 * v.lanes
        blocks = builder.udiv(builder.add(count, ir.Constant(I64, positions - 1)), ir.Constant(I64, positions))
        stride = builder.mul(_padded(v, form, head_dim), ir.Constant(I64, 4 // form.pack))
        kind = v.ints if form.integer else v.floats
        queries = [builder.add(query, builder.mul(stride, ir.Constant(I64, i))) for i in range(heads * digits)]
        totals = [[cgutils.alloca_once(builder, kind) for _ in range(positions)] for _ in queries]
        factors = [v.load(v.address(weights, h, 4), F32) for h in range(heads)]

        with v.loop(blocks) as block:
            first_position = builder.mul(block, ir.Constant(I64, positions))
            here, next_ = (
                [v.load(v.address(v.address(base, first_position, 8), p, 8), I64) for p in range(positions)]
                for base in (rows, ahead)
            )
            for i, row in enumerate(totals):
                start = v.load(v.address(initial, i, size), kind) if form.integer else v.constant(kind, 0.0)
                for total in row:
                    builder.store(start, total)

            def step(first: ir.Value, width: int, count: ir.Value | None) -> None:
                offset = builder.mul(first, ir.Constant(I64, form.itemsize))
                at = builder.mul(first, ir.Constant(I64, 4 // form.pack))
                v.prefetch_all(next_, offset, width * v.lanes * form.pack * form.itemsize)
                for i in range(width):
                    keys = []
                    for row in here:
                        key = v.load_lanes(form, builder.add(row, offset), i, count)
                        keys.append(builder.xor(key, v.constant(v.ints, 0x80808080 - 2**32)) if form.integer else key)
                    for start, sums in zip(queries, totals, strict=True):
                        q = v.load(v.address(builder.add(start, at), i, size), v.ints)
                        for key, total in zip(keys, sums, strict=True):
                            # The keys are raised by 128 to be unsigned: `initial` takes it back.
                            builder.store(v.dot(builder.load(total), q, key, form.pack, "b"), total)

            _walk(v, form, head_dim, max(1, LINE // (v.lanes * form.pack * form.itemsize)), step)
            together = [
                _digits_together(v, form, [builder.load(totals[h * digits + i][p]) for i in range(digits)])
                for h in range(heads)
                for p in range(positions)
            ]
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

    return Tile(f"scores{heads}", 8, body)


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
            top = v.reduce("maxnum", read)
            none = builder.fcmp_ordered("==", top, ir.Constant(F32, float("-inf")))
            shift = v.splat(builder.select(none, ir.Constant(F32, 0.0), top))
            exps = [v.exp(builder.fsub(x, shift)) for x in read]
            line = v.address(weights, h, 4 * form.weight_digits * (form.tile // form.pack))
            for i, weight in enumerate(exps):
                _store_weight(v, form, weight, line, i)
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


def _store_weight(v: Vectors, form: Format, weight: ir.Value, at: ir.Value, index: int) -> None:
    """Vector `index` of a head's weights, into the row or rows of its digits."""
    builder, lanes = v.builder, v.lanes
    rows = [v.address(at, i, 4 * (form.tile // form.pack)) for i in range(form.weight_digits)]
    if form.pack == 1:
        v.store(weight, v.address(rows[0], index, 4 * lanes))
    elif form.pack == 2:
        for row in rows:
            half, weight = v.round_to_bfloat16(weight)
            v.store(half, v.address(row, index, 2 * lanes))
    else:
        scaled = builder.fmul(weight, v.constant(v.floats, WEIGHT_ONE))
        # maxnum turns a NaN into a number: the sum of the weights is NaN by then, and so will the result be.
        whole = builder.fptosi(v.float_function("maxnum", scaled, v.constant(v.floats, 0.0)), v.ints)
        for digit, row in enumerate(rows):
            shift = v.constant(v.ints, 8 * (form.weight_digits - 1 - digit))
            byte = builder.trunc(builder.lshr(whole, shift), ir.VectorType(I8, lanes))
            v.store(byte, v.address(row, index, lanes))


def _values(form: Format, machine: Machine, heads: int) -> Tile:
    """(weights, fades, shares, out, rows, ahead, count, head_dim): the outputs of `heads` query heads.

    The first three are as `weigh` leaves them, from the first of the heads on; `out` is (heads, D padded) float32.
    `rows` and `ahead` hold the addresses of a tile's values, of which `count` count, and the next one's. A factor of 0
    forgets even a NaN.
    """
    digits, tile_lanes = form.weight_digits, form.tile // form.pack
    sums = digits if form.integer else 1  # digits that are floats are summed as one
    wide = 1 if form.integer else max(1, min(8, machine.registers // 2 // heads) // form.pack)  # vectors of a row

    def body(v: Vectors, weights: Any, fades: Any, shares: Any, out: Any, *rest: Any) -> None:
        rows, ahead, positions, head_dim = rest
        builder, size = v.builder, 4 * v.lanes
        kind = v.ints if form.integer else v.floats
        columns = _padded(v, form, head_dim)
        groups = builder.udiv(builder.add(positions, ir.Constant(I64, form.pack - 1)), ir.Constant(I64, form.pack))

        def step(first: ir.Value, width: int, count: ir.Value | None) -> None:
            offset = builder.mul(first, ir.Constant(I64, form.itemsize))
            totals = [
                [[cgutils.alloca_once(builder, kind) for _ in range(width * form.pack)] for _ in range(sums)]
                for _ in range(heads)
            ]
            for total in (x for head in totals for row in head for x in row):
                builder.store(v.constant(kind, 0), total)
            with v.loop(groups) as group:
                here, next_ = (
                    [v.load(v.address(v.address(base, group, 8 * form.pack), i, 8), I64) for i in range(form.pack)]
                    for base in (rows, ahead)
                )
                v.prefetch_all(next_, offset, width * v.lanes * form.pack * form.itemsize)
                lines = v.address(weights, group, 4)
                lanes = [
                    [v.splat(v.load(v.address(lines, (h * digits + i) * tile_lanes, 4), I32)) for i in range(digits)]
                    for h in range(heads)
                ]
                for strip in range(width):
                    read = [v.load_lanes(form, builder.add(row, offset), strip, count) for row in here]
                    for i, column in enumerate(v.interleave(read)):
                        for h in range(heads):
                            for digit in range(digits):
                                total = totals[h][digit % sums][strip * form.pack + i]
                                product = v.dot(builder.load(total), lanes[h][digit], column, form.pack, "a")
                                builder.store(product, total)
            for h in range(heads):
                fade, share = (v.load(v.address(base, h, 4), F32) for base in (fades, shares))
                if form.integer:
                    share = builder.fmul(share, ir.Constant(F32, 1.0 / WEIGHT_ONE))
                forget, ignore = (builder.fcmp_ordered("==", x, ir.Constant(F32, 0.0)) for x in (fade, share))
                fade, share, zero = v.splat(fade), v.splat(share), v.constant(v.floats, 0.0)
                line = builder.add(
                    out, builder.mul(builder.add(builder.mul(columns, ir.Constant(I64, h)), first), ir.Constant(I64, 4))
                )
                for strip in range(width):
                    parts = [
                        _digits_together(v, form, [builder.load(row[strip * form.pack + i]) for row in totals[h]])
                        for i in range(form.pack)
                    ]
                    for i, part in enumerate(v.in_order(parts)):
                        at = v.address(line, strip * form.pack + i, size)
                        part = builder.select(ignore, zero, builder.fmul(part, share))
                        old = builder.select(forget, zero, v.load(at, v.floats))
                        v.store(v.float_function("fma", old, fade, part), at)

        _walk(v, form, head_dim, wide, step)

    return Tile(f"values{heads}", 8, body)
