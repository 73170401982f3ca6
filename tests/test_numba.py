"""The Numba implementation: what is its own, beyond the grid that it shares with the others."""

import ctypes
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest
from cases import TOLERANCE, Case, assert_close, assert_out_close, call_numba, run_reference
from llvmlite import ir

import numba_kernels
from jax_ifa import incre_flash_attention
from jax_ifa.arguments import MAX_HEAD_DIM
from numba_kernels import amx, build, formats, launch
from numba_kernels import machine as machine_module
from numba_kernels.formats import Format, format_of
from numba_kernels.machine import Machine, describe, this_machine
from numba_kernels.tiles import Tile, module_of, numbers
from numba_kernels.vectors import EXP_TERMS, EXP_TERMS_OF_16_BITS, I64, Vectors

AVX512 = dict.fromkeys(("avx512f", "avx512bw", "avx512vl", "avx2", "fma", "avx512bf16", "avx512vnni"), True)
AMX = AVX512 | dict.fromkeys(("amx-tile", "amx-bf16", "amx-int8"), True)
AVX2 = dict.fromkeys(("avx", "avx2", "fma", "f16c"), True)
ARM = {"neon": True, "bf16": True, "fp-armv8": True, "fullfp16": True, "dotprod": True}


def without(machine: Machine, **changes: Any) -> Machine:
    """The same processor, used for less."""
    return dataclasses.replace(machine, **changes)


class TestMachine:
    def test_x86_with_everything(self) -> None:
        machine = describe("znver4", AVX512, "x86_64")
        assert (machine.lanes, machine.bfloat16_dot, machine.int8_dot) == (
            16,
            "llvm.x86.avx512bf16.dpbf16ps.512",
            "llvm.x86.avx512.vpdpbusd.512",
        )

    def test_older_x86(self) -> None:
        machine = describe("haswell", AVX2, "x86_64")
        assert (machine.lanes, machine.int8_dot, machine.int16_dot) == (8, None, "llvm.x86.avx2.pmadd.wd")
        assert describe("alderlake", AVX2 | {"avxvnni": True}, "x86_64").int8_dot == "llvm.x86.avx512.vpdpbusd.256"
        machine = describe("skylake-avx512", AVX512 | {"avx512vnni": False, "avx512bf16": False}, "x86_64")
        assert (machine.lanes, machine.int8_dot, machine.int16_dot) == (16, None, "llvm.x86.avx512.pmaddw.d.512")
        machine = describe("core2", {"sse3": True}, "x86_64")
        assert (machine.lanes, machine.int16_dot) == (4, None)

    def test_arm(self) -> None:
        machine = describe("neoverse-v2", ARM, "aarch64")
        assert machine.lanes == 4
        assert machine.bfloat16_dot == "llvm.aarch64.neon.bfdot.v4f32.v8bf16"
        assert machine.int8_dot == "llvm.aarch64.neon.sdot.v4i32.v16i8"
        assert format_of("int8", False, machine).signed
        assert describe("cortex-a72", {"neon": True}, "aarch64").int8_dot is None

    def test_matrices_for_large_groups(self) -> None:
        machine = describe("sapphirerapids", AMX, "x86_64")
        assert machine.amx
        assert not describe("sapphirerapids", AMX | {"amx-int8": False}, "x86_64").amx
        for dtype, least in formats.LEAST_AMX_GROUP.items():
            assert format_of(dtype, False, machine, group=least).amx
            assert not format_of(dtype, False, machine, group=least - 1).amx
            assert not format_of(dtype, False, describe("znver4", AVX512, "x86_64"), group=8).amx
        assert not format_of("bfloat16", True, machine, group=8).amx
        assert not format_of("float32", False, machine, group=8).amx

    def test_matrices_only_where_the_system_permits_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine_module, "_permits_amx", lambda: False)
        assert not this_machine.__wrapped__().amx
        monkeypatch.undo()
        monkeypatch.setattr(machine_module.sys, "platform", "darwin")
        assert not machine_module._permits_amx()

    def test_narrow_products_only_where_they_keep_the_precision(self) -> None:
        machine = describe("znver4", AVX512, "x86_64")
        assert format_of("bfloat16", False, machine).pack == 2
        assert format_of("bfloat16", True, machine).pack == 1
        assert format_of("int8", True, machine).pack == 4  # exact to float32 as it is
        assert format_of("bfloat16", True, machine, narrow=True).pack == 1
        lesser = without(machine, int8_dot=None)
        assert format_of("int8", False, lesser).pack == 1
        assert format_of("int8", False, lesser, narrow=True).words
        assert not format_of("int8", False, machine, narrow=True).words
        assert format_of("int8", False, without(lesser, int16_dot=None), narrow=True).pack == 1


SMALL = [
    Case(dtype="bfloat16", batch=3, capacity=150, head_dim=48, mask="4d", bias="batch"),
    Case(dtype="float16", layout="BSND", capacity=100, head_dim=72, padding=3),
    Case(int8=True, block=32, capacity=200, heads=6, offset=True, head_dim=36),
    Case(heads=7, kv_heads=1, capacity=130, head_dim=24, lengths="zero"),
    Case(int8=True, dtype="bfloat16", layout="BSH", antiquant="flat", head_dim=20, capacity=70, mask="3d:uint8:full"),
]


FEWER_DIGITS = [
    Case(int8=True, dtype="bfloat16", heads=8, kv_heads=1, capacity=150, offset=True, mask="4d", bias="batch"),
    Case(int8=True, dtype="float16", layout="BSND", block=32, head_dim=72, heads=6, antiquant="flat", offset=True),
    Case(int8=True, dtype="bfloat16", heads=3, kv_heads=3, lengths="zero", mask="3d:uint8:full", head_dim=20),
    Case(dtype="bfloat16", heads=16, kv_heads=2, capacity=300, mask="2d:full", lengths=None),
]


@pytest.mark.parametrize("case", FEWER_DIGITS, ids=str)
def test_where_16_bits_are_kept_of_the_result(case: Case) -> None:
    """The grid asks for the LSE, which is float32."""
    assert_out_close(case)


@pytest.mark.parametrize(
    ("case", "return_lse", "narrow"),
    [
        (Case(dtype="bfloat16"), False, True),
        (Case(dtype="bfloat16"), True, False),
        (Case(dtype="bfloat16", quant="tensor"), False, False),
        (Case(int8=True, dtype="bfloat16"), False, True),
        (Case(int8=True, dtype="bfloat16"), True, False),
        (Case(int8=True, dtype="float32"), False, False),
        (Case(int8=True, dtype="bfloat16", quant="tensor"), False, False),
        (Case(int8=True, dtype="bfloat16", inner_precise=0), False, False),
    ],
    ids=str,
)
def test_fewer_digits_only_where_nothing_shows_it(
    case: Case, return_lse: bool, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[bool] = []
    monkeypatch.setattr(launch, "this_machine", lambda: describe("znver4", AVX512, "x86_64"))
    monkeypatch.setattr(launch, "registered", lambda form, machine: chosen.append("narrow" in form.name) or "nothing")
    args, kwargs = case.inputs()
    jax.jit(
        lambda q, k, v: incre_flash_attention(q, k, v, implementation="numba", return_lse=return_lse, **kwargs)
    ).lower(*args)
    assert set(chosen) == {narrow}


NO_DOTS = dict(bfloat16_dot=None, int8_dot=None, int16_dot=None)
LESSER = {  # every format converted, and narrower vectors, in as few compilations as show both
    "no narrow products": (NO_DOTS, (0, 2)),
    "8 lanes": (NO_DOTS | dict(lanes=8, registers=16), (1, 4)),
    "4 lanes": (NO_DOTS | dict(lanes=4, registers=16), (0, 2, 3)),
    "4 lanes, one by one": (NO_DOTS | dict(lanes=4, by_lane=True), (0, 2, 3)),
}


@pytest.mark.parametrize(
    ("lesser", "case"),
    [pytest.param(lesser, SMALL[i], id=f"{name}-{i}") for name, (lesser, which) in LESSER.items() for i in which],
)
def test_processors_that_offer_less(lesser: dict, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = without(this_machine(), **lesser)
    monkeypatch.setattr(launch, "this_machine", lambda: machine)
    (out, lse), args, kwargs = call_numba(case)
    assert_close(out, lse, args, kwargs)


FEW_REGISTERS = [NO_DOTS | dict(lanes=lanes, registers=16) for lanes in (4, 8)]


@pytest.mark.parametrize("lesser", FEW_REGISTERS, ids=["4 lanes", "8 lanes"])
@pytest.mark.parametrize("int8,dtype", [(False, "float32"), (False, "bfloat16"), (False, "float16"), (True, "float32")])
def test_where_registers_are_few_eight_heads_take_turns(
    int8: bool, dtype: str, lesser: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "this_machine", lambda: without(this_machine(), **lesser))
    case = Case(heads=30, kv_heads=2, head_dim=68, capacity=150, lengths=(150, 83), int8=int8, dtype=dtype)
    (out, lse), args, kwargs = call_numba(case)
    assert_close(out, lse, args, kwargs)


@pytest.mark.skipif(this_machine().lanes < 16 or not this_machine().int8_dot, reason="no products of bytes of AVX-512")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_bytes_with_few_registers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of AVX-VNNI: eight heads take the values in four turns, and four in two."""
    machine = without(
        this_machine(), lanes=8, registers=16, bfloat16_dot=None, int8_dot="llvm.x86.avx512.vpdpbusd.256", amx=False
    )
    monkeypatch.setattr(launch, "this_machine", lambda: machine)
    case = Case(int8=True, dtype=dtype, heads=30, kv_heads=2, head_dim=68, capacity=150, lengths=(150, 37))
    (out, lse), args, kwargs = call_numba(case)
    assert_close(out, lse, args, kwargs)


LARGE = Case(int8=True, dtype="bfloat16", heads=9, kv_heads=1, head_dim=510, capacity=70, lengths=(70, 33))


@pytest.mark.skipif(not this_machine().int16_dot, reason="this processor has no products of int16")
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("case", [*(case for case in FEWER_DIGITS if case.int8), LARGE], ids=str)
def test_int8_as_int16(case: Case, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What processors do that have no products of bytes."""
    machine = without(this_machine(), int8_dot=None, amx=False)
    if lanes > machine.lanes:
        pytest.skip("this processor has no such vectors")
    if lanes < machine.lanes:
        machine = without(machine, lanes=8, registers=16, int16_dot="llvm.x86.avx2.pmadd.wd")
    chosen: list[Format] = []
    monkeypatch.setattr(launch, "this_machine", lambda: machine)
    monkeypatch.setattr(launch, "format_of", lambda *args: chosen.append(format_of(*args)) or chosen[-1])
    assert_out_close(case)
    assert {form.words for form in chosen} == {True}


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int16_dot", "bfloat16"), ("int8_dot", "bfloat16"), ("int8_dot", "float32")]
)
def test_int32_holds_the_products_of_16_bits(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of int16, and of two bytes together, or the higher two of three, where all are the largest that there are."""
    if not getattr(this_machine(), kind):
        pytest.skip(f"this processor has no {kind}")
    head_dim = MAX_HEAD_DIM
    machine = without(this_machine(), amx=False, **({"int8_dot": None} if kind == "int16_dot" else {}))
    chosen: list[Format] = []
    monkeypatch.setattr(launch, "this_machine", lambda: machine)
    monkeypatch.setattr(launch, "format_of", lambda *args: chosen.append(format_of(*args)) or chosen[-1])
    key = np.full((1, 1, 3, head_dim), -128, np.int8)
    key[:, :, 1] = 127
    numbers = np.array([1, -1, 0], np.int8)  # their mean says how much more weight the first has than the second
    value = numbers[None, None, :, None] * np.ones((1, 1, 3, head_dim), np.int8)
    kwargs = dict(num_heads=1, input_layout="BNSD", scale_value=1.0, implementation="numba")
    kwargs |= dict(antiquant_scale=np.ones((2, 1, head_dim), np.float32))
    kwargs["antiquant_scale"][0] = 1 / (3 * 128 * head_dim)
    run = jax.jit(lambda query: incre_flash_attention(query, jnp.asarray(key), jnp.asarray(value), **kwargs))
    out = run(jnp.full((1, 1, 1, head_dim), -3, dtype))
    assert [form.words for form in chosen] == [kind == "int16_dot"]
    assert chosen[0].query_digits == (1 if chosen[0].words else 2 if dtype == "bfloat16" else 3)
    weights = np.exp([1, -127 / 128, 1])
    expected = weights @ numbers / weights.sum()
    np.testing.assert_allclose(
        np.asarray(out, np.float32), expected, rtol=0, atol=2e-3 if dtype == "bfloat16" else 1e-6
    )


@pytest.mark.parametrize("cpu", ["znver3", "znver4", "znver5", "sapphirerapids"])
@pytest.mark.parametrize("int8", [False, True])
def test_whatever_the_processor_fetches_and_copies(cpu: str, int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name; of rows that lie together, and of such as are far apart."""
    monkeypatch.setattr(launch, "this_machine", lambda: without(this_machine(), cpu=cpu, amx=False))
    for layout in ("BNSD", "BSND"):
        case = Case(
            layout=layout,
            dtype="bfloat16",
            int8=int8,
            heads=72,
            kv_heads=8,
            head_dim=70,
            capacity=200,
            batch=4,
            lengths=(200, 129, 1, 0),
        )
        assert_out_close(case)


@pytest.mark.parametrize("group", [3, 7, 11])
@pytest.mark.parametrize("int8", [False, True])
def test_one_head_more_is_multiplied(group: int, int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three, seven or eleven is there twice, with its bias, in heads by themselves and read together.

    It is masked too: a NaN there has no influence.
    """
    monkeypatch.setattr(launch, "this_machine", lambda: without(this_machine(), cpu="znver5", amx=False))
    for layout in ("BNSD", "BSND"):
        case = Case(
            layout=layout,
            heads=4 * group,
            kv_heads=4,
            head_dim=144,
            capacity=300,
            lengths=(300, 0),
            int8=int8,
            mask="4d",
            bias="batch",
        )
        (out, lse), (query, key, value), kwargs = call_numba(case)
        assert_close(out, lse, (query, key, value), kwargs)
        if not int8:
            shape = (2, 1, -1, 1) if layout == "BNSD" else (2, -1, 1, 1)
            soiled = np.where(kwargs["atten_mask"].reshape(shape), np.float32(np.nan), value)
            again, _ = incre_flash_attention(query, key, soiled, return_lse=True, **kwargs)
            np.testing.assert_array_equal(again, out)


@pytest.mark.parametrize(
    ("cpu", "lanes", "amx", "expected"),
    [
        ("znver5", 16, False, {3: 4, 7: 8, 11: 12, 6: 6, 8: 8}),
        ("znver4", 16, False, {3: 3, 7: 8, 11: 11, 15: 16}),
        ("znver3", 8, False, {3: 4, 7: 8, 2: 2}),
        ("sapphirerapids", 16, True, {7: 7}),
    ],
)
def test_how_many_heads_are_multiplied(cpu: str, lanes: int, amx: bool, expected: dict[int, int]) -> None:
    machine = without(this_machine(), cpu=cpu, lanes=lanes, amx=amx)
    form = format_of("bfloat16", False, machine, narrow=True, group=8)
    group = next(tile for tile in numbers(form, machine) if tile.name == "group")
    engine = build.native_engine(llvm.parse_assembly(str(module_of({"group": group}, machine))), this_machine())
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("group"))
    assert {queries: function(queries) for queries in expected} == expected


@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_eight_heads_side_by_side(dtype: str, head_dim: int) -> None:
    """The largest part of a group, whole vectors of a row and what is left of it; bfloat16 is converted."""
    case = Case(
        dtype="float32" if dtype == "int8" else dtype,
        int8=dtype == "int8",
        heads=24,
        kv_heads=2,
        head_dim=head_dim,
        capacity=90,
        inner_precise=0,
    )
    (out, lse), args, kwargs = call_numba(case)
    assert_close(out, lse, args, kwargs)


MATRICES = [
    SMALL[0],
    SMALL[2],
    SMALL[4],
    *FEWER_DIGITS,
    Case(dtype="bfloat16", heads=40, kv_heads=2, capacity=200, head_dim=80, block=16, lengths="zero"),
    Case(int8=True, dtype="bfloat16", layout="BSND", heads=44, kv_heads=2, capacity=333, head_dim=200, padding=17),
    Case(int8=True, heads=16, kv_heads=2, batch=3, capacity=5000, head_dim=64, lengths=(5000, 3, 2777)),
    Case(dtype="bfloat16", heads=8, kv_heads=1, batch=3, capacity=5000, head_dim=128, lengths=(5000, 3, 2777)),
]


@pytest.mark.skipif(not this_machine().amx, reason="this processor has no AMX")
@pytest.mark.parametrize("narrow", [False, True], ids=["lse", "no lse"])
@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_matrices(case: Case, narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size of group, by AMX."""
    monkeypatch.setattr(formats, "LEAST_AMX_GROUP", dict.fromkeys(formats.LEAST_AMX_GROUP, 1))
    chosen: list[Format] = []
    monkeypatch.setattr(launch, "format_of", lambda *args: chosen.append(format_of(*args)) or chosen[-1])
    if narrow:
        assert_out_close(case)
    else:
        (out, lse), args, kwargs = call_numba(case)
        assert_close(out, lse, args, kwargs)
    assert {form.amx for form in chosen} == {True}


@pytest.mark.parametrize("lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("group", [1, 4, 9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_in_their_own_elements_only(dtype: str, group: int, lse: bool) -> None:
    """Also where a product has the element beside it, times 0."""
    batch, kv_heads, length, head_dim = 2, 2, 150, 70
    rng = np.random.default_rng(5)
    query, key, value = (
        jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
        for shape in ((batch, kv_heads * group, 1, head_dim), *[(batch, kv_heads, length, head_dim)] * 2)
    )
    holes = {(0, 0, 70, 5): jnp.inf, (0, 1, 3, head_dim - 1): jnp.nan, (1, 0, length - 1, 0): -jnp.inf}
    broken = value
    for place, hole in holes.items():
        broken = broken.at[place].set(hole)

    @jax.jit
    def run(value: jax.Array) -> tuple[jax.Array, ...]:
        kwargs = dict(num_heads=kv_heads * group, num_key_value_heads=kv_heads, input_layout="BNSD", scale_value=0.1)
        result = incre_flash_attention(query, key, value, implementation="numba", return_lse=lse, **kwargs)
        return result if lse else (result,)

    expected, found = (
        np.array(run(x)[0], np.float32).reshape(batch, kv_heads, group, head_dim) for x in (value, broken)
    )
    for b, head, _, element in holes:
        assert not np.isfinite(found[b, head, :, element]).any()
        expected[b, head, :, element] = found[b, head, :, element]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.skipif(not this_machine().amx, reason="this processor has no AMX")
def test_matrices_of_others_are_left_as_they_were() -> None:
    """Some libraries configure AMX once for all calls on a thread."""
    machine = this_machine()
    steps = amx.make(format_of("int8", False, machine, group=8))
    for name in ("ldtilecfg", "sttilecfg"):
        steps[name] = Tile(name, 1, lambda v, address, name=name: amx._sizes(v, name, address))
    engine = build.native_engine(llvm.parse_assembly(str(module_of(steps, machine))), machine)

    def run(name: str, *arguments: int) -> None:
        kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(arguments))
        kind(engine.get_function_address(name))(*arguments)

    sizes = np.zeros(64, np.uint8)
    sizes[0], sizes[16:20:2], sizes[48:50] = 1, 32, 5
    found, now = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
    for before in (sizes, np.zeros(64, np.uint8)):
        run("ldtilecfg", before.ctypes.data)
        run("configure", 8, found.ctypes.data)
        run("sttilecfg", now.ctypes.data)
        assert (now != before).any()
        run("reset", found.ctypes.data)
        run("sttilecfg", now.ctypes.data)
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_compiles_for_amx(dtype: str, narrow: bool) -> None:
    machine = describe("sapphirerapids", AMX, "x86_64")
    form = format_of(dtype, False, machine, narrow, group=8)
    code = build.compile_object(form, machine, "x86_64-unknown-linux-gnu")
    assert code[:4] == b"\x7fELF"
    # The number of the product's instruction, behind the prefix that says which kind of numbers it takes.
    assert re.search({"bfloat16": rb"\xc4\xe2.\x5c", "int8": rb"\xc4\xe2.\x5e"}[dtype], code, re.DOTALL)


@pytest.mark.parametrize(
    ("cpu", "features"),
    [("haswell", AVX2), ("skylake-avx512", AVX512 | {"avx512vnni": False, "avx512bf16": False})],
    ids=["haswell", "skylake"],
)
def test_compiles_for_x86_without_narrow_products(cpu: str, features: dict[str, bool]) -> None:
    machine = describe(cpu, features, "x86_64")
    target = build._target(machine, "x86_64-unknown-linux-gnu")
    words, converted = (format_of("int8", False, machine, narrow=narrow) for narrow in (True, False))
    for form in (words, converted):
        module = llvm.parse_assembly(str(module_of(form.tiles(machine), machine)))
        build._optimise(module, target)
        assert ("vpmaddwd" in target.emit_assembly(module)) == form.words
    for form in (words, format_of("bfloat16", False, machine)):
        assert build.compile_object(form, machine, "x86_64-unknown-linux-gnu")[:4] == b"\x7fELF"


@pytest.mark.parametrize("group", [1, 5, 8])
@pytest.mark.parametrize("int8,dtype", [(True, "bfloat16"), (True, "float32"), (False, "bfloat16"), (False, "float16")])
def test_every_length_up_to_two_tiles(int8: bool, dtype: str, group: int) -> None:
    tile = format_of("int8" if int8 else dtype, False, this_machine(), group=group).tile
    case = Case(batch=tile, heads=group, kv_heads=1, head_dim=36, capacity=2 * tile, int8=int8, dtype=dtype)
    args, kwargs = dataclasses.replace(case, lengths="ragged").inputs()
    lengths = np.arange(1, 2 * tile, 2, dtype=np.int32)
    lengths[:4] = (tile // 2, tile, tile * 3 // 2, 2 * tile)
    kwargs |= dict(actual_seq_lengths=lengths)
    out = incre_flash_attention(*args, implementation="numba", **kwargs)
    expected, _ = run_reference(args, kwargs)
    largest = np.maximum(1, np.abs(expected).max(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(out, np.float64) / largest, expected / largest, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("factor,more", [(1.0, 0.0), (2.0**24 - 1, 0.0), (2.0**16 - 1, 2.0**23)])
@pytest.mark.parametrize("terms,error", [(EXP_TERMS, 8e-8), (EXP_TERMS_OF_16_BITS, 5.5e-6)])
def test_exp(terms: tuple[float, ...], error: float, factor: float, more: float) -> None:
    """To within what rounding its argument changes; 0 far below, and of nothing seen; NaN of NaN."""
    machine = this_machine()
    module = ir.Module("exp")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64, I64, I64]), "exp")
    builder = ir.IRBuilder(function.append_basic_block())
    v = Vectors(builder, machine)
    source, to, count = function.args
    with v.loop(count) as i:
        x = v.load(v.address(source, i, 4 * v.lanes), v.floats)
        found = v.exp(x, terms, factor, v.constant(v.floats, more) if more else None)
        v.store(found, v.address(to, i, 4 * v.lanes))
    builder.ret_void()
    engine = build.native_engine(llvm.parse_assembly(str(module)), machine)
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(engine.get_function_address("exp"))
    special = np.array([0, -0.0, -np.inf, np.nan, -87.7, -1e30, -3e38, -1e-30], np.float32)
    smallest = -np.linspace(87.7, 87.3, 16, dtype=np.float32)  # from 0 to the first normal numbers
    x = np.concatenate([special, smallest, -np.geomspace(1e-6, 87.2, 4072, dtype=np.float32)])
    found = np.empty_like(x)
    run(x.ctypes.data, found.ctypes.data, len(x) // v.lanes)
    np.testing.assert_array_equal(found[:8], factor * np.array([1, 1, 0, np.nan, 0, 0, 0, 1], np.float32) + more)
    assert (found[8:24] - more).min() >= 0
    assert (found[8:24] - more).max() <= factor * 1.3e-38
    x, found = x[24:], found[24:]
    exact = factor * np.exp(x.astype(np.float64))
    rounded = 0.5 if more else 0.0  # of which a float32 near 2**23 keeps no fraction
    allowed = rounded + exact * (error + 3e-9 * np.abs(x))
    np.testing.assert_array_less(np.abs(found.astype(np.float64) - more - exact), allowed)


def test_a_masked_value_that_one_head_wants_and_another_does_not() -> None:
    """All that the mask leaves to the last heads has a bias below it, so that they want what it hides."""
    case = Case(heads=4, kv_heads=2, capacity=70, layout="BSND", lengths=None)
    args, kwargs = case.inputs()
    mask = np.zeros((2, 1, 1, 70), bool)
    mask[..., 10:40] = True
    bias = np.where(mask, 0, [[[0.0]], [[0.0]], [[-1e13]], [[-1e13]]]).astype(np.float32)
    kwargs |= dict(atten_mask=mask, pse_shift=bias)
    out, lse = incre_flash_attention(*args, implementation="numba", return_lse=True, **kwargs)
    assert_close(out, lse, args, kwargs)


def test_large_scores_do_not_overflow_the_digits() -> None:
    """A query whose largest element is far from the others, and weights of exactly one."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 2, 1, 64)).astype(np.float32)
    query[..., 0] = 1e4
    key = rng.integers(-128, 128, (1, 2, 90, 64)).astype(np.int8)
    kwargs = dict(
        num_heads=2, num_key_value_heads=2, input_layout="BNSD", antiquant_scale=np.array([1e-4, 1e-2], np.float32)
    )
    out, lse = incre_flash_attention(query, key, key, implementation="numba", return_lse=True, **kwargs)
    assert_close(out, lse, (query, key, key), kwargs)


def test_nan_in_the_query_reaches_the_output() -> None:
    """Integers have no NaN: it must not be lost in the digits."""
    query = np.full((1, 2, 1, 16), np.nan, np.float32)
    query[:, 1] = 1.0
    key = np.ones((1, 2, 40, 16), np.int8)
    out, lse = incre_flash_attention(
        query,
        key,
        key,
        num_heads=2,
        num_key_value_heads=2,
        input_layout="BNSD",
        antiquant_scale=np.ones(2, np.float32),
        implementation="numba",
        return_lse=True,
    )
    assert np.isnan(np.asarray(out[:, 0])).all()
    assert np.isnan(np.asarray(lse[:, 0])).all()
    np.testing.assert_allclose(np.asarray(out[:, 1]), 1.0, rtol=1e-6)


def test_many_programs_at_once() -> None:
    """Several Python threads, each with a program of its own, whose calls share XLA's threads."""
    cases = [Case(seed=i, batch=2, head_dim=32, capacity=4000, lengths=None, dtype="bfloat16") for i in range(4)]
    expected = [call_numba(case)[0] for case in cases]
    inputs = [case.inputs() for case in cases]
    run = jax.jit(
        lambda q, k, v: incre_flash_attention(q, k, v, implementation="numba", return_lse=True, **inputs[0][1])
    )
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(30):
            out, lse = run(*inputs[i][0])
            same = np.array_equal(np.asarray(out), np.asarray(expected[i][0]))
            if not same or not np.array_equal(np.asarray(lse), np.asarray(expected[i][1])):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_in_a_scan() -> None:
    args, kwargs = Case(capacity=64, lengths=None).inputs()
    kwargs |= dict(implementation="numba")

    def step(query: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        out = incre_flash_attention(query, *args[1:], **kwargs)
        return out, out

    _, scanned = jax.jit(lambda q: jax.lax.scan(step, q, None, length=3))(args[0])
    query = jnp.asarray(args[0])
    for row in scanned:
        query = incre_flash_attention(query, *args[1:], **kwargs)
        np.testing.assert_array_equal(np.asarray(row), np.asarray(query))


def test_nothing_is_copied() -> None:
    """The program's own temporaries: the query in float32, and no more than a few of its size."""
    args, kwargs = Case(
        batch=2, heads=8, kv_heads=8, head_dim=64, capacity=4096, dtype="bfloat16", lengths=None
    ).inputs()
    run = jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, implementation="numba", **kwargs))
    memory = run.lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.02 * args[1].nbytes


def test_exported_programs_need_nothing_of_ours() -> None:
    args, kwargs = Case(capacity=40).inputs()
    run = jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, **kwargs))
    assert "custom_call @jax_ifa_" in run.lower(*args).as_text()
    exported = jax.export.export(run, platforms=["cpu"])(*args)
    assert "custom_call @jax_ifa_" not in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(np.asarray(again.call(*args)), np.asarray(run(*args)), atol=2e-6)


def test_by_name_it_is_for_cpus_only() -> None:
    args, kwargs = Case().inputs()
    run = jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, implementation="numba", **kwargs))
    with pytest.raises(NotImplementedError, match="runs on CPUs only"):
        run.trace(*args).lower(lowering_platforms=("tpu",))


def test_a_numba_that_does_not_work_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise ImportError("Numba needs NumPy 2.3 or less")

    monkeypatch.setattr(launch, "registered", broken)
    args, kwargs = Case(capacity=41).inputs()
    run = jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, return_lse=True, **kwargs))
    with pytest.warns(RuntimeWarning, match=r"could not be built.*NumPy 2\.3.*implementation='xla'"):
        out, lse = run(*args)
    assert_close(out, lse, args, kwargs)
    with pytest.raises(ImportError, match="Numba needs"):
        call_numba(Case(capacity=41))


class TestWithoutNumba:
    @pytest.fixture(autouse=True)
    def _absent(self, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(numba_kernels.importlib.util, "find_spec", lambda name: None)
        numba_kernels.missing.cache_clear()
        yield
        numba_kernels.missing.cache_clear()

    def test_by_name_it_says_what_to_install(self) -> None:
        with pytest.raises(NotImplementedError, match=r"needs numba and platformdirs.*pip install 'jax-ifa\[numba\]'"):
            call_numba(Case(capacity=43))  # a shape that no other test has traced

    def test_by_default_xla_is_used(self) -> None:
        args, kwargs = Case(capacity=37).inputs()
        run = jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, return_lse=True, **kwargs))
        assert "custom_call @jax_ifa_" not in run.lower(*args).as_text()
        assert_close(*run(*args), args, kwargs)


def in_a_process(code: str, **environment: str) -> str:
    """What Python code prints, in a process of its own with the tests' folder on its path."""
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RUN = """
import sys, jax
from cases import Case, assert_close
from jax_ifa import incre_flash_attention
def check(**fields):
    args, kwargs = Case(**fields).inputs()
    call = jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, implementation="numba", return_lse=True, **kwargs))
    assert_close(*call(*args), args, kwargs)
"""


def test_compiled_code_is_kept_for_the_next_process(tmp_path: pathlib.Path) -> None:
    code = RUN + "check()\nprint('numba_kernels.tiles' in sys.modules)"
    assert in_a_process(code, JAX_IFA_CACHE_DIR=str(tmp_path)).strip() == "True"
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("float32_")
    assert in_a_process(code, JAX_IFA_CACHE_DIR=str(tmp_path)).strip() == "False"  # not even imported


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    code = RUN + "check()\nimport numba\nprint(numba.njit(lambda x: x + 1)(1))"
    assert in_a_process(code, JAX_IFA_CACHE_DIR=str(file / "below")).strip() == "2"  # nor are others' Numba functions


def test_a_damaged_cache_is_no_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_IFA_CACHE_DIR", str(tmp_path))
    machine = this_machine()
    form = format_of("float32", False, machine)
    (tmp_path / f"{build.name_of(form, machine)}.bin").write_bytes(b"half a fi")
    assert build._object_code(form, machine)[:4] != b"half"


def test_several_devices() -> None:
    in_a_process(
        RUN
        + """
import numpy as np
from jax.sharding import Mesh, PartitionSpec as P
args, kwargs = Case(batch=4, heads=4, kv_heads=4, head_dim=64, capacity=3000, lengths=None).inputs()
mesh = Mesh(np.array(jax.devices()), ("b",))
def step(q, k, v):
    return incre_flash_attention(q, k, v, implementation="numba", return_lse=True, **kwargs)
sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P("b"),) * 3, out_specs=(P("b"), P("b"))))
for _ in range(20):
    out, lse = sharded(*args)
assert len(out.sharding.device_set) == 4
assert_close(out, lse, args, kwargs)
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )


def test_after_a_fork() -> None:
    """The child of a process that has used the kernel still gets its results, though XLA's threads are gone in it."""
    printed = in_a_process(
        RUN
        + """
import os, warnings
warnings.simplefilter("ignore")
jax.config.update("jax_cpu_enable_async_dispatch", False)  # the threads that dispatch are JAX's: they die in a fork
args, kwargs = Case(batch=2, head_dim=64, capacity=4000, lengths=None).inputs()
args = jax.device_put(args)
call = jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, implementation="numba", return_lse=True, **kwargs))
call = call.lower(*args).compile()  # compiling, too, needs threads that a child does not have
jax.block_until_ready(call(*args))
child = os.fork()
if child == 0:
    jax.block_until_ready(call(*args))
    print("child", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert_close(*call(*args), args, kwargs)
print("parent")
"""
    )
    assert printed.split() == ["child", "parent"]
