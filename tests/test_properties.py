"""Laws that hold for any call, tried on calls that nobody thought of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, Case, assert_close, run_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ifa import incre_flash_attention

shapes = st.sampled_from(
    [
        dict(batch=1, heads=1, kv_heads=1, head_dim=1, capacity=1),
        dict(batch=2, heads=4, kv_heads=2, head_dim=16, capacity=40),
        dict(batch=3, heads=6, kv_heads=1, head_dim=32, capacity=17),
        dict(batch=2, heads=3, kv_heads=3, head_dim=48, capacity=130),
    ]
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any valid call."""
    chosen = dict(
        draw(shapes),
        seed=draw(st.integers(0, 2**32 - 1)),
        layout=draw(st.sampled_from(["BSH", "BNSD", "BSND"])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        int8=draw(st.booleans()),
        block=draw(st.sampled_from([0, 0, 32])),
        flat_pages=draw(st.booleans()),
        lengths=draw(st.sampled_from([None, "ragged", "one", "zero"])),
        padding=draw(st.sampled_from([None, None, 0, 3, 20])),
        mask=draw(st.sampled_from([None, "2d", "3d:int8", "4d:uint8", "2d:full"])),
        bias=draw(st.sampled_from([None, "shared", "batch"])),
        antiquant=draw(st.sampled_from(["tensor", "channel", "flat", "4d", "4d_bsnd"])),
        antiquant_dtype=draw(st.sampled_from([None, "float32"])),
        offset=draw(st.booleans()),
        quant=draw(st.sampled_from([None, None, "tensor", "channel_offset"])),
        inner_precise=draw(st.integers(0, 1)),
    )
    if chosen["block"] and chosen["lengths"] is None:
        chosen["lengths"] = "ragged"
    if chosen["head_dim"] % 16:
        chosen["bias"] = None
    if isinstance(chosen["lengths"], str) and chosen["padding"] is not None:
        chosen["padding"] = min(chosen["padding"], chosen["capacity"])
    return Case(**chosen)


# What costs time is compiling. The laws below share these few programs, which have every feature between them, and
# hypothesis chooses the numbers.
PROGRAMS = [
    Case(batch=1, heads=1, kv_heads=1, head_dim=1, capacity=1),
    Case(lengths=None, capacity=40, bias="batch"),
    Case(layout="BSH", dtype="bfloat16", mask="2d", bias="batch", capacity=40, inner_precise=0),
    Case(
        layout="BSND", dtype="float16", padding=3, mask="2d", bias="shared", batch=3, heads=6, kv_heads=1, capacity=17
    ),
    Case(block=32, mask="2d", bias="batch", heads=3, kv_heads=3, head_dim=48, capacity=130),
    Case(block=32, flat_pages=True, dtype="bfloat16", lengths="zero", capacity=70, quant="channel_offset"),
    Case(block=32, layout="BSH", dtype="float16", int8=True, offset=True, antiquant="flat", mask="2d", capacity=70),
    Case(block=32, layout="BSND", mask="2d", lengths="zero", capacity=70),
    Case(int8=True, offset=True, mask="2d", bias="batch", lengths="zero", capacity=40),
    Case(int8=True, layout="BSND", antiquant="tensor", lengths="one", capacity=40, quant="tensor", bias="batch"),
    Case(int8=True, block=32, offset=True, bias="batch", antiquant="4d", capacity=70, quant="channel_offset"),
]


def programs(keep: Callable[[Case], bool] = lambda case: True) -> st.SearchStrategy[Case]:
    """One of the programs that a law is about, with any numbers."""
    return st.builds(
        lambda case, seed: dataclasses.replace(case, seed=seed),
        st.sampled_from([case for case in PROGRAMS if keep(case)]),
        st.integers(0, 2**32 - 1),
    )


def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    out, lse = run_everywhere(*args, **kwargs)
    return np.asarray(out), np.asarray(lse)


def assert_same(actual: Any, expected: Any, dtype: str) -> None:
    """Two ways to one result: equal up to float32 arithmetic and one rounding to the dtype."""
    (out, lse), (expected_out, expected_lse) = actual, expected
    assert out.dtype == expected_out.dtype
    assert out.shape == expected_out.shape
    out, expected_out = out.astype(np.float64), expected_out.astype(np.float64)
    tolerance = (
        1.0 if actual[0].dtype == np.int8 else 2 * TOLERANCE[dtype] * max(1.0, np.abs(expected_out).max(initial=0))
    )
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=4e-6, atol=8e-6)


def windows(case: Case, kwargs: dict[str, Any]) -> np.ndarray:
    """(B, S) bool: the positions that each sequence sees."""
    s = case.positions
    lengths = kwargs.get("actual_seq_lengths")
    if lengths is None:
        return np.ones((case.batch, s), bool)
    stop = np.broadcast_to(np.array(lengths), (case.batch,))
    start = np.zeros_like(stop)
    if case.padding is not None and not case.block:
        start, stop = s - max(case.padding, 0) - stop, np.full_like(stop, s - max(case.padding, 0))
        stop = np.where(start < 0, 0, stop)
    t = np.arange(s)
    return (t >= start[:, None]) & (t < stop[:, None])


def head_major(case: Case) -> bool:
    return case.layout == "BNSD" and not (case.block and case.flat_pages)


def fill(case: Case, kwargs: dict[str, Any], cache: np.ndarray, where: np.ndarray, value: Any) -> np.ndarray:
    """The cache with `value` in the positions (B, S) of `where`, and in every block that no sequence reads."""
    if not case.block:
        mark = where
    else:
        mark = np.ones((len(cache), case.block), bool)
        mark[kwargs["block_table"]] = where.reshape(case.batch, -1, case.block)
    if cache.ndim == 3:
        mark = mark[:, :, None]
    elif head_major(case):
        mark = mark[:, None, :, None]
    else:
        mark = mark[:, :, None, None]
    return np.where(mark, np.asarray(value).astype(cache.dtype), cache)


@given(cases())
@settings(max_examples=25)
def test_any_call_is_the_oracle(case: Case) -> None:
    args, kwargs = case.inputs()
    assert_close(*run_everywhere(*args, **kwargs), args, kwargs)


@given(programs(lambda case: not case.int8), st.sampled_from([np.nan, np.inf, -np.inf]))
@settings(max_examples=20)
def test_what_is_outside_the_window_does_not_matter(case: Case, poison: float) -> None:
    (query, key, value), kwargs = case.inputs()
    clean = run((query, key, value), kwargs)
    outside = ~windows(case, kwargs)
    key, value = (fill(case, kwargs, cache, outside, poison) for cache in (key, value))
    if case.bias == "batch":
        shape = (case.batch, 1, 1, case.positions)
        kwargs["pse_shift"] = np.where(
            outside.reshape(shape), kwargs["pse_shift"].dtype.type(poison), kwargs["pse_shift"]
        )
    if case.mask:
        mask = kwargs["atten_mask"]
        kwargs["atten_mask"] = np.where(outside.reshape(mask.shape), ~mask if mask.dtype == bool else 1 - mask, mask)
    if case.block:  # entries past the length lead nowhere
        table = kwargs["block_table"].copy()
        used = windows(case, kwargs).reshape(*table.shape, case.block).any(-1)
        kwargs["block_table"] = np.where(used, table, np.int32(-1 if poison > 0 else 0x7FFFFFFF))
    for a, b in zip(run((query, key, value), kwargs), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@given(programs(lambda case: not case.int8 and case.mask), st.sampled_from([np.nan, np.inf, -np.inf]))
@settings(max_examples=20)
def test_what_is_masked_does_not_matter(case: Case, poison: float) -> None:
    (query, key, value), kwargs = case.inputs()
    visible = windows(case, kwargs)
    mask = kwargs["atten_mask"]
    mask[np.arange(case.batch), visible.argmax(1)] = False  # every row keeps its first position
    clean = run((query, key, value), kwargs)
    key, value = (fill(case, kwargs, cache, mask & visible, poison) for cache in (key, value))
    for a, b in zip(run((query, key, value), kwargs), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@given(programs(lambda case: case.int8 and case.block), st.integers(-128, 127))
@settings(max_examples=15)
def test_dead_int8_blocks_do_not_matter(case: Case, garbage: int) -> None:
    (query, key, value), kwargs = case.inputs()
    clean = run((query, key, value), kwargs)
    outside = ~windows(case, kwargs)
    key, value = (fill(case, kwargs, cache, outside, garbage) for cache in (key, value))
    for a, b in zip(run((query, key, value), kwargs), clean, strict=True):
        np.testing.assert_array_equal(a, b)


@given(programs(lambda case: not case.block and case.lengths is not None and case.padding is None))
@settings(max_examples=15)
def test_capacity_does_not_matter(case: Case) -> None:
    """Room for more positions, filled with garbage, changes nothing; the mask and the bias grow with it."""
    more = 97
    (query, key, value), kwargs = case.inputs()
    expected = run((query, key, value), kwargs)
    axis = 2 if case.layout == "BNSD" else 1

    def grow(x: np.ndarray, axis: int) -> np.ndarray:
        garbage = np.asarray(77 if x.dtype == np.int8 else 1 if x.dtype == bool else np.nan).astype(x.dtype)
        return np.concatenate([x, np.full_like(x, garbage, shape=(*x.shape[:axis], more, *x.shape[axis + 1 :]))], axis)

    for name in ("atten_mask", "pse_shift"):
        if name in kwargs:
            x = kwargs[name]
            kwargs[name] = np.concatenate([x, np.ones_like(x, shape=(*x.shape[:-1], more))], -1)
    key, value = (grow(x, axis) for x in (key, value))
    assert_same(run((query, key, value), kwargs), expected, case.dtype)


@given(programs(lambda case: case.block), st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_where_blocks_lie_does_not_matter(case: Case, seed: int) -> None:
    (query, key, value), kwargs = case.inputs()
    expected = run((query, key, value), kwargs)
    order = np.random.default_rng(seed).permutation(len(key))
    kwargs["block_table"] = np.argsort(order).astype(np.int32)[kwargs["block_table"]]
    for a, b in zip(run((query, key[order], value[order]), kwargs), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@given(programs(lambda case: case.block))
@settings(max_examples=15)
def test_paged_is_contiguous(case: Case) -> None:
    (query, key, value), kwargs = case.inputs()
    paged = run((query, key, value), kwargs)
    table = kwargs.pop("block_table")
    kwargs.pop("block_size")

    def contiguous(cache: np.ndarray) -> np.ndarray:
        pages = cache[table]  # (B, M, P, K*D) or (B, M, K, P, D)
        b, k, d, s = case.batch, case.kv_heads, case.head_dim, case.positions
        tokens = np.swapaxes(pages, 2, 3) if pages.ndim == 5 else pages
        tokens = tokens.reshape(b, s, k, d)
        return {
            "BSH": lambda: tokens.reshape(b, s, k * d),
            "BSND": lambda: tokens,
            "BNSD": lambda: np.ascontiguousarray(np.swapaxes(tokens, 1, 2)),
        }[case.layout]()

    assert_same(run((query, contiguous(key), contiguous(value)), kwargs), paged, case.dtype)


@given(
    programs(lambda case: case.bias == "batch" and case.dtype == "float32" and not case.quant),
    st.floats(-30, 30, width=32),
)
@settings(max_examples=15)
def test_a_constant_bias_changes_only_the_lse(case: Case, constant: float) -> None:
    args, kwargs = case.inputs()
    out, lse = run(args, kwargs)
    kwargs["pse_shift"] = kwargs["pse_shift"] + np.float32(constant)
    moved_out, moved_lse = run(args, kwargs)
    # The bias itself is rounded when the constant is added to it, so scores move by half a unit in its last place.
    np.testing.assert_allclose(moved_out, out, rtol=0, atol=2e-5 * max(1.0, np.abs(out).max(initial=0)))
    moves = np.isfinite(lse) & (lse > -1e11)
    np.testing.assert_allclose(moved_lse[moves], lse[moves] + constant, rtol=4e-6, atol=2e-5)
    np.testing.assert_array_equal(moved_lse[~moves], lse[~moves])


@given(programs(lambda case: case.int8 and case.dtype == "float32"))
@settings(max_examples=15)
def test_int8_is_the_float_cache_it_stands_for(case: Case) -> None:
    (query, key, value), kwargs = case.inputs()
    quantized = run((query, key, value), kwargs)
    scale, offset = kwargs.pop("antiquant_scale"), kwargs.pop("antiquant_offset", None)

    def as_float(cache: np.ndarray, which: int) -> np.ndarray:
        def channels(parameter: np.ndarray) -> np.ndarray:
            k, d = case.kv_heads, case.head_dim
            full = np.full((k, d), parameter[which]) if parameter.ndim == 1 else parameter[which].reshape(k, d)
            if cache.ndim == 3:
                return full.reshape(1, 1, k * d)
            return full[None, :, None] if head_major(case) else full[None, None]

        x = cache.astype(np.float32)
        if offset is not None:
            x = x + channels(offset)
        return x * channels(scale)

    floats = run((query, as_float(key, 0), as_float(value, 1)), kwargs)
    np.testing.assert_array_equal(np.isneginf(floats[1]), np.isneginf(quantized[1]))
    tolerance = 1.0 if case.quant else 1e-5 * max(1.0, np.abs(floats[0]).max(initial=0))
    np.testing.assert_allclose(quantized[0].astype(np.float64), floats[0].astype(np.float64), rtol=0, atol=tolerance)
    np.testing.assert_allclose(quantized[1], floats[1], rtol=1e-5, atol=1e-5)


@given(programs(lambda case: case.batch > 1), st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_sequences_do_not_know_of_each_other(case: Case, seed: int) -> None:
    """Reordering the batch reorders the result."""
    if case.lengths == "one":
        case = dataclasses.replace(case, lengths="ragged")
    (query, key, value), kwargs = case.inputs()
    out, lse = run((query, key, value), kwargs)
    order = np.random.default_rng(seed).permutation(case.batch)
    if case.block:
        kwargs["block_table"] = kwargs["block_table"][order]
    else:
        key, value = key[order], value[order]
    if "actual_seq_lengths" in kwargs:
        kwargs["actual_seq_lengths"] = [kwargs["actual_seq_lengths"][i] for i in order]
    for name in ("atten_mask", "pse_shift"):
        if name in kwargs and len(kwargs[name]) == case.batch:
            kwargs[name] = kwargs[name][order]
    assert_same(run((query[order], key, value), kwargs), (out[order], lse[order]), case.dtype)


@given(st.integers(0, 2**32 - 1), st.floats(-6, 6))
@settings(max_examples=15)
def test_the_output_lies_among_the_values(seed: int, log_scale: float) -> None:
    """A mean with weights: never outside the range of the visible values, at any temperature."""
    (query, key, value), kwargs = Case(seed=seed, mask="2d", lengths="zero").inputs()
    kwargs["scale_value"] = float(np.exp(log_scale))
    out, lse = run((query, key, value), kwargs)
    assert np.isfinite(out).all()
    lengths = kwargs["actual_seq_lengths"]
    for b, length in enumerate(lengths):
        if length:
            low, high = value[b, :, :length].min(1), value[b, :, :length].max(1)
            assert np.all(out[b, :, 0] >= np.repeat(low, 2, 0) - 1e-5)
            assert np.all(out[b, :, 0] <= np.repeat(high, 2, 0) + 1e-5)
        else:
            assert np.all(out[b] == 0)
            assert np.all(lse[b] == -np.inf)


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("offset", [False, True])
def test_antiquantisation_does_not_overflow_float16(block: int, offset: bool) -> None:
    """q * scale is far above 65504, the largest float16, and so are the scores; the result is not."""
    case = Case(batch=2, heads=2, kv_heads=1, head_dim=32, dtype="float16", int8=True, offset=offset, block=block)
    (query, key, value), kwargs = case.inputs()
    query = (query * np.float16(3000)).astype(np.float16)
    kwargs["antiquant_scale"] = np.full((2, 1, 32), 60000, np.float16)
    kwargs["antiquant_scale"][1] = 0.01
    kwargs["scale_value"] = 1e-9
    assert np.abs(query.astype(np.float32)).max() * 60000 > np.finfo(np.float16).max
    out, lse = run_everywhere(query, key, value, **kwargs)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    assert_close(out, lse, (query, key, value), kwargs)


def test_scores_far_apart_do_not_overflow() -> None:
    """exp of the largest score would overflow float32 a thousand times over."""
    (query, key, value), kwargs = Case(bias="batch", lengths=(48, 5)).inputs()
    for size in (1e4, -1e4, 1e30):
        bias = kwargs["pse_shift"] * np.float32(size)
        out, lse = run((query, key, value), kwargs | dict(pse_shift=bias))
        assert np.isfinite(out).all()
        assert np.isfinite(lse).all()
        best = np.where(windows(Case(lengths=(48, 5)), kwargs)[:, None], bias[:, :, 0], -np.inf).argmax(-1)
        if abs(size) == 1e30:  # one position has all the weight
            expected = np.stack([[value[b, n // 2, best[b, n]] for n in range(4)] for b in range(2)])
            np.testing.assert_allclose(out[:, :, 0], expected, rtol=1e-6)


def test_a_bias_of_minus_infinity_hides() -> None:
    """Positions, and rows: a row whose every score is -inf is an empty one."""
    args, kwargs = Case(bias="batch", lengths=None).inputs()
    kwargs["pse_shift"][0, :, :, 5:] = -np.inf
    kwargs["pse_shift"][1, 2] = -np.inf
    out, lse = run(args, kwargs)
    assert_close(jnp.asarray(out), jnp.asarray(lse), args, kwargs)
    assert np.all(out[1, 2] == 0)
    assert np.all(lse[1, 2] == -np.inf)
    gradient = jax.grad(lambda query: incre_flash_attention(query, *args[1:], **kwargs).sum())(args[0])
    assert np.isfinite(gradient).all()
    assert np.all(np.asarray(gradient[1, 2]) == 0)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_visible_and_not_a_number_shows(name: str) -> None:
    """In the rows that see it, output and LSE, and in no others."""
    (query, key, value), kwargs = Case(lengths=(20, 30), mask="2d").inputs()
    kwargs["atten_mask"][:, 0] = False
    call = dict(query=query, key=key, value=value)
    call[name][0, 0, 0] = np.nan
    out, lse = run_everywhere(**call, **kwargs)
    rows = [0] if name == "query" else [0, 1]  # two query heads read kv head 0
    others = [n for n in range(4) if n not in rows]
    assert np.isnan(out[0, np.array(rows)]).all()
    assert np.isfinite(out[0, np.array(others)]).all()
    assert np.isfinite(out[1]).all()
    assert np.isnan(lse[0, np.array(rows)]).all() == (name != "value")
    assert np.isfinite(lse[0, np.array(others)]).all()
