"""One call of the decode loop, as read from XLA's frame, and the scratch that a thread needs for it."""

from typing import NamedTuple

from numba_kernels import linked
from numba_kernels.fetching import Place
from numba_kernels.formats import MATRIX_COLUMNS
from numba_kernels.frame import ARGUMENTS, ATTRIBUTES, DATA, DIMS, KIND, RESULTS, WORD
from numba_kernels.native import load_bfloat16, load_float16, load_float32, load_int32, native, store_int64, up, word
from numba_kernels.records import record_of
from numba_kernels.tiles import SERIES
from numba_kernels.vectors import LINE

# The order of the operands and results of the foreign call; an absent one is an array without elements.
QUERY, SCALE, KEY, VALUE, TABLE, VALUE_TABLE, START, STOP, MASK, BIAS = range(10)
OUT, LSE = range(2)
PLACE_BYTES = WORD * len(Place._fields)
# Bytes of the keys of a tile that are read together, of all heads of a unit: those of keys and values, of this tile and
# the next, are to have room in a second-level cache.
UNIT_TILE = 1 << 17
# Memory is slower in small pieces, so heads that lie together in small pages are read together; but only by calls that
# read so many bytes: others may lie in a cache, and have no ranges to spare for larger states.
LEAST_JOINED = 1 << 26
# Bytes from the first row of a tile to its end: longer ones have more pages of memory than the processor finds at once.
TILE_SPAN = 1 << 16
BFLOAT16, FLOAT16 = 16, 10  # XLA's numbers of element types


class Call(NamedTuple):
    """Addresses and sizes of one call; letters as in `jax_ifa.operands`. Strides of the cache are in bytes."""

    batch: int
    heads: int  # K
    group: int  # G
    head_dim: int
    query: int
    scale: int
    key: int
    value: int
    key_pages: int
    value_pages: int
    page_size: int
    pages: int  # M
    page_stride: int
    head_stride: int
    row_stride: int
    table: int  # 0 if there is none
    value_table: int
    start: int
    stop: int
    mask: int
    mask_rows: int
    mask_width: int
    bias: int
    bias_rows: int
    bias_width: int
    bias_kind: int
    out: int
    lse: int
    unit_heads: int  # kv heads that are read together, since they lie together
    tile: int  # positions read at a time


call_at, _put_call = record_of(Call)
CALL_BYTES = WORD * len(Call._fields)
UNIT_HEADS = WORD * Call._fields.index("unit_heads")


@native
def read_call(frame, address):  # type: ignore[no-untyped-def]
    """The `Call` of a frame, kept at an address. Its tiles are smaller where their rows are far apart."""
    arguments, results = word(frame, ARGUMENTS), word(frame, RESULTS)
    query, key, value = word(arguments, QUERY), word(arguments, KEY), word(arguments, VALUE)
    table, value_table = word(arguments, TABLE), word(arguments, VALUE_TABLE)
    mask, bias = word(arguments, MASK), word(arguments, BIAS)
    dims = word(query, DIMS)
    heads, group, head_dim = word(dims, 1), word(dims, 2), word(dims, 3)
    # The only attribute: an XLA_FFI_Scalar, whose word 1 points to the value.
    head_major = word(word(word(word(frame, ATTRIBUTES), 0), 1), 0) != 0
    page_size = word(word(key, DIMS), 2 if head_major else 1)
    row, tile = head_dim * linked.itemsize(), linked.tile()
    if head_major:
        head_stride, row_stride, unit_heads = page_size * row, row, 1
    else:
        head_stride, row_stride, unit_heads = row, heads * row, heads
        if tile * row_stride > TILE_SPAN:
            tile = linked.least_tile()
        while unit_heads % 2 == 0 and unit_heads * row * tile > UNIT_TILE:
            unit_heads //= 2
    has_table = word(word(table, DIMS), 0) > 0
    has_value_table = word(word(value_table, DIMS), 0) > 0
    has_mask, has_bias = word(word(mask, DIMS), 0) > 0, word(word(bias, DIMS), 0) > 0
    return _put_call(
        address,
        (
            word(word(query, DIMS), 0),
            heads,
            group,
            head_dim,
            word(query, DATA),
            word(word(arguments, SCALE), DATA),
            word(key, DATA),
            word(value, DATA),
            word(word(key, DIMS), 0),
            word(word(value, DIMS), 0),
            page_size,
            word(word(table, DIMS), 1) if has_table else 1,
            heads * page_size * row,
            head_stride,
            row_stride,
            word(table, DATA) if has_table else 0,
            word(value_table, DATA) if has_value_table else (word(table, DATA) if has_table else 0),
            word(word(arguments, START), DATA),
            word(word(arguments, STOP), DATA),
            word(mask, DATA) if has_mask else 0,
            word(word(mask, DIMS), 0),
            word(word(mask, DIMS), 1),
            word(bias, DATA) if has_bias else 0,
            word(word(bias, DIMS), 0),
            word(word(bias, DIMS), 3),
            load_int32(bias + WORD * KIND),
            word(word(results, OUT), DATA),
            word(word(results, LSE), DATA),
            unit_heads,
            tile,
        ),
    )


@native
def join_heads(call, address, most):  # type: ignore[no-untyped-def]
    """Of the call at an address: up to so many heads that lie together in pages that divide a tile become a unit."""
    if call.table != 0 and call.head_stride >= call.row_stride and call.tile % call.page_size == 0:
        unit_heads = max(1, min(call.heads, most, UNIT_TILE // (call.tile * call.row_stride)))
        while call.heads % unit_heads != 0:
            unit_heads -= 1
        store_int64(address + UNIT_HEADS, unit_heads)


@native
def joined(call):  # type: ignore[no-untyped-def]
    """Whether the heads of a unit lie one behind the other in every page, and not side by side in every row."""
    return call.unit_heads > 1 and call.head_stride >= call.row_stride


@native
def window(call, b):  # type: ignore[no-untyped-def]
    """[start, stop) of sequence b, clamped to the positions there are."""
    capacity = call.pages * call.page_size
    stop = min(max(load_int32(call.stop + 4 * b), 0), capacity)
    return min(max(load_int32(call.start + 4 * b), 0), stop), stop


@native
def group_of(call):  # type: ignore[no-untyped-def]
    """Query heads that are multiplied for a kv head: G, or one more, where the last is there twice."""
    return linked.group(call.group)


@native
def query_head(call, b, head, g):  # type: ignore[no-untyped-def]
    """The number in (B, K, G) of head g of a group."""
    return (b * call.heads + head) * call.group + min(g, call.group - 1)


@native
def bias_at(call, b, head, g, t):  # type: ignore[no-untyped-def]
    """The bias of position t for head g of a group of sequence b, as float32."""
    index = query_head(call, b % call.bias_rows, head, g) * call.bias_width + t
    if call.bias_kind == BFLOAT16:
        return load_bfloat16(call.bias + 2 * index)
    if call.bias_kind == FLOAT16:
        return load_float16(call.bias + 2 * index)
    return load_float32(call.bias + 4 * index)


@native
def columns_of(call):  # type: ignore[no-untyped-def]
    """D, rounded up to whole strips."""
    return up(call.head_dim, linked.strip())


@native
def group_lanes(call):  # type: ignore[no-untyped-def]
    """The heads of a group, rounded up to whole vectors."""
    return up(group_of(call), linked.lanes())


@native
def head_state(call):  # type: ignore[no-untyped-def]
    """Bytes of a kv head's state: outputs (G, D in strips), largest scores and sums of weights (2, G in vectors)."""
    return 4 * (group_of(call) * columns_of(call) + 2 * group_lanes(call))


class Scratch(NamedTuple):
    """Addresses of a thread's working memory. G is `group_of`, padded to whole vectors where it comes last."""

    plain: int  # (digits, D padded) one query head
    query: int  # (unit_heads, `query_size`) as `_piece` in dots.py or `scores` in amx.py says
    initial: int  # (unit_heads, G, digits) int32: from which the products of keys start
    weight: int  # (unit_heads, G) float32: what a score is multiplied by
    scores: int  # (G, T) float32; behind these and the next there is room for a matrix
    weights: int  # (G, `weight_rows`, `weight_lanes`) lanes
    factors: int  # (4, G) float32: see `weigh` in tiles.py
    state: int  # (unit_heads, head_state) bytes
    place: int  # `Place`: where fetching stands
    rows: int  # (2, (2, T) and a line) addresses of keys and values of this tile and the next, of a unit's first head
    pieces: int  # (2, T) addresses of a unit's parts of the pages of the next tile, if they are `joined`
    matrices: int  # 64 bytes: the sizes of matrices that `configure` found, for `reset`
    zeros: int  # a row of a head that is all 0, and room for what is fetched with it
    size: int  # bytes in all


_, _put_scratch = record_of(Scratch)
SCRATCH_BYTES = WORD * len(Scratch._fields)


@native
def query_size(call):  # type: ignore[no-untyped-def]
    """Bytes of the query heads of one kv head."""
    parts = (group_of(call) + linked.query_heads() - 1) // linked.query_heads()
    return 4 * linked.query_lanes() * parts * (columns_of(call) // linked.pack())


@native
def _scratch_parts(call, base):  # type: ignore[no-untyped-def]
    """The fields of a `Scratch` that begins there: the record first, then every part on a cache line of its own."""
    length, group = columns_of(call) // linked.pack(), group_of(call)
    heads = call.unit_heads * group
    more = MATRIX_COLUMNS if linked.amx() != 0 else 0
    plain = up(base + SCRATCH_BYTES, LINE)
    query = up(plain + 4 * linked.query_digits() * length, LINE)
    initial = up(query + call.unit_heads * query_size(call), LINE)
    weight = up(initial + 4 * heads * linked.query_digits(), LINE)
    scores = up(weight + 4 * heads, LINE)
    weights = up(scores + 4 * (group + more) * linked.tile(), LINE)
    factors = up(weights + 4 * (group * linked.weight_rows() + more) * linked.weight_lanes(), LINE)
    state = up(factors + 16 * group_lanes(call), LINE)
    place = up(state + call.unit_heads * head_state(call), LINE)
    rows = up(place + PLACE_BYTES, LINE)
    pieces = up(rows + WORD * 2 * (2 * linked.tile() + SERIES), LINE)
    matrices = up(pieces + WORD * 2 * linked.tile(), LINE)
    zeros = matrices + LINE
    end = up(zeros + call.unit_heads * linked.itemsize() * call.head_dim, LINE)
    starts = plain, query, initial, weight, scores, weights, factors, state, place, rows, pieces, matrices, zeros
    return (*starts, end - base)


@native
def scratch_size(call):  # type: ignore[no-untyped-def]
    """Bytes of a `Scratch` for a call, wherever it begins."""
    return _scratch_parts(call, 0)[-1] + LINE


@native
def lay_out(call, base):  # type: ignore[no-untyped-def]
    """The `Scratch` for a call at an address."""
    return _put_scratch(base, _scratch_parts(call, base))
