"""Which loop runs on which GPU, chosen when a program is lowered; what the kernel leaves to XLA; and its plans."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, Case, assert_close
from gpu_copies import copies, faults
from gpu_interpreter import needs_interpreter

from jax_ifa import incre_flash_attention
from jax_ifa.operands import KVView, Operands
from pallas_kernels.gpu import lowering
from pallas_kernels.gpu.hopper import launch, tuning
from pallas_kernels.gpu.hopper.plan import SHARED_MEMORY, largest_number, make_plan
from pallas_kernels.gpu.hopper.support import unsupported_reason

CASE = Case(head_dim=64, dtype="bfloat16")


@dataclasses.dataclass
class Device:
    """What a lowering knows of a device."""

    compute_capability: str | None
    device_kind: str = "some GPU"


def call_of(case: Case, implementation: str | None = None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    args, kwargs = case.inputs()
    return lambda q, k, v: incre_flash_attention(q, k, v, implementation=implementation, **kwargs), args


def operands(cache: tuple[int, ...] = (2, 2, 64, 64), dtype: str = "bfloat16", **changes: Any) -> Operands:
    pages, heads, page, dim = cache
    kv = KVView(jnp.zeros((pages, heads, page, dim), dtype), jnp.zeros((pages, heads, page, dim), dtype), None)
    kv = dataclasses.replace(kv, **{name: changes.pop(name) for name in ("table", "head_major") if name in changes})
    batch = pages if kv.table is None else kv.table.shape[0]
    query = jnp.zeros((batch, heads, changes.pop("group", 2), dim), changes.pop("query", dtype))
    edge = jnp.zeros(batch, jnp.int32)
    return Operands(query, jnp.ones(batch, jnp.float32), kv, edge, edge, **changes)


@pytest.mark.parametrize(
    "devices, partitioned, by_default, by_name",
    [
        ([Device("9.0", "NVIDIA H200")], False, "kernel", "kernel"),
        ([Device("9.0")] * 2, True, "xla", "kernel"),  # which the compiler cannot divide
        ([Device("8.0")], False, "xla", None),
        ([Device("10.0")], False, "xla", None),
        ([Device("gfx942")], False, "xla", None),
        ([Device("9.0"), Device("8.0")], False, "xla", "kernel"),
        ([Device(None)], False, "xla", "kernel"),  # lowered on a machine without a GPU: nothing is known
        ([], False, "xla", "kernel"),
    ],
)
def test_the_choice(devices: list[Device], partitioned: bool, by_default: str, by_name: str | None) -> None:
    loops = {"kernel": lowering._hopper, "xla": lowering._xla}
    attend, kind = lowering.choose(devices, partitioned=partitioned, or_xla=True)
    assert attend is loops[by_default]
    assert kind == (devices[0].device_kind if by_default == "kernel" else None)
    if by_name is None:
        with pytest.raises(NotImplementedError, match=r"compute capability 9.0 \(Hopper\), and this program is for"):
            lowering.choose(devices, partitioned=partitioned, or_xla=False)
    else:
        assert lowering.choose(devices, partitioned=partitioned, or_xla=False)[0] is loops[by_name]


@needs_interpreter
@pytest.mark.parametrize("implementation", [None, "mosaic_gpu", "xla"])
def test_lowering_for_cuda_without_a_gpu(implementation: str | None) -> None:
    """By default for any GPU; by name for Hopper."""
    call, args = call_of(CASE, implementation)
    text = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in text) == (implementation == "mosaic_gpu")


@needs_interpreter
def test_a_gpu_that_is_known_to_be_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = lowering.choose
    monkeypatch.setattr(lowering, "choose", lambda _, **kwargs: choose([Device("9.0", "NVIDIA H200")], **kwargs))
    call, args = call_of(CASE)
    lowered = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    call, args = call_of(Case(dtype="float32"))  # which the kernel does not read
    assert "mosaic_gpu" not in jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_an_export_for_every_platform_runs_here() -> None:
    call, args = call_of(CASE)
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
    exported = jax.export.export(jax.jit(call), platforms=["cpu", "cuda", "rocm"])(*specs)
    assert "mosaic_gpu" not in exported.mlir_module()
    # An exported program runs XLA's loop, this process perhaps the CPU kernels, each within TOLERANCE of the truth: the
    # two may be rounded to neighbours, up to 2**-7 of the largest apart.
    out, expected = (np.asarray(x, np.float32) for x in (exported.call(*args), jax.jit(call)(*args)))
    np.testing.assert_allclose(out, expected, rtol=0, atol=2 * TOLERANCE[CASE.dtype] * np.abs(expected).max())


def test_nothing_but_names_is_imported_or_traced_for_other_platforms() -> None:
    call, args = call_of(CASE)
    assert "pallas" not in str(jax.make_jaxpr(call)(*args))


@pytest.mark.parametrize(
    "given, reason",
    [
        (dict(dtype="float32"), "no float32 products"),
        (dict(query="float32"), "take a query of its dtype, not float32"),
        (dict(cache=(2, 2, 64, 72)), "D=72 is neither"),
        (dict(cache=(2, 2, 64, 80), dtype="int8", query="float32"), None),
        (dict(cache=(1, 1, 20, 64)), r"B \* K \* S = 20 is not made of them"),
        (dict(cache=(1, 8, 20, 64), head_major=True), None),
        (dict(cache=(2, 2, 20, 64), table=jnp.zeros((1, 2), jnp.int32)), "pages of 20 are not made of them"),
    ],
)
def test_what_it_leaves_to_xla(given: dict[str, Any], reason: str | None) -> None:
    found = unsupported_reason(operands(**given))
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found), found


@pytest.mark.parametrize("case", [Case(dtype="float32"), Case(head_dim=20, dtype="bfloat16")], ids=str)
def test_by_name_an_error_with_the_reason(case: Case) -> None:
    call, args = call_of(case, "mosaic_gpu")
    with pytest.raises(
        NotImplementedError, match=r"implementation='mosaic_gpu' cannot do this call: .*(D=20|float32|JAX)"
    ):
        call(*args)
    by_default = Case(**dataclasses.asdict(case))
    args, kwargs = by_default.inputs()
    assert_close(*incre_flash_attention(*args, **kwargs, return_lse=True), args, kwargs)


@st.composite
def calls(draw: st.DrawFn) -> Operands:
    """Operands of any shape, as shapes only."""
    dtype = draw(st.sampled_from(["bfloat16", "float16", "int8"]))
    query = dtype if dtype != "int8" else draw(st.sampled_from(["bfloat16", "float32"]))
    group, heads = draw(st.integers(1, 64)), draw(st.sampled_from([1, 2, 3, 8, 32]))
    batch, dim = draw(st.sampled_from([1, 2, 8, 33, 256])), 16 * draw(st.integers(1, 32))
    capacity = draw(st.sampled_from([8, 24, 1028, 4096, 32768, 262144]))
    head_major, paged = draw(st.booleans()), draw(st.booleans())
    page = draw(st.sampled_from([16, 32, 48, 128, 512])) if paged else capacity
    pages = batch * -(-capacity // page) + 3 * paged
    cache = (pages, heads, page, dim) if head_major else (pages, page, heads, dim)
    struct = jax.ShapeDtypeStruct
    key = struct(cache, jnp.dtype(dtype))
    table = struct((batch, -(-capacity // page)), jnp.dtype("int32")) if paged else None
    rows = draw(st.sampled_from([1, batch]))
    return Operands(
        query=struct((batch, heads, group, dim), jnp.dtype(query)),
        scale=struct((1,), jnp.dtype("float32")),
        kv=KVView(key, key, table, head_major=head_major),
        start=struct((1,), jnp.dtype("int32")),
        stop=struct((batch,), jnp.dtype("int32")),
        mask=struct((rows, capacity), jnp.dtype("bool")) if draw(st.booleans()) else None,
        bias=struct((rows, heads, group, capacity), jnp.dtype(query)) if draw(st.booleans()) else None,
        precise=draw(st.booleans()),
        out_dtype=jnp.dtype(query),
    )


@hypothesis.settings(max_examples=300)
@hypothesis.given(calls())
def test_every_plan_fits(call: Operands) -> None:
    """Shared memory, whole groups of rows, what the driver accepts of copies, and small results of splits."""
    if unsupported_reason(call) is not None:
        return
    plan = make_plan(call, None)
    assert plan.shared_memory <= SHARED_MEMORY
    assert plan.tile % 64 == plan.padded % 64 == plan.columns % 8 == plan.tile % plan.chunk == 0
    assert plan.blocks * plan.columns >= plan.group
    assert plan.stages >= 1
    rows = [0 if array is None else array.shape[0] for array in (call.mask, call.bias)]
    made = copies(plan, value_pages=plan.pages, mask_rows=rows[0], bias_rows=rows[1], width=call.kv.capacity)
    assert len(made) <= 8  # descriptors are parameters of the kernel
    for copy in made:
        assert not faults(copy), copy

    assert 1 <= plan.splits <= max(1, -(-call.kv.capacity // plan.tile))
    cache_bytes = 2 * math.prod(call.kv.key.shape) * plan.key_dtype.itemsize
    if plan.splits > 1 and plan.splits * plan.result_bytes > 0.02 * cache_bytes:
        # More only where multiprocessors had no thread block otherwise: the last split begins before there are 132.
        assert plan.items * (plan.splits - 1) < 132


def test_splits_fill_the_device_where_the_batch_does_not() -> None:
    long = (1, 8, 1 << 16, 128)
    alone = make_plan(jax.eval_shape(lambda: operands(long)), None)
    assert 132 <= alone.items * alone.splits <= 2 * 132
    for group, dtype in itertools.product((1, 8, 64), ("bfloat16", "int8")):
        query = "float32" if dtype == "int8" else dtype
        single = jax.eval_shape(lambda: operands((1, 1, 1 << 17, 128), dtype, query=query, group=group))  # noqa: B023
        plan = make_plan(single, None)
        assert plan.items * plan.splits >= 128  # of 132 multiprocessors: shares of whole tiles
    many = make_plan(jax.eval_shape(lambda: operands((256, 8, 1 << 10, 128))), None)
    assert many.splits == 1
    few = make_plan(jax.eval_shape(lambda: operands((8, 8, 1 << 12, 128), group=4)), None)
    assert few.splits * few.result_bytes < 0.02 * 2 * 8 * 8 * (1 << 12) * 128 * 2


def test_int8_digits_are_the_query() -> None:
    query = np.random.default_rng(0).normal(size=(3, 8, 64)).astype(np.float32)
    query[0, 0] = 0.0
    digits, top = launch.int8_digits(jnp.asarray(query), 3)
    scale = jnp.where(top == 0, 1.0, top / largest_number(3))  # as the kernel, but for the division's last bit
    number = sum(np.asarray(digit, np.float64) * 254.0 ** (2 - i) for i, digit in enumerate(digits))
    error = np.abs(number * np.asarray(scale, np.float64)[..., None] - query).max(axis=-1)
    assert np.all(error <= 2.0**-23 * np.abs(query).max(axis=-1))


def test_tuning_file() -> None:
    """Every entry is complete, and every class has a name that shapes have."""
    names = {
        tuning.shape_class(dtype=jnp.dtype(dtype), head_dim=dim, group=group)
        for dtype in ("int8", "bfloat16")
        for dim in range(1, 513)
        for group in range(1, 65)
    }
    for device in tuning.table().values():
        assert set(device["classes"]) <= names
        for name in names:
            merged = tuning.Tuning(**device["device"] | device["classes"].get(name, {}))
            assert merged.tile % 64 == 0
    kinds = [kind for device in tuning.table().values() for kind in device["kinds"]]
    assert len(kinds) == len(set(kinds))
