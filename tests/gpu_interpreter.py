"""Running the GPU kernel on the CPU, under JAX's GPU interpreter."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ifa import incre_flash_attention
from jax_ifa.compat import GPU_KERNEL_TESTED
from pallas_kernels.gpu.hopper import plan
from pallas_kernels.gpu.hopper.tuning import tuning_for

needs_interpreter = pytest.mark.skipif(
    not GPU_KERNEL_TESTED, reason="the GPU kernel refuses a JAX on whose interpreter it has not been tested"
)

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""A program of callbacks runs once: it takes longer to compile than to run."""


def small_tiles(monkeypatch: pytest.MonkeyPatch, *, splits: int = 2, stages: int = 2, tile: int = 64) -> None:
    """Tiles of 64 positions and two splits, so that a few hundred positions make several of each."""

    def small(*args: Any, **kwargs: Any) -> Any:
        changed = dict(tile=tile, stages=stages, max_splits=splits, overhead_tiles=0, merge_tiles=0)
        return dataclasses.replace(tuning_for(*args, **kwargs), multiprocessors=1 << 20, **changed)

    monkeypatch.setattr(plan, "tuning_for", small)


def interpret(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, function: Callable[..., Any] | None = None, **parameters: Any
) -> tuple[Any, Any]:
    """(out, lse) of a call of the public function on the kernel; `parameters` are those of `InterpretGPUParams`."""

    def call(query: Any, key: Any, value: Any) -> Any:
        return incre_flash_attention(query, key, value, implementation="mosaic_gpu", return_lse=True, **kwargs)

    jax.clear_caches()  # what was traced with other tiles, or planted faults, must not be used again
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**parameters)):
        return jax.block_until_ready(jax.jit(function or call, compiler_options=QUICKLY)(*args))
