"""Every static number of one launch, worked out from shapes and the device's tuning."""

import dataclasses
import math

import jax.numpy as jnp

from jax_ifa.operands import KVView, Operands
from pallas_kernels.gpu.hopper.tuning import Tuning, tuning_for

ROW_GROUP = 8
"""Positions at which a copy begins, and whose multiple it copies: rows of a tile of shared memory."""
M = 64
"""Rows of a wgmma, and so what T and the head dimension of the values are padded to."""
N = 8
"""What the columns of a wgmma, the query heads of a group, are padded to."""
LINE = 16
"""Bytes that rows of an array must be a multiple of, for a copy of a part of several of them."""
BIAS_LINE = 64
"""Positions that rows of the bias must be a multiple of: shared memory has it in squares of 8 heads, and of so many
positions if their type is of 16 bits."""
THREADS = 128
"""Of a thread block: one warpgroup."""
ACCUMULATOR = 4096
"""Most float32 numbers of the output that a thread block accumulates: 32 registers of each of its 128 threads. With 64
the rest of the kernel no longer fits beside them."""
FREE_COLUMNS = 32
"""Columns of a product that take no longer than fewer would."""
SIDE_BY_SIDE = 64
"""Most columns of a product whose right operand has several terms; beyond, each term is a product of its own."""
SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a thread block can have."""
SHARED_MEMORY_PER_MULTIPROCESSOR = 228 * 1024
RESERVED = 2048 + 1024
"""Bytes of shared memory beside the arrays: for reductions between warps, and barriers."""
DRIVER = 1024
"""Bytes of a multiprocessor's shared memory that the driver takes for each thread block."""
ALIGNMENT = 1024
"""Bytes that arrays in shared memory begin at a multiple of."""
PRODUCT = 2048
"""Numbers of the output that one product adds to, so that its own result takes at most 16 registers of a thread, or 32
where there are more than 32 columns."""
RESULTS_OF_CACHE = 0.02
"""Share of the cache's bytes that the results of splits may take, as a rule."""
NARROWEST_PRODUCT = 32
"""Bytes of the narrowest rows of a tile that a wgmma reads."""
DIGIT = 254
"""Base of the int8 digits of a query: digits from -127 to 127."""
QUERY_DIGITS = 3
"""Digits of a query that meets int8 keys: 23 bits, of which float32 has 24."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch.

    A thread block is one warpgroup. It takes one sequence, one kv head, `columns` of the G query heads, and one of
    `splits` shares of the tiles of the window.

    Attributes:
      batch, num_heads, group, head_dim: B, K, G, D.
      pages, page: how many, and P.
      table_width: M, or 0 for a contiguous cache.
      value_table: whether values have a table of their own.
      head_major: the order of the cache's axes.
      key_dtype: of the cache. weight_dtype: what values and softmax weights are multiplied in.
      tile: T. chunk: positions that one copy brings; a page, or a part of one.
      stages: tiles that shared memory holds.
      columns: query heads of a thread block, padded to a multiple of 8. blocks: thread blocks that share a group.
      query_dtype: of the product of queries and keys: the cache's, or `weight_dtype` for int8 rows that are not whole.
      query_terms: numbers of `query_dtype` that stand for one number of the query.
      weight_terms: numbers of `weight_dtype` that stand for one softmax weight.
      key_swizzle, value_swizzle, query_swizzle: bytes of a row of a tile of shared memory.
      padded: D rounded up to what the values' side of a wgmma needs.
      splits: see above.
      masked: whether there is a mask. bias_dtype: of the bias, or None.
      out_dtype: of the result, once it is whole.
    """

    batch: int
    num_heads: int
    group: int
    head_dim: int
    pages: int
    page: int
    table_width: int
    value_table: bool
    head_major: bool
    key_dtype: jnp.dtype
    weight_dtype: jnp.dtype
    tile: int
    chunk: int
    stages: int
    columns: int
    blocks: int
    query_dtype: jnp.dtype
    query_terms: int
    weight_terms: int
    key_swizzle: int
    value_swizzle: int
    query_swizzle: int
    padded: int
    splits: int
    masked: bool
    bias_dtype: jnp.dtype | None
    out_dtype: jnp.dtype

    @property
    def capacity(self) -> int:
        """Positions that a sequence can have."""
        return max(self.table_width, 1) * self.page

    @property
    def heads(self) -> int:
        """Query heads of a kv head as the arrays have them that a copy takes groups of 8 heads of: perhaps padded."""
        in_place = self.group <= N or self.group % N == 0
        return self.group if in_place else self.blocks * self.columns

    @property
    def kernel_out_dtype(self) -> jnp.dtype:
        """What the kernel writes: the result itself, or a split's part of it."""
        return self.out_dtype if self.splits == 1 else jnp.dtype(jnp.float32)

    @property
    def out_swizzle(self) -> int:
        """As `query_swizzle`, of what the kernel writes."""
        return swizzle(self.head_dim, self.kernel_out_dtype.itemsize)

    @property
    def chunks(self) -> int:
        """Copies that make a tile."""
        return self.tile // self.chunk

    @property
    def result_bytes(self) -> int:
        """Bytes that the results of one split take in the device's memory: values, tops and totals."""
        rows = self.batch * self.num_heads
        return 4 * rows * (self.heads * self.head_dim + 2 * self.blocks * self.columns)

    @property
    def items(self) -> int:
        """Thread blocks of each split."""
        return self.batch * self.num_heads * self.blocks

    @property
    def staged(self) -> bool:
        """Whether values are converted on chip."""
        return self.key_dtype == jnp.int8

    @property
    def stages_keys(self) -> bool:
        """Whether keys are converted on chip as well."""
        return self.query_dtype != self.key_dtype

    @property
    def headroom(self) -> int:
        """Weights are at most 2**headroom: float16 has few small numbers and room for large ones."""
        return 15 if self.weight_dtype == jnp.float16 else 0

    @property
    def ragged(self) -> bool:
        """Whether sequences may begin inside a group of 8 rows."""
        return self.table_width == 0 and self.page % ROW_GROUP != 0

    @property
    def mask_width(self) -> int:
        """Positions of the mask that one copy brings: whole lines of 128 bytes."""
        return round_up(self.tile, 128)

    @property
    def sums_late(self) -> bool:
        """Whether weights are added up over positions at the end only, at a register per weight, not in every tile."""
        return self.tile * self.columns <= PRODUCT

    @property
    def product_rows(self) -> int:
        """Channels of the output that one product adds to; fewer where conversion, mask and bias take registers."""
        crowded = self.staged and self.padded > 256 and (self.masked or self.bias_dtype is not None)
        return M * max(1, (PRODUCT // 4 if crowded else PRODUCT) // (M * self.columns))

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory of a thread block."""
        return _shared_memory(self) + RESERVED


def swizzle(head_dim: int, itemsize: int) -> int:
    """The widest row of a tile of shared memory, in bytes, that a row of the cache is a multiple of."""
    return next(width for width in (128, 64, 32, 16) if head_dim * itemsize % width == 0)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not less than `value`."""
    return -(-value // multiple) * multiple


def largest_number(terms: int) -> int:
    """What `terms` digits can stand for."""
    return sum(127 * DIGIT**i for i in range(terms))


def make_plan(operands: Operands, device_kind: str | None) -> Plan:
    """The plan for operands that `support.unsupported_reason` has nothing against."""
    kv = operands.kv
    dtype, head_dim = kv.key.dtype, kv.key.shape[-1]
    staged = dtype == jnp.int8
    precise = staged or operands.precise
    padded = round_up(head_dim, M)
    key_swizzle = swizzle(head_dim, dtype.itemsize)
    tuning = tuning_for(device_kind, dtype=dtype, head_dim=head_dim, group=operands.group)
    most_columns = min(32 if precise else 64, ACCUMULATOR // padded // N * N)
    if operands.precise and operands.mask is not None and operands.bias is not None:
        most_columns = min(most_columns, 16)  # more would spill, with three terms of each weight beside them
    columns = min(round_up(operands.group, N), most_columns)
    # int8 becomes bfloat16 in fewer instructions than float16. That takes three terms of a weight where float16
    # takes two, for which there is no room in the registers beside many columns.
    weight_dtype = jnp.dtype(jnp.bfloat16 if columns <= 16 else jnp.float16) if staged else dtype
    query_dtype = dtype if key_swizzle >= NARROWEST_PRODUCT else weight_dtype
    # Converting values takes the registers that mask and bias would need for more rows than one wgmma has.
    tile = M if staged and (operands.mask is not None or operands.bias is not None) else tuning.tile
    # The terms of a weight are columns of one product, and a few columns more cost nothing: the other side takes the
    # time. Where there are many columns they do, and 16-bit weights are allowed unless the call is precise.
    all_terms = {jnp.dtype(jnp.float16): 2, jnp.dtype(jnp.bfloat16): 3}[weight_dtype]
    free_terms = min(all_terms, max(1, FREE_COLUMNS // columns))
    plan = Plan(
        batch=operands.batch,
        num_heads=kv.num_kv_heads,
        group=operands.group,
        head_dim=head_dim,
        pages=kv.key.shape[0],
        page=kv.page_size,
        table_width=0 if kv.table is None else kv.table.shape[1],
        value_table=kv.value_table is not None,
        head_major=kv.head_major,
        key_dtype=dtype,
        weight_dtype=weight_dtype,
        tile=tile,
        chunk=_chunk(kv, tile),
        stages=tuning.stages,
        columns=columns,
        blocks=-(-operands.group // columns),
        query_dtype=query_dtype,
        query_terms=QUERY_DIGITS if staged else 1,
        weight_terms=all_terms if precise else free_terms,
        key_swizzle=key_swizzle,
        value_swizzle=128 if staged else key_swizzle,
        query_swizzle=swizzle(head_dim, query_dtype.itemsize),
        padded=padded,
        splits=1,
        masked=operands.mask is not None,
        bias_dtype=None if operands.bias is None else operands.bias.dtype,
        out_dtype=operands.out_dtype,
    )
    plan = _fitted(plan, tuning)
    return dataclasses.replace(plan, splits=_splits(plan, tuning))


def _chunk(kv: KVView, tile: int) -> int:
    return tile if kv.table is None else math.gcd(kv.page_size, tile)


def _shared_memory(plan: Plan) -> int:
    """The arrays of `kernel.scratch` and `kernel.shared_slots`, in bytes."""
    size, weight_size = plan.key_dtype.itemsize, plan.weight_dtype.itemsize
    bias_size = 0 if plan.bias_dtype is None else plan.bias_dtype.itemsize
    arrays = [
        plan.query_terms * plan.columns * plan.head_dim * plan.query_dtype.itemsize,  # query
        4 * plan.columns if plan.staged else 0,  # the largest of its rows
        max(plan.stages * plan.tile * plan.head_dim * size, 4 * plan.padded * plan.columns),  # keys, or the output
        plan.stages * plan.tile * plan.padded * size,  # values
        plan.weight_terms * plan.columns * plan.tile * weight_size,  # weights
        plan.tile * plan.padded * weight_size if plan.staged else 0,  # converted values
        plan.tile * plan.head_dim * plan.query_dtype.itemsize if plan.stages_keys else 0,  # and keys
        plan.stages * plan.mask_width if plan.masked else 0,
        plan.stages * plan.columns * plan.tile * bias_size,
        4 * plan.columns,  # the output's top
        4 * plan.columns,  # and total
    ]
    return sum(round_up(array, ALIGNMENT) for array in arrays)


def _fitted(plan: Plan, tuning: Tuning) -> Plan:
    """The plan with as many stages, then as wide a tile and as many columns, as shared memory has room for."""
    while plan.shared_memory > SHARED_MEMORY:
        if plan.stages > 2:
            plan = dataclasses.replace(plan, stages=plan.stages - 1)
        elif plan.tile > M:
            plan = dataclasses.replace(
                plan, tile=M, chunk=M if plan.table_width == 0 else math.gcd(plan.page, M), stages=tuning.stages
            )
        elif plan.stages > 1:
            plan = dataclasses.replace(plan, stages=1)
        else:
            columns = plan.columns - N
            plan = dataclasses.replace(plan, columns=columns, blocks=-(-plan.group // columns))
    return plan


def _splits(plan: Plan, tuning: Tuning) -> int:
    """How many thread blocks share a window: what makes the waves of thread blocks shortest, with the merge."""
    resident = max(1, SHARED_MEMORY_PER_MULTIPROCESSOR // (plan.shared_memory + DRIVER))
    slots = tuning.multiprocessors * min(resident, tuning.blocks_per_multiprocessor)
    tiles = -(-plan.capacity // plan.tile)
    most = max(1, min(tiles, tuning.max_splits, _most_splits(plan, tuning.multiprocessors)))
    # Writing and reading the results of one split, in tiles of a multiprocessor.
    tile_bytes = plan.tile * 2 * plan.head_dim * plan.key_dtype.itemsize
    results = 2 * plan.result_bytes / (tuning.multiprocessors * tile_bytes)

    def cost(splits: int) -> float:
        waves = -(-plan.items * splits // slots)
        sharing = -(-min(plan.items * splits, slots) // tuning.multiprocessors)  # thread blocks on a multiprocessor
        each = -(-tiles // splits) + tuning.overhead_tiles
        merge = (tuning.merge_tiles + results) * splits if splits > 1 else 0.0
        return waves * each * max(sharing, 1 / tuning.alone) + merge

    return min(range(1, most + 1), key=cost)


def _most_splits(plan: Plan, multiprocessors: int) -> int:
    """Splits whose results take 2% of the cache, or as many as give every multiprocessor a thread block, if more.

    A split's results are G rows of D float32 for each kv head, the cache has 2 * S of them: splits * G * 4 of
    2 * S * itemsize bytes. For 2%, a split needs 50 * G positions of bfloat16, 100 * G of int8. Shorter splits are
    worth their results only where multiprocessors would stand idle; an accumulator is 16 KiB at most, so they take
    about 2 MB on 132 multiprocessors, and stay in L2.
    """
    cache_bytes = 2 * plan.batch * plan.num_heads * plan.capacity * plan.head_dim * plan.key_dtype.itemsize
    small = int(RESULTS_OF_CACHE * cache_bytes) // plan.result_bytes
    return max(small, -(-multiprocessors // plan.items))
