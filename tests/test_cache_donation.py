"""A donated cache is appended to in place: shown by the compiled program, by the buffers, and by the clock."""

import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_model import DTYPES, LAYOUTS, empty, in_layout

from jax_ifa import incre_flash_attention
from jax_ifa.cache import tokens as cache_tokens

B, S, K, D = 4, 2048, 4, 64
KINDS = ("contiguous", "paged")
IN_PLACE = {"parameter", "fusion", "scatter", "while", "conditional", "tuple", "get-tuple-element", "bitcast", "call"}


def compile_step(function, cache, *arguments):
    return jax.jit(function, donate_argnums=0).lower(cache, *arguments).compile()


def assert_in_place(compiled, cache, *, temporaries):
    """All of the cache is aliased, temporaries are small, and no whole array is made outside a fusion."""
    memory = compiled.memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes <= temporaries * size
    shape = r"\[" + ",".join(map(str, cache.key.shape)) + r"\]"
    computation = ""
    for line in compiled.as_text().splitlines():
        if line and not line.startswith(" "):
            computation = line
        made = re.search(r"= \w+" + shape + r"\S* ([\w-]+)\(", line)
        if made and "fused" not in computation and "wrapped" not in computation:
            assert made[1] in IN_PLACE, line.strip()


def new_tokens(layout, num_tokens, dtype=jnp.bfloat16):
    return in_layout(jnp.ones((B, num_tokens, K, D), dtype), layout)


def make(kind, dtype, layout):
    return empty(kind, dtype, layout, batch=B, capacity=S, num_kv_heads=K, head_dim=D)


@pytest.mark.parametrize("num_tokens", (1, 64))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_append_copies_nothing(kind, layout, dtype, num_tokens):
    cache, table = make(kind, dtype, layout)
    new, lengths = new_tokens(layout, num_tokens), jnp.zeros(B, jnp.int32)
    step = compile_step(lambda cache, *a: cache.append(new, new, *a), cache, lengths, *table, lengths + 1)
    # what a step needs: the tokens, in two forms at most, and never the cache
    assert_in_place(step, cache, temporaries=0.01 + 2.1 * num_tokens / S)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("BNSD", "BSH"))
def test_copy_blocks_copies_only_blocks(layout, dtype):
    pool, _ = make("paged", dtype, layout)
    ids = jnp.zeros(2, jnp.int32)
    copy = compile_step(lambda pool, *a: pool.copy_blocks(*a), pool, ids, ids)
    assert_in_place(copy, pool, temporaries=0.01 + 4 * 2 / pool.num_blocks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, layout", (("contiguous", "BNSD"), ("paged", "BSH")))
def test_the_buffers_stay(kind, layout, dtype):
    cache, table = make(kind, dtype, layout)
    new, table = new_tokens(layout, 1), tuple(map(jnp.asarray, table))
    where = [array.unsafe_buffer_pointer() for array in (cache.key, cache.value)]
    step = jax.jit(lambda cache, *a: cache.append(new, new, *a), donate_argnums=0)
    for i in range(3):
        cache = step(cache, jnp.full(B, i), *table)
        assert [array.unsafe_buffer_pointer() for array in (cache.key, cache.value)] == where


@pytest.mark.parametrize(
    "kind, layout, dtype",
    [
        *itertools.product(KINDS, ("BNSD", "BSND"), ("bfloat16", "int8")),
        ("contiguous", "BSND", "float32"),
        ("paged", "BNSD", "float16"),
    ],
)
def test_append_and_attend_copy_nothing(kind, layout, dtype):
    """The step of a decoder: new keys and values depend on the step's input, and its output on the cache.

    The attention's tiles have one size for any capacity, so the cache is long, and only its shape is made.
    """
    sizes = dict(batch=B, capacity=16 * S, num_kv_heads=K, head_dim=D)
    cache, table = jax.eval_shape(lambda: empty(kind, dtype, layout, **sizes))
    query_dtype = jnp.bfloat16 if dtype == "int8" else jnp.dtype(dtype)
    query = in_layout(jnp.ones((B, 1, 4 * K, D), query_dtype), layout)

    def step(cache, query, lengths, *table):
        new = in_layout(query.reshape(B, 1, K, 4, D)[:, :, :, 0], layout)
        cache = cache.append(jnp.sin(new), jnp.cos(new), lengths, *table)
        out = incre_flash_attention(query, **cache.arguments(lengths + 1, *table), num_heads=4 * K, scale_value=D**-0.5)
        return cache, out

    compiled = compile_step(step, cache, query, jnp.zeros(B, jnp.int32), *table)
    assert_in_place(compiled, cache, temporaries=0.04)


@pytest.mark.parametrize("head_major", (False, True))
def test_the_bfloat16_fallback_agrees(head_major):
    """Both ways of writing tokens, whichever this JAX uses: NaN, negative zero and dropped tokens included."""
    storage, new = (
        jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)
        for shape in ((5, 16, 2, 8), (3, 4, 2, 8))
    )
    storage = jnp.swapaxes(storage, 1, 2) if head_major else storage
    new = new.at[0, 0].set(jnp.nan).at[0, 1].set(-0.0)  # 16 NaN
    page = jnp.array([[0, 0, 0, 1], [4, 4, 5, 5], [5, 5, 5, 5]])
    slot = jnp.array([[13, 14, 15, 0], [7, 8, 7, 0], [0, 1, 2, 3]])
    ways = (cache_tokens._scatter, cache_tokens._select)
    written = [np.asarray(jax.jit(way, static_argnums=0)(head_major, storage, new, page, slot)) for way in ways]
    chex.assert_trees_all_equal(*(array.view(np.uint16) for array in written))
    assert np.isnan(written[0].astype(np.float32)).sum() == 16
