"""The steps on a tile of positions, as functions of vector instructions.

    series    numbers at equal distances, for lists of addresses and for zeros
    split     a query head as the digits that meet keys
    scores    scores[head, position] = weight * sum_d query[head, d] * key[position, d]
    weigh     scores -> softmax weights; what the old output and the tile's are multiplied by
    values    out[head, d] = fade * out + share * sum_position weights[head, position] * value[position, d]
    merge     the sums of a head over two ranges of positions
    divide    the sums of a head over the sum of its weights

`scores` and `values`, the products, are in dots.py, and as products of matrices in amx.py; the others are here.

Rows of the cache are read where they lie, once for a few heads, and what is made of them stays in registers, or in a
copy of a few KB until the next of these have read it. The memory is kept busy meanwhile: every step of the work has
as many lines of the next tile fetched as it reads.

All take addresses as int64: they work on memory of XLA's and on scratch, and nothing there has a Python object. They
are emitted straight as LLVM IR, into a module of their own; the Numba code sees them as external functions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from numba_kernels.fetching import Fetcher
from numba_kernels.formats import Format
from numba_kernels.machine import Machine
from numba_kernels.vectors import EXP_TERMS, EXP_TERMS_OF_16_BITS, F32, I16, I32, I64, Vectors

HEADS = (8, 4, 2, 1)  # the numbers of query heads that products are made for: each half of the one before
# Seven heads, parts of four, two and one, take longer than eight; and three than four, where vectors are short. Of the
# processors with long ones, it is known of these.
FOUR_FOR_THREE = ("znver5",)
SERIES = 8  # numbers of `series` in a line of memory
# By the number of digits: one of 16 bits, or two bytes with a highest of 127, whose products with 512 keys of -128, the
# largest D, have room in int32; or three bytes, of which the same holds for the higher two. Of three, what is left of a
# float32 query is below its own last place.
LARGEST_QUERY = {1: 2**15 - 1, 2: 127 * 2**8 + 127, 3: 127 * 2**16 + 127 * 2**8}


class Tile(NamedTuple):
    """A function on tiles.

    Attributes:
      name: its symbol.
      arguments: how many int64 it takes. All return an int64.
      body: emits its code: `body(v, *values)`. What it returns is the answer; None is one that has no meaning.
      number: whether it is a number of the format: nothing is left of it when all is optimised.
    """

    name: str
    arguments: int
    body: Callable[..., ir.Value | None]
    number: bool = False


def common(form: Format, machine: Machine) -> dict[str, Tile]:
    """The steps that all formats have, and the numbers that Numba code asks for, by name."""
    tiles = (_series(), _split(form), weigh(form), _merge(), _divide(), *numbers(form, machine))
    return {tile.name: tile for tile in tiles}


def numbers(form: Format, machine: Machine) -> list[Tile]:
    """The numbers of a format on a machine, as functions: when all is optimised, they are constants."""
    values = {
        "lanes": machine.lanes,
        "strip": form.strip(machine.lanes),
        "pack": form.pack,
        "itemsize": form.itemsize,
        "tile": form.tile,
        "least_tile": form.least_tile,
        "query_digits": form.query_digits,
        "query_heads": form.query_heads,
        "query_lanes": form.query_lanes,
        "weight_rows": form.weight_rows,
        "weight_lanes": form.weight_lanes,
        "amx": int(form.amx),
    }
    return [*(number(name, value) for name, value in values.items()), _group(form, machine)]


def _group(form: Format, machine: Machine) -> Tile:
    """(queries): query heads that are multiplied where so many share a kv head: see `FOUR_FOR_THREE`."""
    whole = 4 if machine.lanes < 16 or machine.cpu in FOUR_FOR_THREE else 8

    def body(v: Vectors, queries: Any) -> ir.Value:
        missing = v.builder.icmp_unsigned(
            "==", v.builder.urem(queries, ir.Constant(I64, whole)), ir.Constant(I64, whole - 1)
        )
        return queries if form.amx else v.builder.add(queries, v.builder.zext(missing, I64))

    return Tile("group", 1, body, number=True)


def number(name: str, value: int, arguments: int = 0) -> Tile:
    """A function that returns it, whatever it is called with."""
    return Tile(name, arguments, lambda v, *unused: ir.Constant(I64, value), number=True)


def module_of(tiles: dict[str, Tile], machine: Machine) -> ir.Module:
    """The LLVM module with their code."""
    module = ir.Module("jax_ifa_tiles")
    for tile in tiles.values():
        function = ir.Function(module, ir.FunctionType(I64, [I64] * tile.arguments), tile.name)
        builder = ir.IRBuilder(function.append_basic_block())
        answer = tile.body(Vectors(builder, machine), *function.args)
        builder.ret(ir.Constant(I64, 0) if answer is None else answer)
    return module


def padded(v: Vectors, form: Format, head_dim: ir.Value) -> ir.Value:
    """D, rounded up to what is read together."""
    size = form.strip(v.lanes)
    return v.builder.mul(v.over(head_dim, size), ir.Constant(I64, size))


def walk(v: Vectors, form: Format, head_dim: ir.Value, wide: int, step: Callable[..., None]) -> None:
    """`step(first, width, count)` for all elements of a row: `width` readings of them from element `first` on.

    As many readings at a time as `wide` says while there are, then half as many, and so on; then, with one reading, the
    `count` elements that are left. Otherwise count is None.
    """
    builder, size = v.builder, form.strip(v.lanes)
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


def digits_together(v: Vectors, form: Format, digits: list[ir.Value]) -> ir.Value:
    """Sums of digits, the highest first, as float32: of bytes high * 2**16 + middle * 2**8 + low."""
    if not form.integer:
        return functools.reduce(v.builder.fadd, reversed(digits))
    kind = ir.VectorType(F32, digits[0].type.count)
    total, *lower = (v.builder.sitofp(digit, kind) for digit in digits)
    for digit in lower:
        total = v.float_function("fma", total, v.constant(kind, 256.0), digit)
    return total


def _series() -> Tile:
    """(to, first, distance, count): int64 from `first` on: `count` and what fills the last line of memory."""

    def body(v: Vectors, to: Any, first: Any, distance: Any, count: Any) -> None:
        builder, kind = v.builder, ir.VectorType(I64, SERIES)
        places = builder.mul(v.splat(distance, SERIES), ir.Constant(kind, list(range(SERIES))))
        step = builder.mul(distance, ir.Constant(I64, SERIES))
        with v.loop(builder.udiv(builder.add(count, ir.Constant(I64, SERIES - 1)), ir.Constant(I64, SERIES))) as i:
            start = builder.add(first, builder.mul(i, step))
            v.store(builder.add(v.splat(start, SERIES), places), v.address(to, i, 8 * SERIES))

    return Tile("series", 4, body)


def _split(form: Format) -> Tile:
    """(query, scale, initial, weight, plain, head_dim): a query head as `plain` (digits, D padded), zeros behind D.

    `query` is float32. `initial` and `weight` of this head are as `scores` wants them; the latter has `scale` in it.
    """

    def body(v: Vectors, query: Any, scale: Any, initial: Any, weight: Any, plain: Any, head_dim: Any) -> None:
        builder, size = v.builder, 4 * v.lanes
        vectors = builder.udiv(padded(v, form, head_dim), ir.Constant(I64, v.lanes))
        row = builder.mul(vectors, ir.Constant(I64, size // form.pack))

        def read(i: ir.Value) -> ir.Value:
            left = builder.sub(head_dim, builder.mul(i, ir.Constant(I64, v.lanes)))
            return v.load_first(v.address(query, i, size), v.floats, left)

        factor = v.load(scale, F32)
        if not form.integer:
            v.store(factor, weight)
            with v.loop(builder.udiv(vectors, ir.Constant(I64, form.parts))) as i:
                first = builder.mul(i, ir.Constant(I64, form.parts))
                places = [v.address(first, j, 1) for j in range(form.parts)]
                for place, x in zip(places, v.apart([read(place) for place in places]), strict=True):
                    x = v.as_ints(x)
                    if form.pack == 2:  # a bfloat16 already
                        x = builder.trunc(builder.lshr(x, v.constant(v.ints, 16)), ir.VectorType(I16, v.lanes))
                    v.store(x, v.address(plain, place, size // form.pack))
            return

        zero, most, bits = v.constant(v.floats, 0.0), LARGEST_QUERY[form.query_digits], form.digit_bits
        largest, *sums = (v.variable_of(v.constant(v.ints, 0)) for _ in range(1 + form.query_digits))
        with v.loop(vectors) as i:  # as integers, of which infinity and NaN are the largest
            x = builder.and_(v.as_ints(read(i)), v.constant(v.ints, 2**31 - 1))
            builder.store(v.larger(x, builder.load(largest)), largest)
        found = builder.bitcast(v.reduce("max", [builder.load(largest)]), F32)
        finite = builder.fcmp_ordered("<", found, ir.Constant(F32, float("inf")))
        step = builder.fdiv(v.larger(found, ir.Constant(F32, 1e-30)), ir.Constant(F32, most))
        step = builder.select(finite, step, ir.Constant(F32, float("nan")))
        v.store(builder.fmul(factor, step), weight)
        inverse = v.splat(builder.fdiv(ir.Constant(F32, 1.0), step))
        with v.loop(vectors) as i:
            x = builder.fmul(read(i), inverse)
            inside = builder.fcmp_ordered("<=", v.float_function("fabs", x), v.constant(v.floats, most + 2))
            whole = builder.fptosi(v.float_function("rint", builder.select(inside, x, zero)), v.ints)
            for digit in reversed(range(form.query_digits)):
                half, ones = v.constant(v.ints, 2 ** (bits - 1)), v.constant(v.ints, 2**bits - 1)
                low = builder.sub(builder.and_(builder.add(whole, half), ones), half)
                whole = builder.ashr(builder.sub(whole, low), v.constant(v.ints, bits))
                to = builder.add(plain, builder.mul(row, ir.Constant(I64, digit)))
                kind = ir.VectorType(ir.IntType(bits), v.lanes)
                v.store(builder.trunc(low, kind), v.address(to, i, size // form.pack))
                builder.store(builder.add(builder.load(sums[digit]), low), sums[digit])
        if form.signed:
            return
        for digit, sum_ in enumerate(sums):  # what the keys are raised by is taken back
            raised = builder.mul(v.reduce("add", [builder.load(sum_)]), ir.Constant(I32, -128))
            v.store(raised, v.address(initial, digit, 4))

    return Tile("split", 6, body)


def _divide() -> Tile:
    """(sums, total, out, head_dim): `out` = `sums` / `total`, float32, and 0 where `total` is 0."""

    def body(v: Vectors, sums: Any, total: Any, out: Any, head_dim: Any) -> None:
        builder, zero = v.builder, ir.Constant(F32, 0.0)
        total = v.load(total, F32)
        inverse = builder.fdiv(ir.Constant(F32, 1.0), total)
        inverse = builder.select(builder.fcmp_ordered("==", total, zero), zero, inverse)
        whole = builder.udiv(head_dim, ir.Constant(I64, v.lanes))
        with v.loop(whole) as i:
            x = builder.fmul(v.load(v.address(sums, i, 4 * v.lanes), v.floats), v.splat(inverse))
            v.store(x, v.address(out, i, 4 * v.lanes))
        with v.loop(builder.urem(head_dim, ir.Constant(I64, v.lanes))) as i:
            place = builder.add(builder.mul(whole, ir.Constant(I64, v.lanes)), i)
            v.store(builder.fmul(v.load(v.address(sums, place, 4), F32), inverse), v.address(out, place, 4))

    return Tile("divide", 4, body)


def _merge() -> Tile:
    """(state, part, top, part_top, to_total, columns): fold the sums of a head in one state into those in another.

    The first two have so many columns, a multiple of the lanes; the largest scores are at the next two, and the sums of
    weights so many bytes behind these.
    """

    def body(v: Vectors, state: Any, part: Any, top: Any, part_top: Any, to_total: Any, columns: Any) -> None:
        builder, zero = v.builder, v.constant(v.floats, 0.0)
        total, part_total = (builder.add(x, to_total) for x in (top, part_top))
        found = [v.splat(v.load(x, F32)) for x in (top, total, part_top, part_total)]
        new_top, new_total, fade, share = _together(v, *found)
        for value, place in ((new_top, top), (new_total, total)):
            v.store(builder.extract_element(value, ir.Constant(I32, 0)), place)
        forget, ignore = (builder.fcmp_ordered("==", x, zero) for x in (fade, share))
        with v.loop(builder.udiv(columns, ir.Constant(I64, v.lanes))) as i:
            at = v.address(state, i, 4 * v.lanes)
            old = builder.select(forget, zero, builder.fmul(v.load(at, v.floats), fade))
            new = builder.fmul(v.load(v.address(part, i, 4 * v.lanes), v.floats), share)
            v.store(builder.fadd(old, builder.select(ignore, zero, new)), at)

    return Tile("merge", 6, body)


def _together(v: Vectors, old_top: ir.Value, old_total: ir.Value, top: ir.Value, total: ir.Value) -> list[ir.Value]:
    """The largest score of two states and the sum of weights, and what the outputs of both are multiplied by."""
    builder, zero = v.builder, v.constant(v.floats, 0.0)
    new_top = v.float_function("maxnum", old_top, top)
    fade, share = (
        builder.select(builder.fcmp_ordered("==", sum_, zero), zero, v.exp(builder.fsub(x, new_top)))
        for x, sum_ in ((old_top, old_total), (top, total))
    )
    return [new_top, builder.fadd(builder.fmul(old_total, fade), builder.fmul(total, share)), fade, share]


def weigh(form: Format, percent: int = 0, meanwhile: Callable[[Vectors], None] | None = None) -> Tile:
    """(heads, count, scores, weights, factors, state, place, head_dim): weights = exp(score - top), for `values`.

    `scores` is (heads, T) float32, of which `count` count; `weights` (heads, `weight_rows`, `weight_lanes`) lanes.
    `factors` is (4, H) float32, where H is `heads` rounded up to whole vectors: `top`, each head's largest score, -inf
    if all are; the sum of its weights, NaN if a score is NaN; and what the output so far and the tile's are multiplied
    by. `state` is (2, H) float32, the largest score and the sum of weights so far, and is brought up to date.
    Scores that do not count are overwritten.

    So many percent of the lines of the next tile are fetched in it, and `meanwhile` is emitted for every fourth head.
    """

    def body(v: Vectors, heads: Any, count: Any, scores: Any, weights: Any, factors: Any, *rest: Any) -> None:
        state, place, head_dim = rest
        builder = v.builder
        few = builder.icmp_signed("<=", count, ir.Constant(I64, form.least_tile))
        blocks = builder.udiv(builder.add(heads, ir.Constant(I64, v.lanes - 1)), ir.Constant(I64, v.lanes))
        size = builder.mul(blocks, ir.Constant(I64, 4 * v.lanes))
        tops, totals, fades, shares = (builder.add(factors, builder.mul(size, ir.Constant(I64, i))) for i in range(4))
        nothing = v.constant(v.floats, float("-inf"))

        def read(h: ir.Value, vectors: int) -> list[ir.Value]:
            row = v.address(scores, h, 4 * form.tile)
            return [v.load(v.address(row, i, 4 * v.lanes), v.floats) for i in range(vectors)]

        whole = (builder.icmp_signed("==", count, ir.Constant(I64, x)) for x in (form.tile, form.least_tile))
        with builder.if_then(builder.not_(builder.or_(*whole))):  # the last tile of a window
            limit = v.splat(builder.trunc(count, I32))
            with v.loop(heads) as h:
                for i, score in enumerate(read(h, form.tile // v.lanes)):
                    position = ir.Constant(v.ints, list(range(v.lanes * i, v.lanes * (i + 1))))
                    score = builder.select(builder.icmp_signed("<", position, limit), score, nothing)
                    v.store(score, v.address(v.address(scores, h, 4 * form.tile), i, 4 * v.lanes))

        fetcher = Fetcher(v, place, heads) if percent else None
        portion = fetcher and fetcher.portion(fetcher.part(form, head_dim, percent), heads)

        def weigh_some(vectors: int) -> None:
            """The first vectors of scores of all heads."""
            # A loop of its own: otherwise the processor would wait for one head's largest at a time.
            with v.loop(heads) as h:
                v.store(v.reduce("max", read(h, vectors)), v.address(tops, h, 4))
            with v.loop(heads) as h:
                if fetcher and portion:
                    fetcher.fetch(portion)
                if meanwhile is not None:
                    fourth = builder.and_(h, ir.Constant(I64, 3))
                    with builder.if_then(builder.icmp_unsigned("==", fourth, ir.Constant(I64, 0))):
                        meanwhile(v)
                top = v.load(v.address(tops, h, 4), F32)
                none = builder.fcmp_ordered("==", top, ir.Constant(F32, float("-inf")))
                shift = v.splat(builder.select(none, ir.Constant(F32, 0.0), top))
                below = [builder.fsub(x, shift) for x in read(h, vectors)]
                line = v.address(weights, h, 4 * form.weight_rows * form.weight_lanes)
                v.store(_store_weights(v, form, below, line), v.address(totals, h, 4))

        if form.least_tile == form.tile:
            weigh_some(form.tile // v.lanes)
        else:
            with builder.if_else(few) as (then, otherwise):
                with then:
                    weigh_some(form.least_tile // v.lanes)
                with otherwise:
                    weigh_some(form.tile // v.lanes)
        if fetcher:
            fetcher.keep()

        with v.loop(blocks) as block:
            top, total, old_top, old_total = (
                v.load(v.address(base, block, 4 * v.lanes), v.floats)
                for base in (tops, totals, state, builder.add(state, size))
            )
            new_top, total, fade, share = _together(v, old_top, old_total, top, total)
            for value, base in ((fade, fades), (share, shares), (new_top, state), (total, builder.add(state, size))):
                v.store(value, v.address(base, block, 4 * v.lanes))

    return Tile("weigh", 8, body)


def _weight_of_one(form: Format) -> int:
    """The integer that the digits of a weight of 1 hold."""
    digit = (1 << form.digit_bits - form.signed) - 1
    return sum(digit << form.digit_bits * i for i in range(form.weight_digits))


def _store_weights(v: Vectors, form: Format, below: list[ir.Value], at: ir.Value) -> ir.Value:
    """A head's weights, exp of how far its scores are below the largest, into the rows of their digits; and their sum.

    One bfloat16, two bytes, three signed ones and an int16 are rounded, and the sum is of what they hold, so that many
    weights rounded in one direction, or to nothing, do no harm. Three unsigned bytes hold more than a float32 of 1 does
    in its last place, and are cut off.
    """
    terms = EXP_TERMS_OF_16_BITS if form.weight_bits == 16 else EXP_TERMS
    if form.integer:
        return _store_integers(v, form, below, terms, at)
    return v.reduce("fadd", [_store_weight(v, form, v.exp(x, terms), at, i) for i, x in enumerate(below)])


def _store_weight(v: Vectors, form: Format, weight: ir.Value, at: ir.Value, index: int) -> ir.Value:
    """Vector `index` of a head's weights as float32 or bfloat16; and what to sum of it."""
    builder, lanes = v.builder, v.lanes

    def put(value: ir.Value, digit: int) -> None:
        if form.interleaved:
            row = v.address(at, digit, 4 * form.weight_lanes)
            v.store(value, v.address(row, index, lanes * 4 // form.pack))
            return
        value = builder.zext(value, v.ints)
        for i in range(form.pack):
            row = v.address(at, digit * form.pack + i, 4 * form.weight_lanes)
            v.store(builder.shl(value, v.constant(v.ints, 32 // form.pack * i)), v.address(row, index, 4 * lanes))

    if form.pack == 1:
        put(weight, 0)
        return weight
    left = weight
    for digit in range(form.weight_digits):
        half, held = v.round_to_bfloat16(left)
        put(builder.bitcast(half, ir.VectorType(I16, lanes)), digit)
        left = builder.fsub(left, held)
    return held if form.weight_digits == 1 else weight


def _store_integers(
    v: Vectors, form: Format, below: list[ir.Value], terms: tuple[float, ...], at: ir.Value
) -> ir.Value:
    """A head's weights as bytes or int16, of `pack` weights `positions_apart` in a lane; and their sum.

    A NaN becomes some number: the sum of the weights is NaN then, and so will the result be.
    """
    builder, one, bits = v.builder, _weight_of_one(form), form.digit_bits
    rounder = v.constant(v.floats, 2.0**23) if one < 2**23 else None
    weights = [v.exp(x, terms, one, rounder) for x in below]
    if rounder is not None:  # they are the low bits of a float32
        total = v.reduce("fadd", [builder.fsub(x, rounder) for x in weights])
        whole = [v.as_ints(x) for x in weights]
    else:
        total = v.reduce("fadd", weights)
        whole = [builder.fptosi(v.larger(x, v.constant(v.floats, 0.0)), v.ints) for x in weights]
    total = builder.fmul(total, ir.Constant(F32, 1.0 / one))
    if form.signed and form.weight_digits > 1:  # half of a digit's numbers are below 0, which the next one makes up for
        half = v.constant(v.ints, sum(2 ** (bits - 1) << bits * i for i in range(form.weight_digits - 1)))
        whole = [builder.xor(builder.add(x, half), half) for x in whole]
    vectors = form.weight_lanes // v.lanes
    for digit in range(form.weight_digits):
        row, begin = v.address(at, digit, 4 * form.weight_lanes), bits * (form.weight_digits - 1 - digit)
        for i in range(vectors):
            lanes = v.constant(v.ints, 0)
            for place, x in enumerate(whole[i::vectors]):
                mask = (2**bits - 1) << bits * place
                moved = v.shift(x, bits * place - begin)
                lanes = builder.or_(lanes, builder.and_(moved, v.constant(v.ints, mask - (mask >> 31 << 32))))
            v.store(lanes, v.address(row, i, 4 * v.lanes))
    return total


def lanes_with_weights(v: Vectors, form: Format, count: ir.Value) -> ir.Value:
    """How many lanes, from the first on, have all the weights of a tile's first `count` positions."""
    if form.positions_apart == 1:
        return v.over(count, form.tile // form.weight_lanes)
    lanes = ir.Constant(I64, form.weight_lanes)
    return v.builder.select(v.builder.icmp_unsigned("<", count, lanes), count, lanes)


def rows_of_lane(v: Vectors, form: Format, rows: ir.Value, lane: ir.Value) -> list[ir.Value]:
    """Of the addresses in `rows`, those of the `pack` positions whose weights are in a lane."""
    apart = form.positions_apart
    first = v.address(rows, lane, 8 * (form.pack if apart == 1 else 1))
    return [v.load(v.address(first, i * apart, 8), I64) for i in range(form.pack)]


def fold(v: Vectors, form: Format, parts: list[ir.Value], fade: ir.Value, share: ir.Value, out: ir.Value) -> None:
    """out = fade * out + share * parts: the sums of a tile, as float32, of the vectors that `interleave` gives.

    The rest are addresses. A factor of 0 forgets even a NaN.
    """
    builder = v.builder
    fade, share = (v.load(x, F32) for x in (fade, share))
    if form.integer:
        share = builder.fmul(share, ir.Constant(F32, 1.0 / _weight_of_one(form)))
    fade, share, zero = v.splat(fade), v.splat(share), v.constant(v.floats, 0.0)
    forget, ignore = (builder.fcmp_ordered("==", x, zero) for x in (fade, share))
    for i, part in enumerate(v.in_order(parts) if form.interleaved else v.alternate(parts[0], parts[1], 1)):
        at = v.address(out, i, 4 * v.lanes)
        part = builder.select(ignore, zero, builder.fmul(part, share))
        old = builder.select(forget, zero, v.load(at, v.floats))
        v.store(v.float_function("fma", old, fade, part), at)
