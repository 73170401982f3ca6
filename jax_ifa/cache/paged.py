"""A paged cache: one pool of blocks, and a table that says which blocks each sequence has."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jax_ifa.arguments import BLOCK_ALIGNMENT, BLOCK_ALIGNMENT_INT8, check_layout
from jax_ifa.cache.rules import check_cache_dtype, check_integers, check_new_tokens, check_size
from jax_ifa.cache.storage import DATA_FIELDS, META_FIELDS, Storage, create_arrays
from jax_ifa.cache.tokens import token_positions, write_tokens
from jax_ifa.conversion import as_int32, as_integers, numpy_value
from jax_ifa.errors import fail

NO_BLOCK = -1


@functools.partial(jax.tree_util.register_dataclass, data_fields=DATA_FIELDS, meta_fields=META_FIELDS)
@dataclasses.dataclass(frozen=True, eq=False)
class PagedCache(Storage):
    """Keys and values of one layer in a pool of blocks of `block_size` positions, shared by any number of sequences.

    Position t of sequence b is row ``t % block_size`` of block ``block_table[b, t // block_size]``. The tables and
    lengths, the same for all layers, are the caller's; a `BlockAllocator` makes them.

    A pytree, for use inside `jit`, `scan`, `while_loop` and `vmap`. Donate it to a jitted step, and `append` writes in
    place.

    Attributes:
      key, value: (blocks, K, P, D) in BNSD, (blocks, P, K*D) in BSND and BSH; P is the block size.
      antiquant_scale, antiquant_offset: what int8 stands for, float32, or None.
      input_layout, num_kv_heads: static.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ifa import incre_flash_attention
      >>> from jax_ifa.cache import BlockAllocator, PagedCache
      >>> pool = PagedCache.create(64, 16, 4, 64, jnp.float32)                 # 64 blocks, P=16, K=4, D=64
      >>> blocks = BlockAllocator(64, 16)
      >>> a, b = blocks.allocate(10), blocks.allocate(7)                      # room for two prompts
      >>> prompt = jnp.ones((2, 4, 10, 64))                                   # (B, K, Q, D)
      >>> pool = pool.append(prompt, prompt, [0, 0], blocks.block_table([a, b]), counts=[10, 7])
      >>> before = blocks.lengths([a, b])
      >>> blocks.grow(a), blocks.grow(b)                                      # room for one more token each
      (11, 8)
      >>> token, table = jnp.ones((2, 4, 1, 64)), blocks.block_table([a, b])
      >>> pool = pool.append(token, token, before, table)
      >>> arguments = pool.arguments(blocks.lengths([a, b]), table)
      >>> incre_flash_attention(jnp.ones((2, 8, 1, 64)), **arguments, num_heads=8, scale_value=64**-0.5).shape
      (2, 8, 1, 64)
    """

    @classmethod
    def create(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = jnp.bfloat16,
        *,
        input_layout: str = "BNSD",
        antiquant_scale: ArrayLike | None = None,
        antiquant_offset: ArrayLike | None = None,
    ) -> Self:
        """An empty pool.

        Args:
          num_blocks: blocks in the pool, for all sequences together.
          block_size: P, positions in a block: a multiple of 16, or of 32 for int8, as the operator has it.
          num_kv_heads: K.
          head_dim: D.
          dtype: float32, bfloat16, float16, or int8, which needs `antiquant_scale`.
          input_layout: "BNSD", "BSND" or "BSH": of what is appended, and of the queries. It also orders the pool:
            on TPUs take "BSH" or "BSND" unless D or `block_size` is a multiple of 128, or the kernel cannot read it.
          antiquant_scale: for int8, which stands for ``(x + offset) * scale``: positive, any floating point dtype, per
            tensor (2,) or per channel (2, K, D), (2, K, 1, D), (2, 1, K, D) or (2, K*D); index 0 for keys. It is
            copied. `calibrate_antiquant` makes it.
          antiquant_offset: in the shape of `antiquant_scale`; None means 0.

        Raises:
          ValueError, TypeError: for a size, layout, dtype or scale that is none.
        """
        check_layout(input_layout)
        dtype = check_cache_dtype(dtype)
        num_blocks, block_size = check_size("num_blocks", num_blocks), check_size("block_size", block_size)
        num_kv_heads, head_dim = check_size("num_kv_heads", num_kv_heads), check_size("head_dim", head_dim)
        alignment = BLOCK_ALIGNMENT_INT8 if dtype == jnp.int8 else BLOCK_ALIGNMENT
        if block_size % alignment:
            fail(f"block_size of a {dtype} cache", expected=f"a multiple of {alignment}", got=block_size)
        if input_layout == "BNSD":
            shape: tuple[int, ...] = (num_blocks, num_kv_heads, block_size, head_dim)
        else:
            shape = (num_blocks, block_size, num_kv_heads * head_dim)
        arrays = create_arrays(
            shape, dtype, antiquant_scale, antiquant_offset, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        return cls(**arrays, input_layout=input_layout, num_kv_heads=num_kv_heads)

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.key.shape[0]

    @property
    def block_size(self) -> int:
        """P, positions in a block."""
        return self.page_size

    def append(
        self,
        key: ArrayLike,
        value: ArrayLike,
        lengths: ArrayLike,
        block_table: ArrayLike,
        counts: ArrayLike | None = None,
    ) -> Self:
        """The pool with new tokens: one decode step, or whole prompts.

        Args:
          key, value: Q new tokens per sequence in the cache's layout, (B, K, Q, D) in BNSD, (B, Q, K, D) in BSND,
            (B, Q, K*D) in BSH, floating point. Cast to the cache's dtype, or quantised to int8 by `quantize_kv`.
          lengths: (B,) integers, the tokens each sequence already holds, which is where the first new one goes.
          block_table: (B, M) integers, the blocks of each sequence in order, with room for the new tokens. Entries for
            other positions are not looked at. No two sequences may be given the same place to write to; a
            `BlockAllocator` sees to that.
          counts: (B,) integers: only the first counts[b] of the Q tokens are written. None means all.

        Returns:
          A new pool; the old one is unchanged, unless donated, and then nothing is copied. Tokens whose place, by
          traced `lengths`, `counts` or `block_table`, is not in the table or not in the pool are dropped: nothing is
          ever written elsewhere. For int8, a traced NaN becomes 0 and infinities saturate.

        Raises:
          ValueError: for shapes, for concrete lengths, counts and tables that do not give every token a place of its
            own, and for concrete values that are not finite when the cache is int8.
          TypeError: for dtypes.
        """
        key, value = self._new_tokens(key, value)
        batch, num_tokens = key.shape[:2]
        table = as_integers("block_table", block_table)
        if table is None or table.ndim != 2 or table.shape[0] != batch or not table.shape[1]:
            got = None if table is None else table.shape
            fail("block_table lists the blocks of each sequence", expected=f"shape ({batch}, M), M >= 1", got=got)
        capacity = table.shape[1] * self.block_size
        lengths, counts = check_new_tokens(lengths, counts, batch=batch, num_tokens=num_tokens, capacity=capacity)
        _check_places(table, lengths, counts, num_tokens, self.num_blocks, self.block_size)
        self._check_storable(key, value, counts)
        counts = None if counts is None else as_int32(counts)
        return _append(self, key, value, as_int32(lengths), as_int32(table), counts)

    def arguments(self, lengths: ArrayLike, block_table: ArrayLike) -> dict[str, Any]:
        """What `incre_flash_attention` takes: ``incre_flash_attention(query, **pool.arguments(lengths, table), ...)``.

        Args:
          lengths: (B,) integers, the tokens each sequence holds now, and sees.
          block_table: (B, M) int32.

        Returns:
          What `ContiguousCache.arguments` returns, block_table and block_size. Nothing is copied.
        """
        return self._arguments(lengths) | {"block_table": block_table, "block_size": self.block_size}

    def copy_blocks(self, source: ArrayLike, target: ArrayLike) -> Self:
        """The pool with whole blocks copied, which is what `BlockAllocator.fork` asks for.

        All sources are read before any target is written.

        Args:
          source, target: (n,) integers, block ids. An entry that is -1 in both copies nothing, so that one shape
            serves any number of copies.

        Raises:
          ValueError: for shapes, and for concrete ids outside the pool or targets named twice. Traced ids outside the
            pool copy nothing.
        """
        if jnp.ndim(source) != 1:
            fail("source lists blocks", expected="shape (n,)", got=jnp.shape(source))
        source = check_integers("source", source, jnp.shape(source))
        target = check_integers("target", target, source.shape)
        _check_copies(source, target, self.num_blocks)
        return _copy_blocks(self, as_int32(source), as_int32(target))


# jit, so that an eager call is compiled once and reused; inside a traced program it is simply inlined.
@jax.jit
def _append(
    pool: PagedCache, key: Array, value: Array, lengths: Array, table: Array, counts: Array | None
) -> PagedCache:
    """The pure part, on (B, Q, K, D) tokens."""
    capacity = table.shape[1] * pool.block_size
    position, keep = token_positions(lengths, counts, num_tokens=key.shape[1], capacity=capacity)
    block = jnp.take_along_axis(table, position // pool.block_size, axis=1)
    keep &= (block >= 0) & (block < pool.num_blocks)
    return pool._write(key, value, block, position % pool.block_size, keep)


@jax.jit
def _copy_blocks(pool: PagedCache, source: Array, target: Array) -> PagedCache:
    """The pure part: the positions of a block are written as so many tokens."""
    keep = (source >= 0) & (source < pool.num_blocks) & (target >= 0) & (target < pool.num_blocks)
    shape = (source.shape[0], pool.block_size)
    page, keep = (jnp.broadcast_to(array[:, None], shape) for array in (target, keep))
    slot = lax.broadcasted_iota(jnp.int32, shape, 1)

    def copied(storage: Array) -> Array:
        blocks = jnp.take(storage, jnp.clip(source, 0, pool.num_blocks - 1), axis=0)
        tokens = jnp.swapaxes(blocks, 1, 2) if pool.head_major else blocks
        return write_tokens(storage, tokens, page, slot, keep, head_major=pool.head_major)

    return dataclasses.replace(pool, key=copied(pool.key), value=copied(pool.value))


def _check_places(table: Any, lengths: Any, counts: Any, num_tokens: int, num_blocks: int, block_size: int) -> None:
    """Where all is concrete, and fits the table: every token has a place in the pool, and no two have the same."""
    counts = np.full(table.shape[:1], num_tokens) if counts is None else counts
    table, lengths, counts = (numpy_value(array) for array in (table, lengths, counts))
    if table is None or lengths is None or counts is None:
        return
    token = np.arange(num_tokens)[None]
    written = token < counts[:, None]
    sequence, position = np.nonzero(written)[0], (lengths[:, None] + token)[written]
    block = table[sequence, position // block_size]
    if ((block < 0) | (block >= num_blocks)).any():
        fail("block_table must name a block for every new token", expected=f"0 to {num_blocks - 1}", got=block.tolist())
    places = np.stack([block, position % block_size])
    unique, uses = np.unique(places, axis=1, return_counts=True)
    if (uses > 1).any():
        fail(
            "no two new tokens may go to one place: a shared block must be copied before it is written to",
            expected="different blocks or positions",
            got=f"position {unique[1, uses > 1][0]} of block {unique[0, uses > 1][0]} for {uses.max()} tokens",
        )


def _check_copies(source: Any, target: Any, num_blocks: int) -> None:
    """Where concrete: ids in the pool, or none on both sides, and each target once."""
    ids = {"source": numpy_value(source), "target": numpy_value(target)}
    for name, given in ids.items():
        if given is not None and ((given < NO_BLOCK) | (given >= num_blocks)).any():
            fail(f"{name} names blocks", expected=f"0 to {num_blocks - 1}, or -1 for none", got=given.tolist())
    if ids["source"] is not None and ids["target"] is not None:
        unpaired = (ids["source"] == NO_BLOCK) != (ids["target"] == NO_BLOCK)
        if unpaired.any():
            got = f"source {ids['source'].tolist()} and target {ids['target'].tolist()}"
            fail("-1 copies nothing", expected="-1 in source and target alike", got=got)
    if ids["target"] is not None:
        used = ids["target"][ids["target"] != NO_BLOCK]
        if np.unique(used).size != used.size:
            fail("target names each block once", expected="different blocks", got=used.tolist())
