"""Every static number of one launch, worked out from shapes and the generation's tuning."""

import dataclasses
import math

import jax.numpy as jnp

from jax_ifa.operands import Operands
from pallas_kernels.tpu.narrow import MOST_PRODUCTS
from pallas_kernels.tpu.storage import LANES, ROWS, alignment, form
from pallas_kernels.tpu.tuning import Tuning

SUBLANES = 8
MAX_CHUNK = 512
MAX_TILE = 16384
MAX_ITEM_ROWS = 512
MANY_COPIES = 512  # of keys, and as many of values, whose starting takes longer than the arithmetic of a tile
MANY_COPIES_TURNED = 256  # where int8 is transposed first, and arithmetic leaves less room in one place
MAX_CUTS = 32  # of all stages


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch.

    The kernel walks over items. An item is one sequence and `item_heads` of its kv heads (all K of them, unless a tile
    would not fit), over the whole window or, for an odd batch on two cores, over half of it.

    A tile is `tile` positions of an item, fetched in `chunks` copies of `chunk` positions: a page each, or a part of a
    page where pages are long. Inside an item, heads are multiplied in groups of `packed` heads side by side, so that
    `width` = packed * D lanes are whole and `rows` >= packed * G query rows fill sublanes. A group's query is block
    diagonal: row (j, g) holds q of head j in lanes j*D to (j+1)*D and zeros elsewhere.

    Attributes:
      form: how the cache lies in memory; see `storage.py`.
      batch, num_heads, group, head_dim: B, K, G, D.
      page: P.
      table_width: M, or 0 without a table.
      item_heads, packed, width, rows: see above.
      chunk, chunks: see above; tile = chunk * chunks, a multiple of 128.
      edge_chunks: chunks in a block of a tile that the window does not fill: such a tile is computed block by block.
      stages: parts of a whole tile with a softmax each.
      cuts: pieces in which a stage is multiplied, so that many copies can be started in between.
      query_terms, weight_terms: bfloat16 numbers whose sum stands for one float32 query element or softmax weight.
      digits: int8 digits of the query that are multiplied instead, by keys as they are; or 0.
      row_groups: whether the rows of a cache, positions or in columns D, are viewed in groups of 8.
      splits: parts each sequence's window is cut into, 1 or the number of cores.
      masked, biased: whether there is a mask, a bias.
      tuning: see `Tuning`.
      interleaved: kv heads that take turns in the positions of a cache of one: position t is of head t % interleaved,
        and the query rows are those of one head after the other.
      apart: multiply each head's keys alone, though heads are packed, or its values, though they are interleaved; for
        what is not finite.
    """

    form: str
    batch: int
    num_heads: int
    group: int
    head_dim: int
    page: int
    table_width: int
    item_heads: int
    packed: int
    width: int
    rows: int
    chunk: int
    chunks: int
    edge_chunks: int
    stages: int
    cuts: int
    query_terms: int
    weight_terms: int
    digits: int
    row_groups: bool
    splits: int
    masked: bool
    biased: bool
    tuning: Tuning
    interleaved: int = 1
    apart: bool = False

    @property
    def tile(self) -> int:
        """T, positions of a tile."""
        return self.chunk * self.chunks

    @property
    def own_width(self) -> int:
        """Lanes of a row in the query and the output: the fewest heads, its own among them, that fill whole lanes."""
        whole = math.lcm(self.head_dim, LANES)
        return whole if self.width % whole == 0 else self.width

    @property
    def query_rows(self) -> int:
        """Rows of a group's query in all its terms or digits; digits fill whole tiles of int8."""
        return _round_up(self.digits * self.rows, ROWS) if self.digits else self.query_terms * self.rows

    @property
    def groups(self) -> int:
        """Groups of packed heads in an item."""
        return self.item_heads // self.packed

    @property
    def head_blocks(self) -> int:
        """Items that one sequence's heads make."""
        return self.num_heads // self.item_heads

    @property
    def items(self) -> int:
        """All items, rounded up so that each core has as many."""
        cores = self.tuning.cores
        return _round_up(self.splits * self.batch * self.head_blocks, cores)

    @property
    def chunks_per_page(self) -> int:
        """Chunks that make up a page."""
        return self.page // self.chunk


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def make_plan(operands: Operands, tuning: Tuning, interleaved: int = 1) -> Plan:
    """The plan of one launch over `operands`, whose capacity is a multiple of `storage.alignment`."""
    kv = operands.kv
    dtype = kv.key.dtype
    memory = form(kv)
    num_heads, head_dim, group = kv.num_kv_heads, kv.key.shape[-1], operands.group
    item_heads, packed = _head_split(memory, num_heads, head_dim, group, dtype, tuning)
    # A contiguous cache may end in a part of a chunk, which another launch sees to.
    page = kv.page_size if kv.table is not None else kv.page_size // alignment(kv) * alignment(kv)
    position_bytes = 2 * item_heads * _round_up(head_dim, SUBLANES if memory == "columns" else 1) * dtype.itemsize
    rows = _round_up(packed * group, SUBLANES)
    target = tuning.tile_bytes // position_bytes
    # Scores and weights of a tile are float32 (rows, tile), a few of them at a time.
    target = min(target, MAX_TILE, max(LANES, tuning.tile_bytes // 2 // (4 * rows * (item_heads // packed))))
    chunk = _chunk(page, alignment(kv), target)
    unit = math.lcm(chunk, LANES)
    tile = unit * max(1, min(target // unit, -(-kv.capacity // unit)))
    wide = dtype == jnp.float32
    units = tile // unit
    stages = 2 if units % 2 == 0 else 1
    digits = _digits(operands, tuning)
    turned = dtype == jnp.int8 and not digits and tuning.turns_int8
    places = MAX_CUTS if tile // chunk >= (MANY_COPIES_TURNED if turned else MANY_COPIES) else stages
    return Plan(
        form=memory,
        batch=operands.batch,
        num_heads=num_heads,
        group=group,
        head_dim=head_dim,
        page=page,
        table_width=0 if kv.table is None else kv.table.shape[1],
        item_heads=item_heads,
        packed=packed,
        width=packed * head_dim,
        rows=rows,
        chunk=chunk,
        chunks=tile // chunk,
        edge_chunks=next(d for d in _divisors(units) if 4 * d >= units) * (unit // chunk),
        stages=stages,
        cuts=max(d for d in _divisors(units // stages) if d * stages <= places),
        query_terms=_query_parts(operands) if operands.query.dtype == jnp.float32 and not wide else 1,
        weight_terms=1 if wide else 3 if operands.precise else 2,
        digits=digits,
        row_groups=dtype.itemsize == 2 and (head_dim if memory == "columns" else kv.page_size) % SUBLANES == 0,
        splits=tuning.cores if operands.batch % tuning.cores else 1,
        masked=operands.mask is not None,
        biased=operands.bias is not None,
        tuning=tuning,
        interleaved=interleaved,
    )


def _query_parts(operands: Operands) -> int:
    """Terms or digits of a float32 query: for all its bits, or for 16 where that is all that is kept of the output.

    The LSE would show more.
    """
    return 2 if operands.keeps_16_bits and not operands.precise else 3


def _digits(operands: Operands, tuning: Tuning) -> int:
    """See `Plan`."""
    key = operands.kv.key
    if key.dtype != jnp.int8 or operands.precise or not tuning.int8_products or key.shape[-1] > MOST_PRODUCTS:
        return 0
    return _query_parts(operands)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _head_split(
    memory: str, num_heads: int, head_dim: int, group: int, dtype: jnp.dtype, tuning: Tuning
) -> tuple[int, int]:
    """(item_heads, packed): kv heads of an item and of a group."""
    if memory == "lanes":
        whole = LANES // math.gcd(LANES, head_dim)  # heads that end on a lane boundary
        whole = whole if num_heads % whole == 0 else num_heads
    else:
        whole = 1
    # More heads side by side, until the rows of one group fill the sublanes and its lanes the matrix unit; in columns
    # only where heads stack on whole tiles.
    packed = whole
    if memory != "columns" or head_dim % 32 == 0:
        for more in _divisors(num_heads):
            width = more * head_dim
            if more % whole == 0 and ((more * group <= SUBLANES and width <= 1024) or width <= tuning.matrix_width):
                packed = max(packed, more)
    smallest_tile = 2 * LANES * head_dim * dtype.itemsize
    fitting = [
        heads
        for heads in _divisors(num_heads)
        if heads % packed == 0
        and heads * smallest_tile <= tuning.tile_bytes
        and heads // packed * _round_up(packed * group, SUBLANES) <= MAX_ITEM_ROWS
    ]
    return max(fitting, default=packed), packed


def _chunk(page: int, align: int, target: int) -> int:
    """The longest part of a page that divides it, is aligned, and lets a tile of whole lanes stay near `target`."""
    candidates = [d for d in _divisors(page) if d % align == 0 and (d <= MAX_CHUNK)]
    near = [d for d in candidates if math.lcm(d, LANES) <= max(target, LANES)]
    return max(near) if near else min(candidates, key=lambda d: math.lcm(d, LANES))
