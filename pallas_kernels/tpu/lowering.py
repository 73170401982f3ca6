"""A primitive that waits for its lowering to choose tile sizes.

While a function is traced, nothing says which TPU it will be compiled for, and asking which devices this machine has
would give the wrong answer when compiling for another. The lowering knows the devices it is for: so the kernel's
program is traced then, with that generation's tuning, or with the default's where even then no TPU is known (an export
from another machine). A program that is lowered for other platforms only never traces the kernel, nor imports Pallas.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import mlir

from jax_ifa import xla
from jax_ifa.lowering import bind, loop_primitive, lower_as, partitioned_by_xla
from jax_ifa.operands import Operands
from pallas_kernels.tpu.tuning import tuning_for


def _interpreter_effects() -> Any:
    """What a kernel does besides its result: nothing on a TPU, but JAX's TPU interpreter calls back to the host.

    A program that has not imported Pallas cannot have asked for the interpreter.
    """
    if "jax.experimental.pallas.tpu" not in sys.modules:
        return set()
    from jax.experimental import pallas as pl

    of_no_device = jax.core.ShapedArray((), jnp.dtype(jnp.float32)).manual_axis_type  # a `shard_map` wants to be told
    tile = jax.ShapeDtypeStruct((8, 128), jnp.float32, manual_axis_type=of_no_device)
    return jax.make_jaxpr(pl.pallas_call(lambda x, y: None, out_shape=tile))(tile).effects


attend_p = loop_primitive("incre_flash_attention_tpu", lambda operands, or_xla: _interpreter_effects())


def attend_for_any_generation(operands: Operands, *, or_xla: bool) -> tuple[Array, Array]:
    """The decode loop, tuned when it is lowered.

    A program whose arrays XLA distributes over devices by itself, outside of any `shard_map`, cannot contain the
    kernel, and only the lowering sees that. There `or_xla` lowers XLA's loop; else Pallas raises NotImplementedError.
    """
    return bind(attend_p, operands, or_xla=or_xla)


def _attend(operands: Operands, *, device_kind: str | None) -> tuple[Array, Array]:
    from pallas_kernels.tpu import parts

    return parts.attend(operands, tuning_for(device_kind))


def device_kind_of(context: mlir.LoweringRuleContext) -> str | None:
    """The kind of the devices that a lowering is for, or None if it does not say."""
    backend = context.module_context.backend
    devices = backend.devices() if backend is not None else ()
    return devices[0].device_kind if devices else None


def _lower(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any, or_xla: bool) -> Any:
    """For TPUs, and for the interpreter anywhere."""
    if or_xla and partitioned_by_xla(context):
        return lower_as(xla.attend, context, *leaves, tree=tree)
    loop = functools.partial(_attend, device_kind=device_kind_of(context))
    with jax.enable_x64(False):  # Pallas kernels are 32-bit, also in a program whose Python numbers are not
        return lower_as(loop, context, *leaves, tree=tree)


def _lower_elsewhere(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any, or_xla: bool) -> Any:
    """For the other platforms of a program for several: they lower even the branch that only TPUs take."""
    if or_xla and not _interpreter_effects():
        return lower_as(xla.attend, context, *leaves, tree=tree)
    return _lower(context, *leaves, tree=tree, or_xla=False)  # outside the interpreter Pallas says what is wrong


mlir.register_lowering(attend_p, _lower_elsewhere)
mlir.register_lowering(attend_p, _lower, platform="tpu")
