"""A few vectors times a matrix whose rows are the outputs: the machine code of `product.py`.

out[b, o] = sum_i x[b, i] * matrix[o, i], float32. The matrix is read once, from its beginning to its end in as few
pieces as the threads need: that is how memory is read fastest, and reading is all that a product of a few rows waits
for. Many rows meet a small piece of it at a time, as float32, in the processor's caches. Few rows meet a matrix in
blocks as digits (block_dots.py), unless one of them has numbers that digits are not for.
"""

from numba_kernels.frame import ARGUMENTS, DATA, DIMS, RESULTS, answers_metadata, num_threads
from numba_kernels.linked import linked
from numba_kernels.meetings import MANY
from numba_kernels.native import allocate, native, release, store_int64, up, word
from numba_kernels.sharing import OWN, done, leave, new_block, share, take
from numba_kernels.vectors import LINE

FROM = 5  # rows of x that are many, if they are not split
GROUP = MANY[0].vectors  # of many, those that meet a piece of the matrix before the next do
NEAR = 128  # rows of x: the lines of more rows of the result do not stay in the caches until all sums are in them
SLAB = 768  # inputs that they meet at a time: what of eight rows of x stays in the first-level cache
PIECE = 1 << 19  # bytes of the matrix, as float32, that many rows of x meet one group after another
LEAST_WEIGHTS = 1 << 17  # of a range: where one begins, the memory's own fetching ahead has to begin anew
RANGES_PER_THREAD = 8  # at most
X, MATRIX, OUT, BATCH, OUTPUTS, INPUTS, STRIDE, LENGTH, DIGITS, WORDS = range(OWN, OWN + 10)  # of the shared block


dot_few = linked("dot_few", 10)
dot_digits = linked("dot_digits", 8)
split_row = linked("split_row", 3)
digits_size = linked("digits_size", 1)
most_split = linked("most_split")  # rows of x; 0 if they have no digits
dot_many = linked("dot_many", 10)
expand = linked("expand", 5)
copy = linked("copy", 3)
in_blocks = linked("in_blocks")  # 1 if the matrix is
row_itemsize = linked("row_itemsize")  # of the array that holds it


@native
def multiply(block, first, end):  # type: ignore[no-untyped-def]
    """Outputs `first` to `end` of all rows of x."""
    x, out, batch = word(block, X), word(block, OUT) + 4 * first, word(block, BATCH)
    outputs, inputs, stride = word(block, OUTPUTS), word(block, INPUTS), word(block, STRIDE)
    matrix = word(block, MATRIX) + stride * first
    if word(block, DIGITS) != 0:
        dot_digits(word(block, DIGITS), matrix, out, end - first, batch, outputs, inputs, stride)
        return
    piece = min(max(1, PIECE // (4 * inputs)), end - first)
    line = up(4 * piece, LINE)  # bytes of the sums of one row of x
    room = allocate(GROUP * line + (4 * inputs * piece if in_blocks() != 0 else 0)) if batch >= FROM else 0
    if room == 0:
        dot_few(x, matrix, out, end - first, batch, outputs, inputs, stride, 0, inputs)
        return
    for begin in range(0, end - first, piece):
        count = min(piece, end - first - begin)
        rows, step = matrix + stride * begin, stride
        if in_blocks() != 0:
            expand(rows, room + GROUP * line, count, inputs, stride)
            rows, step = room + GROUP * line, 4 * inputs
        for b in range(0, batch, GROUP):
            some = min(GROUP, batch - b)
            own = out + 4 * (outputs * b + begin)
            to, distance = (own, outputs) if batch <= NEAR else (room, line // 4)
            for at in range(0, inputs, SLAB):
                length = min(SLAB, inputs - at)
                dot_many(x + 4 * inputs * b, rows, to, count, some, distance, inputs, step, at, length)
            if batch > NEAR:
                for i in range(some):
                    copy(room + line * i, own + 4 * outputs * i, count)
    release(room)


@native
def split(x, digits, size, batch, inputs):  # type: ignore[no-untyped-def]
    """Put all rows of x in digits; their address, or 0 if they have none."""
    if size == 0:
        return 0
    for b in range(batch):
        if split_row(x + 4 * inputs * b, digits + size * b, inputs) == 0:
            return 0
    return digits


@native
def take_ranges(block):  # type: ignore[no-untyped-def]
    """What every thread does with the shared block."""
    while True:
        number = take(block)
        if number < 0:
            break
        length = word(block, LENGTH)
        multiply(block, number * length, min((number + 1) * length, word(block, OUTPUTS)))
        done(block)
    leave(block)
    return 0


@native
def handle(frame):  # type: ignore[no-untyped-def]
    """Answer the call of a frame of XLA's. Returns 0, or 1 if there is no memory."""
    if answers_metadata(frame):
        return 0
    arguments = word(frame, ARGUMENTS)
    x, matrix, out = word(arguments, 0), word(arguments, 1), word(word(frame, RESULTS), 0)
    batch, inputs = word(word(x, DIMS), 0), word(word(x, DIMS), 1)
    outputs, stride = word(word(matrix, DIMS), 0), row_itemsize() * word(word(matrix, DIMS), 1)
    threads = 1
    weights = outputs * inputs
    if weights >= 2 * LEAST_WEIGHTS:
        threads = max(1, num_threads(frame))
    # As many for each thread: at the end nobody waits long.
    ranges = threads * max(1, min(RANGES_PER_THREAD, weights // LEAST_WEIGHTS // threads))
    length = (outputs + ranges - 1) // ranges
    ranges = (outputs + length - 1) // length
    threads = min(threads, ranges)
    size = digits_size(inputs) if batch <= most_split() else 0
    block = new_block(8 * WORDS + LINE + size * batch, ranges, threads)
    if block == 0:
        return 1
    store_int64(block + 8 * DIGITS, split(word(x, DATA), up(block + 8 * WORDS, LINE), size, batch, inputs))
    store_int64(block + 8 * X, word(x, DATA))
    store_int64(block + 8 * MATRIX, word(matrix, DATA))
    store_int64(block + 8 * OUT, word(out, DATA))
    store_int64(block + 8 * BATCH, batch)
    store_int64(block + 8 * OUTPUTS, outputs)
    store_int64(block + 8 * INPUTS, inputs)
    store_int64(block + 8 * STRIDE, stride)
    store_int64(block + 8 * LENGTH, length)
    share(frame, block, threads)
    leave(block)
    return 0
