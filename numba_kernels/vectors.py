"""Vector arithmetic as LLVM IR: what the tiles are made of.

Vectors have `lanes` 32-bit lanes. The IR says nothing of a processor but for the narrow dot products, so it compiles
for any that LLVM knows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from numba_kernels.formats import Format
from numba_kernels.machine import Machine

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()

# exp(r) on |r| <= log(2) / 2: the polynomial of this degree whose largest relative error, 1.9e-9, is smallest (Remez).
EXP_TERMS = (0.0013836742, 0.0083748987, 0.0416682325, 0.1666641980, 0.4999999106, 1.0, 1.0)
# The same of a lower degree, 5.3e-6: for weights of which 16 bits are kept, or fewer.
EXP_TERMS_OF_16_BITS = (0.0412773493, 0.1675360082, 0.5000512641, 1.0, 1.0)
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
EXP_VANISHES = -87.7  # from here on exp(x) is 0: here it is nearest to 2**-127, whose exponent is that of 0
LINE = 64  # bytes of a cache line
# Lines are fetched into the second-level cache, which has room, and more fetches under way; but into the first-level
# cache of these processors, where that is faster.
FETCH_TO_FIRST_LEVEL = ("znver5",)


class Vectors:
    """Emits vector instructions at the end of a builder's block."""

    def __init__(self, builder: ir.IRBuilder, machine: Machine) -> None:
        self.builder, self.machine, self.lanes = builder, machine, machine.lanes
        self.ints = ir.VectorType(I32, self.lanes)
        self.floats = ir.VectorType(F32, self.lanes)

    def constant(self, kind: ir.VectorType, value: float) -> ir.Constant:
        """The same value in every lane."""
        return ir.Constant(kind, [value] * kind.count)

    def splat(self, scalar: ir.Value, count: int = 0) -> ir.Value:
        """A scalar in every lane of a vector, or of one of `count` lanes."""
        kind = ir.VectorType(scalar.type, count or self.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.shuffle(first, ir.Constant(kind, ir.Undefined), [0] * kind.count)

    def address(self, base: ir.Value, index: ir.Value | int, size: int) -> ir.Value:
        """base + index * size, in bytes."""
        index = ir.Constant(I64, index) if isinstance(index, int) else index
        return self.builder.add(base, self.builder.mul(index, ir.Constant(I64, size)))

    def over(self, count: ir.Value, size: int) -> ir.Value:
        """count / size, rounded up."""
        return self.builder.udiv(self.builder.add(count, ir.Constant(I64, size - 1)), ir.Constant(I64, size))

    def load(self, address: ir.Value, kind: ir.Type, align: int = 1) -> ir.Value:
        """What lies at an address."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: ir.Value, address: ir.Value, align: int = 1) -> None:
        """Write to an address."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=align)

    def room(self, size: int) -> ir.Value:
        """The address of so many bytes of the function's own, on a cache line of their own."""
        with self.builder.goto_entry_block():
            place = self.builder.alloca(I8, size)
            place.align = LINE
        return self.builder.ptrtoint(place, I64)

    def variable(self, kind: ir.Type) -> ir.Value:
        """A place for a value that changes, of which LLVM makes a register where it can."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind)

    def variable_of(self, value: ir.Value) -> ir.Value:
        """A place for a value that changes, and this one in it."""
        place = self.variable(value.type)
        self.builder.store(value, place)
        return place

    def load_first(self, address: ir.Value, kind: ir.VectorType, count: ir.Value) -> ir.Value:
        """The first `count` elements at an address, at least one, and zeros: nothing behind them is read."""
        bits = kind.element.width if isinstance(kind.element, ir.IntType) else 32
        if bits < 32 and self.lanes < 16:
            return self._load_first_narrow(address, kind, count, 32 // bits)
        name = f"llvm.masked.load.v{kind.count}{_suffix(kind.element)}.p0"
        mask_kind = ir.VectorType(ir.IntType(1), kind.count)
        places = ir.Constant(ir.VectorType(I64, kind.count), list(range(kind.count)))
        mask = self.builder.icmp_signed("<", places, self.splat(count, kind.count))
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        function = self.function(name, kind, (pointer.type, I32, mask_kind, kind))
        return self.builder.call(function, (pointer, ir.Constant(I32, 1), mask, ir.Constant(kind, None)))

    def _load_first_narrow(self, address: ir.Value, kind: ir.VectorType, count: ir.Value, share: int) -> ir.Value:
        """The same where only loads of whole lanes can be masked, which hold `share` elements each."""
        builder = self.builder
        whole = builder.udiv(count, ir.Constant(I64, share))
        words = self.load_first(address, ir.VectorType(I32, kind.count // share), whole)
        elements, last = builder.bitcast(words, kind), builder.sub(count, ir.Constant(I64, 1))
        for i in range(1, share):  # what is left, or the last element once more
            index = self.address(builder.mul(whole, ir.Constant(I64, share)), i - 1, 1)
            index = builder.select(builder.icmp_unsigned("<", index, last), index, last)
            element = self.load(self.address(address, index, kind.element.width // 8), kind.element)
            places = ir.Constant(ir.VectorType(I64, kind.count), list(range(kind.count)))
            here = builder.icmp_signed("==", places, self.splat(index, kind.count))
            elements = builder.select(here, self.splat(element, kind.count), elements)
        return elements

    def prefetch(self, address: ir.Value) -> None:
        """Have the cache line at an address fetched; any address will do."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        function = self.function("llvm.prefetch.p0", ir.VoidType(), (pointer.type, I32, I32, I32))
        locality = 3 if self.machine.cpu in FETCH_TO_FIRST_LEVEL else 2
        read, keep, data = (ir.Constant(I32, x) for x in (0, locality, 1))
        self.builder.call(function, (pointer, read, keep, data))

    def function(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        """An LLVM intrinsic."""
        kind = ir.FunctionType(result, arguments)
        module = self.builder.module
        return module.globals.get(name) or ir.Function(module, kind, name)

    def float_function(self, name: str, *values: ir.Value) -> ir.Value:
        """`llvm.NAME` of float32 vectors or scalars."""
        kind = values[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.builder.call(self.function(f"llvm.{name}.{suffix}", kind, [kind] * len(values)), values)

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger of two in each lane, and b where one is NaN: one instruction on x86."""
        integers = getattr(a.type, "element", a.type) == I32
        above = self.builder.icmp_signed(">", a, b) if integers else self.builder.fcmp_ordered(">", a, b)
        return self.builder.select(above, a, b)

    def reduce(self, combine: str, vectors: Sequence[ir.Value]) -> ir.Value:
        """All lanes of all vectors into one, by halves: "max", which may lose a NaN, "fadd", or "add" of int32."""

        def both(a: ir.Value, b: ir.Value) -> ir.Value:
            if combine == "max":
                return self.larger(a, b)
            return getattr(self.builder, combine)(a, b)

        rows = list(vectors)
        while len(rows) > 1:
            rows = [both(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        (vector,) = rows
        while (count := vector.type.count) > 1:
            halves = range(count // 2), range(count // 2, count)
            vector = both(*(self.shuffle(vector, vector, half) for half in halves))
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def dot(self, total: ir.Value, a: ir.Value, b: ir.Value, form: Format, unsigned: str) -> ir.Value:
        """Add the dot product of a and b to the total, in every lane.

        Args:
          total: float32 lanes, or int32 of an integer format.
          a, b: lanes of one float32, two bfloat16, two int16 or four int8.
          form: which of them.
          unsigned: "a" or "b", which one of them is uint8 where they are bytes and not both signed.
        """
        if form.pack == 1:
            return self.float_function("fma", self.as_floats(a), self.as_floats(b), total)
        if form.integer:
            if unsigned == "b" and form.pack == 4 and not form.signed:
                a, b = b, a
            return self.dot_integers(total, a, b, form.pack)
        name, kind = self.machine.bfloat16_dot, ir.VectorType(_BFLOAT, 2 * self.lanes)
        a, b = self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)
        return self.builder.call(self.function(str(name), total.type, (total.type, kind, kind)), (total, a, b))

    def dot_integers(self, total: ir.Value, a: ir.Value, b: ir.Value, pack: int) -> ir.Value:
        """Add the dot products of pairs of int16, or of quads of bytes, to int32 lanes.

        Bytes are uint8 in a and int8 in b, or int8 in both where the machine says so.
        """
        kind = ir.VectorType(ir.IntType(32 // pack), pack * self.lanes)
        a, b = self.builder.bitcast(a, kind), self.builder.bitcast(b, kind)
        if pack == 2:
            function = self.function(str(self.machine.int16_dot), self.ints, (kind, kind))
            return self.builder.add(total, self.builder.call(function, (a, b)))
        function = self.function(str(self.machine.int8_dot), self.ints, (self.ints, kind, kind))
        return self.builder.call(function, (total, a, b))

    def as_floats(self, vector: ir.Value) -> ir.Value:
        """The same bits as float32 lanes."""
        return self.builder.bitcast(vector, self.floats)

    def as_ints(self, vector: ir.Value) -> ir.Value:
        """The same bits as int32 lanes."""
        return self.builder.bitcast(vector, self.ints)

    def shift(self, x: ir.Value, bits: int) -> ir.Value:
        """int32 lanes moved up by so many bits, or down if that is negative, and zeros."""
        move = self.builder.shl if bits > 0 else self.builder.lshr
        return move(x, self.constant(self.ints, abs(bits)))

    def shuffle(self, a: ir.Value, b: ir.Value, indices: Sequence[int]) -> ir.Value:
        """Elements of a and b, counted through both."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(indices)), list(indices)))

    def one_lane(self, vector: ir.Value, index: int, form: Format) -> ir.Value:
        """A lane of a vector in all lanes, as `b` of `dot`.

        Arm's products take it from the vector itself, if LLVM finds it in lanes of the type that these are summed in.
        """
        vector = vector if form.integer else self.as_floats(vector)
        return self.shuffle(vector, vector, [index] * self.lanes)

    def interleave(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """1, 2 or 4 vectors of elements, as vectors whose lanes hold one element of each.

        Every 128 bits by themselves, which processors do faster: `in_order` puts sums of such vectors right.
        """
        if len(rows) == 1:
            return [self.as_ints(rows[0])]
        bits = 32 // len(rows)
        zipped = [list(rows)]
        while len(zipped[0]) > 1:
            kind = ir.VectorType(ir.IntType(bits), 32 // bits * self.lanes)
            zipped = [
                [
                    self._zip(self.builder.bitcast(a, kind), self.builder.bitcast(b, kind), 128 // bits)[half]
                    for a, b in zip(parts[::2], parts[1::2], strict=True)
                ]
                for parts in zipped
                for half in (0, 1)
            ]
            bits *= 2
        return [self.as_ints(x) for (x,) in zipped]

    def _zip(self, a: ir.Value, b: ir.Value, block: int) -> list[ir.Value]:
        """a0 b0 a1 b1 ... of the first halves of all blocks of so many elements, and of their second halves."""
        n = a.type.count
        return [
            self.shuffle(
                a,
                b,
                [
                    x
                    for at in range(0, n, block)
                    for i in range(block // 2)
                    for x in (at + begin + i, n + at + begin + i)
                ],
            )
            for begin in (0, block // 2)
        ]

    def in_order(self, sums: Sequence[ir.Value]) -> list[ir.Value]:
        """Vectors of lanes that belong to the elements of `interleave`'s vectors, in the elements' own order."""
        if len(sums) == 1 or self.lanes == 4:
            return list(sums)
        if len(sums) == 2:
            return self.alternate(sums[0], sums[1], 4)
        first, second = self.alternate(sums[0], sums[1], 4), self.alternate(sums[2], sums[3], 4)
        return [x for a, b in zip(first, second, strict=True) for x in self.alternate(a, b, 8)]

    def apart(self, vectors: Sequence[ir.Value]) -> list[ir.Value]:
        """The inverse of `in_order` for one vector, or two."""
        if len(vectors) == 1 or self.lanes == 4:
            return list(vectors)
        a, b = vectors
        halves = range(0, 2 * self.lanes, 8), range(4, 2 * self.lanes, 8)
        return [self.shuffle(a, b, [at + i for at in half for i in range(4)]) for half in halves]

    def alternate(self, a: ir.Value, b: ir.Value, size: int) -> list[ir.Value]:
        """Blocks of `size` lanes of two vectors in turn, as two vectors."""
        n = self.lanes
        if size == n:
            return [a, b]
        both = [x for at in range(0, n, size) for start in (at, n + at) for x in range(start, start + size)]
        return [self.shuffle(a, b, both[:n]), self.shuffle(a, b, both[n:])]

    def transpose_blocks(self, rows: Sequence[ir.Value]) -> list[ir.Value]:
        """In every block of as many lanes as there are vectors, lane i of vector j is lane j of vector i."""
        rows, n = list(rows), self.lanes
        for distance in (1 << i for i in range(len(rows).bit_length() - 1)):
            lanes = range(n)
            low = [i if not i & distance else n + i - distance for i in lanes]
            high = [i + distance if not i & distance else n + i for i in lanes]
            for i in range(len(rows)):
                if not i & distance:
                    a, b = rows[i], rows[i + distance]
                    rows[i], rows[i + distance] = self.shuffle(a, b, low), self.shuffle(a, b, high)
        return rows

    def sums(self, vectors: Sequence[ir.Value], block: int) -> ir.Value:
        """The sums of every `block` lanes by themselves, of at most as many vectors.

        Block i of the result has those of the vectors' blocks i, in order; of fewer vectors, it is as much smaller.
        Vectors and lanes are powers of two.
        """
        n, rows = self.lanes, list(vectors)
        add = self.builder.add if rows[0].type == self.ints else self.builder.fadd
        while block > 1:
            half = block // 2
            if len(rows) == 1:
                low = [i + j for i in range(0, n, block) for j in range(half)]
                rows = [
                    add(self.shuffle(rows[0], rows[0], low), self.shuffle(rows[0], rows[0], [half + i for i in low]))
                ]
                n //= 2
            else:
                # The first half of a block is of a, the second of b; one of the two shuffles leaves all in its place.
                stay = [i if i % block < half else n + i for i in range(n)]
                move = [i + half if i % block < half else n + i - half for i in range(n)]
                pairs = zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)
                rows = [add(self.shuffle(a, b, stay), self.shuffle(a, b, move)) for a, b in pairs]
            block = half
        (total,) = rows
        return total

    def exp(
        self, x: ir.Value, terms: tuple[float, ...] = EXP_TERMS, factor: float = 1.0, more: ir.Value | None = None
    ) -> ir.Value:
        """The exp of float32 lanes, at most 0 each, times a factor and plus `more`; 0 far below, NaN of NaN.

        `terms` is one of the polynomials. log(2) is a float32, off by 2e-9 of n: less than x itself is off, which is
        near n * log(2).
        """
        c, fma = self.constant, lambda *values: self.float_function("fma", *values)
        x = self.larger(c(self.floats, EXP_VANISHES), x)
        rounder = c(self.floats, 1.5 * 2**23 + 127)  # adding it rounds to an integer, in the low bits
        shifted = fma(x, c(self.floats, LOG2E), rounder)
        n = self.builder.fsub(shifted, rounder)
        r = fma(n, c(self.floats, -LN2), x)
        y = c(self.floats, factor * terms[0])
        for term in terms[1:]:
            y = fma(y, r, c(self.floats, factor * term))
        # 2**n: the rounder's own bits are shifted out
        power = self.as_floats(self.builder.shl(self.as_ints(shifted), c(self.ints, 23)))
        return self.builder.fmul(y, power) if more is None else fma(y, power, more)

    def round_to_bfloat16(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The nearest bfloat16 of float32 lanes, and the same as float32."""
        half = self.builder.fptrunc(x, ir.VectorType(_BFLOAT, self.lanes))
        bits = self.builder.zext(self.builder.bitcast(half, ir.VectorType(I16, self.lanes)), self.ints)
        return half, self.as_floats(self.builder.shl(bits, self.constant(self.ints, 16)))

    def load_parts(self, form: Format, address: ir.Value, index: int, count: ir.Value | None) -> list[ir.Value]:
        """`form.per_lane` elements of a row of the cache for every lane, as `form.parts` vectors.

        Of two vectors, each has half of every 128 bits that were read: `in_order` puts sums of such vectors right.

        Args:
          form: how.
          address: in the row.
          index: of the reading, counted from the address on.
          count: elements there are, where fewer than fill the lanes; the rest is then 0. None: as many.
        """
        builder, elements = self.builder, form.strip(self.lanes)
        kind = ir.VectorType({1: I8, 2: I16, 4: F32}[form.itemsize], elements)
        address = self.address(address, index, elements * form.itemsize)
        raw = self.load(address, kind) if count is None else self.load_first(address, kind, count)
        if form.words:
            return [self.as_ints(builder.sext(raw, ir.VectorType(I16, elements)))]
        if form.pack > 1 or form.dtype == "float32":
            return [self.as_ints(raw)]
        if form.dtype == "float16":
            return [self.as_ints(builder.fpext(builder.bitcast(raw, ir.VectorType(F16, elements)), self.floats))]
        if form.dtype == "bfloat16":  # a float32 is the bits of a bfloat16 behind 16 that are 0
            return self.interleave([self.constant(kind, 0), raw])
        return [self.as_ints(builder.sitofp(builder.sext(raw, self.ints), self.floats))]

    @contextmanager
    def loop(self, count: ir.Value) -> Iterator[ir.Value]:
        """For index in range(count)."""
        builder, before = self.builder, self.builder.basic_block
        condition, body, after = (builder.append_basic_block(f"loop.{part}") for part in ("condition", "body", "after"))
        builder.branch(condition)
        builder.position_at_end(condition)
        index = builder.phi(count.type)
        builder.cbranch(builder.icmp_signed("<", index, count), body, after)
        builder.position_at_end(body)
        yield index
        index.add_incoming(ir.Constant(count.type, 0), before)
        index.add_incoming(builder.add(index, ir.Constant(count.type, 1), flags=["nsw"]), builder.basic_block)
        builder.branch(condition)
        builder.position_at_end(after)


class _BFloatType(ir.Type):
    """bfloat16, which llvmlite's own types lack."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


_BFLOAT = _BFloatType()


def _suffix(element: ir.Type) -> str:
    return "f32" if element == F32 else f"i{element.width}"
