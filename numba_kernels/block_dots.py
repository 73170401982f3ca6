"""A few rows of x meet rows of a matrix in blocks, by narrow dot products of integers.

A code is a byte, or half of one. So x is made of digits that meet codes: in a block x = step * X, where the step is a
power of two and X has three bytes with a sign each, or two int16 for processors without products of bytes. What a
block adds to a dot product is

    scale * step * sum(code * X) + minimum * sum(x)

of which the first sum is exact, in int32. X has 23 bits (22 beside codes of 8 bits), nearly float32's own precision of
the block's largest element; what a smaller one loses counts as much as its scale * code, be the weight ever so small.

A span is as many blocks as two vectors of codes hold, a strip as many as there are lanes.
"""

from typing import Any

from llvmlite import ir

from numba_kernels.blocks import BLOCK, LAYOUTS
from numba_kernels.machine import Machine
from numba_kernels.tiles import Tile, number
from numba_kernels.vectors import F32, I1, I8, I16, I32, I64, Vectors
from numba_kernels.weights import fetch_blocks, numbers_of

AT_ONCE = (4, 2, 1)  # rows of x that meet a row of the matrix
MOST = {4: 12, 2: 3}  # rows of x that are split at most, by codes in a lane: more are multiplied faster as float32
VECTORS = 2  # of codes, in a span
# Bits of X: what three signed bytes hold, and so few that the sum of a lane's products has room in int32.
BITS = {"q4_1": 23, "q8_0": 22}
MARGIN = 1.004  # three signed bytes hold 2**23 / MARGIN, and not 2**23
# Sizes of a block's largest that are split, as exponents of float32, which are stored with 127 added: so beside every
# float16 scale and minimum nothing overflows that would not have to, and scale * step is a normal number.
EXPONENTS = range(127 - 80, 127 + 100)
RAISED = 0x80808080 - 2**32  # 128 in every byte


class Digits:
    """How a row of x is split for matrices of a kind, and where that lies.

    There is a part for every vector of codes, of `rows` vectors: the digits that meet the codes, the highest first;
    and, where codes are raised by 128 to be unsigned, int32 that take it back. Behind all parts there are every block's
    step, then its sum of x, float32. All of it is as for whole strips, and 0 where there are no inputs.
    """

    def __init__(self, kind: str, machine: Machine) -> None:
        self.kind, self.layout = kind, LAYOUTS[kind]
        self.halves = kind == "q4_1"  # a byte has two codes: one vector has the first halves of blocks, one the second
        self.pack = 4 if machine.int8_dot else 2  # codes in a lane
        self.digits, self.bits = {4: 3, 2: 2}[self.pack], 32 // self.pack
        self.raises = self.pack == 4 and not self.halves and not machine.int8_signed
        self.rows = self.digits + self.raises
        self.span = VECTORS * self.pack * machine.lanes // BLOCK
        self.block_bytes = BLOCK // self.pack * 4 * self.rows  # of a block's parts

    def blocks(self, v: Vectors, inputs: ir.Value) -> ir.Value:
        """Those of whole strips."""
        return v.builder.mul(v.over(inputs, BLOCK * v.lanes), ir.Constant(I64, v.lanes))

    def size(self, v: Vectors, inputs: ir.Value) -> ir.Value:
        """Bytes of one row."""
        return v.builder.mul(self.blocks(v, inputs), ir.Constant(I64, self.block_bytes + 4 + 4))

    def numbers(self, v: Vectors, digits: ir.Value, inputs: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The addresses of the steps and of the sums of a row."""
        blocks = self.blocks(v, inputs)
        steps = v.address(digits, blocks, self.block_bytes)
        return steps, v.address(steps, blocks, 4)

    def place(self, v: Vectors, block: ir.Value, element: int) -> ir.Value:
        """Bytes from the beginning of a row to the highest digit of an element of a block."""
        builder, codes = v.builder, self.pack * v.lanes

        def divide(number: ir.Value, by: int) -> tuple[ir.Value, ir.Value]:
            return builder.udiv(number, ir.Constant(I64, by)), builder.urem(number, ir.Constant(I64, by))

        if self.halves:
            half, inside = divmod(element, BLOCK // 2)
            span, which = divide(block, self.span)
            vector = v.address(ir.Constant(I64, half), span, VECTORS)
            code = v.address(ir.Constant(I64, inside), which, BLOCK // 2)
        else:
            vector, code = divide(v.address(ir.Constant(I64, element), block, BLOCK), codes)
        return builder.add(
            builder.mul(vector, ir.Constant(I64, 4 * v.lanes * self.rows)),
            builder.mul(code, ir.Constant(I64, 4 // self.pack)),
        )


def make(machine: Machine, kind: str | None) -> tuple[Tile, ...]:
    """Steps of a product with a matrix of a kind; without narrow products, what says that a row of x has no digits."""
    if kind is None or machine.int8_dot is machine.int16_dot is None:
        nothing = [("most_split", 0), ("digits_size", 1), ("split_row", 3), ("dot_digits", 8)]
        return tuple(number(name, 0, arguments) for name, arguments in nothing)
    form = Digits(kind, machine)
    size = Tile("digits_size", 1, form.size, number=True)
    return number("most_split", MOST[form.pack]), size, _split_row(form), _dot_digits(form)


def _split_row(form: Digits) -> Tile:
    """(x, digits, inputs): split a row of x. The answer is 1, or 0 if digits are not for it: see `EXPONENTS`."""

    def body(v: Vectors, x: Any, digits: Any, inputs: Any) -> ir.Value:
        builder, size, zero = v.builder, 4 * v.lanes, v.constant(v.floats, 0.0)
        steps, sums = form.numbers(v, digits, inputs)
        with v.loop(builder.udiv(form.size(v, inputs), ir.Constant(I64, size))) as i:
            v.store(v.constant(v.ints, 0), v.address(digits, i, size))
        wrong, fits = v.variable_of(zero), v.variable_of(ir.Constant(I1, 1))
        with v.loop(builder.udiv(inputs, ir.Constant(I64, BLOCK))) as block:
            at = v.address(x, block, 4 * BLOCK)
            found = [v.load(v.address(at, i, 4), v.floats) for i in range(0, BLOCK, v.lanes)]
            larger = [builder.fmul(v.float_function("fabs", part), v.constant(v.floats, MARGIN)) for part in found]
            for part in larger:
                builder.store(v.float_function("fma", part, zero, builder.load(wrong)), wrong)  # NaN of NaN and inf
            largest = v.reduce("max", larger)
            builder.store(builder.and_(builder.load(fits), _fits(v, largest)), fits)
            step, inverse = _step(v, largest, BITS[form.kind])
            v.store(step, v.address(steps, block, 4))
            v.store(v.reduce("fadd", found), v.address(sums, block, 4))
            for i, part in enumerate(found):
                whole = builder.fptosi(v.float_function("rint", builder.fmul(part, v.splat(inverse))), v.ints)
                place = builder.add(digits, form.place(v, block, v.lanes * i))
                for digit in reversed(range(form.digits)):
                    low = builder.trunc(whole, ir.VectorType(ir.IntType(form.bits), v.lanes))
                    v.store(low, v.address(place, digit, size))
                    whole = builder.sub(whole, builder.sext(low, v.ints))
                    whole = builder.ashr(whole, v.constant(v.ints, form.bits))
        if form.raises:
            with v.loop(builder.udiv(builder.sub(steps, digits), ir.Constant(I64, form.rows * size))) as i:
                part = v.address(digits, i, form.rows * size)
                raised = _sums(v, form, [v.constant(v.ints, RAISED)], [part])
                v.store(builder.sub(v.constant(v.ints, 0), raised), v.address(part, form.digits, size))
        fine = builder.fcmp_ordered("==", v.reduce("fadd", [builder.load(wrong)]), ir.Constant(F32, 0.0))
        return builder.zext(builder.and_(builder.load(fits), fine), I64)

    return Tile("split_row", 3, body)


def _fits(v: Vectors, largest: ir.Value) -> ir.Value:
    """Whether a block with such a largest is split. Of 0 all digits are 0."""
    builder = v.builder
    above = builder.sub(_exponent(v, largest), ir.Constant(I32, EXPONENTS.start))
    inside = builder.icmp_unsigned("<", above, ir.Constant(I32, len(EXPONENTS)))
    return builder.or_(inside, builder.fcmp_ordered("==", largest, ir.Constant(F32, 0.0)))


def _exponent(v: Vectors, x: ir.Value) -> ir.Value:
    """Of a positive float32, as it is stored."""
    return v.builder.lshr(v.builder.bitcast(x, I32), ir.Constant(I32, 23))


def _step(v: Vectors, largest: ir.Value, bits: int) -> tuple[ir.Value, ir.Value]:
    """The step of which `largest`, if it fits, has so many bits at most, and 1 / step."""
    builder, least = v.builder, ir.Constant(I32, EXPONENTS.start)
    exponent = _exponent(v, largest)
    exponent = builder.select(builder.icmp_unsigned("<", exponent, least), least, exponent)
    exponent = builder.sub(exponent, ir.Constant(I32, bits - 1))
    both = exponent, builder.sub(ir.Constant(I32, 2 * 127), exponent)
    step, inverse = (builder.bitcast(builder.shl(x, ir.Constant(I32, 23)), F32) for x in both)
    return step, inverse


def _sums(v: Vectors, form: Digits, codes: list[ir.Value], parts: list[ir.Value]) -> ir.Value:
    """sum(code * X) of every lane, of some vectors of codes and the addresses of what they meet."""
    # A sum for each digit: if each went on from the one before, the processor would mostly wait.
    sums = [v.constant(v.ints, 0)] * form.digits
    for code, part in zip(codes, parts, strict=True):
        x = [v.load(v.address(part, digit, 4 * v.lanes), v.ints) for digit in range(form.digits)]
        sums = [v.dot_integers(total, code, digit, form.pack) for total, digit in zip(sums, x, strict=True)]
    *higher, whole = sums
    for i, total in enumerate(reversed(higher)):
        whole = v.builder.add(v.shift(total, form.bits * (i + 1)), whole)
    return whole


def _dot_digits(form: Digits) -> Tile:
    """(digits, matrix, out, count, batch, outputs, inputs, stride): `count` rows of the matrix, all rows of x."""

    def body(v: Vectors, digits: ir.Value, matrix: ir.Value, out: ir.Value, count: ir.Value, *sizes: ir.Value) -> None:
        builder = v.builder
        batch, outputs, inputs, stride = sizes
        size = form.size(v, inputs)
        done = v.variable_of(ir.Constant(I64, 0))
        for some in AT_ONCE:
            with v.loop(builder.udiv(builder.sub(batch, builder.load(done)), ir.Constant(I64, some))):
                first = builder.load(done)
                numbers = [builder.add(first, ir.Constant(I64, i)) for i in range(some)]
                vectors = [builder.add(digits, builder.mul(b, size)) for b in numbers]
                places = [v.address(out, builder.mul(b, outputs), 4) for b in numbers]
                with v.loop(count) as r:
                    row = builder.add(matrix, builder.mul(r, stride))
                    for total, place in zip(_dots(v, form, row, vectors, inputs), places, strict=True):
                        v.store(v.reduce("fadd", [total]), v.address(place, r, 4))
                builder.store(builder.add(first, ir.Constant(I64, some)), done)

    return Tile("dot_digits", 8, body)


def _dots(v: Vectors, form: Digits, row: ir.Value, vectors: list[ir.Value], inputs: ir.Value) -> list[ir.Value]:
    """The dot products of a row of the matrix with rows of x at some addresses, in lanes that are yet to be summed."""
    builder, layout, size = v.builder, form.layout, 4 * v.lanes
    lanes, blocks = ir.Constant(I64, v.lanes), builder.udiv(inputs, ir.Constant(I64, BLOCK))
    totals = [v.variable(v.floats) for _ in vectors]
    for total in totals:
        builder.store(v.constant(v.floats, 0.0), total)

    def strip(first: ir.Value, left: ir.Value | None) -> None:
        """The blocks from `first` on: as many as there are lanes, or so many as are left."""
        if left is None:
            fetch_blocks(v, row, layout, first, v.lanes)
        scale, *minimum = numbers_of(v, row, layout, blocks, first, left)
        factors = []
        for total, digits in zip(totals, vectors, strict=True):
            step, sum_ = (v.load(v.address(at, first, 4), v.floats) for at in form.numbers(v, digits, inputs))
            factors.append(builder.fmul(scale, step))
            if minimum:
                builder.store(v.float_function("fma", minimum[0], sum_, builder.load(total)), total)
        for begin in range(0, v.lanes, form.span):
            block = v.address(first, begin, 1)
            if left is None:
                span(block, None, factors, begin)
                continue
            here = builder.sub(left, ir.Constant(I64, begin))
            with builder.if_then(builder.icmp_signed(">", here, ir.Constant(I64, 0))):
                fetch_blocks(v, row, layout, block, form.span)
                span(block, here, factors, begin)

    def codes_of(block: ir.Value, left: ir.Value | None) -> list[ir.Value]:
        """The codes of a span, in two vectors; zeros behind the blocks that are left."""
        kind = ir.VectorType(I32, form.pack * v.lanes // 4)
        read = []
        for i in range(1 if form.halves else VECTORS):
            at = v.address(v.address(row, block, layout.codes), i, 4 * kind.count)
            if left is None or form.span == 1:
                some = v.load(at, kind)
            else:
                words = builder.mul(left, ir.Constant(I64, layout.codes // 4))
                some = v.load_first(at, kind, builder.sub(words, ir.Constant(I64, i * kind.count)))
            if form.pack == 2:
                some = builder.bitcast(some, ir.VectorType(I8, 4 * kind.count))
                some = (builder.zext if form.halves else builder.sext)(some, ir.VectorType(I16, 4 * kind.count))
            read.append(v.as_ints(some))
        if form.halves:
            halves = v.constant(v.ints, {4: 0x0F0F0F0F, 2: 0x000F000F}[form.pack])
            return [builder.and_(x, halves) for x in (read[0], v.shift(read[0], -4))]
        return [builder.xor(x, v.constant(v.ints, RAISED)) for x in read] if form.raises else read

    def span(block: ir.Value, left: ir.Value | None, factors: list[ir.Value], begin: int) -> None:
        """The blocks from `block` on; their factors are those lanes of a strip's that `begin` is the first of."""
        codes = codes_of(block, left)
        spans = builder.udiv(block, ir.Constant(I64, form.span))
        for total, digits, factor in zip(totals, vectors, factors, strict=True):
            part = v.address(digits, spans, VECTORS * form.rows * size)
            parts = [v.address(part, i, form.rows * size) for i in range(VECTORS)]
            # A lane has codes of one block; of halves, the two lanes that belong to the same one are summed together.
            summed = [range(VECTORS)] if form.halves else [range(i, i + 1) for i in range(VECTORS)]
            for which in summed:
                whole = _sums(v, form, [codes[i] for i in which], [parts[i] for i in which])
                if form.raises:
                    whole = builder.add(whole, v.load(v.address(parts[which[0]], form.digits, size), v.ints))
                of_block = BLOCK // form.pack // len(which)  # lanes
                own = [begin + (which[0] * v.lanes + lane) // of_block for lane in range(v.lanes)]
                spread = v.shuffle(factor, factor, own)
                total_ = v.float_function("fma", builder.sitofp(whole, v.floats), spread, builder.load(total))
                builder.store(total_, total)

    whole = builder.udiv(blocks, lanes)
    with v.loop(whole) as i:
        strip(builder.mul(i, lanes), None)
    done = builder.mul(whole, lanes)
    left = builder.sub(blocks, done)
    with builder.if_then(builder.icmp_signed(">", left, ir.Constant(I64, 0))):
        strip(done, left)
    return [builder.load(total) for total in totals]
