"""Appending to contiguous and paged caches: every token where it belongs, and nothing anywhere else."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_model import LAYOUTS, by_sequence, empty, in_layout, random_tokens, scales, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ifa import incre_flash_attention
from jax_ifa.cache import ContiguousCache, PagedCache, quantize_kv

B, S, K, D = 3, 64, 2, 16
KINDS = ("contiguous", "paged")
INT32_MAX = 2**31 - 1
jitted_quantize = jax.jit(quantize_kv)


def make(kind, dtype="float32", layout="BNSD"):
    return empty(kind, dtype, layout, batch=B, capacity=S, num_kv_heads=K, head_dim=D)


def expected(cache, tokens, index):
    """(B, Q, K, D) tokens as the cache should hold them."""
    if cache.dtype != jnp.int8:
        return np.asarray(tokens.astype(cache.dtype))
    scale, offset = cache.antiquant_scale[None, None, index], cache.antiquant_offset[None, None, index]
    return np.asarray(jitted_quantize(tokens, scale, offset))


def append_model(contents, new, lengths, counts):
    """The plain model: one assignment per token that has a place."""
    contents = [array.copy() for array in contents]
    for array, tokens in zip(contents, new, strict=True):
        for b in range(tokens.shape[0]):
            for q in range(tokens.shape[1]):
                position = int(lengths[b]) + q
                if lengths[b] >= 0 and q < counts[b] and position < array.shape[1]:
                    array[b, position] = tokens[b, q]
    return contents


def append(cache, key, value, lengths, counts, *table):
    return cache.append(key, value, lengths, *table, counts=counts)


jitted_append = jax.jit(append)  # one for all tests, so that each form compiles once


def assert_appended(cache, table, *, lengths, counts, num_tokens, jit):
    key, value = random_tokens(1, (B, num_tokens, K, D))
    before = by_sequence(cache, table)
    new = [expected(cache, tokens, index) for index, tokens in enumerate((key, value))]

    arguments = [in_layout(tokens, cache.input_layout) for tokens in (key, value)]
    arguments += [jnp.asarray(lengths, jnp.int32), None if counts is None else jnp.asarray(counts, jnp.int32)]
    after = (jitted_append if jit else append)(cache, *arguments, *table)
    model = append_model(before, new, lengths, [num_tokens] * B if counts is None else counts)
    chex.assert_trees_all_equal(by_sequence(after, table), model)
    if table:  # blocks that are not in the table
        unowned = np.setdiff1d(np.arange(cache.num_blocks), table[0])
        assert unowned.size
        chex.assert_trees_all_equal([pages[unowned] for pages in stored(after)], [p[unowned] for p in stored(cache)])
    return after


def check_prompt_then_steps(kind, layout, dtype, *, jit):
    cache, table = make(kind, dtype, layout)
    cache = assert_appended(cache, table, lengths=[0, 0, 0], counts=[40, 0, 33], num_tokens=40, jit=jit)
    cache = assert_appended(cache, table, lengths=[40, 0, 33], counts=[1, 1, 1], num_tokens=1, jit=jit)
    cache = assert_appended(cache, table, lengths=[41, 1, S - 1], counts=[1, 0, 1], num_tokens=1, jit=jit)
    assert cache.dtype == dtype


@pytest.mark.parametrize(
    "kind, layout, dtype",
    [
        *itertools.product(("contiguous",), LAYOUTS, ("bfloat16", "int8")),
        *itertools.product(("paged",), ("BNSD", "BSH"), ("bfloat16", "int8")),
        ("contiguous", "BSND", "float32"),
        ("paged", "BNSD", "float16"),
    ],
)
def test_prompt_then_steps(kind, layout, dtype):
    check_prompt_then_steps(kind, layout, dtype, jit=True)


@pytest.mark.parametrize("kind, layout, dtype", (("contiguous", "BSND", "int8"), ("paged", "BNSD", "bfloat16")))
def test_prompt_then_steps_without_jit(kind, layout, dtype):
    check_prompt_then_steps(kind, layout, dtype, jit=False)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_hold_the_same(kind):
    tokens = random_tokens(3, (B, 5, K, D), jnp.bfloat16)
    contents = []
    for layout in LAYOUTS:
        cache, table = make(kind, "int8", layout)
        cache = cache.append(*(in_layout(t, layout) for t in tokens), [0, 31, 59], *table, counts=[5, 3, 5])
        contents.append(by_sequence(cache, table))
    chex.assert_trees_all_equal(*contents)


def test_kinds_hold_the_same():
    tokens = [in_layout(t, "BSND") for t in random_tokens(3, (B, 5, K, D))]
    contents = []
    for kind in KINDS:
        cache, table = make(kind, "float16", "BSND")
        cache = jax.jit(lambda cache, *a: cache.append(*a))(cache, *tokens, jnp.array([0, 31, 59]), *table)
        contents.append(by_sequence(cache, table))
    chex.assert_trees_all_equal(*contents)


@settings(max_examples=60)
@given(
    form=st.sampled_from(
        (
            ("contiguous", "bfloat16", "BNSD"),
            ("contiguous", "int8", "BSH"),
            ("paged", "bfloat16", "BSH"),
            ("paged", "float32", "BNSD"),
        )
    ),
    lengths=st.lists(
        st.one_of(st.integers(-5, S + 5), st.sampled_from((INT32_MAX, INT32_MAX - 3, -INT32_MAX, -1, S - 3))),
        min_size=B,
        max_size=B,
    ),
    counts=st.lists(st.one_of(st.integers(-3, 12), st.just(INT32_MAX)), min_size=B, max_size=B),
)
def test_traced_garbage_is_dropped(form, lengths, counts):
    cache, table = make(*form)
    assert_appended(cache, table, lengths=lengths, counts=counts, num_tokens=8, jit=True)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "int8"))
@pytest.mark.parametrize("layout", ("BNSD", "BSH"))
def test_traced_garbage_ids_are_dropped(layout, dtype):
    num_blocks, block_size = 5, 32
    pool = PagedCache.create(num_blocks, block_size, K, D, dtype, input_layout=layout, **scales(dtype, K, D))
    ids = [-1, -num_blocks, num_blocks, INT32_MAX, -INT32_MAX - 1, -2]
    table = jnp.array([[i, 2] for i in ids], jnp.int32)
    key, value = random_tokens(0, (len(ids), 4, K, D))
    lengths = jnp.full(len(ids), 20, jnp.int32)
    new = in_layout(key, layout), in_layout(value, layout)
    chex.assert_trees_all_equal(stored(jitted_append(pool, *new, lengths, None, table)), stored(pool))

    # across a page boundary, what has a place is written and the rest is not; garbage elsewhere is harmless
    lengths = jnp.array([30, 0, 0, 0, 0, 0], jnp.int32)
    pages = stored(jitted_append(pool, *new, lengths, None, table.at[1].set(jnp.array([4, -9]))))[0].copy()
    chex.assert_trees_all_equal(pages[2, :2], expected_rows(pool, key[0, 2:]))
    chex.assert_trees_all_equal(pages[4, :4], expected_rows(pool, key[1]))
    pages[2, :2], pages[4, :4] = 0, 0
    assert not pages.any()


def expected_rows(pool, tokens):
    """(Q, K, D) keys as the pool should hold them."""
    if pool.dtype != jnp.int8:
        return np.asarray(tokens.astype(pool.dtype))
    return np.asarray(jitted_quantize(tokens, pool.antiquant_scale[None, 0], pool.antiquant_offset[None, 0]))


def test_padding_never_reaches_the_cache():
    """NaN in tokens past counts, traced or not, in a float or an int8 cache."""
    for dtype in ("float32", "int8"):
        cache, _ = make("contiguous", dtype)
        key, value = random_tokens(1, (B, K, 4, D))
        ragged = key.at[:, :, 2:].set(jnp.nan)
        for append in (cache.append, jax.jit(cache.append)):
            got = append(ragged, value, jnp.array([0, 5, 60]), jnp.array([2, 0, 1]))
            want = cache.append(key, value, [0, 5, 60], [2, 0, 1])
            chex.assert_trees_all_equal(got.key, want.key)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_is_a_loop(kind):
    cache, table = make(kind, "bfloat16")
    layers = 3
    tokens = [jnp.swapaxes(t.reshape(layers, B, 2, K, D), 2, 3) for t in random_tokens(5, (layers * B, 2, K, D))]
    stacked = jax.tree.map(lambda x: jnp.stack([x] * layers), cache)
    lengths = jnp.array([[0, 5, 62], [63, -1, 1], [31, 32, 64]])

    def append(cache, key, value, lengths):
        return cache.append(key, value, lengths, *map(jnp.asarray, table))

    got = jax.jit(jax.vmap(append))(stacked, *tokens, lengths)
    for layer in range(layers):
        want = jax.jit(append)(cache, *(t[layer] for t in tokens), lengths[layer])
        chex.assert_trees_all_equal(jax.tree.map(lambda x, n=layer: x[n], got), want)


@pytest.mark.parametrize("kind", KINDS)
def test_scan_and_while_are_steps(kind):
    cache, table = make(kind, "int8", "BSND")
    steps = 5
    tokens = [t[:, :, None] for t in random_tokens(2, (steps, B, K, D))]  # one token for each step and sequence
    start = jnp.array([0, 31, S - 2], jnp.int32)  # the last sequence runs out of room
    table = tuple(map(jnp.asarray, table))

    def step(carry, new):
        cache, lengths = carry
        return (cache.append(*new, lengths, *table), lengths + 1), None

    eager = cache
    for i in range(steps):
        eager = jax.jit(lambda c, *a: c.append(*a, *table))(eager, *(t[i] for t in tokens), start + i)
    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(step, (c, start), tuple(tokens)))(cache)

    def body(state):
        i, carry = state
        return i + 1, step(carry, tuple(t[i] for t in tokens))[0]

    _, (looped, _) = jax.jit(lambda c: jax.lax.while_loop(lambda s: s[0] < steps, body, (0, (c, start))))(cache)
    chex.assert_trees_all_equal(eager, scanned, looped)


def test_one_trace_for_changing_values():
    cache, table = make("paged", "int8")
    key, value = (in_layout(t, "BNSD") for t in random_tokens(1, (B, 4, K, D)))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(cache, lengths, counts, table):
        return cache.append(key, value, lengths, table, counts)

    for i in range(4):
        cache = step(cache, jnp.full(B, i), jnp.full(B, i), jnp.asarray(np.roll(table[0], i)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_goes_through(kind):
    for dtype in ("float32", "bfloat16"):
        cache, table = make(kind, dtype, "BSND")
        tokens = jnp.ones((B, 2, K, D), dtype)
        weight = jax.random.uniform(jax.random.key(0), cache.key.shape, dtype)

        def loss(cache, tokens, weight=weight, table=table):
            after = cache.append(tokens, tokens, jnp.array([0, 32, S - 1]), *map(jnp.asarray, table))
            return (after.key * weight).sum()

        by_cache, by_tokens = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1)))(cache, tokens)
        ones = by_sequence(cache.append(tokens, tokens, [0, 32, S - 1], *table, counts=[2, 2, 1]), table)[0]
        weights = by_sequence(cache.__class__(weight, weight, None, None, "BSND", K), table)[0]
        chex.assert_trees_all_equal(by_sequence(by_cache, table)[0], np.where(ones, 0, weights))
        chex.assert_trees_all_equal(np.asarray(by_tokens[1]), weights[1, 32:34])
        assert not np.asarray(by_tokens[2, 1]).any()  # dropped


def test_it_is_a_pytree():
    cache, _ = make("contiguous", "int8", "BSH")
    leaves, structure = jax.tree.flatten(cache)
    assert len(leaves) == 4
    again = jax.tree.unflatten(structure, leaves)
    assert (again.input_layout, again.num_kv_heads, again.head_dim, again.capacity) == ("BSH", K, D, S)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(cache)[0]]
    assert names == [".key", ".value", ".antiquant_scale", ".antiquant_offset"]
    with pytest.raises(AttributeError):
        cache.key = leaves[0]


def test_sizes():
    cache, _ = make("contiguous", "float16", "BSND")
    assert (cache.batch, cache.capacity, cache.head_dim, cache.num_kv_heads) == (B, S, D, K)
    pool = PagedCache.create(7, 32, K, D, "int8", input_layout="BSH", **scales("int8", K, D))
    assert (pool.num_blocks, pool.block_size, pool.head_dim, pool.num_kv_heads) == (7, 32, D, K)
    chex.assert_shape(pool.key, (7, 32, K * D))
    chex.assert_shape(PagedCache.create(7, 32, K, D).key, (7, K, 32, D))
    assert ContiguousCache.create(1, 8, 1, 8).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", ((2,), (2, K, D), (2, K, 1, D), (2, 1, K, D), (2, K * D)))
@pytest.mark.parametrize("scale_dtype", ("float32", "bfloat16", "float16"))
def test_every_shape_of_scale(shape, scale_dtype):
    per_tensor = shape == (2,)
    scale = jnp.asarray([0.25, 0.5] if per_tensor else np.linspace(0.1, 0.4, 2 * K * D), scale_dtype).reshape(shape)
    offset = jnp.round(4 * scale)
    cache = ContiguousCache.create(
        B, S, K, D, jnp.int8, input_layout="BSND", antiquant_scale=scale, antiquant_offset=offset
    )
    key, value = random_tokens(1, (B, 2, K, D))
    cache = cache.append(key, value, [0, 1, 2])
    arguments = cache.arguments([2, 3, 4])
    assert arguments["antiquant_scale"].dtype == arguments["antiquant_offset"].dtype == jnp.float32
    assert arguments["antiquant_scale"].shape == arguments["antiquant_offset"].shape == shape
    per_channel = [
        np.asarray(p.astype(jnp.float32)).reshape(2, 1, 1, *((1, 1) if per_tensor else (K, D))) for p in (scale, offset)
    ]
    for index, (tokens, pages) in enumerate(zip((key, value), stored(cache), strict=True)):
        restored = (pages[0, :2] + per_channel[1][index, 0]) * per_channel[0][index, 0]
        error = np.abs(restored - np.asarray(tokens[0]))
        assert (error <= per_channel[0][index, 0] * 0.5001).all()


def test_the_caller_keeps_its_scales():
    """Donating one layer's cache takes neither the caller's arrays nor another layer's."""
    scale = jnp.full((2, K, D), 0.1)
    layers = [ContiguousCache.create(B, S, K, D, jnp.int8, antiquant_scale=scale) for _ in range(2)]
    key = jnp.ones((B, K, 1, D))

    def step(layers, lengths):
        return [cache.append(key, key, lengths) for cache in layers]

    layers = jax.jit(step, donate_argnums=0)(layers, jnp.zeros(B, jnp.int32))
    assert float(scale.sum()) == pytest.approx(0.1 * 2 * K * D)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(layers))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_over_the_cache(kind, layout):
    """`arguments` is what the function takes: the answer is that of a dense softmax over the tokens appended."""
    cache, table = make(kind, "float32", layout)
    key, value = random_tokens(1, (B, 40, K, D))
    counts = jnp.array([40, 7, 0])
    cache = cache.append(in_layout(key, layout), in_layout(value, layout), [0, 0, 0], *table, counts=counts)
    query = jax.random.normal(jax.random.key(2), (B, 1, 2 * K, D))
    out = incre_flash_attention(
        in_layout(query, layout), **cache.arguments(counts, *table), num_heads=2 * K, scale_value=D**-0.5
    )
    heads = np.asarray(query).reshape(B, K, 2, D)
    scores = np.einsum("bkgd,btkd->bkgt", heads, np.asarray(key)) / np.sqrt(D)
    weights = np.exp(scores) * (np.arange(40) < np.asarray(counts)[:, None])[:, None, None]
    sums = weights.sum(-1, keepdims=True)
    want = np.einsum("bkgt,btkd->bkgd", weights / np.where(sums, sums, 1), np.asarray(value))
    chex.assert_trees_all_close(np.asarray(out).reshape(B, K, 2, D), want, atol=1e-5)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "int8"))
@pytest.mark.parametrize("layout", ("BNSD", "BSND"))
def test_copy_blocks(layout, dtype):
    pool = PagedCache.create(6, 32, K, D, dtype, input_layout=layout, **scales(dtype, K, D))
    key, value = (in_layout(t, layout) for t in random_tokens(1, (6, 32, K, D)))
    pool = pool.append(key, value, [0] * 6, np.arange(6)[:, None])
    before = stored(pool)
    source, target = np.array([0, 3, -1, 1]), np.array([3, 5, -1, 0])  # 0 is read although it is overwritten
    want = [pages.copy() for pages in before]
    for pages, old in zip(want, before, strict=True):
        pages[[3, 5, 0]] = old[[0, 3, 1]]
    chex.assert_trees_all_equal(stored(pool.copy_blocks(source, target)), want)
    copy = jax.jit(PagedCache.copy_blocks)
    chex.assert_trees_all_equal(stored(copy(pool, source, target)), want)
    garbage = np.array([-1, 6, -6, 2, 2, INT32_MAX])
    outside = np.array([0, 0, 0, 6, -1, 0])
    chex.assert_trees_all_equal(stored(copy(pool, garbage, outside)), before)


def append_error(error, match, *, kind="contiguous", dtype="float32", key=None, value=None, table=None, **given):
    cache, own = make(kind, dtype)
    tokens = jnp.ones((B, K, 2, D))
    arguments = {"lengths": [0, 1, 2], "counts": None} | given
    if kind == "paged":
        arguments["block_table"] = own[0] if table is None else table
    with pytest.raises(error, match=match):
        cache.append(tokens if key is None else key, tokens if value is None else value, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_concrete_mistakes_raise(kind):
    def fails(error, match, **given):
        append_error(error, match, kind=kind, **given)

    fails(ValueError, r"must fit the cache: expected .* <= 64, got lengths \[0, 63, 0\]", lengths=[0, 63, 0])
    fails(ValueError, "must fit the cache", lengths=[-1, 0, 0])
    fails(ValueError, "must fit the cache", lengths=[0, 64, 0], counts=[2, 1, 0])
    fails(ValueError, r"how many of the new tokens count: expected 0 to 2, got \[3, 0, 0\]", counts=[3, 0, 0])
    fails(ValueError, "how many of the new tokens count", counts=np.array([-1, 0, 0]))
    fails(ValueError, r"lengths has one shape: expected shape \(3,\), got \(2,\)", lengths=[0, 1])
    fails(ValueError, "counts has one shape", counts=2)
    fails(TypeError, "lengths must hold integers", lengths=[0.0, 1.0, 2.0])
    fails(TypeError, "counts must hold integers", counts=[True, False, True])
    fails(ValueError, "value has the shape of key", value=jnp.ones((B, K, 3, D)))
    fails(ValueError, "key has the axes of BNSD", key=jnp.ones((B, 2, K * D)))
    fails(ValueError, "value has the axes of BNSD", value=jnp.ones((B + 1, K, 2, D)))
    fails(ValueError, "key has the axes of BNSD", key=jnp.ones((B, K, 2, D + 1)))
    fails(TypeError, "key holds new tokens to store", key=jnp.ones((B, K, 2, D), jnp.int8))
    fails(TypeError, "key must be an array", key="keys")
    fails(ValueError, "key is stored as int8", dtype="int8", key=jnp.full((B, K, 2, D), jnp.nan))
    fails(ValueError, "value is stored as int8", dtype="int8", value=jnp.full((B, K, 2, D), jnp.inf))


def test_concrete_tables_are_checked():
    good = np.array([[0, 1], [2, 3], [4, 5]])

    def fails(error, match, **given):
        append_error(error, match, kind="paged", **given)

    fails(ValueError, r"lists the blocks of each sequence: expected shape \(3, M\)", table=good[0])
    fails(ValueError, "lists the blocks of each sequence", table=good[:2])
    fails(ValueError, "lists the blocks of each sequence", table=np.zeros((3, 0), np.int32))
    fails(TypeError, "block_table must hold integers", table=good.astype(np.float32))
    fails(ValueError, "a block for every new token", table=np.where(good == 2, -1, good))
    fails(ValueError, "a block for every new token: expected 0 to 8", table=np.where(good == 2, 9, good))
    fails(ValueError, "no two new tokens may go to one place", table=np.zeros((3, 2), np.int32))
    fails(ValueError, "must fit the cache", table=good[:, :1], lengths=[0, 31, 0])
    cache, _ = make("paged")
    tokens = jnp.ones((B, K, 2, D))
    unneeded = np.array([[0, -1], [-7, 3], [99, 5]])  # each token's place is there all the same
    cache.append(tokens, tokens, [30, 32, 0], unneeded, counts=[2, 2, 0])
    cache.append(tokens, tokens, [0, 2, 4], np.zeros((3, 2), np.int32))  # one block, different positions


def test_wrong_caches_raise():
    def fails(error, match, cls=ContiguousCache, sizes=(B, S, K, D), dtype="float32", **given):
        with pytest.raises(error, match=match):
            cls.create(*sizes, dtype, **given)

    scale = jnp.ones((2, K, D))
    fails(ValueError, "input_layout names the axes", input_layout="SBH")
    fails(TypeError, "dtype of a cache: expected float32 or bfloat16 or float16 or int8", dtype="int16")
    fails(ValueError, "capacity is a size: expected at least 1, got 0", sizes=(B, 0, K, D))
    fails(TypeError, "batch is an integer known when tracing", sizes=(1.5, S, K, D))
    fails(ValueError, "int8 key and value need antiquant_scale", dtype="int8")
    fails(ValueError, "antiquant_scale is for int8", antiquant_scale=scale)
    fails(ValueError, "antiquant_offset is for int8", antiquant_offset=scale)
    fails(ValueError, "one of", dtype="int8", antiquant_scale=jnp.ones((2, D, K)))
    fails(TypeError, "antiquant_scale dtype", dtype="int8", antiquant_scale=jnp.ones((2, K, D), jnp.int32))
    fails(
        ValueError, "has the shape of antiquant_scale", dtype="int8", antiquant_scale=scale, antiquant_offset=scale[0]
    )
    for bad in (0.0, -1.0, np.nan, np.inf):
        fails(ValueError, "antiquant_scale divides", dtype="int8", antiquant_scale=scale.at[1, 0, 0].set(bad))
    fails(
        ValueError,
        "antiquant_offset shifts",
        dtype="int8",
        antiquant_scale=scale,
        antiquant_offset=scale.at[0, 0, 0].set(jnp.nan),
    )
    fails(ValueError, "block_size of a float32 cache: expected a multiple of 16", PagedCache, (8, 24, K, D))
    fails(ValueError, "block_size of a int8 cache", PagedCache, (8, 16, K, D), "int8", antiquant_scale=scale)


def test_wrong_copies_raise():
    pool = PagedCache.create(6, 16, K, D)
    for match, source, target in (
        ("source names blocks: expected 0 to 5", [6], [0]),
        ("target names blocks", [0], [-2]),
        ("-1 copies nothing", [-1], [0]),
        ("target names each block once", [0, 1], [2, 2]),
        ("target has one shape", [0, 1], [2]),
        ("source lists blocks", [[0]], [[1]]),
    ):
        with pytest.raises(ValueError, match=match):
            pool.copy_blocks(np.array(source), np.array(target))
