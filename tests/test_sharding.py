"""Inside `jax.shard_map`, with its checks on: over batch, heads and positions, forward and back."""

import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest
from cases import Case
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jax_ifa import compat, incre_flash_attention

ON_FOUR_DEVICES = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from cases import Case, assert_close
from jax.sharding import AxisType, PartitionSpec as P
from jax_ifa import incre_flash_attention, merge_all

implementation = None if sys.argv[1] == "None" else sys.argv[1]
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
(q, k, v), _ = Case(batch=4, heads=8, kv_heads=4, head_dim=16, capacity=64, lengths=None).inputs()
lengths = jnp.array([3, 64, 0, 20], jnp.int32)
attend = functools.partial(
    incre_flash_attention, input_layout="BNSD", scale_value=0.25, return_lse=True, implementation=implementation
)
whole = dict(num_heads=8, num_key_value_heads=4, input_layout="BNSD", scale_value=0.25)


def over(specs, out_specs, heads, kv_heads):
    def step(q, k, v, lengths):
        return attend(q, k, v, actual_seq_lengths=lengths, num_heads=heads, num_key_value_heads=kv_heads)
    return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out_specs)


def positions(q, k, v, lengths):
    here = 16 * jax.lax.axis_index("x")
    out, lse = attend(q, k, v, actual_seq_lengths=jnp.clip(lengths - here, 0, 16), num_heads=8, num_key_value_heads=4)
    parts = jax.lax.all_gather((out[..., 0, :], lse[..., 0]), "x")
    out, lse = merge_all(*parts)
    return out[None, ..., None, :], lse[None, ..., None]


x, heads = P("x"), P(None, "x")
by_positions = jax.shard_map(
    positions, mesh=mesh, in_specs=(P(), P(None, None, "x"), P(None, None, "x"), P()), out_specs=(x, x)
)
ways = {
    "batch": over((x, x, x, x), (x, x), 8, 4),
    "heads": over((heads, heads, heads, P()), (heads, heads), 2, 1),
    "queries of one shared cache": over((x, P(), P(), P()), (x, x), 8, 4),
    "positions": lambda *args: jax.tree.map(lambda part: part[2], by_positions(*args)),
}
for name, way in ways.items():
    args = (q, k[:1], v[:1], lengths[1:2]) if "shared" in name else (q, k, v, lengths)
    kv = (jnp.tile(k[:1], (4, 1, 1, 1)), jnp.tile(v[:1], (4, 1, 1, 1))) if "shared" in name else (k, v)
    known = dict(actual_seq_lengths=[64] * 4 if "shared" in name else lengths.tolist(), **whole)
    assert_close(*jax.jit(way)(*args), (q, *kv), known)
    if name != "positions":
        slope = jax.jit(jax.grad(lambda q, k, v: way(q, k, v, args[3])[0].sum(), argnums=(0, 1, 2)))(*args[:3])
        plain = functools.partial(incre_flash_attention, implementation=implementation, **known)
        fit = lambda a: jnp.broadcast_to(a, (4, *a.shape[1:]))
        alone = jax.grad(lambda q, k, v: plain(q, fit(k), fit(v)).sum(), argnums=(0, 1, 2))(*args[:3])
        for got, want in zip(slope, alone):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    print(name)
"""


@pytest.mark.parametrize("implementation", [None, "xla", "numba"])
def test_on_four_devices(implementation: str | None) -> None:
    """Results and gradients, with the types that JAX's checks ask of them."""
    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
    }
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(implementation)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["batch", "heads", "queries of one shared cache", "positions"]


@pytest.mark.parametrize(
    "platform, implementation",
    [("tpu", None), ("tpu", "mosaic_tpu"), ("tpu", "xla"), ("cuda", None), ("cuda", "mosaic_gpu")],
)
@pytest.mark.parametrize("checks", [True, False])
def test_lowered_for_accelerators(platform: str, implementation: str | None, checks: bool) -> None:
    """The kernels are part of a program that is divided by hand, with JAX's checks or without."""
    if implementation == "mosaic_gpu" and not compat.GPU_KERNEL_TESTED:
        pytest.skip("the GPU kernel has been tested on JAX 0.11.2 and newer only")
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    case = Case(batch=4, kv_heads=2, head_dim=128, capacity=1024, layout="BSH", dtype="bfloat16", lengths=None)
    args, kwargs = case.inputs()
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]

    def step(*args: Any) -> Any:
        return incre_flash_attention(*args, implementation=implementation, **kwargs)

    divided = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=checks))
    program = divided.trace(*specs).lower(lowering_platforms=(platform,)).as_text()
    kernel = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}[platform]
    # By default a CUDA program gets the kernel only where a Hopper GPU is known to be there.
    assert (kernel in program) == (implementation != "xla" and (platform, implementation) != ("cuda", None))
