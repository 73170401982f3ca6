"""The Numba implementation: how a call is cut into units of heads, ranges and tiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest
from cases import TOLERANCE, Case, assert_close, call_numba

from jax_ifa import incre_flash_attention
from numba_kernels.call import LEAST_JOINED, TILE_SPAN, UNIT_TILE, Call, call_at, join_heads
from numba_kernels.formats import format_of
from numba_kernels.machine import this_machine


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8"])
def test_shared_among_threads(kind: str, layout: str) -> None:
    """Long and ragged enough that windows are cut into several ranges."""
    case = Case(
        batch=3,
        heads=4,
        kv_heads=2,
        head_dim=64,
        capacity=5000,
        layout=layout,
        lengths=(5000, 3, 2777),
        dtype="float32" if kind == "int8" else kind,
        int8=kind == "int8",
    )
    (out, lse), args, kwargs = call_numba(case)
    assert_close(out, lse, args, kwargs)


@pytest.mark.parametrize("heads", [1, 17])
def test_one_long_sequence(heads: int) -> None:
    """Merged of the states of many ranges, some of which see nothing."""
    case = Case(batch=1, heads=heads, kv_heads=1, head_dim=64, capacity=20000, lengths=None)
    args, kwargs = case.inputs()
    mask = np.zeros((1, 1, 1, 20000), bool)
    mask[..., 3000:9000] = True
    bias = np.zeros((1, heads, 1, 20000), np.float32)
    bias[:, -1, :, 11000:] = -np.inf
    kwargs |= dict(atten_mask=mask, pse_shift=bias)
    out, lse = jax.jit(lambda *args: incre_flash_attention(*args, return_lse=True, implementation="numba", **kwargs))(
        *args
    )
    assert_close(out, lse, args, kwargs)


def test_more_heads_side_by_side_than_are_read_together() -> None:
    case = Case(heads=12, kv_heads=12, head_dim=256, capacity=100, layout="BSND", lengths=(100, 41), mask="4d")
    (out, lse), args, kwargs = call_numba(case)
    assert_close(out, lse, args, kwargs)


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_are_far_apart_are_read_in_shorter_tiles(dtype: str, block: int) -> None:
    """Windows that end anywhere in these."""
    case = Case(batch=4, heads=8, kv_heads=8, head_dim=256, capacity=112, layout="BSND", dtype=dtype, block=block)
    case = dataclasses.replace(case, lengths=(112, 49, 17, 1), mask="4d")
    form = format_of(dtype, False, this_machine())
    assert form.least_tile < form.tile
    assert form.tile * 8 * 256 * form.itemsize > TILE_SPAN
    (out, lse), args, kwargs = call_numba(case)
    assert_close(out, lse, args, kwargs)


@numba.njit
def units(address: int, most: int) -> int:
    """What a call at an address, whose heads may be joined, is cut into: heads of a unit."""
    join_heads(call_at(address), address, most)
    return call_at(address).unit_heads


@pytest.mark.parametrize(
    "heads,row_bytes,most,joined",
    [
        (8, 256, 99, 8),  # as many as have room
        (16, 256, 99, 8),
        (12, 256, 99, 6),  # of all sizes of which nothing is left over
        (15, 256, 99, 5),
        (7, 256, 99, 7),
        (11, 256, 99, 1),
        (8, 258, 99, 4),
        (8, UNIT_TILE // 64, 99, 1),
        (8, UNIT_TILE // 32, 99, 1),
        (8, 256, 7, 4),  # and no more than may be
        (15, 256, 4, 3),
        (8, 256, 1, 1),
        (8, 256, 0, 1),
    ],
)
def test_units_of_heads_in_small_pages(heads: int, row_bytes: int, most: int, joined: int) -> None:
    words = Call(*[0] * len(Call._fields))._replace(
        heads=heads, table=1, page_size=16, tile=64, head_stride=16 * row_bytes, row_stride=row_bytes, unit_heads=-1
    )
    for call, expected in [
        (words, joined),
        (words._replace(page_size=64), joined),
        (words._replace(page_size=48), -1),
        (words._replace(page_size=128), -1),
        (words._replace(table=0), -1),
        (words._replace(head_stride=row_bytes, row_stride=row_bytes * heads), -1),
    ]:
        record = np.array(call, np.int64)
        assert units(record.ctypes.data, most) == expected


@pytest.mark.parametrize(
    "int8,dtype,kv_heads,group,masked",
    [
        (False, "float32", 12, 2, 0.3),
        (False, "bfloat16", 12, 4, 0.3),
        (False, "float16", 15, 1, 0.0),
        (True, "bfloat16", 12, 6, 0.0),
    ],
)
def test_heads_that_lie_together_in_small_pages(
    int8: bool, dtype: str, kv_heads: int, group: int, masked: float
) -> None:
    """They are read together where a call reads much, several units of them, and what nobody sees is not seen."""
    head_dim, page = 128, 32
    cache_dtype = "int8" if int8 else dtype
    row = head_dim * jnp.dtype(cache_dtype).itemsize
    enough = LEAST_JOINED // (2 * kv_heads * page * row) + 1
    lengths = np.array([enough // 2 * page + 13, enough // 3 * page + 1, enough // 5 * page + 100, 0])
    form = format_of(cache_dtype, False, this_machine(), narrow=dtype != "float32", group=group)
    assert lengths.sum() * 2 * kv_heads * row >= LEAST_JOINED
    assert form.tile % page == 0
    assert 2 * form.tile * row <= UNIT_TILE
    assert kv_heads * form.tile * row > UNIT_TILE or form.amx
    blocks = -(-lengths // page)
    width = blocks.max()
    rng = np.random.default_rng(11)
    table = np.full((4, width), blocks.sum(), np.int32)  # the last page is nobody's
    table[np.arange(width) < blocks[:, None]] = rng.permutation(blocks.sum())
    mask = rng.random((4, width * page)) < masked
    seen = np.arange(width * page) < lengths[:, None]
    hole = np.zeros((blocks.sum() + 1, page), bool)
    hole[table] = (mask | ~seen).reshape(4, width, page)
    hole[-1] = True

    def pages() -> tuple[np.ndarray, np.ndarray]:
        """With something in the holes that would show, and with nothing."""
        shape = (blocks.sum() + 1, kv_heads, page, head_dim)
        found = rng.integers(-128, 128, shape, np.int8) if int8 else rng.standard_normal(shape, np.float32)
        found = found.astype(cache_dtype)
        return found, np.where(hole[:, None, :, None], found.dtype.type(-128 if int8 else np.nan), found)

    (key, broken_key), (value, broken_value) = pages(), pages()
    query = rng.standard_normal((4, kv_heads * group, 1, head_dim), np.float32).astype(dtype)
    kwargs = dict(num_heads=kv_heads * group, num_key_value_heads=kv_heads, input_layout="BNSD", scale_value=0.2)
    kwargs |= dict(actual_seq_lengths=lengths.astype(np.int32), block_table=table, block_size=page)
    if masked:
        kwargs |= dict(atten_mask=mask[:, None, None])
    if int8:
        kwargs |= dict(antiquant_scale=np.full((2, kv_heads, head_dim), 0.02, np.float32))
    if dtype == "float32":
        kwargs |= dict(
            pse_shift=rng.standard_normal((4, kv_heads * group, 1, width * page), np.float32), return_lse=True
        )
    found = incre_flash_attention(query, broken_key, broken_value, implementation="numba", **kwargs)
    expected = incre_flash_attention(query, key, value, implementation="xla", **kwargs)
    if dtype == "float32":
        (found, lse), (expected, expected_lse) = found, expected
        np.testing.assert_allclose(np.asarray(lse), np.asarray(expected_lse), rtol=4e-6, atol=8e-6)
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert not found[3].any()
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype] * max(1, np.abs(expected).max()))
