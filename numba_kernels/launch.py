"""The foreign call in a JAX program.

A primitive, because some things are known only when a program is lowered: that it is for a CPU, so that nothing is
compiled for a program that only passes through this machine; whether it is being exported, and must run on machines
without this package; whether XLA distributes it over devices by itself, which it can do only with loops of its own.
Such programs get XLA's loop, unless the foreign call was asked for by name.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.interpreters import mlir

from jax_ifa import xla
from jax_ifa.lowering import bind, loop_primitive, lower_as, partitioned_by_xla
from jax_ifa.operands import Operands
from numba_kernels.formats import format_of
from numba_kernels.machine import this_machine
from numba_kernels.targets import builds, registered

attend_p = loop_primitive("incre_flash_attention_cpu")


def attend(operands: Operands, *, or_xla: bool) -> tuple[Array, Array]:
    """The decode loop as a foreign call; `or_xla` allows XLA's loop where that is better."""
    return bind(attend_p, operands, or_xla=or_xla)


def _target_of(operands: Operands) -> str:
    """The registered kernel for these operands on this machine."""
    machine, dtype, group = this_machine(), str(operands.kv.key.dtype), operands.query.shape[2]
    return registered(format_of(dtype, operands.precise, machine, _narrow(operands), group), machine)


def _narrow(operands: Operands) -> bool:
    """Whether the products of keys and values need not be more precise than 16 bits."""
    return operands.keeps_16_bits and not operands.precise


def _call(operands: Operands) -> tuple[Array, Array]:
    kv = operands.kv
    batch, heads, group, head_dim = operands.query.shape
    result = (
        jax.ShapeDtypeStruct((batch, heads, group, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, group), jnp.float32),
    )
    call = jax.ffi.ffi_call(_target_of(operands), result)
    bias = operands.bias
    if bias is not None and bias.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        bias = bias.astype(jnp.float32)

    def or_none(array: Array | None, rank: int, dtype: Any) -> Array:
        return jnp.zeros((0,) * rank, dtype) if array is None else array

    out, lse = call(
        operands.query.astype(jnp.float32),
        operands.scale,
        kv.key,
        kv.value,
        or_none(kv.table, 2, jnp.int32),
        or_none(kv.value_table, 2, jnp.int32),
        operands.start,
        operands.stop,
        or_none(operands.mask, 2, jnp.int8),
        or_none(bias, 4, jnp.float32),
        head_major=np.int64(kv.head_major),
    )
    return out, lse


def _lower(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any, or_xla: bool) -> Any:
    """For a CPU."""
    exported = context.module_context.lowering_parameters.for_export
    as_xla = or_xla and (exported or partitioned_by_xla(context) or not _builds(tree, context.avals_in))
    return lower_as(xla.attend if as_xla else _call, context, *leaves, tree=tree)


def _builds(tree: Any, leaves: Any) -> bool:
    return builds(
        functools.partial(_target_of, jax.tree.unflatten(tree, leaves)),
        "XLA's slower loop runs instead. implementation='xla' chooses that loop without this warning.",
    )


def _lower_elsewhere(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any, or_xla: bool) -> Any:
    """For other platforms: what JAX asks for when it lowers a program for several at once, though none will run it."""
    if not or_xla:
        raise NotImplementedError("implementation='numba' cannot do this call: it runs on CPUs only")
    return lower_as(xla.attend, context, *leaves, tree=tree)


mlir.register_lowering(attend_p, _lower_elsewhere)
mlir.register_lowering(attend_p, _lower, platform="cpu")
