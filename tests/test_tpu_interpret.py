"""The TPU kernel against the oracle under JAX's TPU interpreter: uninitialised memory is NaN, reading outside raises.

A copy runs when it is awaited, so what is read without a wait is NaN. By default a few cases run;
JAX_IFA_FULL_TPU_GRID=1 runs the whole grid.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, assert_close, run_reference
from test_grid import grid
from tpu_interpreter import interpret, small_tiles, tiles_in_stages

from jax_ifa import incre_flash_attention
from pallas_kernels.tpu import plan


def for_tpu(case: Case) -> Case | None:
    """The case with a head dimension whose cache the kernel reads in place; None where no such thing exists."""
    if case.dtype == "float16" and not case.int8:
        return None
    if case.head_dim == 16:
        case = dataclasses.replace(case, head_dim=64)
    head_major_pages = case.block and case.block % 128 and case.layout == "BNSD" and not case.flat_pages
    if head_major_pages or (case.block and case.kv_heads * case.head_dim % 128):
        case = dataclasses.replace(case, head_dim=128)
    if case.layout == "BSH" and case.kv_heads * case.head_dim % 128 and case.head_dim % 8:
        return None
    return case


FULL_GRID = list(dict.fromkeys(case for case in map(for_tpu, grid()) if case is not None))

COMMON = dict(batch=3, heads=8, kv_heads=2, capacity=700, head_dim=64)
FEW = [
    # every form of the cache, every dtype, and what is seen
    Case(**COMMON | dict(head_dim=128), dtype="bfloat16"),
    Case(**COMMON, mask="4d", bias="batch"),
    Case(**COMMON, layout="BSH", lengths="zero", mask="3d:uint8:full", padding=5, dtype="bfloat16"),
    Case(**COMMON, layout="BSND", block=32, int8=True, dtype="bfloat16", offset=True, quant="channel_offset"),
    Case(**COMMON | dict(head_dim=128), block=16, lengths="zero", dtype="bfloat16"),
    Case(heads=16, kv_heads=8, head_dim=128, capacity=52, layout="BSND", mask="2d:int8:full", padding=3),
    Case(**COMMON, flat_pages=True, block=1024, bias="shared"),
    # shapes of heads, precision
    Case(batch=1, heads=9, kv_heads=3, head_dim=128, capacity=400, dtype="bfloat16", inner_precise=0),
    Case(heads=8, kv_heads=8, head_dim=80, layout="BSH", capacity=300, dtype="bfloat16", bias="batch"),
    Case(heads=5, kv_heads=5, head_dim=7, capacity=20, mask="2d"),
]
MORE = [
    Case(**COMMON, dtype="bfloat16"),
    Case(**COMMON, layout="BSH"),
    Case(**COMMON, layout="BSND", int8=True, offset=True),
    Case(**COMMON | dict(head_dim=128), block=64, int8=True),
    Case(**COMMON, block=128, dtype="bfloat16"),
    Case(**COMMON, layout="BSH", block=16, dtype="bfloat16"),
    Case(**COMMON, layout="BSH", block=16, mask="2d:int8:full", bias="shared", dtype="bfloat16"),
    Case(**COMMON | dict(head_dim=128), block=32, int8=True, mask="2d", bias="batch", lengths="zero"),
    Case(**COMMON, lengths="one", padding=200, bias="shared"),
    Case(heads=64, kv_heads=1, head_dim=96, capacity=300),
    Case(heads=2, kv_heads=2, head_dim=512, capacity=130, layout="BSH"),
    Case(heads=2, kv_heads=1, head_dim=256, capacity=129, layout="BSND"),
    Case(**COMMON, dtype="bfloat16", inner_precise=0),
    Case(**COMMON, int8=True, inner_precise=0, dtype="bfloat16"),
]
CASES = FEW + MORE + FULL_GRID if os.environ.get("JAX_IFA_FULL_TPU_GRID") else FEW


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    args, kwargs = case.inputs()
    assert_close(*interpret(args, kwargs), args, kwargs)


@pytest.mark.parametrize("layout, block, turns_int8", [("BSH", 32, True), ("BNSD", 0, True), ("BSH", 32, False)])
def test_int8_is_multiplied_as_bfloat16(
    layout: str, block: int, turns_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lanes keys are transposed for it, in columns values. A tile of pages is multiplied in cuts."""
    small_tiles(monkeypatch, tile_bytes=1 << 17, int8_products=False, turns_int8=turns_int8)
    monkeypatch.setattr(plan, "MANY_COPIES_TURNED", 2)
    shape = COMMON | dict(batch=2, layout=layout, block=block, lengths=(690, 130))
    args, kwargs = Case(**shape, int8=True, offset=True, dtype="bfloat16").inputs()
    assert_close(*interpret(args, kwargs), args, kwargs)


@pytest.mark.parametrize("many_copies", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, heads=8, head_dim=128, capacity=1100, block=16, dtype="bfloat16", lengths=(1100, 700)),
        Case(
            batch=1,
            head_dim=64,
            capacity=1700,
            layout="BSH",
            block=16,
            mask="2d",
            bias="batch",
            padding=3,
            lengths=(1690,),
        ),
    ],
    ids=str,
)
def test_tiles_in_stages(case: Case, many_copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_in_stages(monkeypatch, many_copies=many_copies)
    args, kwargs = case.inputs()
    assert_close(*interpret(args, kwargs), args, kwargs)


def test_a_tile_of_many_copies_longer_than_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_in_stages(monkeypatch, many_copies=True)
    args, kwargs = Case(batch=1, head_dim=128, capacity=360, block=16, lengths=(360,), dtype="bfloat16").inputs()
    assert kwargs["block_table"].shape == (1, 23)  # and a tile of 384 positions has 24
    assert_close(*interpret(args, kwargs), args, kwargs)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_cores_share_the_work(batch: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, cores=cores)
    case = Case(
        batch=batch, heads=2, kv_heads=1, head_dim=128, capacity=640, block=16, lengths=(640, 1, 300, 0)[:batch]
    )
    args, kwargs = case.inputs()
    assert_close(*interpret(args, kwargs), args, kwargs)


@pytest.mark.parametrize(
    "layout, head_dim, block, dtype",
    [
        ("BNSD", 128, 16, "bfloat16"),
        ("BSH", 64, 16, "float32"),
        ("BNSD", 64, 0, "bfloat16"),
        ("BNSD", 64, 0, "float32"),
    ],
)
def test_nan_outside_the_window_and_under_the_mask_never_leaks(
    layout: str, head_dim: int, block: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN everywhere that is not visible: past the lengths, under the mask, and in pages of no sequence."""
    small_tiles(monkeypatch)
    case = Case(
        batch=2, head_dim=head_dim, capacity=400, layout=layout, block=block, dtype=dtype, mask="2d", lengths=(270, 130)
    )
    args, kwargs = case.inputs()
    mask = kwargs["atten_mask"].astype(bool)
    mask[1, :128] = True  # a whole tile of it
    kwargs["atten_mask"] = mask
    seen = ~mask & (np.arange(mask.shape[1])[None] < np.array(kwargs["actual_seq_lengths"])[:, None])

    def spoil(cache: np.ndarray) -> np.ndarray:
        spoilt = np.full_like(cache, np.nan)
        for b, t in np.argwhere(seen):
            page, row = (kwargs["block_table"][b, t // block], t % block) if block else (b, t)
            index = (page, slice(None), row) if cache.ndim == 4 else (page, row)
            spoilt[index] = cache[index]
        return spoilt

    args = (args[0], spoil(args[1]), spoil(args[2]))
    assert_close(*interpret(args, kwargs), args, kwargs)


@pytest.mark.parametrize("layout, head_dim, value", [("BNSD", 64, np.nan), ("BSH", 128, np.inf)])
def test_a_key_that_is_not_finite_spoils_its_own_head_only(
    layout: str, head_dim: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though heads are packed side by side, and the product of a zero with it is NaN."""
    small_tiles(monkeypatch)
    case = Case(batch=2, head_dim=head_dim, capacity=300, layout=layout, lengths=(300, 200), dtype="bfloat16")
    args, kwargs = case.inputs()
    expected, expected_lse = run_reference(args, kwargs)
    args[1][(0, 1, 150, 3) if layout == "BNSD" else (0, 150, head_dim + 3)] = value  # of kv head 1
    out, lse = (np.asarray(x, np.float64) for x in interpret(args, kwargs))
    others = np.ones((2, 4), bool)
    others[0, 2:] = False  # the query heads of kv head 1
    assert np.isnan(lse[0, 2:]).any()  # an infinity of the sign that gives no weight leaves a row finite
    np.testing.assert_allclose(lse[others], expected_lse[others], rtol=2e-6, atol=4e-6)
    out, expected = (x.reshape(2, 4, head_dim)[others] for x in (out, expected))
    np.testing.assert_allclose(out, expected, rtol=0, atol=2**-8 * max(1.0, np.abs(expected).max()))


def test_a_value_that_is_not_finite_spoils_its_own_head_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the heads of a position lie in one tile, and the product of a zero with it is NaN."""
    small_tiles(monkeypatch)
    case = Case(batch=2, heads=16, kv_heads=8, head_dim=128, capacity=52, layout="BSND", dtype="bfloat16")
    args, kwargs = case.inputs()
    expected, _ = run_reference(args, kwargs)
    args[2][0, 40, 1, 3] = np.nan
    out = np.asarray(interpret(args, kwargs)[0], np.float64)
    spoilt = np.zeros(out.shape, bool)
    spoilt[0, 0, 2:4, 3] = True
    assert np.all(np.isnan(out[spoilt]))
    np.testing.assert_allclose(out[~spoilt], expected[~spoilt], rtol=0, atol=2**-8 * max(1.0, np.abs(expected).max()))


def test_garbage_in_the_table_is_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    case = Case(batch=3, head_dim=128, capacity=700, block=16, lengths=(290, 0, 16), dtype="bfloat16")
    args, kwargs = case.inputs()
    expected = run_reference(args, kwargs)
    for b, length in enumerate(kwargs["actual_seq_lengths"]):
        kwargs["block_table"][b, -(-length // 16) :] = np.iinfo(np.int32).max - b
    out, lse = interpret(args, kwargs)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], rtol=0, atol=2**-8)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected[1], rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("entries", [60, 16])
def test_a_table_too_large_for_scalar_memory_is_cut(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By sequences while a row of it fits, else by columns too."""
    from pallas_kernels.tpu import parts

    small_tiles(monkeypatch)
    whole = parts.attend
    monkeypatch.setattr(parts, "attend", lambda operands, tuning, _=0: whole(operands, tuning, entries))
    case = Case(batch=3, head_dim=128, capacity=400, block=16, mask="2d", bias="batch", lengths="zero")
    args, kwargs = case.inputs()
    assert_close(*interpret(args, kwargs), args, kwargs)


def test_a_row_whose_every_score_is_minus_infinity_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    case = Case(head_dim=128, capacity=300, lengths=None, bias="batch", dtype="bfloat16")
    args, kwargs = case.inputs()
    kwargs["pse_shift"][0] = -np.inf
    out, lse = interpret(args, kwargs)
    assert np.all(np.asarray(out, np.float32)[0] == 0)
    assert np.all(np.isneginf(np.asarray(lse)[0]))
    assert_close(out, lse, args, kwargs)


def test_64_bit_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    args, kwargs = Case(batch=1, head_dim=128, capacity=300, block=16, mask="2d", dtype="bfloat16").inputs()
    with jax.enable_x64(True):
        assert_close(*interpret(args, kwargs), args, kwargs)


def test_vmap_joins_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    case = Case(batch=3, head_dim=128, capacity=192, lengths=None)
    (query, key, value), kwargs = case.inputs()
    queries = np.stack([query, query + 1])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return incre_flash_attention(q, k, v, implementation="mosaic_tpu", return_lse=True, **kwargs)

    out, lse = interpret((queries, key, value), {}, function=jax.vmap(attend, in_axes=(0, None, None)))
    for i, q in enumerate(queries):
        assert_close(jnp.asarray(out)[i], jnp.asarray(lse)[i], (q, key, value), kwargs)
