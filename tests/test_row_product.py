"""The product of a few rows with a matrix that lies with its outputs first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import numba_kernels
from numba_kernels import product
from numba_kernels.block_dots import MOST
from numba_kernels.blocks import BLOCK, LAYOUTS, BlockMatrix, take_rows
from numba_kernels.machine import this_machine
from numba_kernels.product import MOST_ROWS, row_product

MANY = 5  # rows from which on a matrix in blocks is converted before it is multiplied, where x is not split
FOREIGN = "custom_call @jax_ifa_row_product"


def inputs(rows: tuple[int, ...], outputs: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """x (*rows, size) and a matrix (outputs, size), float32."""
    rng = np.random.default_rng(outputs)
    x = rng.standard_normal((*rows, size), np.float32)
    return x, rng.standard_normal((outputs, size), np.float32)


def in_blocks(outputs: int, size: int, kind: str) -> tuple[BlockMatrix, np.ndarray]:
    """A random matrix (outputs, size), and its weights (outputs, size) float32 by plain NumPy."""
    rng = np.random.default_rng(outputs)
    numbers, scales = LAYOUTS[kind].numbers, rng.standard_normal((outputs, size // BLOCK, 2)).astype(np.float16)
    codes = rng.integers(0, 256, (outputs, size // BLOCK, LAYOUTS[kind].codes), np.uint8)
    file = np.concatenate([scales[..., :numbers].view(np.uint8), codes], axis=-1).reshape(outputs, -1)
    scale, minimum = (scales[..., i : i + 1].astype(np.float32) for i in (0, 1))
    if kind == "q4_1":
        weights = np.concatenate([codes & 15, codes >> 4], axis=-1) * scale + minimum
    else:
        weights = codes.view(np.int8) * scale
    return BlockMatrix.from_file(file, kind), weights.astype(np.float32).reshape(outputs, size)


KINDS = pytest.mark.parametrize("kind", LAYOUTS)


def assert_exact(out: jax.Array, x: np.ndarray, matrix: np.ndarray) -> None:
    """Within float32's rounding of the sum of the terms' sizes, in whatever order they were added."""
    x, matrix = x.astype(np.float64), matrix.astype(np.float64)
    assert out.dtype == jnp.float32
    assert (np.abs(np.asarray(out) - x @ matrix.T) <= 1e-6 * (np.abs(x) @ np.abs(matrix).T)).all()


def assert_native(x: np.ndarray, matrix: np.ndarray | BlockMatrix, weights: np.ndarray) -> None:
    """A foreign call gives the product with the weights of a matrix, in a program and outside of one."""
    run = jax.jit(row_product)
    assert FOREIGN in run.lower(x, matrix).as_text()
    assert_exact(run(x, matrix), x, weights)
    assert_exact(row_product(x, matrix), x, weights)


@pytest.mark.parametrize(
    ("rows", "outputs", "size"),
    [((1,), 1, 1), ((3,), 7, 5), ((1,), 100, 16), ((), 33, 129), ((2, 1), 65, 576), ((MOST_ROWS,), 2000, 1537)],
)
def test_values(rows: tuple[int, ...], outputs: int, size: int) -> None:
    x, matrix = inputs(rows, outputs, size)
    assert_native(x, matrix, matrix)


@KINDS
@pytest.mark.parametrize(
    ("rows", "outputs", "size"),
    [((1,), 1, 32), ((), 33, 544), ((2, 2), 65, 576), ((4 * MANY - 1,), 300, 1568), ((133,), 300, 1568)],
)
def test_values_in_blocks(kind: str, rows: tuple[int, ...], outputs: int, size: int) -> None:
    matrix, weights = in_blocks(outputs, size, kind)
    x, _ = inputs(rows, outputs, size)
    assert_native(x, matrix, weights)


@KINDS
def test_weights_in_blocks_are_the_files_own_bit_by_bit(kind: str) -> None:
    matrix, weights = in_blocks(9, 96, kind)
    assert (matrix.shape, matrix.dtype) == (weights.shape, weights.dtype)
    np.testing.assert_array_equal(jax.jit(BlockMatrix.dense)(matrix), weights)
    ids = np.array([[8, 0], [3, 3]])
    np.testing.assert_array_equal(take_rows(matrix, ids), weights[ids])
    np.testing.assert_array_equal(take_rows(jnp.asarray(weights), ids), weights[ids])
    for source in (matrix, jnp.asarray(weights)):
        assert np.isnan(take_rows(source, np.array([9, 2]))[0]).all()
    one = np.zeros((1, 96), np.float32)
    for i in (0, 17, 95):  # the kernel's own conversion
        one[0] = np.arange(96) == i
        np.testing.assert_array_equal(jax.jit(row_product)(one, matrix)[0], weights[:, i])


@pytest.mark.parametrize(
    "lesser",
    [
        dict(lanes=8, registers=16, int8_dot=None, int16_dot="llvm.x86.avx2.pmadd.wd"),
        dict(lanes=8, registers=16, int8_dot="llvm.x86.avx512.vpdpbusd.256"),
        dict(int8_dot=None),
        dict(lanes=4, int8_dot=None, int16_dot=None),
    ],
    ids=["8 lanes", "8 lanes, bytes", "no bytes", "4 lanes"],
)
def test_processors_with_narrower_vectors(lesser: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = this_machine()
    if lesser["int8_dot"] and machine.int8_dot is None:
        pytest.skip("needs narrow dot products of bytes")
    monkeypatch.setattr(product, "this_machine", lambda: dataclasses.replace(machine, **lesser))
    x, matrix = inputs((2,), 40, 77)
    assert_exact(jax.jit(row_product)(x, matrix), x, matrix)
    for kind in LAYOUTS:
        blocks, weights = in_blocks(40, 288, kind)
        for rows in (2, MANY):
            x, _ = inputs((rows,), 40, 288)
            assert_exact(jax.jit(row_product)(x, blocks), x, weights)


def test_what_is_not_a_number_reaches_its_outputs_and_no_other() -> None:
    x, matrix = inputs((3,), 6, 21)
    x[1, 20], matrix[4, 0], matrix[5, 20] = np.nan, np.inf, np.nan
    out = np.asarray(jax.jit(row_product)(x, matrix))
    expected = np.isnan(x @ matrix.T)
    assert (np.isnan(out) == expected).all()
    assert expected[1].all()
    assert np.isinf(out[[0, 2], 4]).all()


@KINDS
@pytest.mark.parametrize("rows", [2, MANY, MOST[4] + 1])
def test_with_blocks_what_is_not_a_number_reaches_its_row_and_no_other(kind: str, rows: int) -> None:
    blocks, weights = in_blocks(6, 64, kind)
    x, _ = inputs((rows,), 6, 64)
    x[0, 5], x[1, 63] = np.nan, np.inf
    out = np.asarray(jax.jit(row_product)(x, blocks))
    with np.errstate(invalid="ignore"):
        expected = x @ weights.T
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    np.testing.assert_array_equal(np.isinf(out), np.isinf(expected))


@pytest.mark.parametrize(
    ("rows", "outputs", "size", "dtype"),
    [((MOST_ROWS + 1,), 9, 8, "float32"), ((2,), 9, 8, "bfloat16"), ((0,), 9, 8, "float32"), ((1,), 9, 0, "float32")],
)
def test_the_rest_is_for_xla(rows: tuple[int, ...], outputs: int, size: int, dtype: str) -> None:
    x, matrix = (jnp.asarray(array, dtype) for array in inputs(rows, outputs, size))
    run = jax.jit(row_product)
    assert FOREIGN not in run.lower(x, matrix).as_text()
    np.testing.assert_array_equal(np.asarray(run(x, matrix)), np.asarray(x @ matrix.T))


def test_other_platforms_and_exported_programs_have_no_foreign_call() -> None:
    x, matrix = inputs((1,), 9, 32)
    blocks, weights = in_blocks(9, 32, "q4_1")
    for kind in (matrix, blocks):
        traced = jax.jit(row_product).trace(x, kind)
        assert FOREIGN not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert FOREIGN not in export.export(jax.jit(row_product))(x, matrix).mlir_module()
    exported = export.export(jax.jit(lambda x, rows: row_product(x, BlockMatrix(rows, "q4_1"))))(x, blocks.rows)
    assert FOREIGN not in exported.mlir_module()
    assert_exact(exported.call(x, blocks.rows), x, weights)


def test_a_number_of_rows_that_is_a_symbol() -> None:
    x, matrix = inputs((MOST_ROWS + 1,), 9, 32)
    blocks, weights = in_blocks(9, 32, "q4_1")
    (rows,) = export.symbolic_shape("rows")
    shape = jax.ShapeDtypeStruct((rows, 32), np.float32)
    assert_exact(export.export(jax.jit(row_product))(shape, matrix).call(x[:2], matrix), x[:2], matrix)
    assert_exact(export.export(jax.jit(lambda x: row_product(x, blocks)))(shape).call(x), x, weights)


def test_vmap() -> None:
    x, matrix = inputs((3,), 9, 8)
    several = np.stack([matrix, 2 * matrix, matrix + 1])
    over_rows = jax.jit(jax.vmap(row_product, (0, None)))
    assert FOREIGN in over_rows.lower(x, matrix).as_text()
    assert_exact(over_rows(x, matrix), x, matrix)
    for i, out in enumerate(jax.vmap(row_product)(x, several)):
        assert_exact(out, x[i], several[i])
    for i, out in enumerate(jax.vmap(row_product, (None, 0))(x[0], several)):
        assert_exact(out, x[0], several[i])


@KINDS
def test_transforms_with_blocks(kind: str) -> None:
    matrix, weights = in_blocks(9, 32, kind)
    x, tangent = inputs((3,), 3, 32)
    over_rows = jax.jit(jax.vmap(row_product, (0, None)))
    assert FOREIGN in over_rows.lower(x, matrix).as_text()
    assert_exact(over_rows(x, matrix), x, weights)
    several = BlockMatrix(jnp.stack([matrix.rows, matrix.rows[::-1]]), kind)
    out = jax.vmap(row_product, (None, 0))(x, several)
    assert_exact(out[0], x, weights)
    assert_exact(out[1], x, weights[::-1])
    assert_exact(jax.jvp(lambda x: row_product(x, matrix), (x,), (tangent,))[1], tangent, weights)
    (back,) = jax.linear_transpose(lambda x: row_product(x, matrix), x)(jnp.ones((3, 9)))
    np.testing.assert_allclose(back, np.ones((3, 9)) @ weights, rtol=1e-5, atol=1e-5)


def test_reverse_mode_through_a_scan() -> None:
    _, matrix = inputs((2,), 8, 8)
    blocks, weights = in_blocks(32, 32, "q4_1")

    def of(multiply):  # type: ignore[no-untyped-def]
        def step(x, _):  # type: ignore[no-untyped-def]
            return jnp.sin(0.01 * multiply(x)), None

        return lambda x: jnp.sum(jax.lax.scan(step, x, None, length=3)[0])

    for product_of, dense in ((matrix, matrix), (blocks, weights)):
        start = jnp.ones((2, dense.shape[1]))
        found = jax.grad(of(lambda x, m=product_of: row_product(x, m)))(start)
        expected = jax.grad(of(lambda x, m=dense: x @ m.T))(start)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients() -> None:
    x, matrix = inputs((2,), 9, 8)

    def of(multiply):  # type: ignore[no-untyped-def]
        return jax.grad(lambda x, matrix: jnp.sum(jnp.sin(multiply(x, matrix))), (0, 1))(x, matrix)

    for found, expected in zip(of(row_product), of(lambda x, matrix: x @ matrix.T), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_inside_a_shard_map() -> None:
    """A matrix that differs from device to device, with rows that do not."""
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    x, matrix = inputs((1,), 9, 8)
    run = jax.jit(
        jax.shard_map(row_product, mesh=mesh, in_specs=(spec(), spec("model")), out_specs=spec(None, "model"))
    )
    assert_exact(run(x, matrix), x, matrix)


def test_what_its_type_says_to_be_distributed_is_for_xla() -> None:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, matrix = inputs((1,), 9, 8)
    with jax.set_mesh(mesh):
        placed = jax.device_put(matrix, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model")))
        out = jax.jit(row_product)(x, placed)
    assert out.sharding.spec == jax.sharding.PartitionSpec(None, "model")
    assert_exact(out, x, matrix)


def test_what_does_not_fit_is_refused() -> None:
    x, matrix = inputs((1,), 9, 8)
    with pytest.raises(ValueError, match=r"expected x \(\.\.\., inputs\).*\(1, 7\) and \(9, 8\)"):
        row_product(x[:, :7], matrix)
    with pytest.raises(ValueError, match="expected"):
        row_product(x, matrix[0])
    with pytest.raises(TypeError, match="one dtype, got float32 and float16"):
        row_product(x, matrix.astype(np.float16))
    blocks, _ = in_blocks(9, 32, "q8_0")
    with pytest.raises(ValueError, match=r"got \(1, 8\) and \(9, 32\)"):
        row_product(x, blocks)
    with pytest.raises(TypeError, match="one dtype, got bfloat16 and float32"):
        row_product(jnp.ones((1, 32), jnp.bfloat16), blocks)
    with pytest.raises(ValueError, match="blocks of 34 bytes, got \\(9, 33\\) uint8"):
        BlockMatrix.from_file(np.zeros((9, 33), np.uint8), "q8_0")
    with pytest.raises(ValueError, match="blocks of 34 bytes, got \\(9, 35\\) uint8"):
        row_product(jnp.ones((1, 32)), BlockMatrix(jnp.zeros((9, 35), jnp.uint8), "q8_0"))
    with pytest.raises(ValueError, match="blocks of 34 bytes, got \\(\\) uint8"):
        row_product(jnp.ones((1, 32)), BlockMatrix(jnp.zeros((), jnp.uint8), "q8_0"))
    with pytest.raises(ValueError, match="a kind of block among q4_1, q8_0, got 'q2_k'"):
        BlockMatrix.from_file(np.zeros((9, 34), np.uint8), "q2_k")
    with pytest.raises(ValueError, match="a kind of block among q4_1, q8_0, got 'q2_k'"):
        row_product(jnp.ones((1, 32)), BlockMatrix(blocks.rows, "q2_k"))


def test_without_numba_xla_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_kernels, "missing", lambda: "not here")
    x, matrix = inputs((1,), 11, 8)
    run = jax.jit(lambda x, matrix: row_product(x, matrix))
    assert FOREIGN not in run.lower(x, matrix).as_text()
    assert_exact(run(x, matrix), x, matrix)


def test_a_numba_that_does_not_work_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise ImportError("no")

    monkeypatch.setattr(product, "registered", broken)
    x, matrix = inputs((1,), 13, 8)
    with pytest.warns(RuntimeWarning, match="could not be built.*XLA's slower product runs"):
        out = jax.jit(lambda x, matrix: row_product(x, matrix))(x, matrix)
    assert_exact(out, x, matrix)
