"""What the compiled programs allocate: no temporary that grows with the cache, and no copy of it."""

import jax
import jax.numpy as jnp
import pytest
from cases import IMPLEMENTATIONS_HERE

from jax_ifa import cache, incre_flash_attention

B, N, K, S, D = 8, 32, 8, 4096, 128
SHARE = 0.02  # of the bytes of the cache

CACHES = {
    "BSH": ("BSH", (B, S, K * D), 0),
    "BNSD": ("BNSD", (B, K, S, D), 0),
    "BSND": ("BSND", (B, S, K, D), 0),
    "paged16": ("BNSD", (B * S // 16, K, 16, D), 16),
    "paged128": ("BNSD", (B * S // 128, K, 128, D), 128),
    "paged16_flat": ("BSH", (B * S // 16, 16, K * D), 16),
    "paged128_flat": ("BSND", (B * S // 128, 128, K * D), 128),
}
QUERY = {"BSH": (B, 1, N * D), "BNSD": (B, N, 1, D), "BSND": (B, 1, N, D)}


def struct(shape: tuple[int, ...], dtype: object = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def call(layout: str, block: int, int8: bool, implementation: str | None = None, **features: object):
    """The function of arrays that is compiled, and the arrays that are not query, key and value."""
    arrays = {"actual_seq_lengths": struct((B,), jnp.int32)}
    if block:
        arrays["block_table"] = struct((B, S // block), jnp.int32)
    if int8:
        arrays |= {"antiquant_scale": struct((2, K, D)), "antiquant_offset": struct((2, K, D))}
    arrays |= features
    static = dict(num_heads=N, num_key_value_heads=K, input_layout=layout, block_size=block, scale_value=0.1)
    static |= dict(return_lse=True, implementation=implementation)
    return lambda q, k, v, arrays: incre_flash_attention(q, k, v, **arrays, **static), arrays


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS_HERE)
@pytest.mark.parametrize("form", CACHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_temporaries_do_not_grow_with_the_cache(dtype: str, form: str, implementation: str) -> None:
    layout, shape, block = CACHES[form]
    block = 32 if dtype == "int8" and block == 16 else block
    if form.startswith("paged16") and dtype == "int8":
        shape = (B * S // 32, K, 32, D) if layout == "BNSD" else (B * S // 32, 32, K * D)
    function, arrays = call(layout, block, dtype == "int8", implementation)
    query = struct(QUERY[layout], jnp.float32 if dtype == "int8" else dtype)
    key = struct(shape, dtype)
    compiled = jax.jit(function).lower(query, key, key, arrays).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    cache_bytes = 2 * key.size * key.dtype.itemsize
    assert temporaries < SHARE * cache_bytes, f"{temporaries / cache_bytes:.1%} of the cache"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS_HERE)
def test_temporaries_with_mask_and_bias(implementation: str) -> None:
    """The mask and the bias are read in tiles too, not converted whole."""
    features = {"atten_mask": struct((B, 1, 1, S), jnp.int8), "pse_shift": struct((B, N, 1, S), jnp.bfloat16)}
    function, arrays = call("BNSD", 0, False, implementation, **features)
    key = struct((B, K, S, D), jnp.bfloat16)
    compiled = jax.jit(function).lower(struct((B, N, 1, D), jnp.bfloat16), key, key, arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < SHARE * 2 * key.size * 2


@pytest.mark.parametrize("mapped", ["query", "query_and_key"])
def test_vmap_does_not_copy_an_unmapped_cache(mapped: str) -> None:
    function, arrays = call("BNSD", 0, False)
    key, size = struct((B, K, S, D), jnp.bfloat16), 3
    keys = struct((size, *key.shape), jnp.bfloat16) if mapped == "query_and_key" else key
    axes = (0, 0 if mapped == "query_and_key" else None, None, None)
    compiled = (
        jax.jit(jax.vmap(function, in_axes=axes))
        .lower(struct((size, B, N, 1, D), jnp.bfloat16), keys, key, arrays)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * key.size * 2  # one copy would be 100%


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS_HERE)
@pytest.mark.parametrize("layout", ["BSH", "BNSD", "BSND"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_a_donated_decode_step_copies_no_cache(layout: str, dtype: str, paged: bool, implementation: str) -> None:
    """Append and attend inside one jitted step: this is where XLA likes to copy."""
    float_dtype = jnp.float32 if dtype == "int8" else jnp.dtype(dtype)
    scales = dict(antiquant_scale=jnp.full((2, K, D), 0.02)) if dtype == "int8" else {}
    table = struct((B, S // 128), jnp.int32)
    new = struct({"BSH": (B, 1, K * D), "BNSD": (B, K, 1, D), "BSND": (B, 1, K, D)}[layout], float_dtype)

    def create() -> cache.ContiguousCache | cache.PagedCache:
        if paged:
            return cache.PagedCache.create(B * S // 128, 128, K, D, jnp.dtype(dtype), input_layout=layout, **scales)
        return cache.ContiguousCache.create(B, S, K, D, jnp.dtype(dtype), input_layout=layout, **scales)

    def step(kv, q, key, value, lengths, table):
        where = (table,) if paged else ()
        kv = kv.append(key, value, lengths, *where)
        visible = kv.arguments(lengths + 1, *where)
        out = incre_flash_attention(q, **visible, num_heads=N, scale_value=0.1, implementation=implementation)
        return kv, out

    kv = jax.eval_shape(create)
    compiled = (
        jax.jit(step, donate_argnums=0)
        .lower(kv, struct(QUERY[layout], float_dtype), new, new, struct((B,), jnp.int32), table)
        .compile()
    )
    memory = compiled.memory_analysis()
    cache_bytes = 2 * kv.key.size * kv.key.dtype.itemsize
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < SHARE * cache_bytes, f"{memory.temp_size_in_bytes / cache_bytes:.1%}"
