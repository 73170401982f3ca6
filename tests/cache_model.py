"""Caches as plain NumPy: what the tests of `jax_ifa.cache` compare with."""

import jax.numpy as jnp
import numpy as np

from jax_ifa.cache import ContiguousCache, PagedCache

LAYOUTS = ("BNSD", "BSND", "BSH")
DTYPES = ("float32", "bfloat16", "float16", "int8")


def in_layout(tokens, layout):
    """(B, Q, K, D) tokens as a caller with that layout has them."""
    if layout == "BNSD":
        return jnp.swapaxes(tokens, 1, 2)
    return tokens.reshape(*tokens.shape[:2], -1) if layout == "BSH" else tokens


def stored(cache):
    """Keys and values as NumPy (pages, positions, K, D), in the dtype of the cache."""
    pages = []
    for storage in (cache.key, cache.value):
        array = np.asarray(storage)
        if cache.input_layout == "BNSD":
            array = np.swapaxes(array, 1, 2)
        pages.append(array.reshape(*array.shape[:2], cache.num_kv_heads, -1))
    return pages


def random_tokens(seed, shape, dtype=jnp.float32):
    """Keys and values, (B, Q, K, D) each, none of them 0."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.uniform(0.5, 4.0, shape), dtype) for _ in range(2)]


def scales(dtype, num_kv_heads, head_dim):
    """The keyword arguments that a cache of `dtype` needs."""
    if dtype != "int8":
        return {}
    scale = np.random.default_rng(7).uniform(0.02, 0.03, (2, num_kv_heads, head_dim)).astype(np.float32)
    return {
        "antiquant_scale": scale,
        "antiquant_offset": np.linspace(-9, 9, scale.size, dtype=np.float32).reshape(scale.shape),
    }


def empty(kind, dtype, layout, *, batch, capacity, num_kv_heads, head_dim, block_size=32):
    """An empty cache of either kind, and the arguments after `lengths` that its `append` takes.

    The paged one has a few blocks that no sequence owns, and a table that is not in order.
    """
    options = dict(input_layout=layout, **scales(dtype, num_kv_heads, head_dim))
    if kind == "contiguous":
        return ContiguousCache.create(batch, capacity, num_kv_heads, head_dim, dtype, **options), ()
    columns = capacity // block_size
    num_blocks = batch * columns + 3
    order = np.random.default_rng(0).permutation(num_blocks)[: batch * columns]
    table = order.reshape(batch, columns).astype(np.int32)
    return PagedCache.create(num_blocks, block_size, num_kv_heads, head_dim, dtype, **options), (table,)


def by_sequence(cache, table=()):
    """What `stored` gives, with the pages of each sequence joined: (B, S, K, D)."""
    if not table:
        return stored(cache)
    rows = np.asarray(table[0])
    return [pages[rows].reshape(rows.shape[0], -1, *pages.shape[2:]) for pages in stored(cache)]
