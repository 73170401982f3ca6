"""The public transforms, composed by hand into the operator; and merge, which composes its results."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_ifa
from jax_ifa import incre_flash_attention

CASES = {
    "contiguous": Case(lengths="ragged", bias="batch"),
    "contiguous_bsh": Case(layout="BSH", lengths=None, dtype="bfloat16"),
    "left_padded_masked": Case(layout="BSND", lengths=(40, 7), padding=5, mask="4d", bias="shared"),
    "fully_masked": Case(mask="3d:uint8:full", lengths="zero", batch=3),
    "paged": Case(block=16, lengths=(33, 48), mask="2d", bias="batch"),
    "paged_bsh": Case(block=16, layout="BSH", lengths="one", dtype="float16"),
    "int8": Case(int8=True, lengths="zero", mask="2d"),
    "int8_offset": Case(int8=True, offset=True, lengths="zero", layout="BSND", antiquant="flat", dtype="float16"),
    "int8_per_tensor": Case(int8=True, offset=True, antiquant="tensor", bias="shared"),
    "int8_output": Case(quant="channel_offset", lengths="zero"),
    "int8_all_over": Case(
        block=32, capacity=70, int8=True, offset=True, quant="tensor_offset", mask="2d", bias="batch"
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def by_hand(
    query: jax.Array, key: jax.Array, value: jax.Array, arguments: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """The operator as the README tells it: canonical operands, the loop, and back."""
    given = {name: x if np.ndim(x) == 0 else jnp.asarray(x) for name, x in arguments.items()}
    layout, n, k = given["input_layout"], given["num_heads"], given["num_key_value_heads"]
    batch = query.shape[0]

    q = jax_ifa.split_query(query, num_heads=n, num_kv_heads=k)
    kv = jax_ifa.view_kv(key, value, num_kv_heads=k, input_layout=layout, block_table=given.get("block_table"))
    start, stop = jax_ifa.visible_window(
        batch=batch,
        capacity=kv.capacity,
        lengths=given.get("actual_seq_lengths"),
        left_padding=given.get("kv_padding_size"),
    )
    scale = jnp.full(batch, given["scale_value"], jnp.float32)
    int8 = key.dtype == jnp.int8
    if int8:
        key_scale, value_scale = jax_ifa.split_antiquant(given["antiquant_scale"], num_kv_heads=k)
        q = jax_ifa.fold_key_scale(q, key_scale)

    mask, bias = given.get("atten_mask"), given.get("pse_shift")
    out, lse = jax_ifa.attend(
        jax_ifa.Operands(
            query=q,
            scale=scale,
            kv=kv,
            start=start,
            stop=stop,
            mask=None if mask is None else jax_ifa.mask_rows(mask, kv.capacity),
            bias=None if bias is None else jax_ifa.bias_rows(bias, num_kv_heads=k),
            out_dtype=jnp.dtype(jnp.float32) if int8 or "quant_scale2" in given else query.dtype,
        )
    )

    if int8:
        empty, value_offset = jnp.isneginf(lse), None
        if "antiquant_offset" in given:
            key_offset, value_offset = jax_ifa.split_antiquant(given["antiquant_offset"], num_kv_heads=k)
            lse = lse + jax_ifa.key_offset_score(q, key_offset, scale)
        out = jax_ifa.antiquantize_output(out, value_scale, value_offset, empty)
    if "quant_scale2" in given:
        out = jax_ifa.quantize_output(out, given["quant_scale2"], given.get("quant_offset2"))
    else:
        out = out.astype(query.dtype)
    return jax_ifa.join_output(out, input_layout=layout), lse.reshape(batch, n, 1)


@each_case
def test_the_transforms_compose_into_the_operator(case: Case) -> None:
    args, kwargs = case.inputs()
    expected = incre_flash_attention(*args, return_lse=True, **kwargs)
    actual = jax.jit(lambda *args: by_hand(*args, kwargs))(*map(jnp.asarray, args))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- one transform replaced by its definition ---


@pytest.mark.parametrize("name", ["paged", "paged_bsh", "int8_all_over"])
def test_gathered_pages_are_a_contiguous_cache(name: str) -> None:
    case = CASES[name]
    (query, key, value), kwargs = case.inputs()
    k, table = case.kv_heads, jnp.asarray(kwargs.pop("block_table"))
    kwargs.pop("block_size")
    expected = incre_flash_attention(
        query, key, value, block_table=table, block_size=case.block, return_lse=True, **kwargs
    )
    kv = jax_ifa.view_kv(
        jnp.asarray(key), jnp.asarray(value), num_kv_heads=k, input_layout=case.layout, block_table=table
    )
    key, value = (jax_ifa.gather_pages(x, table, head_major=kv.head_major) for x in (kv.key, kv.value))
    assert key.shape[2 if kv.head_major else 1] == kv.capacity == case.positions
    if case.layout == "BSH":
        key, value = (x.reshape(*x.shape[:2], -1) for x in (key, value))
    actual = incre_flash_attention(query, key, value, return_lse=True, **kwargs)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["int8", "int8_per_tensor"])
def test_antiquantized_cache_is_a_float_cache(name: str) -> None:
    case = CASES[name]
    (query, key, value), kwargs = case.inputs()
    expected = incre_flash_attention(query, key, value, return_lse=True, **kwargs)
    scale = jax_ifa.split_antiquant(jnp.asarray(kwargs.pop("antiquant_scale")), num_kv_heads=case.kv_heads)
    offset = kwargs.pop("antiquant_offset", None)
    offsets: tuple[Any, Any] = (None, None)
    if offset is not None:
        offsets = jax_ifa.split_antiquant(jnp.asarray(offset), num_kv_heads=case.kv_heads)
    key, value = (
        jax_ifa.antiquantize(jnp.asarray(x), s[:, None, :][None], None if o is None else o[:, None, :][None])
        for x, s, o in zip((key, value), scale, offsets, strict=True)
    )
    assert_close(incre_flash_attention(query, key, value, return_lse=True, **kwargs), expected)


def test_quantize_output_rounds_half_to_even_and_saturates() -> None:
    halves = jnp.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.5, -128.5, 1e9, -1e9, jnp.inf, -jnp.inf, jnp.nan, 126.5])
    out = jax_ifa.quantize_output(halves.reshape(1, 1, 1, 14), jnp.ones(1))
    np.testing.assert_array_equal(out[0, 0, 0], [0, 2, 2, 0, -2, -2, 127, -128, 127, -128, 127, -128, 0, 126])
    offset = jax_ifa.quantize_output(jnp.zeros((1, 2, 2, 2)), jnp.ones((1, 4, 1, 2)), jnp.arange(8.0).reshape(4, 2))
    np.testing.assert_array_equal(offset.reshape(-1), np.arange(8))


def test_visible_window() -> None:
    def window(**kwargs: Any) -> list[list[int]]:
        return [x.tolist() for x in jax_ifa.visible_window(batch=3, capacity=10, **kwargs)]

    lengths = jnp.array([10, 4, 0])
    assert window() == [[0, 0, 0], [10, 10, 10]]
    assert window(left_padding=jnp.array([3])) == [[0, 0, 0], [10, 10, 10]]
    assert window(lengths=lengths) == [[0, 0, 0], [10, 4, 0]]
    assert window(lengths=jnp.array([4])) == [[0, 0, 0], [4, 4, 4]]
    assert window(lengths=lengths, left_padding=jnp.array([0])) == [[0, 6, 10], [10, 10, 10]]
    assert window(lengths=lengths, left_padding=jnp.array(3)) == [[0, 3, 7], [0, 7, 7]]
    assert window(lengths=lengths, left_padding=jnp.array(-3)) == [[0, 6, 10], [10, 10, 10]]
    assert window(lengths=jnp.array([99, -5, 2]))[1] == [10, 0, 2]
    wild = jax_ifa.visible_window(
        batch=2, capacity=10, lengths=jnp.array([2**31 - 1, -(2**31)]), left_padding=jnp.array([2**31 - 1])
    )
    np.testing.assert_array_equal(wild[0], wild[1])


def test_in_window_and_mask_scores() -> None:
    inside = jax_ifa.in_window(jnp.arange(5), jnp.array([1, 3]), jnp.array([3, 3]))
    np.testing.assert_array_equal(inside, [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    scores = jax_ifa.mask_scores(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([0, 1, -1], jnp.int8))
    np.testing.assert_array_equal(scores, np.array([1.0, -1e12, -1e12], np.float32))


def test_split_query_and_join_output_are_inverse() -> None:
    numbers = jnp.arange(2 * 6 * 5.0)
    for layout, shape in {"BSH": (2, 1, 30), "BNSD": (2, 6, 1, 5), "BSND": (2, 1, 6, 5)}.items():
        split = jax_ifa.split_query(numbers.reshape(shape), num_heads=6, num_kv_heads=2)
        assert split.shape == (2, 2, 3, 5)
        np.testing.assert_array_equal(split.reshape(-1), numbers)
        np.testing.assert_array_equal(jax_ifa.join_output(split, input_layout=layout), numbers.reshape(shape))


# --- merge ---


def assert_close(actual: Any, expected: Any) -> None:
    """Equal up to the order of float32 sums, and one unit in the last place of what is rounded afterwards."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        tolerance = {"float32": 3e-6, "bfloat16": 2**-7, "float16": 2**-10, "int8": 1.0}[b.dtype.name]
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance)


WHOLE = Case(batch=2, heads=4, kv_heads=2, head_dim=8, capacity=24, lengths=None).inputs()


@jax.jit
def part(start: jax.Array, stop: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over the positions [start, stop) of the case above, one window for both sequences."""
    (query, key, value), kwargs = WHOLE
    return incre_flash_attention(
        query,
        key,
        value,
        return_lse=True,
        actual_seq_lengths=(stop - start)[None],
        kv_padding_size=24 - stop,
        **kwargs,
    )


def parts(cuts: list[int]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Partial results of the windows between the cuts; outputs (B, N, D), LSEs (B, N)."""
    edges = [0, *sorted(cuts), 24]
    results = [part(jnp.int32(a), jnp.int32(b)) for a, b in itertools.pairwise(edges)]
    return [out[:, :, 0] for out, _ in results], [lse[..., 0] for _, lse in results]


@given(st.lists(st.integers(0, 24), min_size=3, max_size=3))
@settings(max_examples=30)
def test_merged_parts_are_the_whole(cuts: list[int]) -> None:
    """Four windows, empty ones too, at once and one by one from either end."""
    outs, lses = parts(cuts)
    (query, key, value), kwargs = WHOLE
    out, lse = incre_flash_attention(query, key, value, return_lse=True, **kwargs)
    whole = out[:, :, 0], lse[..., 0]
    assert_close(jax_ifa.merge_all(jnp.stack(outs), jnp.stack(lses)), whole)
    assert_close(jax_ifa.merge_all(jnp.stack(outs, axis=1), jnp.stack(lses, axis=1), axis=1), whole)
    assert_close(jax_ifa.merge_all(jnp.stack(outs, axis=2), jnp.stack(lses, axis=2), axis=-1), whole)
    for order in (range(len(outs)), reversed(range(len(outs)))):
        merged = jnp.zeros_like(outs[0]), jnp.full_like(lses[0], -jnp.inf)
        for i in order:
            merged = jax_ifa.merge(*merged, outs[i], lses[i])
        assert_close(merged, whole)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_merge_is_associative_and_commutative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outs = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    lses = jnp.asarray(rng.choice([-np.inf, -1e12, -90.0, 0.0, 3.0, 80.0, 1e4], (3, 4)), jnp.float32)
    a, b, c = zip(outs, lses, strict=True)
    left = jax_ifa.merge(*jax_ifa.merge(*a, *b), *c)
    assert_close(left, jax_ifa.merge(*a, *jax_ifa.merge(*b, *c)))
    assert_close(jax_ifa.merge(*a, *b), jax_ifa.merge(*b, *a))
    # In float64, by the definition.
    weights = np.exp(np.asarray(lses, np.float64) - np.maximum(lses.max(0), -1e13))
    total = weights.sum(0)
    expected = (weights[..., None] * outs).sum(0) / np.where(total == 0, 1, total)[:, None]
    np.testing.assert_allclose(left[0], expected, atol=2e-6)


def test_no_positions_is_the_identity_of_merge_whatever_its_output_holds() -> None:
    out, lse = jnp.arange(6.0).reshape(2, 3), jnp.array([5.0, -jnp.inf])
    out = out.at[1].set(0.0)
    for hole in (0.0, jnp.nan, jnp.inf):
        nothing = jnp.full((2, 3), hole), jnp.full(2, -jnp.inf)
        for merged in (jax_ifa.merge(out, lse, *nothing), jax_ifa.merge(*nothing, out, lse)):
            np.testing.assert_array_equal(merged[0], out)
            np.testing.assert_array_equal(merged[1], lse)


def test_merge_takes_16_bit_outputs_and_gives_float32() -> None:
    out, lse = jax_ifa.merge(
        jnp.ones((2, 3), jnp.bfloat16), jnp.zeros(2), jnp.zeros((2, 3), jnp.float16).astype(jnp.bfloat16), jnp.zeros(2)
    )
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(out, 0.5)
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("hole", [0.0, jnp.nan])
def test_merge_has_finite_gradients_beside_empty_parts(hole: float) -> None:
    out, lse = jnp.array([[1.0] * 4, [hole] * 4, [hole] * 4]), jnp.array([1.0, -jnp.inf, -jnp.inf])
    other, other_lse = jnp.array([[hole] * 4, [2.0] * 4, [hole] * 4]), jnp.array([-jnp.inf, 2.0, -jnp.inf])

    def total(out: jax.Array, lse: jax.Array, other: jax.Array, other_lse: jax.Array) -> jax.Array:
        merged, merged_lse = jax_ifa.merge(out, lse, other, other_lse)
        return merged.sum() + jnp.where(jnp.isfinite(merged_lse), merged_lse, 0.0).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(out, lse, other, other_lse)
    expected = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]
    for gradient, values in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(gradient.reshape(3, -1)[:, 0], values)
