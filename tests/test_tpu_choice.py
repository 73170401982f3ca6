"""When the TPU kernel is taken, when XLA's loop, and what is said where the kernel was asked for and cannot."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from cases import Case
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tpu_compile import Call

from jax_ifa import incre_flash_attention
from pallas_kernels.tpu.tuning import tuning_for

CALL = Call(implementation=None)


def lowered(call: Call, platform: str = "tpu", wrap: Any = lambda f: f, **jit: Any) -> str:
    """The program of a call, lowered for a platform that this machine need not have."""
    (query, key, value), arrays = call.specs()
    return (
        jax.jit(wrap(call.function()), **jit)
        .trace(query, key, value, arrays)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )


def has_kernel(program: str) -> bool:
    return "tpu_custom_call" in program


@pytest.mark.parametrize("call", [CALL, dataclasses.replace(CALL, block=32, cache="int8", mask=True)], ids=str)
def test_the_kernel_is_the_default_on_tpus_only(call: Call) -> None:
    assert has_kernel(lowered(call))
    for platform in ("cpu", "cuda", "rocm"):
        assert not has_kernel(lowered(call, platform))


def test_the_kernel_is_taken_where_python_numbers_have_64_bits() -> None:
    with jax.enable_x64(True):
        assert has_kernel(lowered(dataclasses.replace(CALL, block=16, mask=True, bias=True)))


def test_what_the_kernel_cannot_do_falls_through_to_xla() -> None:
    assert not has_kernel(lowered(dataclasses.replace(CALL, cache="float16", query="float16")))


def test_a_program_that_xla_distributes_gets_xla_s_loop() -> None:
    """A kernel cannot be cut up automatically; inside `shard_map` nobody has to."""
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    over_batch = dict(in_shardings=NamedSharding(mesh, P("x")), out_shardings=NamedSharding(mesh, P("x")))
    assert not has_kernel(lowered(CALL, **over_batch))
    with pytest.raises(NotImplementedError, match=r"automatically partitioned.*shard_map"):
        lowered(dataclasses.replace(CALL, implementation="mosaic_tpu"), **over_batch)
    by_hand = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    assert has_kernel(lowered(CALL, wrap=by_hand, **over_batch))


UNSUPPORTED = {
    "float16": (dict(dtype="float16"), "Mosaic cannot load float16 on any TPU; use bfloat16"),
    "narrow heads, head by head": (
        dict(block=16, head_dim=64),
        r"pages of 16 positions with D=64 and K=2 .*use \(blocks, P, K\*D\) pages with K\*D a multiple of 128",
    ),
    "narrow rows": (dict(block=16, head_dim=16, layout="BSH"), r"pages of 16 positions with D=16 and K=2 block by"),
    "rows that split heads": (dict(head_dim=7, layout="BSH"), r"rows of K\*D=14 numbers .* D is a multiple of 8"),
    "a bias over heads in a tile": (
        dict(head_dim=128, heads=8, kv_heads=8, layout="BSND", bias="batch"),
        r"a bias would have to be spread over the heads of a \(B, S, K, D\) cache",
    ),
    "part of a tile": (
        dict(head_dim=128, heads=8, kv_heads=8, capacity=50, layout="BSND"),
        r"where S\*K is a multiple of 32",
    ),
    "heads in a tile": (dict(head_dim=128, layout="BSND"), r"\(B, S, K, D\) cache with D a multiple of 128 .*BSH"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_reasons(name: str) -> None:
    fields, reason = UNSUPPORTED[name]
    args, kwargs = Case(**fields).inputs()

    def call(*args: Any) -> Any:
        return incre_flash_attention(*args, implementation="mosaic_tpu", **kwargs)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    with pytest.raises(NotImplementedError, match=f"implementation='mosaic_tpu' cannot do this call: .*{reason}"):
        jax.eval_shape(call, *shapes)


def test_reasons_that_only_a_vmap_makes() -> None:
    (query, key, value), kwargs = Case(head_dim=128, lengths=None, capacity=20).inputs()

    def call(key: Any) -> Any:
        return incre_flash_attention(query, key, value, implementation="mosaic_tpu", **kwargs)

    with pytest.raises(NotImplementedError, match="keys and values have different block tables"):
        jax.eval_shape(jax.vmap(call), np.stack([key, key]))

    def shared(query: Any) -> Any:
        return incre_flash_attention(query, key, value, implementation="mosaic_tpu", **kwargs)

    with pytest.raises(NotImplementedError, match="copies begin at multiples of 16 positions, and pages of 20 do not"):
        jax.eval_shape(jax.vmap(shared), np.stack([query, query]))


@pytest.mark.parametrize("kind, cores", [("TPU v4", 2), ("TPU v5p", 2), ("TPU v6 lite", 1), ("TPU7x", 1)])
def test_tuning_by_device_kind(kind: str, cores: int) -> None:
    assert tuning_for(kind).cores == cores


def test_unknown_generations_get_the_default() -> None:
    assert tuning_for("TPU v99") == tuning_for(None) == tuning_for("default")
