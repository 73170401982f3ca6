"""The two products of a tile of positions, of vectors: `scores` and `values`, as tiles.py says.

Both are made for eight query heads, four, two and one, whose sums stay in registers while a row is read, once for all
of them. How the lanes of a vector are shared out depends on how many there are: see `_beside`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

from numba_kernels.fetching import Fetcher
from numba_kernels.formats import Format
from numba_kernels.machine import Machine
from numba_kernels.tiles import HEADS, Tile, digits_together, fold, lanes_with_weights, padded, rows_of_lane, walk
from numba_kernels.vectors import F32, I32, I64, LINE, Vectors

# Rows that are so many bytes apart lie in few sets of a first-level cache, which cannot hold a strip of a tile then. So
# on these processors, for up to so many heads, a copy is made of such int8 values, which are read more than once.
FAR = 512
COPIES_FAR_VALUES = {"znver4": 1, "znver5": 8}
Read = Callable[[ir.Value, int], list[ir.Value]]  # of a lane of weights and a strip: the vectors that meet it


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
    tiles.append(_piece(form, machine))
    for name, kind in (("scores", _scores), ("values", _values)):
        parts = {heads: kind(form, machine, heads) for heads in HEADS}
        tiles += [*parts.values(), _for_a_group(name, form, parts)]
    return {tile.name: tile for tile in tiles}


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


def _beside(form: Format, machine: Machine, heads: int) -> int:
    """R: query heads whose products `scores` has side by side in a vector, in lanes / R lanes each.

    Sums of fewer lanes are sooner put together; but a key is read in pieces of so many lanes, R times into a vector,
    and every reading is to serve two products at least. What is converted is copied for that, which eight heads pay
    where vectors are long. Products by one lane take it from a key that is read as a whole; but of pairs of bfloat16
    LLVM copies a lane before it multiplies, and that is to serve two products too.
    """
    if machine.by_lane:
        least = machine.lanes * (2 if form.dtype == "bfloat16" and form.pack == 2 else 1)
        return machine.lanes if heads >= least else 1
    if (form.converted and (heads < 8 or machine.lanes == 8)) or form.words:
        return 1
    return _power_of_two(min(heads, machine.lanes // 4, heads * form.query_digits // 2))


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
    """(query, initial, weights, out, rows, head, place, sharing, count, head_dim): scores of `heads` query heads.

    `query` is as `_piece` says, `weights` a float32 for each head, `out` (heads, T) float32. `rows` holds the
    addresses of a tile's keys, of which `count` count. int8 keys are raised by 128 where they are to be unsigned;
    `initial` (heads, digits) int32, from which the sums start, takes that back.
    """
    beside, digits = _beside(form, machine, heads), form.query_digits
    piece, vectors = machine.lanes // beside, heads * digits // beside
    by_lane = beside > 1 and machine.by_lane
    copied = beside > 1 and not by_lane  # where keys are converted, or end in the middle of a vector
    # The sums of these leave room for what is read, which of copies is read all at once.
    positions = _power_of_two(machine.registers * (5 if copied else 6) // 8 // vectors)
    if by_lane:  # a vector of each key; and scores are turned around by as many as there are lanes
        positions = max(machine.lanes, min(positions, 8))
    # A line of memory at a time; but of copies only so many as the next ones can be made beside.
    line = max(1, LINE // (form.strip(machine.lanes) * form.itemsize * form.parts))
    wide = 1 if form.converted and copied else line
    products_of_a_line = heads * digits * LINE // (form.itemsize * form.pack * machine.lanes)

    def body(v: Vectors, query: Any, initial: Any, weights: Any, out: Any, rows: Any, head: Any, *rest: Any) -> None:
        place, sharing, count, head_dim = rest
        builder, kind = v.builder, v.ints if form.integer else v.floats
        blocks = builder.udiv(builder.add(count, ir.Constant(I64, positions - 1)), ir.Constant(I64, positions))
        totals = [[v.variable(kind) for _ in range(positions)] for _ in range(vectors)]
        raises = form.integer and not form.signed
        starts = _first_sums(v, initial, heads, digits, beside) if raises else [v.constant(kind, 0)] * vectors
        factors = v.load(weights, ir.VectorType(F32, heads))
        copies = [v.room(4 * v.lanes * form.parts) for _ in range(positions)] if copied else []
        fetcher = Fetcher(v, place, sharing, products_of_a_line)

        def together(sums: list[list[ir.Value]]) -> ir.Value:
            """Scores without their weight, of sums of every digit, the highest first, in `piece` lanes each."""
            if form.integer and digits > 1:  # as int32, which has room for LARGEST_QUERY and 512 keys of -128
                high, next_, *rest = sums
                sums = [[builder.add(v.shift(x, 8), y) for x, y in zip(high, next_, strict=True)], *rest]
            return digits_together(v, form, [v.sums(x, piece) for x in sums])

        def sums_of(digit: int) -> list[ir.Value]:
            """Of the groups of heads that lie side by side, those of all positions in turn."""
            each = heads // beside
            return [x for k in range(each) for x in totals[digit * each + k]]

        def put(first_position: ir.Value) -> None:
            """The scores of a block of positions."""
            for begin in range(0, heads // beside * positions, piece):
                sums = [sums_of(digit)[begin : begin + piece] for digit in range(digits)]
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

        def put_lanes(first_position: ir.Value) -> None:
            """The same where a sum has one lane: as many positions as there are lanes are turned around at a time."""
            for begin in range(0, heads // beside * positions, v.lanes):
                sums = [sums_of(digit)[begin : begin + v.lanes] for digit in range(digits)]
                k, p = divmod(begin, positions)
                own = v.shuffle(factors, factors, range(k * beside, (k + 1) * beside))
                scores = [
                    builder.fmul(together([[builder.load(x)] for x in some]), own) for some in zip(*sums, strict=True)
                ]
                for h, score in enumerate(v.transpose_blocks(scores)):
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
            (put_lanes if by_lane else put)(first_position)
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


def _values(form: Format, machine: Machine, heads: int) -> Tile:
    """(weights, fades, shares, out, rows, head, place, sharing, count, head_dim): the outputs of `heads` query heads.

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
    # Lanes of weights. Each of n turns meets n lines for one that it fetches: all of them meet the same.
    together = max(1, len(turns) * LINE // (at_once * wide * column_bytes))
    products_of_a_line = heads * digits * LINE // column_bytes
    by_lane = machine.by_lane
    if by_lane:  # whole vectors of them
        together = max(together, machine.lanes)

    def body(v: Vectors, weights: Any, fades: Any, shares: Any, out: Any, rows: Any, head: Any, *rest: Any) -> None:
        place, sharing, positions, head_dim = rest
        builder, size = v.builder, 4 * v.lanes
        kind = v.ints if form.integer else v.floats
        columns = padded(v, form, head_dim)
        fetcher = Fetcher(v, place, sharing, products_of_a_line)
        groups = v.over(lanes_with_weights(v, form, positions), together)

        def products(own: range, width: int, which: range, read: Read) -> Any:
            """[head][strip][which] sums over the tile, of some of the vectors that the rows' vectors become."""
            totals = [[[[v.variable(kind) for _ in range(sums)] for _ in which] for _ in range(width)] for _ in own]
            for total in (x for head in totals for strip in head for column in strip for x in column):
                builder.store(v.constant(kind, 0), total)
            with v.loop(groups) as group:
                fetcher.share(max(1, together * len(which) * width * column_bytes // LINE // len(turns)))
                first_lane = builder.mul(group, ir.Constant(I64, together))
                factors = factors_by_lane(own, first_lane) if by_lane else [None] * together
                for i, some in enumerate(factors):
                    add_products(own, v.address(first_lane, i, 1), some, which, read, totals)
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
            own: range, lane: ir.Value, factors: list[list[ir.Value]] | None, which: range, read: Read, totals: Any
        ) -> None:
            """Of the values whose weights are in one lane."""
            factors = factors or [[v.splat(x) for x in head] for head in weights_at(own, lane, I32)]
            for strip in range(len(totals[0])):
                found = read(lane, strip)
                for h in range(len(own)):
                    for i, column in enumerate(which):
                        for digit in range(digits):
                            total = totals[h][strip][i][digit % sums]
                            a, b, unsigned = factors[h][digit], found[column], "a"
                            if by_lane:
                                a, b, unsigned = b, a, "b"
                            builder.store(v.dot(builder.load(total), a, b, form, unsigned), total)

        def read_rows(first: ir.Value, count: ir.Value | None, lane: ir.Value, strip: int) -> list[ir.Value]:
            """The vectors that the values from element `first` on become whose weights are in a lane."""
            offset = v.address(head, first, form.itemsize)
            here = rows_of_lane(v, form, rows, lane)
            found = [x for row in here for x in v.load_parts(form, builder.add(row, offset), strip, count)]
            return v.interleave(found) if form.parts == 1 else found

        def reads(copy: ir.Value | None, first: ir.Value, count: ir.Value | None) -> Iterator[Read]:
            """How each of the passes over a strip of the tile's rows reads them: with a copy, once."""
            read = functools.partial(read_rows, first, count)
            if copy is None:
                yield from itertools.repeat(read)
                return

            def places(lane: ir.Value, strip: int) -> list[ir.Value]:
                at = v.address(copy, lane, size * form.per_lane * wide)
                return [v.address(at, strip * form.per_lane + i, size) for i in range(form.per_lane)]

            def read_and_copy(lane: ir.Value, strip: int) -> list[ir.Value]:
                found = read(lane, strip)
                for x, place in zip(found, places(lane, strip), strict=True):
                    v.store(x, place, size)
                return found

            yield read_and_copy
            yield from itertools.repeat(lambda lane, strip: [v.load(x, v.ints, size) for x in places(lane, strip)])

        def step(copy: ir.Value | None, first: ir.Value, width: int, count: ir.Value | None) -> None:
            ways = reads(copy, first, count)
            for own in turns:
                halves = [
                    products(own, width, range(begin, begin + at_once), next(ways))
                    for begin in range(0, form.per_lane, at_once)
                ]
                for i, h in enumerate(own):
                    line = builder.add(builder.mul(columns, ir.Constant(I64, h)), first)
                    line = builder.add(out, builder.mul(line, ir.Constant(I64, 4)))
                    for strip in range(width):
                        parts = [part for half in halves for part in half[i][strip]]
                        at = v.address(line, strip * form.per_lane, size)
                        fold(v, form, parts, v.address(fades, h, 4), v.address(shares, h, 4), at)

        def walk_values(copies: bool) -> None:
            copy = v.room(size * form.per_lane * wide * form.weight_lanes) if copies else None
            walk(v, form, head_dim, wide, functools.partial(step, copy))

        if form.pack == 4 and heads <= COPIES_FAR_VALUES.get(machine.cpu, 0):
            first, second = (v.load(v.address(rows, i, 8), I64) for i in range(2))
            far = builder.icmp_unsigned(">=", builder.sub(second, first), ir.Constant(I64, FAR))
            with builder.if_else(far) as (then, otherwise):
                with then:
                    walk_values(copies=True)
                with otherwise:
                    walk_values(copies=False)
        else:
            # Long vectors are made of values sooner than they are stored and loaded.
            walk_values(copies=len(turns) > 1 and machine.lanes < 16)
        fetcher.keep()

    return Tile(f"values{heads}", 10, body)
