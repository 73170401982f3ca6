"""Products with a matrix in blocks by narrow dot products: what digits of x can and cannot hold, and where they lie."""

import ctypes
import mmap

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_row_product import KINDS, assert_exact, in_blocks, inputs

from numba_kernels import block_dots, build, meetings, tiles
from numba_kernels.block_dots import MOST
from numba_kernels.blocks import BLOCK, LAYOUTS, BlockMatrix
from numba_kernels.machine import Machine, this_machine
from numba_kernels.product import row_product

DIGITS = pytest.mark.skipif(this_machine().int8_dot is None, reason="needs narrow dot products of bytes")


def error_of_digits(x: np.ndarray, weights: np.ndarray, kind: str) -> np.ndarray:
    """What they may be off, in each output: half a step of every element, of a block's largest in so many bits."""
    largest = np.abs(x).reshape(len(x), -1, BLOCK).max(axis=-1)
    sizes = np.abs(weights.astype(np.float64)).reshape(len(weights), -1, BLOCK).sum(axis=-1)
    return block_dots.MARGIN * 2.0 ** -block_dots.BITS[kind] * largest.astype(np.float64) @ sizes.T


@given(
    rows=st.integers(1, MOST[4] + 2),
    outputs=st.integers(1, 9),
    blocks=st.integers(1, 37),
    kind=st.sampled_from([*LAYOUTS]),
)
def test_any_shape(rows: int, outputs: int, blocks: int, kind: str) -> None:
    matrix, weights = in_blocks(outputs, blocks * BLOCK, kind)
    x, _ = inputs((rows,), outputs, blocks * BLOCK)
    assert_exact(row_product(x, matrix), x, weights)


@DIGITS
@KINDS
def test_a_row_has_the_same_product_whatever_is_beside_it(kind: str) -> None:
    """Only digits do: many rows are added up in another order otherwise."""
    matrix, _ = in_blocks(70, 544, kind)
    x, _ = inputs((MOST[4],), 3, 544)
    run = jax.jit(row_product)
    alone = np.concatenate([run(x[i : i + 1], matrix) for i in range(MOST[4])])
    for rows in range(1, MOST[4] + 1):
        np.testing.assert_array_equal(run(x[:rows], matrix), alone[:rows])


@KINDS
@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e20])
def test_a_large_element_costs_its_own_block_precision_and_no_other(kind: str, outlier: float) -> None:
    matrix, weights = in_blocks(50, 160, kind)
    x, _ = inputs((2,), 50, 160)
    x[1, 70] = outlier
    out = np.asarray(row_product(x, matrix), np.float64)
    wide, sizes = x.astype(np.float64), np.abs(x.astype(np.float64)) @ np.abs(weights.astype(np.float64)).T
    # Of the sums of float32 something is rounded as well.
    assert (np.abs(out - wide @ weights.astype(np.float64).T) <= error_of_digits(x, weights, kind) + 4e-7 * sizes).all()
    # The block has no weights: all else is as if there were no such element.
    rows, blocks = np.asarray(matrix.rows).copy(), 160 // BLOCK
    for number in range(LAYOUTS[kind].numbers):
        begin = blocks * (LAYOUTS[kind].codes + 2 * number) + 2 * (70 // BLOCK)
        rows[:, begin : begin + 2] = 0
    weights[:, 64:96] = x[:, 64:96] = 0
    x_there = x.copy()
    x_there[1, 70] = outlier
    assert_exact(row_product(x_there, BlockMatrix(jnp.asarray(rows), kind)), x, weights)


@KINDS
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e25, 1e30])
def test_elements_of_any_size(kind: str, size: float) -> None:
    matrix, weights = in_blocks(20, 96, kind)
    x, _ = inputs((2,), 20, 96)
    x = x * np.float32(size)
    assert_exact(row_product(x, matrix), x, weights)


@KINDS
@pytest.mark.parametrize("largest", [1, 1.991, 1.9921, 1.9922, 1.993, np.nextafter(np.float32(2), np.float32(0))])
@pytest.mark.parametrize("code", [0x80, 0x7F, 0xFF])
def test_sums_have_room(kind: str, largest: float, code: int) -> None:
    """All elements as large as their digits can be, and all codes."""
    matrix, _ = in_blocks(4, 96, kind)
    rows = np.asarray(matrix.rows).copy()
    rows[:, : 96 // BLOCK * LAYOUTS[kind].codes] = code
    matrix = BlockMatrix(jnp.asarray(rows), kind)
    x = np.float32(largest) * np.ones((2, 96), np.float32)
    x[1] *= -1
    assert_exact(row_product(x, matrix), x, np.asarray(matrix.dense()))


@KINDS
def test_the_largest_and_the_smallest_numbers(kind: str) -> None:
    """Digits do not hold the largest, which is for float32 then; of subnormal numbers there is nothing left."""
    matrix, weights = in_blocks(9, 64, kind)
    weights = weights.astype(np.float64)
    x = np.zeros((2, 64), np.float32)
    x[0, 3], x[1, 40] = 3e33, np.finfo(np.float32).max
    out = np.asarray(row_product(x, matrix))
    exact = x.astype(np.float64) @ weights.T
    fits = np.abs(exact) < 1e38
    assert fits[0].all()
    np.testing.assert_allclose(out[fits], exact[fits], rtol=1e-6)
    assert (np.sign(out) == np.sign(exact)).all()
    assert not np.isnan(out).any()
    x = np.full((1, 64), 1e-40, np.float32)
    assert (np.abs(np.asarray(row_product(x, matrix))) <= 1e-36).all()
    assert not np.asarray(row_product(np.zeros((3, 64), np.float32), matrix)).any()


class Guarded:
    """A copy of an array whose last byte is followed by a page of memory that may not be touched."""

    def __init__(self, array: np.ndarray) -> None:
        page = mmap.PAGESIZE
        size = -(-array.nbytes // page) * page
        self.map = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.address = start + size - array.nbytes
        ctypes.memmove(self.address, array.ctypes.data, array.nbytes)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        assert protect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0

    def read(self, array: np.ndarray) -> np.ndarray:
        """What it holds now, as an array of this kind."""
        ctypes.memmove(array.ctypes.data, self.address, array.nbytes)
        return array


@KINDS
@pytest.mark.parametrize(
    ("lanes", "int8_dot", "int16_dot"),
    [
        (8, None, "llvm.x86.avx2.pmadd.wd"),
        (8, "llvm.x86.avx512.vpdpbusd.256", None),
        (16, None, "llvm.x86.avx512.pmaddw.d.512"),
        (16, "llvm.x86.avx512.vpdpbusd.512", None),
    ],
    ids=["8 lanes", "8 lanes, bytes", "16 lanes", "16 lanes, bytes"],
)
def test_nothing_is_read_behind_the_end(kind: str, lanes: int, int8_dot: str | None, int16_dot: str | None) -> None:
    """Of x, of its digits, and of the last row of the matrix, which ends in the middle of a strip."""
    host = this_machine()
    if lanes > host.lanes or host.int16_dot is None or (int8_dot and not host.int8_dot):
        pytest.skip("this processor cannot do that")
    fields = {field: getattr(host, field) for field in Machine.__dataclass_fields__}
    machine = Machine(**fields | dict(lanes=lanes, int8_dot=int8_dot, int16_dot=int16_dot))
    steps = meetings.make(machine, kind)
    engine = build.native_engine(llvm.parse_assembly(str(tiles.module_of(steps, machine))), machine)

    def step(name: str, *arguments: int) -> int:
        function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(arguments))
        return int(function(engine.get_function_address(name))(*arguments))

    for blocks in range(1, lanes + 3):
        size = blocks * BLOCK
        matrix, weights = in_blocks(3, size, kind)
        rows = np.asarray(matrix.rows)
        x, _ = inputs((3,), 3, size)
        bytes_ = step("digits_size", size)
        digits, out = Guarded(np.full(3 * bytes_, 255, np.uint8)), Guarded(np.full((3, 3), np.nan, np.float32))
        source, stored = Guarded(x), Guarded(rows)
        for b in range(3):
            assert step("split_row", source.address + 4 * size * b, digits.address + bytes_ * b, size) == 1
        step("dot_digits", digits.address, stored.address, out.address, 3, 3, 3, size, rows.shape[1])
        found = out.read(np.empty((3, 3), np.float32))
        assert (np.abs(found - x @ weights.T) <= 1e-6 * (np.abs(x) @ np.abs(weights).T)).all()
