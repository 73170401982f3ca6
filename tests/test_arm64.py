"""The CPU kernels' code for 64-bit Arm, executed by an emulator that lets nothing be read that is not theirs."""

import ctypes
import dataclasses
import types
from typing import Any

import jax
import llvmlite.binding as llvm
import numpy as np
import pytest
from arm64 import MACHINES, Emulated, instructions_of_a_position
from cases import TOLERANCE, Case, assert_close, assert_out_close, call_numba, run_reference
from test_row_product import LAYOUTS, MANY, assert_exact, in_blocks, inputs

from benchmarks import arm_static
from jax_ifa import incre_flash_attention
from numba_kernels import build
from numba_kernels import machine as machine_module
from numba_kernels.block_dots import MOST
from numba_kernels.formats import format_of
from numba_kernels.machine import Machine
from numba_kernels.product import RowProduct, row_product

FEW = [
    Case(dtype="bfloat16", batch=3, capacity=150, head_dim=48, mask="4d", bias="batch"),
    Case(int8=True, block=32, capacity=200, heads=26, offset=True, head_dim=36),
    Case(dtype="float16", layout="BSND", heads=12, capacity=100, head_dim=70, padding=3),
    Case(heads=7, kv_heads=1, batch=4, capacity=130, head_dim=24, lengths="zero", mask="3d:uint8"),
]
MORE = [
    *[
        Case(dtype=dtype, int8=int8, heads=15, kv_heads=1, head_dim=head_dim, capacity=90, block=32 if int8 else 16)
        for dtype, int8, head_dim in [
            ("float32", False, 7),
            ("float16", False, 70),
            ("bfloat16", False, 130),
            ("float32", True, 68),
        ]
    ],
    Case(heads=8, kv_heads=4, head_dim=64, capacity=500, lengths=(500, 77), block=16),  # in ranges of many threads
    Case(int8=True, heads=3, kv_heads=3, capacity=333, lengths="zero", layout="BSH", antiquant="flat", offset=True),
    Case(quant="channel_offset", dtype="bfloat16", mask="2d:int8:full", bias="shared"),
]
PAIRS = [  # what only the products of bfloat16 do otherwise
    Case(dtype="bfloat16", heads=15, kv_heads=1, head_dim=67, capacity=70, block=16),
    Case(dtype="bfloat16", heads=16, kv_heads=2, head_dim=40, capacity=90, inner_precise=0),
    Case(dtype="bfloat16", heads=4, kv_heads=2, head_dim=40, capacity=300, lengths=(300, 1), layout="BSND"),
]
# Where 16 bits are kept of the result, and nothing shows more.
FEWER_DIGITS = [
    Case(int8=True, dtype="bfloat16", heads=15, kv_heads=1, capacity=150, offset=True, mask="4d", bias="batch"),
    Case(int8=True, dtype="float16", layout="BSND", block=32, head_dim=72, heads=6, antiquant="flat", offset=True),
    Case(dtype="bfloat16", heads=16, kv_heads=2, capacity=100, mask="2d:full", lengths=None),
]


class TestMachine:
    """Which of Arm's narrow products there are, not every LLVM knows; the systems are asked."""

    @staticmethod
    def found(platform: str, features: dict[str, bool], monkeypatch: pytest.MonkeyPatch, **functions: Any) -> Machine:
        """The processor as it would be found on an Arm machine with these functions of C."""
        monkeypatch.setattr(machine_module.sys, "platform", platform)
        monkeypatch.setattr(machine_module.platform, "machine", lambda: "arm64" if platform == "darwin" else "aarch64")
        monkeypatch.setattr(machine_module.ctypes, "CDLL", lambda name: types.SimpleNamespace(**functions))
        monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
        return machine_module.this_machine.__wrapped__()

    @staticmethod
    def assert_found(machine: Machine, bf16: bool, dotprod: bool) -> None:
        assert (machine.lanes, machine.registers) == (4, 32)
        assert machine.bfloat16_dot == ("llvm.aarch64.neon.bfdot.v4f32.v8bf16" if bf16 else None)
        assert machine.int8_dot == ("llvm.aarch64.neon.sdot.v4i32.v16i8" if dotprod else None)
        found = {"+bf16" if bf16 else "-bf16", "+dotprod" if dotprod else "-dotprod"}
        assert found < set(machine.features.split(","))
        assert (format_of("bfloat16", False, machine).pack, format_of("int8", False, machine).pack) == (
            2 if bf16 else 1,
            4 if dotprod else 1,
        )

    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("dotprod", [False, True])
    def test_linux(self, bf16: bool, dotprod: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        bits = {16: dotprod << 20 | 1 << 22, 26: bf16 << 14 | 1 << 12}  # and SVE, whose such products are others
        getauxval = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)(lambda kind: bits[kind])
        machine = self.found("linux", {"neon": True, "sve": True, "sve2": True}, monkeypatch, getauxval=getauxval)
        self.assert_found(machine, bf16, dotprod)
        assert {"+neon", "-sve", "-sve2"} < set(machine.features.split(","))

    @pytest.mark.parametrize(("bf16", "dotprod"), [(0, 0), (1, 1), (None, 1), (None, None)])
    def test_macos(self, bf16: int | None, dotprod: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments: list[Any] = []
        numbers = {b"hw.optional.arm.FEAT_BF16": bf16, b"hw.optional.arm.FEAT_DotProd": dotprod}

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_size_t)
        def sysctlbyname(name: bytes, to: int, size: int, new: int | None, new_size: int) -> int:
            arguments.append((ctypes.c_size_t.from_address(size).value, new, new_size))
            if numbers[name] is None:  # an older system
                return -1
            ctypes.c_int.from_address(to).value = numbers[name]
            return 0

        machine = self.found("darwin", {}, monkeypatch, sysctlbyname=sysctlbyname)
        self.assert_found(machine, bf16 == 1, dotprod == 1)
        assert arguments == [(4, None, 0)] * 2

    def test_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = self.found("freebsd14", {"bf16": True}, monkeypatch)
        assert (machine.bfloat16_dot is not None, machine.int8_dot) == (True, None)


def emulated(name: str, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(MACHINES[name], monkeypatch)


def attend(kwargs: dict[str, Any], *arrays: np.ndarray) -> np.ndarray:
    return np.asarray(
        jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, implementation="numba", **kwargs))(*arrays)
    )


def assert_executed(calls: Emulated, name: str, case: Case) -> None:
    """On the processor that is meant, with the products that it has of those that the emulator does not know."""
    assert calls.calls == 1
    pairs = name == "neoverse-v2" and case.dtype == "bfloat16" and not case.int8 and case.inner_precise == 1
    assert ("bfdot" in calls.instructions) == pairs


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{case}") for name in MACHINES for case in FEW]
    + [pytest.param("apple-m1", case, id=f"apple-m1-{case}") for case in MORE]
    + [pytest.param("neoverse-v2", case, id=f"neoverse-v2-{case}") for case in PAIRS],
)
def test_against_oracle(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = emulated(name, monkeypatch)
    (out, lse), args, kwargs = call_numba(case)
    assert_close(out, lse, args, kwargs)
    assert_executed(calls, name, case)


@pytest.mark.parametrize("case", FEWER_DIGITS, ids=str)
@pytest.mark.parametrize("name", ["apple-m1", "neoverse-v2"])
def test_where_16_bits_are_kept_of_the_result(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = emulated(name, monkeypatch)
    assert_out_close(case)
    assert_executed(calls, name, case)


@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("int8,dtype", [(True, "bfloat16"), (False, "bfloat16"), (False, "float32")])
def test_many_lengths(int8: bool, dtype: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = emulated("neoverse-v2", monkeypatch)
    case = Case(batch=24, heads=group, kv_heads=1, head_dim=20, capacity=72, int8=int8, dtype=dtype, lengths=None)
    args, kwargs = case.inputs()
    kwargs["actual_seq_lengths"] = np.arange(1, 72, 3, dtype=np.int32)
    out = attend(kwargs, *args)
    expected, _ = run_reference(args, kwargs)
    largest = np.maximum(1, np.abs(expected).max(axis=-1, keepdims=True))
    np.testing.assert_allclose(out.astype(np.float64) / largest, expected / largest, rtol=0, atol=TOLERANCE[dtype])
    assert_executed(calls, "neoverse-v2", case)


def test_nan_behind_the_lengths_and_pages_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's number that is wrong is followed within the cache, whatever is found there; the emulator would tell."""
    calls = emulated("apple-m1", monkeypatch)
    case = Case(batch=3, block=16, capacity=64, lengths=(64, 40, 21), heads=8, head_dim=24)
    (query, *caches), kwargs = case.inputs()
    hidden = np.ones((len(caches[0]), case.block), bool)
    for length, table in zip(case.lengths, kwargs["block_table"], strict=True):
        for t in range(length):
            hidden[table[t // case.block], t % case.block] = False
    soiled = [np.where(hidden[:, None, :, None], np.float32(np.nan), cache) for cache in caches]
    table = kwargs.pop("block_table")
    wrong = table.copy()
    wrong[:, 3] = 2**30, 2**31 - 1, -(2**31)

    @jax.jit
    def run(table: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return incre_flash_attention(query, key, value, block_table=table, implementation="numba", **kwargs)

    np.testing.assert_array_equal(run(wrong, query, *soiled)[1:], run(table, query, *caches)[1:])
    assert calls.calls == 2


def test_nan_that_is_masked_in_heads_that_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = emulated("apple-m1", monkeypatch)
    case = Case(layout="BSND", heads=8, kv_heads=4, capacity=90, head_dim=24, mask="2d")
    (query, *caches), kwargs = case.inputs()
    hidden = kwargs["atten_mask"][:, :, None, None]
    soiled = [np.where(hidden, np.float32(np.nan), cache) for cache in caches]
    np.testing.assert_array_equal(attend(kwargs, query, *soiled), attend(kwargs, query, *caches))
    assert calls.calls == 2


@pytest.mark.parametrize(("dtype", "one", "error"), [("float16", 32639, 1.5e-4), ("float32", 8355711, 8e-7)])
def test_many_weights_that_are_rounded_one_way(
    dtype: str, one: int, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an int8 cache: one weight of 1 in 64, and 63 of 1.49 of the last place, which are held as 1.

    If they were summed as they are, the result would be too small by 30.9 of the large one's places.
    """
    emulated("apple-m1", monkeypatch)
    s, d = 128, 256
    query, key = np.zeros((1, 1, 1, d), dtype), np.zeros((1, 1, s, d), np.int8)
    query[..., 0], key[..., 0] = 1, np.where(np.arange(s) % 64 == 0, 0, -1)
    value = np.random.default_rng(1).integers(64, 128, (1, 1, s, d)).astype(np.int8)
    kwargs: dict[str, Any] = dict(num_heads=1, input_layout="BNSD", scale_value=1.0)
    kwargs["antiquant_scale"] = np.array([np.log(one / 1.49), 1], np.float32)
    weights = np.where(key[0, 0, :, 0] == 0, 1, 1.0 / one)
    truth = weights @ value[0, 0].astype(np.float64) / weights.sum()
    assert abs(np.mean(attend(kwargs, query, key, value).astype(np.float64)[0, 0, 0] / truth - 1)) < error
    assert 30.9 / one > 3 * error


@pytest.mark.parametrize(
    ("name", "case", "products", "most"),
    [
        ("apple-m1", Case(), 512, 2.2),
        ("apple-m1", Case(dtype="float16"), 512, 2.1),
        ("apple-m1", Case(int8=True, dtype="bfloat16"), 256, 2.7),
    ],
    ids=str,
)
def test_few_instructions_for_a_product(
    name: str, case: Case, products: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight heads, for each position; docs/cpu-speed.md has all. One weight at a time took a third more."""
    case = dataclasses.replace(case, heads=8, kv_heads=1, head_dim=128)
    total = instructions_of_a_position(MACHINES[name], case, monkeypatch).total()
    assert products < total < most * products


def test_the_benchmark_counts_them() -> None:
    row = arm_static.row("apple-m1", "int8", 1)
    assert row["products"] == 2 * 128 // 16 * 2  # of two digits
    assert row["products"] < row["keys"] + row["values"] < row["instructions"] < 250


@pytest.mark.parametrize("name", ["cortex-a72", "neoverse-v2"])
def test_row_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = emulated(name, monkeypatch)
    for rows, outputs, size in [((1,), 1, 1), ((3,), 7, 5), ((), 33, 129), ((2, 5), 200, 577)]:
        x, matrix = inputs(rows, outputs, size)
        assert_exact(jax.jit(lambda x, matrix: row_product(x, matrix))(x, matrix), x, matrix)
    for kind in LAYOUTS:
        for rows, outputs, size in [((), 33, 544), ((2,), 9, 32), ((MANY,), 300, 96), ((MOST[4] + 1,), 20, 160)]:
            blocks, weights = in_blocks(outputs, size, kind)
            x, _ = inputs(rows, outputs, size)
            assert_exact(jax.jit(lambda x, blocks: row_product(x, blocks))(x, blocks), x, weights)
    assert calls.calls == 4 + 4 * len(LAYOUTS)


@pytest.mark.parametrize(
    ("name", "kernel"), [("apple-m1", "float16"), ("neoverse-v2", "int8"), ("apple-m1", "product")]
)
def test_compiles_for_macos(name: str, kernel: str) -> None:
    machine = MACHINES[name]
    form = RowProduct(None) if kernel == "product" else format_of(kernel, False, machine)
    code = build.compile_object(form, machine, "arm64-apple-darwin")
    assert code[:4] == b"\xcf\xfa\xed\xfe"  # Mach-O, 64 bits
