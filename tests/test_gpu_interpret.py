"""The GPU kernel against the oracle under JAX's GPU interpreter: uninitialised memory is NaN.

By default a part of the grid runs; JAX_IFA_FULL_GPU_GRID=1 runs all of it.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, assert_close, run_reference
from gpu_interpreter import interpret, needs_interpreter, small_tiles
from test_grid import grid

from jax_ifa import incre_flash_attention

pytestmark = needs_interpreter


def for_gpu(case: Case) -> Case | None:
    """The case with a head dimension and a capacity that the kernel reads; None for what it leaves to XLA."""
    if case.dtype == "float32" and not case.int8:
        case = dataclasses.replace(case, dtype="bfloat16")
    if case.head_dim % 16:
        case = dataclasses.replace(case, head_dim=16)
    rows = case.batch * case.capacity * (case.kv_heads if case.layout == "BNSD" else 1)
    return None if not case.block and rows % 8 else case


FULL_GRID = list(dict.fromkeys(case for case in map(for_gpu, grid()) if case is not None))

COMMON = dict(batch=2, heads=8, kv_heads=2, capacity=136, head_dim=64, dtype="bfloat16")
PART = [
    # every form of the cache, every dtype
    Case(**COMMON),
    Case(**COMMON | dict(dtype="float16"), layout="BSH"),
    Case(**COMMON, layout="BSND", int8=True, offset=True),
    Case(**COMMON, block=16, lengths="zero"),
    Case(**COMMON | dict(dtype="float32"), block=64, int8=True, quant="channel_offset"),
    Case(**COMMON | dict(dtype="float16"), layout="BSH", block=48),
    Case(**COMMON, flat_pages=True, block=128),
    # what is seen; sequences that begin inside a group of 8 rows
    Case(**COMMON, lengths=None, mask="4d", bias="batch"),
    Case(**COMMON | dict(capacity=134), layout="BNSD", lengths="zero", mask="3d:uint8:full", padding=5, bias="shared"),
    Case(**COMMON | dict(capacity=132), layout="BSH", mask="2d:int8", bias="batch", padding=3),
    Case(**COMMON, layout="BSH", block=16, mask="2d:int8:full", bias="shared"),
    Case(**COMMON, block=32, int8=True, mask="2d", bias="batch", lengths="zero"),
    # shapes of heads
    Case(heads=9, kv_heads=3, head_dim=128, capacity=104, dtype="bfloat16"),
    Case(heads=64, kv_heads=1, head_dim=96, capacity=104, dtype="bfloat16", mask="2d"),
    Case(heads=12, kv_heads=1, head_dim=80, capacity=104, dtype="float16", bias="shared"),
    Case(heads=64, kv_heads=1, head_dim=192, capacity=72, dtype="float16", int8=True, bias="batch"),
    Case(heads=4, kv_heads=2, head_dim=80, capacity=104, dtype="bfloat16", int8=True, mask="2d", layout="BSH"),
    Case(heads=8, kv_heads=8, head_dim=256, capacity=72, dtype="bfloat16", layout="BSH"),
    Case(heads=16, kv_heads=1, head_dim=512, capacity=200, dtype="bfloat16", layout="BSND"),
    Case(head_dim=512, capacity=100, dtype="bfloat16", int8=True, mask="2d", bias="batch"),
    # precision
    Case(**COMMON, inner_precise=0),
    Case(**COMMON | dict(dtype="float16", heads=64), inner_precise=0, block=16),
]


@pytest.mark.parametrize("case", FULL_GRID if os.environ.get("JAX_IFA_FULL_GPU_GRID") else PART, ids=str)
def test_against_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, stages=1)  # so that every tile but a thread block's first is a refill
    args, kwargs = case.inputs()
    assert_close(*interpret(args, kwargs), args, kwargs)


@pytest.mark.parametrize("splits", [1, 5])
def test_thread_blocks_share_a_window(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also windows of fewer tiles than thread blocks, and of none."""
    small_tiles(monkeypatch, splits=splits)
    case = Case(batch=4, heads=4, kv_heads=2, head_dim=64, capacity=384, lengths=(384, 65, 1, 0), dtype="bfloat16")
    args, kwargs = case.inputs()
    assert_close(*interpret(args, kwargs), args, kwargs)


def test_parts_that_are_masked_whole_count_by_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, splits=3)
    case = Case(batch=2, head_dim=64, capacity=320, mask="2d:full", lengths=(300, 300), dtype="float16")
    args, kwargs = case.inputs()
    kwargs["atten_mask"][1, :256] = True
    assert_close(*interpret(args, kwargs), args, kwargs)


@pytest.mark.parametrize(
    "layout, block, features",
    [("BNSD", 16, {}), ("BSH", 0, {}), ("BSH", 16, dict(mask="2d")), ("BNSD", 0, dict(mask="2d", bias="batch"))],
)
def test_nan_outside_the_window_and_under_the_mask_never_leaks(
    layout: str, block: int, features: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN everywhere that is not visible: past the lengths, under the mask, and in pages of no sequence."""
    small_tiles(monkeypatch)
    case = Case(
        batch=2, head_dim=64, capacity=304, layout=layout, block=block, dtype="bfloat16", lengths=(270, 130), **features
    )
    args, kwargs = case.inputs()
    seen = np.arange(case.positions)[None] < np.array(kwargs["actual_seq_lengths"])[:, None]
    if case.mask:
        mask = kwargs["atten_mask"].astype(bool)
        mask[1, :64] = True  # a whole tile of it
        kwargs["atten_mask"] = mask
        seen &= ~mask

    def spoil(cache: np.ndarray) -> np.ndarray:
        spoilt = np.full_like(cache, np.nan)
        for b, t in np.argwhere(seen):
            page, row = (kwargs["block_table"][b, t // block], t % block) if block else (b, t)
            index = (page, slice(None), row) if cache.ndim == 4 else (page, row)
            spoilt[index] = cache[index]
        return spoilt

    args = (args[0], spoil(args[1]), spoil(args[2]))
    assert_close(*interpret(args, kwargs), args, kwargs)


def test_nan_that_is_seen_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    (query, key, value), kwargs = Case(head_dim=64, capacity=136, lengths=None, dtype="bfloat16").inputs()
    key[0, 0, 70] = np.nan
    out, lse = (np.asarray(x, np.float32) for x in interpret((query, key, value), kwargs))
    assert np.isnan(out[0, :2]).all()
    assert np.isnan(lse[0, :2]).all()
    assert not np.isnan(out[0, 2:]).any()
    assert not np.isnan(out[1]).any()


def test_garbage_in_the_table_is_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    case = Case(batch=3, head_dim=64, capacity=304, block=16, lengths=(290, 0, 16), dtype="bfloat16")
    args, kwargs = case.inputs()
    expected = run_reference(args, kwargs)
    for b, length in enumerate(kwargs["actual_seq_lengths"]):
        kwargs["block_table"][b, -(-length // 16) :] = np.iinfo(np.int32).max - b
    used = np.unique(np.concatenate([kwargs["block_table"][0, :19], kwargs["block_table"][2, :1]]))
    for cache in args[1:]:
        cache[np.setdiff1d(np.arange(cache.shape[0]), used)] = np.nan
    out, lse = interpret(args, kwargs)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], rtol=0, atol=2**-8)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected[1], rtol=2e-6, atol=4e-6)


def test_a_row_whose_every_score_is_minus_infinity_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    args, kwargs = Case(head_dim=64, capacity=136, lengths=None, bias="batch", dtype="bfloat16").inputs()
    kwargs["pse_shift"][0] = -np.inf
    out, lse = interpret(args, kwargs)
    assert np.all(np.asarray(out, np.float32)[0] == 0)
    assert np.all(np.isneginf(np.asarray(lse)[0]))
    assert_close(out, lse, args, kwargs)


@pytest.mark.parametrize("magnitude", [1e-3, 1e3])
def test_small_and_large_scores(magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many weights that are small beside the largest, which float16 weights must not lose; and one that is all."""
    small_tiles(monkeypatch)
    case = Case(batch=1, heads=2, kv_heads=1, head_dim=64, capacity=320, lengths=None, dtype="float16")
    (query, key, value), kwargs = case.inputs()
    query = (np.sign(query) * min(magnitude, 40)).astype(np.float16)
    key[0, 0, 7] = np.sign(query[0, 0, 0])
    args = (query, key, value)
    assert_close(*interpret(args, kwargs), args, kwargs)


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 0, None)])
def test_vmap_joins_the_batch(mapped: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped key and an unmapped value have tables of their own."""
    small_tiles(monkeypatch)
    case = Case(batch=2, head_dim=64, capacity=192, lengths=None, dtype="bfloat16")
    args, kwargs = case.inputs()
    stacked = tuple(a if axis is None else np.stack([a, a + a]) for a, axis in zip(args, mapped, strict=True))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return incre_flash_attention(q, k, v, implementation="mosaic_gpu", return_lse=True, **kwargs)

    out, lse = interpret(stacked, {}, function=jax.vmap(attend, in_axes=mapped))
    for i in range(2):
        one = tuple(a if axis is None else a[i] for a, axis in zip(stacked, mapped, strict=True))
        assert_close(jnp.asarray(out)[i], jnp.asarray(lse)[i], one, kwargs)


def test_where_python_numbers_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    case = Case(head_dim=80, capacity=136, int8=True, block=32, mask="2d", bias="batch", dtype="bfloat16")
    args, kwargs = case.inputs()
    with jax.enable_x64(True):
        assert_close(*interpret(args, kwargs), args, kwargs)
