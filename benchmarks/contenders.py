"""Decode attention as each library's own users would call it, on the same numbers."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ifa import cache, incre_flash_attention

Contender = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decode step: B sequences of S visible positions, N query and K key/value heads of D."""

    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    length: int = 4096
    head_dim: int = 128

    def cache_bytes(self, dtype: str) -> int:
        """Visible keys and values, once."""
        return 2 * self.batch * self.kv_heads * self.length * self.head_dim * jnp.dtype(dtype).itemsize


def _random(key: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    rng = np.random.default_rng(key)
    if dtype == "int8":
        return jnp.asarray(rng.integers(-128, 128, shape, np.int8))
    return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)


def ours(
    shape: Shape,
    dtype: str,
    layout: str,
    block: int = 0,
    capacity: int | None = None,
    implementation: str | None = None,
) -> Contender:
    """`incre_flash_attention` on a contiguous or (block > 0) paged cache, with traced lengths.

    Args:
      shape, dtype: of the step; int8 caches take a bfloat16 query.
      layout: "BSH", "BNSD" or "BSND".
      block: `block_size`, or 0.
      capacity: S of the cache where it is more than the visible `shape.length`.
      implementation: None is the platform's default.
    """
    b, n, k, d = shape.batch, shape.heads, shape.kv_heads, shape.head_dim
    s = capacity or shape.length
    query_shape = {"BSH": (b, 1, n * d), "BNSD": (b, n, 1, d), "BSND": (b, 1, n, d)}[layout]
    query = _random(0, query_shape, "bfloat16" if dtype == "int8" else dtype)
    arrays: dict[str, Any] = {"actual_seq_lengths": jnp.full(b, shape.length, jnp.int32)}
    cache_shape: tuple[int, ...]
    if block:
        blocks = b * s // block
        cache_shape = (blocks, k, block, d) if layout == "BNSD" else (blocks, block, k * d)
        table = np.random.default_rng(3).permutation(blocks).reshape(b, -1)
        arrays["block_table"] = jnp.asarray(table, jnp.int32)
    else:
        cache_shape = {"BSH": (b, s, k * d), "BNSD": (b, k, s, d), "BSND": (b, s, k, d)}[layout]
    if dtype == "int8":
        arrays["antiquant_scale"] = jnp.full((2, k, d), 0.01, jnp.float32)
    key, value = _random(1, cache_shape, dtype), _random(2, cache_shape, dtype)
    call = jax.jit(
        lambda q, k_, v, arrays: incre_flash_attention(
            q,
            k_,
            v,
            num_heads=n,
            num_key_value_heads=k,
            input_layout=layout,
            block_size=block,
            scale_value=d**-0.5,
            implementation=implementation,
            **arrays,
        )
    )
    return lambda: call(query, key, value, arrays).block_until_ready()


def append_one(shape: Shape, dtype: str) -> Contender:
    """`ContiguousCache.append` of one token per sequence, donated; `shape.length` is the capacity."""
    kind = jnp.dtype(dtype)
    scale = jnp.full(2, 0.01, jnp.float32) if kind == jnp.int8 else None
    storage = cache.ContiguousCache.create(
        shape.batch, shape.length, shape.kv_heads, shape.head_dim, kind, antiquant_scale=scale
    )
    token = jnp.ones((shape.batch, shape.kv_heads, 1, shape.head_dim), jnp.float32)
    lengths = jnp.zeros(shape.batch, jnp.int32)
    append = jax.jit(lambda storage, token, lengths: storage.append(token, token, lengths), donate_argnums=0)
    held = [storage]

    def call() -> None:
        held[0] = jax.block_until_ready(append(held[0], token, lengths))

    return call


def jax_nn(shape: Shape, dtype: str) -> Contender:
    """`jax.nn.dot_product_attention` with key/value lengths, in its own layout."""
    b, n, k, s, d = shape.batch, shape.heads, shape.kv_heads, shape.length, shape.head_dim
    query, key, value = (_random(i, (b, t, h, d), dtype) for i, (t, h) in enumerate([(1, n), (s, k), (s, k)]))
    lengths = jnp.full(b, s, jnp.int32)
    call = jax.jit(lambda q, k_, v, n_: jax.nn.dot_product_attention(q, k_, v, key_value_seq_lengths=n_))
    return lambda: call(query, key, value, lengths).block_until_ready()


def torch_sdpa(shape: Shape, dtype: str, *, folded: bool) -> Contender:
    """`torch.nn.functional.scaled_dot_product_attention`.

    Args:
      shape, dtype: of the step.
      folded: with the query heads of a group as query positions of its kv head, which a user can do by hand, instead of
        `enable_gqa=True`.
    """
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    b, n, k, s, d = shape.batch, shape.heads, shape.kv_heads, shape.length, shape.head_dim
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(b, k, s, d, generator=generator).to(kind) for _ in range(2))
    query = torch.randn((b, k, n // k, d) if folded else (b, n, 1, d), generator=generator).to(kind)

    def call() -> None:
        with torch.inference_mode():
            torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=not folded)

    return call
