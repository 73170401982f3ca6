"""The steps on a tile of positions, as functions of vector instructions.

    series    numbers at equal distances, for lists of addresses and for zeros
    split     a query head as the digits that meet keys
    scores    scores[head, position] = weight * sum_d query[head, d] * key[position, d]
    weigh     scores -> softmax weights; what the old output and the tile's are multiplied by
    values    out[head, d] = fade * out + share * sum_position weights[head, position] * value[position, d]
    merge     the sums of a head over two ranges of positions
    divide    the sums of a head over the sum of its weights

Rows of the cache are read where they lie, once for a few heads, and all that is made of them stays in registers. The
memory is kept busy meanwhile: every step of the work has as many lines of the next tile fetched as it reads.

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
from numba_kernels.vectors import EXP_TERMS, EXP_TERMS_OF_16_BITS, F32, I16, I32, I64, LINE, Vectors

HEADS = (8, 4, 2, 1)  # the numbers of query heads that steps are made for: each half of the one before
SERIES = 8  # numbers of `series` in a line of memory
# By the number of digits: one of 16 bits, or two bytes with a highest of 127, whose products with 512 keys of -128, the
# largest D, have room in int32; or three bytes. Of three, what is left of a float32 query is below its own last place.
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
    return [number(name, value) for name, value in values.items()] + [_piece(form, machine)]


def number(name: str, value: int) -> Tile:
    """A function that returns it."""
    return Tile(name, 0, lambda v: ir.Constant(I64, value), number=True)


def make(form: Format, machine: Machine) -> dict[str, Tile]:
    """The two products, by name, for one format on one machine, and their parts before them.

    scores (group, query, initial, weights, out, rows, head, place, count, head_dim): `query`, `initial` and `weights`
    as `_split` and `_piece` have them; `out` (heads, T) float32.
    values (group, weights, fades, shares, out, rows, head, place, count, head_dim): the first three as `weigh` leaves
    them; `out` (heads, D padded) float32.
    In both, `rows` holds the addresses of a tile's keys or values, of which `count` count, `head` is added to each, and
    `place` is a `Place`.
    """
    # Before and after a thread's products: here there is nothing to do.
    tiles = [Tile("configure", 2, lambda v, group, found: None), Tile("reset", 1, lambda v, found: None)]
    for name, kind in (("scores", _scores), ("values", _values)):
        parts = {heads: kind(form, machine, heads) for heads in HEADS}
        tiles += [*parts.values(), _for_a_group(name, form, parts)]
    return {tile.name: tile for tile in tiles}


def module_of(tiles: dict[str, Tile], machine: Machine) -> ir.Module:
    """The LLVM module with their code."""
    module = ir.Module("jax_ifa_tiles")
    for tile in tiles.values():
        function = ir.Function(module, ir.FunctionType(I64, [I64] * tile.arguments), tile.name)
        builder = ir.IRBuilder(function.append_basic_block())
        answer = tile.body(Vectors(builder, machine), *function.args)
        builder.ret(ir.Constant(I64, 0) if answer is None else answer)
    return module


def _for_a_group(name: str, form: Format, parts: dict[int, Tile]) -> Tile:
    """(group, *what a part takes): the step `name` for all heads of a group, in parts of so many heads.

    Of what a part takes, the first four are moved on from part to part; see `_strides`. Behind the place of fetching it
    takes the number of parts that share in it.
    """

    def body(v: Vectors, group: Any, *arguments: Any) -> None:
        builder = v.builder
        *moving, rows, offset, place, count, head_dim = arguments
        strides = _strides(name, v, form, head_dim)
        done = v.variable_of(ir.Constant(I64, 0))
        sharing, left = ir.Constant(I64, 0), group
        for heads in parts:
            sharing = builder.add(sharing, builder.udiv(left, ir.Constant(I64, heads)))
            left = builder.urem(left, ir.Constant(I64, heads))
        for heads, part in parts.items():
            with v.loop(builder.udiv(builder.sub(group, builder.load(done)), ir.Constant(I64, heads))):
                first = builder.load(done)
                moved = [builder.add(x, builder.mul(first, stride)) for x, stride in zip(moving, strides, strict=True)]
                function = builder.module.get_global(part.name)
                builder.call(function, (*moved, rows, offset, place, sharing, count, head_dim))
                builder.store(builder.add(first, ir.Constant(I64, heads)), done)

    return Tile(name, 10, body)


def _strides(name: str, v: Vectors, form: Format, head_dim: ir.Value) -> list[ir.Value]:
    """Bytes from a head to the next in the first four arguments of a step."""
    columns = padded(v, form, head_dim)
    if name == "scores":
        query = v.builder.mul(columns, ir.Constant(I64, 4 // form.pack * form.query_digits))
        return [query, *(ir.Constant(I64, x) for x in (4 * form.query_digits, 4, 4 * form.tile))]
    weights = 4 * form.weight_rows * form.weight_lanes
    return [*(ir.Constant(I64, x) for x in (weights, 4, 4)), v.builder.mul(columns, ir.Constant(I64, 4))]


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


def _beside(form: Format, machine: Machine, heads: int) -> int:
    """R: query heads whose products `scores` has side by side in a vector, in lanes / R lanes each.

    Sums of fewer lanes are sooner put together; but a key is read in pieces of so many lanes, R times into a vector,
    and every reading is to serve two products at least. What is converted is copied for that, which eight heads pay
    where vectors are long. Where they have four lanes, a key is read once: see `_by_lane`; but of pairs of bfloat16
    LLVM copies a lane before it multiplies, and that is to serve two products too.
    """
    if _by_lane(machine):
        return (
            machine.lanes if heads >= machine.lanes * (2 if form.dtype == "bfloat16" and form.pack == 2 else 1) else 1
        )
    if (form.converted and (heads < 8 or machine.lanes == 8)) or form.words:
        return 1
    return _power_of_two(min(heads, machine.lanes // 4, heads * form.query_digits // 2))


def _by_lane(machine: Machine) -> bool:
    """Whether vectors meet single lanes of others, which are read as a whole: Arm's products can, for nothing."""
    return machine.lanes == 4


def _power_of_two(most: int) -> int:
    """The largest that is not more; 1 at least."""
    return 1 << max(1, most).bit_length() - 1


def _piece(form: Format, machine: Machine) -> Tile:
    """(heads): the lanes L of a piece, in a part of the query of so many heads.

    `scores` wants the query of a group in parts of as many heads as `HEADS` says while there are as many. A part has,
    for every L lanes of a row, the L lanes of each digit, of each head. So all pieces of a row lie together that meet
    the same piece of a key.
    """

    def body(v: Vectors, heads: Any) -> ir.Value:
        answer = ir.Constant(I64, 0)
        for some in HEADS:
            lanes = ir.Constant(I64, machine.lanes // _beside(form, machine, some))
            answer = v.builder.select(v.builder.icmp_signed("==", heads, ir.Constant(I64, some)), lanes, answer)
        return answer

    return Tile("piece", 1, body, number=True)


def _scores(form: Format, machine: Machine, heads: int) -> Tile:
    """(query, initial, weights, out, rows, head, *fetching, count, head_dim): scores of `heads` query heads.

    `query` is as `_piece` says, `weights` a float32 for each head, `out` (heads, T) float32. `rows` holds the
    addresses of a tile's keys, of which `count` count. int8 keys are raised by 128 where they are to be unsigned;
    `initial` (heads, digits) int32, from which the sums start, takes that back.
    """
    beside, digits = _beside(form, machine, heads), form.query_digits
    piece, vectors = machine.lanes // beside, heads * digits // beside
    by_lane = beside > 1 and _by_lane(machine)
    copied = beside > 1 and not by_lane  # where keys are converted, or end in the middle of a vector
    # The sums of these leave room for what is read: with lanes of keys, a vector of each.
    positions = min(_power_of_two(machine.registers * 3 // 4 // vectors), 8 if by_lane else machine.registers)
    # A line of memory at a time; but of copies only so many as the next ones can be made beside.
    line = max(1, LINE // (form.strip(machine.lanes) * form.itemsize * form.parts))
    wide = 1 if form.converted and copied else line

    def body(v: Vectors, query: Any, initial: Any, weights: Any, out: Any, rows: Any, head: Any, *rest: Any) -> None:
        *fetching, count, head_dim = rest
        builder, kind = v.builder, v.ints if form.integer else v.floats
        blocks = builder.udiv(builder.add(count, ir.Constant(I64, positions - 1)), ir.Constant(I64, positions))
        totals = [[v.variable(kind) for _ in range(positions)] for _ in range(vectors)]
        raises = form.integer and not form.signed
        starts = _first_sums(v, initial, heads, digits, beside) if raises else [v.constant(kind, 0)] * vectors
        factors = v.load(weights, ir.VectorType(F32, heads))
        copies = [v.room(4 * v.lanes * form.parts) for _ in range(positions)] if copied else []
        fetcher = Fetcher(v, *fetching)

        def together(sums: list[list[ir.Value]]) -> ir.Value:
            """Scores without their weight, of sums of every digit, the highest first, in `piece` lanes each."""
            if form.integer and digits == 2:  # as int32, which has room for LARGEST_QUERY and 512 keys of -128
                sums = [[builder.add(v.shift(high, 8), low) for high, low in zip(*sums, strict=True)]]
            return digits_together(v, form, [v.sums(x, piece) for x in sums])

        def sums_of(digit: int, totals: list[list[ir.Value]]) -> list[ir.Value]:
            """Of the groups of heads that lie side by side, those of all positions in turn."""
            each = heads // beside
            return [x for k in range(each) for x in totals[digit * each + k]]

        def put(totals: list[list[ir.Value]], first_position: ir.Value) -> None:
            """The scores of a block of positions."""
            for begin in range(0, heads // beside * positions, piece):
                sums = [sums_of(digit, totals)[begin : begin + piece] for digit in range(digits)]
                score = together([[builder.load(x) for x in some] for some in sums])
                each = score.type.count // beside  # of the sums begin, begin + 1 ... of a head at this place
                places = [divmod(begin + i, positions) for i in range(each)]
                which = [k * beside + h for h in range(beside) for k, _ in places]
                score = builder.fmul(score, v.shuffle(factors, factors, which))
                run = min(each, positions)
                for h in range(beside):
                    for i in range(0, each, run):
                        k, p = places[i]
                        line = v.address(v.address(out, first_position, 4), (k * beside + h) * form.tile + p, 4)
                        v.store(v.shuffle(score, score, range(h * each + i, h * each + i + run)), line)

        def put_lanes(totals: list[list[ir.Value]], first_position: ir.Value) -> None:
            """The same where a sum has one lane: as many positions as there are lanes are turned around at a time."""
            for begin in range(0, heads // beside * positions, v.lanes):
                sums = [sums_of(digit, totals)[begin : begin + v.lanes] for digit in range(digits)]
                k, p = divmod(begin, positions)
                own = v.shuffle(factors, factors, range(k * beside, (k + 1) * beside))
                scores = [
                    builder.fmul(together([[builder.load(x)] for x in some]), own) for some in zip(*sums, strict=True)
                ]
                for h, score in enumerate(v.transpose_halves(scores)):
                    v.store(score, v.address(v.address(out, first_position, 4), (k * beside + h) * form.tile + p, 4))

        with v.loop(blocks) as block:
            first_position = builder.mul(block, ir.Constant(I64, positions))
            here = [v.load(v.address(v.address(rows, first_position, 8), p, 8), I64) for p in range(positions)]
            for start, sums in zip(starts, totals, strict=True):
                for total in sums:
                    builder.store(start, total)

            def raised(key: ir.Value) -> ir.Value:
                return builder.xor(key, v.constant(v.ints, 0x80808080 - 2**32)) if raises else key

            def step(first: ir.Value, width: int, count: ir.Value | None) -> None:
                offset = v.address(head, first, form.itemsize)
                fetcher.share(max(1, positions * width * form.itemsize * form.strip(v.lanes) // LINE))
                at = v.address(query, first, 4 // form.pack * heads * digits)
                for i in range(width):
                    keys = [builder.add(row, offset) for row in here]
                    pieces = [v.address(key, i, 4 * v.lanes) for key in keys]
                    if by_lane:
                        whole = [[raised(part) for part in v.load_parts(form, key, i, count)] for key in keys]
                    elif copied and (form.converted or count is not None):
                        for key, copy in zip(keys, copies, strict=True):
                            for j, part in enumerate(v.load_parts(form, key, i, count)):
                                v.store(part, v.address(copy, j, 4 * v.lanes))
                        pieces = copies
                    for j in range(form.parts * beside):
                        place = v.address(at, (i * form.parts * beside + j) * vectors, 4 * v.lanes)
                        queries = [v.load(v.address(place, k, 4 * v.lanes), v.ints) for k in range(vectors)]
                        for p, (key, at_piece) in enumerate(zip(keys, pieces, strict=True)):
                            if by_lane:
                                part = whole[p][j // v.lanes]
                                read = v.one_lane(part, j % v.lanes, form)
                            elif beside == 1:
                                read = raised(v.load_parts(form, key, i, count)[j])
                            else:
                                part = v.load(v.address(at_piece, j, 4 * piece), ir.VectorType(I32, piece))
                                read = raised(v.shuffle(part, part, [*range(piece)] * beside))
                            for k, q in enumerate(queries):
                                total = totals[k][p]
                                builder.store(v.dot(builder.load(total), q, read, form, "b"), total)

            walk(v, form, head_dim, wide, step)
            (put_lanes if by_lane else put)(totals, first_position)
        fetcher.keep()

    return Tile(f"scores{heads}", 10, body)


def _first_sums(v: Vectors, initial: ir.Value, heads: int, digits: int, beside: int) -> list[ir.Value]:
    """What the sums of int8 scores start from: each head's number in one of its lanes."""
    vectors = []
    for digit in range(digits):
        for h in range(0, heads, beside):
            vector = v.constant(v.ints, 0)
            for i in range(beside):
                number = v.load(v.address(initial, (h + i) * digits + digit, 4), I32)
                vector = v.builder.insert_element(vector, number, ir.Constant(I32, i * v.lanes // beside))
            vectors.append(vector)
    return vectors


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

    `query` is float32. `initial` and `weight` of this head are as `_scores` wants them; the latter has `scale` in it.
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
        largest, wrong, *sums = (v.variable_of(zero) for _ in range(2 + form.query_digits))
        with v.loop(vectors) as i:
            x = read(i)
            builder.store(v.float_function("maxnum", builder.load(largest), v.float_function("fabs", x)), largest)
            builder.store(v.float_function("fma", x, zero, builder.load(wrong)), wrong)  # NaN of NaN and infinity
        step = v.float_function("maxnum", v.reduce("max", [builder.load(largest)]), ir.Constant(F32, 1e-30))
        step = builder.fdiv(step, ir.Constant(F32, most))
        step = builder.fadd(step, v.reduce("fadd", [builder.load(wrong)]))
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
                builder.store(builder.fadd(builder.load(sums[digit]), builder.sitofp(low, v.floats)), sums[digit])
        for digit, sum_ in enumerate(sums):  # what the keys are raised by is taken back; the floats are integers
            raised = builder.mul(builder.fptosi(v.reduce("fadd", [builder.load(sum_)]), I32), ir.Constant(I32, -128))
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
        terms = EXP_TERMS_OF_16_BITS if form.weight_bits == 16 else EXP_TERMS

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
                exps = [v.exp(builder.fsub(x, shift), terms) for x in read(h, vectors)]
                line = v.address(weights, h, 4 * form.weight_rows * form.weight_lanes)
                v.store(_store_weights(v, form, exps, line), v.address(totals, h, 4))

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


def _store_weights(v: Vectors, form: Format, weights: list[ir.Value], at: ir.Value) -> ir.Value:
    """A head's weights into the row or rows of its digits; and their sum.

    One bfloat16, two bytes, three signed ones and an int16 are rounded, and the sum is of what they hold, so that many
    weights rounded in one direction, or to nothing, do no harm. Three unsigned bytes hold more than a float32 of 1 does
    in its last place, and are cut off.
    """
    if form.integer:
        return _store_integers(v, form, weights, at)
    return v.reduce("fadd", [_store_weight(v, form, weight, at, i) for i, weight in enumerate(weights)])


def _store_weight(v: Vectors, form: Format, weight: ir.Value, at: ir.Value, index: int) -> ir.Value:
    """Vector `index` of a head's weights as float32 or bfloat16; and what to sum of it."""
    builder, lanes, summed = v.builder, v.lanes, weight

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
    else:
        for digit in range(form.weight_digits):
            half, weight = v.round_to_bfloat16(weight)
            put(builder.bitcast(half, ir.VectorType(I16, lanes)), digit)
        if form.weight_digits == 1:
            summed = builder.fsub(summed, weight)
    return summed


def _store_integers(v: Vectors, form: Format, weights: list[ir.Value], at: ir.Value) -> ir.Value:
    """A head's weights as bytes or int16, of `pack` weights `positions_apart` in a lane; and their sum.

    A NaN becomes some number: the sum of the weights is NaN then, and so will the result be.
    """
    builder, one, bits = v.builder, _weight_of_one(form), form.digit_bits
    scale, rounder = v.constant(v.floats, one), v.constant(v.floats, 2.0**23)
    if one < 2**23:  # rounded, they are the low bits of a float32
        rounded = [v.float_function("fma", weight, scale, rounder) for weight in weights]
        total = v.reduce("fadd", [builder.fsub(x, rounder) for x in rounded])
        total = builder.fmul(total, ir.Constant(F32, 1.0 / one))
        whole = [v.as_ints(x) for x in rounded]
    else:
        total = v.reduce("fadd", weights)
        scaled = [v.larger(builder.fmul(weight, scale), v.constant(v.floats, 0.0)) for weight in weights]
        whole = [builder.fptosi(x, v.ints) for x in scaled]
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


def _values(form: Format, machine: Machine, heads: int) -> Tile:
    """(weights, fades, shares, out, rows, head, *fetching, count, head_dim): the outputs of `heads` query heads.

    The first three are as `weigh` leaves them, from the first of the heads on; `out` is (heads, D padded) float32.
    `rows` holds the addresses of a tile's values, of which `count` count. A factor of 0 forgets even a NaN.
    """
    most = min(heads, machine.registers // (8 if form.pack == 4 else 4))  # heads in a turn, whose sums have room
    turns = [range(first, first + most) for first in range(0, heads, most)]
    digits = form.weight_digits
    sums = digits if form.integer else 1  # digits that are floats are summed as one
    wide = 1 if form.integer else max(1, min(8, machine.registers // 2 // most) // form.per_lane)  # readings of a row
    at_once = 2 if form.integer else form.per_lane  # of the vectors that these become: more would not fit
    column_bytes = machine.lanes * form.pack * form.itemsize  # that are read for one of these vectors
    # Lanes of weights. Each of n turns reads n lines for one that it fetches: all of them read the same.
    together = max(1, len(turns) * LINE // (at_once * wide * column_bytes))
    by_lane = _by_lane(machine)
    if by_lane:  # whole vectors of them
        together = max(together, machine.lanes)

    def body(v: Vectors, weights: Any, fades: Any, shares: Any, out: Any, rows: Any, head: Any, *rest: Any) -> None:
        *fetching, positions, head_dim = rest
        builder, size = v.builder, 4 * v.lanes
        kind = v.ints if form.integer else v.floats
        columns = padded(v, form, head_dim)
        fetcher = Fetcher(v, *fetching)
        groups = v.over(lanes_with_weights(v, form, positions), together)

        def products(own: range, first: ir.Value, width: int, count: ir.Value | None, which: range) -> Any:
            """[head][strip][which] sums over the tile, of some of the vectors that the rows' vectors become."""
            offset = v.address(head, first, form.itemsize)
            totals = [[[[v.variable(kind) for _ in range(sums)] for _ in which] for _ in range(width)] for _ in own]
            for total in (x for head in totals for strip in head for column in strip for x in column):
                builder.store(v.constant(kind, 0), total)
            with v.loop(groups) as group:
                fetcher.share(max(1, together * len(which) * width * column_bytes // LINE // len(turns)))
                first_lane = builder.mul(group, ir.Constant(I64, together))
                factors = factors_by_lane(own, first_lane) if by_lane else [None] * together
                for i, some in enumerate(factors):
                    add_products(own, v.address(first_lane, i, 1), some, offset, count, which, totals)
            return [
                [[digits_together(v, form, [builder.load(x) for x in column]) for column in strip] for strip in head]
                for head in totals
            ]

        def weights_at(own: range, lane: ir.Value, kind: ir.Type) -> list[list[ir.Value]]:
            """[head][digit] what lies from a lane of weights on."""
            lines = v.address(weights, lane, 4)
            return [
                [v.load(v.address(lines, (h * digits + i) * form.weight_lanes, 4), kind) for i in range(digits)]
                for h in own
            ]

        def factors_by_lane(own: range, first: ir.Value) -> list[list[list[ir.Value]]]:
            """[lane][head][digit] the weights of each of `together` lanes, in every lane of a vector."""
            vectors = [weights_at(own, v.address(first, i, 1), v.ints) for i in range(0, together, v.lanes)]
            return [
                [[v.one_lane(x, i, form) for x in head] for head in some] for some in vectors for i in range(v.lanes)
            ]

        def add_products(
            own: range,
            lane: ir.Value,
            factors: list[list[ir.Value]] | None,
            offset: ir.Value,
            count: ir.Value | None,
            which: range,
            totals: Any,
        ) -> None:
            """Of the values whose weights are in one lane."""
            here = rows_of_lane(v, form, rows, lane)
            factors = factors or [[v.splat(x) for x in head] for head in weights_at(own, lane, I32)]
            for strip in range(len(totals[0])):
                found = [x for row in here for x in v.load_parts(form, builder.add(row, offset), strip, count)]
                if form.parts == 1:
                    found = v.interleave(found)
                for h in range(len(own)):
                    for i, column in enumerate(which):
                        for digit in range(digits):
                            total = totals[h][strip][i][digit % sums]
                            a, b, unsigned = factors[h][digit], found[column], "a"
                            if by_lane:
                                a, b, unsigned = b, a, "b"
                            builder.store(v.dot(builder.load(total), a, b, form, unsigned), total)

        def step(first: ir.Value, width: int, count: ir.Value | None) -> None:
            for own in turns:
                halves = [
                    products(own, first, width, count, range(begin, begin + at_once))
                    for begin in range(0, form.per_lane, at_once)
                ]
                for i, h in enumerate(own):
                    line = builder.add(builder.mul(columns, ir.Constant(I64, h)), first)
                    line = builder.add(out, builder.mul(line, ir.Constant(I64, 4)))
                    for strip in range(width):
                        parts = [part for half in halves for part in half[i][strip]]
                        at = v.address(line, strip * form.per_lane, size)
                        fold(v, form, parts, v.address(fades, h, 4), v.address(shares, h, 4), at)

        walk(v, form, head_dim, wide, step)
        fetcher.keep()

    return Tile(f"values{heads}", 10, body)
