"""The oracle itself, against numbers worked out by hand, algebra, and `jax.nn.dot_product_attention`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case

from jax_ifa.reference import incre_flash_attention_reference as oracle

# One sequence, one head, D = 1 (BSH): the scores are the keys when the query is 1, and exp(log 2) and exp(log 3) are
# the weights 2 and 3 beside exp(0) = 1.
QUERY = np.array([[[1.0]]])
KEY = np.log(np.array([[[1.0], [2.0], [3.0]]]))
VALUE = np.array([[[10.0], [20.0], [60.0]]])


def one(**kwargs: Any) -> tuple[float, float]:
    """Output and LSE of the one head of the example above, with arguments on top of it."""
    arrays = [kwargs.pop(name, default) for name, default in (("query", QUERY), ("key", KEY), ("value", VALUE))]
    out, lse = oracle(*arrays, **kwargs)
    assert out.shape == arrays[0].shape
    assert lse.shape == (1, 1, 1)
    return out.item(), lse.item()


def expect(result: tuple[float, float], out: float, lse: float) -> None:
    np.testing.assert_allclose(result, (out, lse), rtol=1e-13)


def test_plain() -> None:
    # (1*10 + 2*20 + 3*60) / 6
    expect(one(), 230 / 6, math.log(6))


def test_scale_multiplies_the_scores() -> None:
    # twice the scores squares the weights: 1, 4, 9
    expect(one(scale_value=2.0), (10 + 80 + 540) / 14, math.log(14))


def test_bias_is_added_after_the_scale() -> None:
    # weights 1, 4, 9 times exp(bias) = 5, 1, 1; were the bias scaled too, the 5 would be 25
    bias = np.log(np.array([[[[5.0, 1.0, 1.0]]]]))
    expect(one(scale_value=2.0, pse_shift=bias), (50 + 80 + 540) / 18, math.log(18))


def test_mask_of_one_hides() -> None:
    for dtype in (bool, np.int8, np.uint8):
        expect(one(atten_mask=np.array([[0, 1, 0]], dtype)), (10 + 180) / 4, math.log(4))
    expect(one(atten_mask=np.array([[0, -3, 0]], np.int8)), (10 + 180) / 4, math.log(4))
    expect(one(atten_mask=np.zeros((1, 0), bool)), 230 / 6, math.log(6))


def test_mask_replaces_the_score_and_its_bias() -> None:
    bias = np.log(np.array([[[[1.0, 1e30, 1.0]]]]))
    expect(one(atten_mask=np.array([[0, 1, 0]], bool), pse_shift=bias), (10 + 180) / 4, math.log(4))


def test_row_masked_whole_is_the_mean() -> None:
    expect(one(atten_mask=np.ones((1, 3), bool)), 30.0, -1e12 + math.log(3))
    expect(one(atten_mask=np.ones((1, 3), bool), actual_seq_lengths=[2]), 15.0, -1e12 + math.log(2))


@pytest.mark.parametrize("lengths", [[2], (2,), np.array([2]), np.array([2], np.int64), jnp.array([2])])
def test_lengths(lengths: Any) -> None:
    expect(one(actual_seq_lengths=lengths), 50 / 3, math.log(3))


def test_no_lengths_is_everything() -> None:
    for lengths in (None, [], np.zeros(0, np.int32)):
        expect(one(actual_seq_lengths=lengths), 230 / 6, math.log(6))


def test_length_zero_and_empty_cache() -> None:
    assert one(actual_seq_lengths=[0]) == (0.0, -math.inf)
    empty = np.zeros((1, 0, 1))
    assert one(key=empty, value=empty) == (0.0, -math.inf)


def test_outside_the_window_is_never_read() -> None:
    key, value = KEY.copy(), VALUE.copy()
    key[0, 2], value[0, 2] = np.nan, np.inf
    expect(one(key=key, value=value, actual_seq_lengths=[2]), 50 / 3, math.log(3))


@pytest.mark.parametrize(
    ("padding", "length", "weights"),
    [
        (0, 2, [0, 2, 3]),  # the window ends at the end of the cache
        (1, 2, [1, 2, 0]),
        (1, 1, [0, 2, 0]),
        (2, 1, [1, 0, 0]),
        (-5, 1, [0, 0, 3]),  # negative counts as 0
        (0, 0, [0, 0, 0]),
        (2, 2, [0, 0, 0]),  # begins before the cache: nothing at all, not what would be left of it
        (3, 1, [0, 0, 0]),
        (9, 0, [0, 0, 0]),
        (3, 0, [0, 0, 0]),
    ],
)
def test_left_padding(padding: int, length: int, weights: list[float]) -> None:
    for form in (padding, [padding], np.array([padding]), np.array(padding, np.int32)):
        out, lse = one(kv_padding_size=form, actual_seq_lengths=[length])
        if sum(weights):
            expect((out, lse), np.dot(weights, [10, 20, 60]) / sum(weights), math.log(sum(weights)))
        else:
            assert (out, lse) == (0.0, -math.inf)


def test_left_padding_without_lengths_or_with_pages_is_ignored() -> None:
    expect(one(kv_padding_size=1), 230 / 6, math.log(6))
    expect(one(kv_padding_size=1, actual_seq_lengths=[]), 230 / 6, math.log(6))
    expect(one(kv_padding_size=[], actual_seq_lengths=[2]), 50 / 3, math.log(3))
    paged = dict(block_table=np.array([[0]]), block_size=3, actual_seq_lengths=[2])
    expect(one(**paged, kv_padding_size=1), 50 / 3, math.log(3))


def test_mask_and_bias_go_by_absolute_position() -> None:
    # the window is positions 1 and 2
    window = dict(kv_padding_size=0, actual_seq_lengths=[2])
    expect(one(**window, atten_mask=np.array([[1, 0, 1]], bool)), 20.0, math.log(2))
    bias = np.log(np.array([[[[7.0, 4.0, 1.0]]]]))
    expect(one(**window, pse_shift=bias), (8 * 20 + 3 * 60) / 11, math.log(11))


def test_pages() -> None:
    """Blocks of two: positions 0 and 1 in block 2, position 2 in the first row of block 0."""
    nan = np.nan
    key = np.array([[[KEY[0, 2, 0]], [nan]], [[nan], [nan]], [[KEY[0, 0, 0]], [KEY[0, 1, 0]]]])
    value = np.array([[[60.0], [nan]], [[nan], [nan]], [[10.0], [20.0]]])
    table = dict(block_table=np.array([[2, 0, -1]], np.int32), block_size=2)
    expect(one(key=key, value=value, **table, actual_seq_lengths=[3]), 230 / 6, math.log(6))
    expect(one(key=key, value=value, **table, actual_seq_lengths=[2]), 50 / 3, math.log(3))
    assert one(key=key, value=value, **table, actual_seq_lengths=[0]) == (0.0, -math.inf)
    head_major = dict(key=key[:, None], value=value[:, None], query=QUERY[:, None], input_layout="BNSD")
    expect(one(**head_major, **table, actual_seq_lengths=[3]), 230 / 6, math.log(6))


def test_antiquant_is_offset_then_scale() -> None:
    # keys (0 + 1) * log 2 and (1 + 1) * log 2: weights 2 and 4; values (3 - 1) * 10 and (6 - 1) * 10
    ints = dict(key=np.array([[[0], [1]]], np.int8), value=np.array([[[3], [6]]], np.int8))
    scale, offset = np.array([math.log(2), 10.0]), np.array([1.0, -1.0])
    expect(one(**ints, antiquant_scale=scale, antiquant_offset=offset), (2 * 20 + 4 * 50) / 6, math.log(6))
    expect(one(**ints, antiquant_scale=scale), (1 * 30 + 2 * 60) / 3, math.log(3))
    # int8 arithmetic would wrap 127 + 1 around
    ints = dict(key=np.zeros((1, 1, 1), np.int8), value=np.full((1, 1, 1), 127, np.int8))
    expect(one(**ints, antiquant_scale=scale, antiquant_offset=-offset), 1280.0, -math.log(2))


@pytest.mark.parametrize("form", [(2, 2, 3), (2, 6), (2, 2, 1, 3), (2, 1, 2, 3)])
def test_antiquant_shapes(form: tuple[int, ...]) -> None:
    """Index 0 is for the key; channels are head-major: K=2 heads of D=3, one position, so the output is the value."""
    scale = np.arange(1.0, 13.0)
    query, ones = np.zeros((1, 1, 6)), np.ones((1, 1, 6), np.int8)
    query[0, 0, 4] = 1.0  # head 1, channel 1: key scale 5
    out, lse = oracle(query, ones, ones, num_heads=2, antiquant_scale=scale.reshape(form))
    np.testing.assert_array_equal(out[0, 0], [7, 8, 9, 10, 11, 12])
    np.testing.assert_array_equal(lse[0, :, 0], [0, 5])


def test_antiquant_of_an_empty_row_is_zero() -> None:
    ints = np.ones((1, 3, 1), np.int8)
    quantized = dict(antiquant_scale=np.array([2.0, 3.0]), antiquant_offset=np.array([1.0, 5.0]))
    assert one(key=ints, value=ints, actual_seq_lengths=[0], **quantized) == (0.0, -math.inf)


def test_output_quantization_is_left_unrounded() -> None:
    out, _ = one(quant_scale2=np.array([2.0]), quant_offset2=np.array([0.25]))
    assert out == pytest.approx(230 / 3 + 0.25, rel=1e-13)
    assert one(quant_scale2=np.array([2.0]), quant_offset2=np.array([7.5]), actual_seq_lengths=[0])[0] == 7.5


@pytest.mark.parametrize("form", [(4,), (2, 2), (1, 2, 1, 2), (1, 1, 4), (1, 1, 2, 2)])
def test_output_quantization_per_query_channel(form: tuple[int, ...]) -> None:
    """N=2 query heads share K=1; the channels are those of the output, head-major, in every layout."""
    value = np.array([3.0, 5.0])
    scale, offset = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([0.1, 0.2, 0.3, 0.4])
    expected = [3.1, 50.2, 300.3, 5000.4]
    for layout, query, cache in (
        ("BSH", (1, 1, 4), (1, 1, 2)),
        ("BNSD", (1, 2, 1, 2), (1, 1, 1, 2)),
        ("BSND", (1, 1, 2, 2), (1, 1, 1, 2)),
    ):
        out, _ = oracle(
            np.zeros(query),
            np.zeros(cache),
            value.reshape(cache),
            num_heads=2,
            num_key_value_heads=1,
            input_layout=layout,
            quant_scale2=scale.reshape(form),
            quant_offset2=offset.reshape(form),
        )
        np.testing.assert_allclose(out.reshape(-1), expected, rtol=1e-14)


def test_query_heads_share_kv_heads_in_order() -> None:
    """N=4, K=2, one position: heads 0 and 1 read kv head 0, heads 2 and 3 read kv head 1, in every layout."""
    value = np.array([[1.0, 2.0], [3.0, 4.0]])
    shapes = {"BSH": ((1, 1, 8), (1, 1, 4)), "BNSD": ((1, 4, 1, 2), (1, 2, 1, 2)), "BSND": ((1, 1, 4, 2), (1, 1, 2, 2))}
    for layout, (query, cache) in shapes.items():
        out, _ = oracle(
            np.zeros(query),
            np.zeros(cache),
            value.reshape(cache),
            num_heads=4,
            num_key_value_heads=2,
            input_layout=layout,
        )
        np.testing.assert_array_equal(out.reshape(4, 2), [[1, 2], [1, 2], [3, 4], [3, 4]])


def test_batch_rows_do_not_mix() -> None:
    """Lengths, mask rows, shared and separate bias rows belong to their own sequence."""
    query, key, value = (np.concatenate([x, x]) for x in (QUERY, KEY, VALUE))
    mask = np.array([[0, 0, 0], [1, 0, 0]], bool)
    out, _ = oracle(query, key, value, atten_mask=mask, actual_seq_lengths=[3, 2])
    np.testing.assert_allclose(out.reshape(-1), [230 / 6, 20.0])
    bias = np.log(np.array([[5.0, 1.0, 1.0], [1.0, 1.0, 2.0]])).reshape(2, 1, 1, 3)
    out, _ = oracle(query, key, value, pse_shift=bias)
    np.testing.assert_allclose(out.reshape(-1), [270 / 10, 410 / 9])
    out, _ = oracle(query, key, value, pse_shift=bias[:1])
    np.testing.assert_allclose(out.reshape(-1), [270 / 10, 270 / 10])
    out, _ = oracle(query, key, value, actual_seq_lengths=[1])
    np.testing.assert_allclose(out.reshape(-1), [10, 10])


@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=None),
        Case(lengths=None, layout="BSND", heads=6, kv_heads=1, head_dim=24),
        Case(lengths="ragged", layout="BSND", heads=3, kv_heads=3, batch=5),
        Case(lengths=(48, 30), mask="2d", bias="batch"),
        Case(lengths=None, layout="BSH", bias="shared", heads=8, kv_heads=2),
    ],
    ids=str,
)
def test_against_the_attention_of_jax(case: Case) -> None:
    """`jax.nn.dot_product_attention` means the same where it has the feature; there, True keeps a position."""
    args, kwargs = case.inputs()
    out, _ = oracle(*args, **{name: x for name, x in kwargs.items() if name != "inner_precise"})
    b, n, k, d, s = case.batch, case.heads, case.kv_heads, case.head_dim, case.capacity
    query, key, value = (jnp.asarray(x) for x in args)
    if case.layout == "BNSD":
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    mask = kwargs.get("atten_mask")
    lengths = kwargs.get("actual_seq_lengths")
    with jax.default_matmul_precision("highest"):
        expected = jax.nn.dot_product_attention(
            query.reshape(b, 1, n, d),
            key.reshape(b, s, k, d),
            value.reshape(b, s, k, d),
            bias=kwargs.get("pse_shift"),
            mask=None if mask is None else jnp.asarray(~mask.reshape(b, 1, 1, s)),
            scale=kwargs["scale_value"],
            key_value_seq_lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32),
        )
    np.testing.assert_allclose(
        out.reshape(b, 1, n, d) if case.layout != "BNSD" else np.swapaxes(out, 1, 2), expected, atol=2e-6
    )


def test_shifts_of_the_scores_cancel() -> None:
    """Against itself in other words: a key offset adds a constant per query to all scores, and so to the LSE alone."""
    args, kwargs = Case(int8=True, offset=True, heads=2, kv_heads=2).inputs()
    kwargs.pop("inner_precise")
    offset = kwargs["antiquant_offset"].astype(np.float64)
    out, lse = oracle(*args, **kwargs)
    moved = offset.copy()
    moved[0] += 3.0
    moved_out, moved_lse = oracle(*args, **kwargs | dict(antiquant_offset=moved))
    np.testing.assert_allclose(moved_out, out, atol=1e-10)
    expected = (
        3.0 * kwargs["scale_value"] * np.einsum("bnqd,nd->bnq", args[0], kwargs["antiquant_scale"][0].astype(float))
    )
    np.testing.assert_allclose(moved_lse - lse, expected, atol=1e-9)
