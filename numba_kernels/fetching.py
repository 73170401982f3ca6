"""Having the rows of the next tile fetched into the processor's cache while this one is worked on."""

import math
from typing import NamedTuple

from llvmlite import ir

from numba_kernels.formats import Format
from numba_kernels.vectors import I64, LINE, Vectors

TOGETHER = 4  # lines of memory that are fetched at once, where that is no slower
# Of these processors the memory is slower when several lines are asked for at once. They go one by one, and are kept
# apart, unless the products of a line are so many that these do it.
ONE_BY_ONE = {"znver3": math.inf, "znver4": math.inf, "znver5": 8}


class Place(NamedTuple):
    """Where fetching stands in a list of addresses: of rows of one head or several, or of pages."""

    row: int  # where the address of the row stands whose lines are next; a page counts as a row
    offset: int  # bytes of it that have been fetched
    last: int  # where the last row's address stands
    size: int  # bytes of a row


class Portion(NamedTuple):
    """Lines to fetch at one place of the work."""

    times: ir.Value
    together: int  # lines of a row, each time


class Fetcher:
    """Has rows fetched into the processor's cache, in the order in which they lie in memory.

    The memory must be busy all the time and never swamped: every step of the work fetches as many lines as it has time
    for, which is as many as it reads, and no more: those that come too early are missing later. How many may go
    together is the processor's. Where they are kept apart, the address of each is made of that of the last, which takes
    some cycles; else of the place in a row, which does not wait for the row's address.
    """

    def __init__(self, v: Vectors, place: ir.Value, sharing: ir.Value, products: int = 0) -> None:
        """`place` is where the words of a `Place` stand; `sharing` parts share in every fetch.

        A line that is read meets so many vectors in `products`.
        """
        builder = v.builder
        self.v, self.place, self.sharing = v, place, sharing
        row, offset, self.last, self.size = (v.load(v.address(place, i, 8), I64) for i in range(len(Place._fields)))
        self.row, self.offset = (v.variable_of(x) for x in (row, offset))
        self.apart = products < ONE_BY_ONE.get(v.machine.cpu, 0)
        self.together = 1 if v.machine.cpu in ONE_BY_ONE else TOGETHER
        self.of_a_row = v.over(self.size, LINE)
        if self.apart:
            start = v.load(row, I64)
            self.line = v.variable_of(builder.add(start, offset))
            self.end = v.variable_of(builder.add(start, self.size))

    def part(self, form: Format, head_dim: ir.Value, percent: int) -> ir.Value:
        """So many percent of the lines of one head's tile."""
        v, builder = self.v, self.v.builder
        lines = v.over(builder.mul(head_dim, ir.Constant(I64, form.itemsize)), LINE)
        return v.over(builder.mul(lines, ir.Constant(I64, 2 * form.tile * percent)), 100)

    def portion(self, lines: ir.Value, sharing: ir.Value, together: int = TOGETHER) -> Portion:
        """What to `fetch`, at most so many lines together, for one of those that share in `lines`."""
        together = min(self.together, together)
        builder, most = self.v.builder, ir.Constant(I64, together)
        each = builder.select(builder.icmp_unsigned("<", self.of_a_row, most), self.of_a_row, most)
        own = builder.mul(sharing, each)
        return Portion(builder.udiv(builder.add(lines, builder.sub(own, ir.Constant(I64, 1))), own), together)

    def share(self, lines: int) -> None:
        """Fetch this part's share of so many lines."""
        with self.v.builder.goto_entry_block():
            portion = self.portion(ir.Constant(I64, lines), self.sharing, lines)
        if self.apart or self.together > 1:
            self.fetch(portion)
            return
        # Without a loop, whose jumps would take longer than all else.
        builder = self.v.builder
        for i in range(lines):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(I64, i), portion.times)):
                self._fetch_some(1)

    def fetch(self, portion: Portion) -> None:
        """Fetch the next lines; after the last row, that one over and over, which costs nothing."""
        with self.v.loop(portion.times):
            if self.apart:
                self._fetch_one()
            else:
                self._fetch_some(portion.together)

    def _fetch_one(self) -> None:
        v, builder = self.v, self.v.builder
        line, row = builder.load(self.line), builder.load(self.row)
        v.prefetch(line)
        line = v.address(line, 1, LINE)
        ends = builder.icmp_unsigned(">=", line, builder.load(self.end))
        row = self._row_behind(row, ends)
        start = v.load(row, I64)
        builder.store(row, self.row)
        builder.store(builder.select(ends, start, line), self.line)
        builder.store(builder.select(ends, builder.add(start, self.size), builder.load(self.end)), self.end)

    def _fetch_some(self, together: int) -> None:
        v, builder = self.v, self.v.builder
        row, offset = builder.load(self.row), builder.load(self.offset)
        line = builder.add(v.load(row, I64), offset)
        for i in range(together):
            v.prefetch(v.address(line, i, LINE))
        offset = v.address(offset, together, LINE)
        ends = builder.icmp_unsigned(">=", offset, self.size)
        builder.store(self._row_behind(row, ends), self.row)
        builder.store(builder.select(ends, ir.Constant(I64, 0), offset), self.offset)

    def _row_behind(self, row: ir.Value, ends: ir.Value) -> ir.Value:
        builder = self.v.builder
        more = builder.icmp_unsigned("<", row, self.last)
        return builder.select(builder.and_(more, ends), self.v.address(row, 1, 8), row)

    def keep(self) -> None:
        """Leave the place for the next part."""
        v, builder = self.v, self.v.builder
        offset = builder.load(self.offset)
        if self.apart:
            offset = builder.sub(builder.load(self.line), builder.sub(builder.load(self.end), self.size))
        for i, x in enumerate((builder.load(self.row), offset)):
            v.store(x, v.address(self.place, i, 8))
