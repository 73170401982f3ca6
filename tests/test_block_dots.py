"""Products with a matrix in blocks by narrow dot products: what digits of x can and cannot hold, and where they lie."""

import ctypes
import dataclasses
import mmap

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_row_product import KINDS, assert_exact, in_blocks, inputs

from numba_kernels import build, meetings, tiles
from numba_kernels.block_dots import MOST
from numba_kernels.blocks import BLOCK, LAYOUTS, BlockMatrix
from numba_kernels.machine import this_machine
from numba_kernels.product import row_product

HOST = this_machine()
DIGITS = pytest.mark.skipif(HOST.int8_dot is None, reason="needs narrow dot products of bytes")
SPLIT = pytest.mark.skipif(HOST.int8_dot is HOST.int16_dot is None, reason="needs narrow dot products")
BITS = {"q4_1": 23, "q8_0": 22}


def matrix_of(kind: str, codes: np.ndarray, scale: float, minimum: float) -> tuple[BlockMatrix, np.ndarray, np.ndarray]:
    """Of codes (outputs, inputs); its weights, and the sizes of what they are made of, float64."""
    outputs, inputs_ = codes.shape
    blocks = codes.reshape(outputs, inputs_ // BLOCK, BLOCK).astype(np.int64)
    numbers = np.array([scale, minimum][: LAYOUTS[kind].numbers], np.float16).view(np.uint8)
    halves = blocks[..., : BLOCK // 2] | blocks[..., BLOCK // 2 :] << 4
    stored = halves if kind == "q4_1" else blocks & 255
    numbers = np.broadcast_to(numbers, (*blocks.shape[:2], len(numbers)))
    file = np.concatenate([numbers, stored.astype(np.uint8)], axis=-1).reshape(outputs, -1)
    scaled = float(np.float16(scale)) * codes.astype(np.float64)
    least = float(np.float16(minimum)) if LAYOUTS[kind].numbers == 2 else 0.0
    return BlockMatrix.from_file(file, kind), scaled + least, np.abs(scaled) + abs(least)


def random_codes(kind: str, shape: tuple[int, int]) -> np.ndarray:
    """All that a kind has."""
    return np.random.default_rng(0).integers(*((0, 16) if kind == "q4_1" else (-128, 128)), shape)


def error_of_digits(x: np.ndarray, sizes: np.ndarray, kind: str) -> np.ndarray:
    """What they may be off, in each output: half a step of every element, of a block's largest in so many bits."""
    largest = np.abs(x).reshape(len(x), -1, BLOCK).max(axis=-1)
    of_blocks = sizes.reshape(len(sizes), -1, BLOCK).sum(axis=-1)
    return 1.01 * 2.0 ** -BITS[kind] * largest.astype(np.float64) @ of_blocks.T


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
    codes = random_codes(kind, (50, 160))
    codes[:, 70] = 8 if kind == "q4_1" else 0  # a weight of 0, so that others count
    matrix, weights, sizes = matrix_of(kind, codes, 0.25, -2)
    x, _ = inputs((2,), 50, 160)
    x[1, 70] = outlier
    assert not weights[:, 70].any()
    found = np.asarray(row_product(x, matrix), np.float64)
    wide = x.astype(np.float64)
    # Of the sums of float32 something is rounded as well.
    limit = error_of_digits(x, sizes, kind) + 4e-7 * np.abs(wide) @ sizes.T
    assert (np.abs(found - wide @ weights.T) <= limit).all()
    # The block has no weights: all else is as if there were no such element.
    rows, blocks = np.asarray(matrix.rows).copy(), 160 // BLOCK
    for number in range(LAYOUTS[kind].numbers):
        begin = blocks * (LAYOUTS[kind].codes + 2 * number) + 2 * (70 // BLOCK)
        rows[:, begin : begin + 2] = 0
    rest = np.where(np.arange(160) // BLOCK == 70 // BLOCK, 0, x)
    assert_exact(row_product(x, BlockMatrix(jnp.asarray(rows), kind)), rest, weights)


@SPLIT
@KINDS
def test_bits_of_x(kind: str) -> None:
    """The smallest number that there is beside 1, and that others are rounded to it, ties to even."""
    codes = np.zeros((2, 64), np.int64)
    codes[1, 37] = 1
    matrix, *_ = matrix_of(kind, codes, 1, 0)
    step = 2.0 ** (1 - BITS[kind])
    for quarters in range(-9, 10):
        x = np.zeros((1, 64), np.float32)
        x[0, 40], x[0, 37] = 1, quarters / 4 * step
        np.testing.assert_array_equal(np.asarray(row_product(x, matrix)), [[0, step * np.rint(quarters / 4)]])


@KINDS
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("size", "scale"),
    [(1e-34, 8000), (1e-30, 2.0**-10), (1e-24, 2.0**-24), (1e-10, 1), (1e25, 1), (1e30, 60), (1.1e37, 0.001)],
)
def test_elements_of_any_size(kind: str, rows: int, size: float, scale: float) -> None:
    """Where float32 has numbers for them: what digits are not for is multiplied without."""
    matrix, weights, sizes = matrix_of(kind, random_codes(kind, (20, 96)), scale, -8 * scale)
    x = np.float32(size) * inputs((rows,), 20, 96)[0].clip(-1.5, 1.5)
    found, exact = np.asarray(row_product(x, matrix), np.float64), x.astype(np.float64) @ weights.T
    assert (np.abs(found - exact) <= 1e-6 * np.abs(x.astype(np.float64)) @ sizes.T).all()


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
@pytest.mark.parametrize("x", [1.1e37, 1e38, np.finfo(np.float32).max])
def test_sums_of_large_numbers_do_not_overflow_on_their_way(kind: str, x: float) -> None:
    matrix, weights, _ = matrix_of(kind, np.ones((3, 32)), 0.001, 0)
    found = row_product(np.full((1, 32), x, np.float32), matrix)
    np.testing.assert_allclose(found, np.full((1, 3), float(np.float32(x)) * weights[0].sum()), rtol=1e-6)


@KINDS
def test_zeros_and_subnormal_numbers(kind: str) -> None:
    matrix, _ = in_blocks(9, 64, kind)
    assert not np.asarray(row_product(np.zeros((3, 64), np.float32), matrix)).any()
    assert (np.abs(np.asarray(row_product(np.full((1, 64), 1e-40, np.float32), matrix))) <= 1e-36).all()


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
    if lanes > HOST.lanes or HOST.int16_dot is None or (int8_dot and not HOST.int8_dot):
        pytest.skip("this processor cannot do that")
    machine = dataclasses.replace(HOST, lanes=lanes, int8_dot=int8_dot, int16_dot=int16_dot)
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
