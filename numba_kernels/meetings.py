"""The steps of a product, as functions of vector instructions: rows of x meet rows of the matrix in registers."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from numba_kernels import block_dots
from numba_kernels.machine import Machine
from numba_kernels.tiles import Tile, number
from numba_kernels.vectors import F32, I32, I64, Vectors
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


def make(machine: Machine, kind: str | None) -> dict[str, Tile]:
    """What rows.py is linked with for a matrix of a kind, by name."""
    tiles = (
        Tile("dot_few", 10, _dot_rows(READERS[kind], FEW)),
        Tile("dot_many", 10, _dot_rows(READERS[None], MANY if machine.registers >= 32 else MANY[1:])),
        Tile("expand", 5, _expand(READERS[kind])),
        Tile("copy", 3, _copy),
        *block_dots.make(machine, kind),
        number("in_blocks", int(kind is not None)),
        number("row_itemsize", 1 if kind else 4),
    )
    return {tile.name: tile for tile in tiles}


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
        done = v.variable_of(ir.Constant(I64, 0))
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
    totals = [[[v.variable(v.floats) for _ in range(sums)] for _ in rows] for _ in vectors]
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
