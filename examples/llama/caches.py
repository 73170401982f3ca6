"""The KV caches of a model: which kind, and for paged ones whose block is whose."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_ifa.cache import BlockAllocator, ContiguousCache, PagedCache

Cache = ContiguousCache | PagedCache


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How keys and values are kept.

    Attributes:
      kind: "contiguous" or "paged".
      dtype: "float32", "bfloat16", "float16" or "int8".
      block_size: tokens per block of a paged cache.
      headroom: how far beyond the largest values that were seen the range of int8 reaches.
    """

    kind: Literal["contiguous", "paged"] = "contiguous"
    dtype: str = "float32"
    block_size: int = 64
    headroom: float = 1.25


DEFAULT_CACHE = CacheOptions()


def create_cache(
    num_kv_heads: int, head_dim: int, batch: int, capacity: int, options: CacheOptions, scale: Array | None
) -> Cache:
    """An empty cache for one layer."""
    heads = (num_kv_heads, head_dim, jnp.dtype(options.dtype))
    if options.kind == "contiguous":
        return ContiguousCache.create(batch, capacity, *heads, antiquant_scale=scale)
    blocks = batch * -(-capacity // options.block_size)
    return PagedCache.create(blocks, options.block_size, *heads, antiquant_scale=scale)


def append(cache: Cache, key: Array, value: Array, lengths: Array, table: Array | None, counts: Array) -> Cache:
    """The cache with new tokens; only a paged one has a block table."""
    if isinstance(cache, ContiguousCache):
        return cache.append(key, value, lengths, counts)
    assert table is not None
    return cache.append(key, value, lengths, table, counts)


def arguments(cache: Cache, lengths: Array, table: Array | None) -> dict[str, Any]:
    """What the attention takes of a cache; only a paged one has a block table."""
    if isinstance(cache, ContiguousCache):
        return cache.arguments(lengths)
    assert table is not None
    return cache.arguments(lengths, table)


class Blocks:
    """The blocks of a batch in paged caches; one table serves all layers."""

    def __init__(self, batch: int, capacity: int, block_size: int):
        self.width = -(-capacity // block_size)
        self._allocator = BlockAllocator(batch * self.width, block_size)
        self._sequences = [self._allocator.allocate(0) for _ in range(batch)]
        self._table: Array | None = None

    def grow(self, tokens: np.ndarray) -> Array:
        """The (B, width) int32 block table once sequence b has tokens[b] more."""
        for sequence, count in zip(self._sequences, tokens, strict=True):
            self._allocator.grow(sequence, int(count))
        return jnp.asarray(self._allocator.block_table(self._sequences, self.width))
