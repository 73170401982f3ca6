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
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_ifa import xla
from jax_ifa.lowering import partitioned_by_xla
from jax_ifa.operands import Operands
from pallas_kernels.tpu.tuning import tuning_for

attend_p = Primitive("incre_flash_attention_tpu")
attend_p.multiple_results = True


def attend_for_any_generation(operands: Operands, *, or_xla: bool) -> tuple[Array, Array]:
    """The decode loop, tuned when it is lowered.

    A program whose arrays XLA distributes over devices by itself, outside of any `shard_map`, cannot contain the
    kernel, and only the lowering sees that. There `or_xla` lowers XLA's loop; else Pallas raises NotImplementedError.
    """
    leaves, tree = jax.tree.flatten(operands)
    out, lse = attend_p.bind(*leaves, tree=tree, or_xla=or_xla)
    return out, lse


def _attend(*leaves: Array, tree: Any, device_kind: str | None) -> tuple[Array, Array]:
    from pallas_kernels.tpu import parts

    return parts.attend(jax.tree.unflatten(tree, leaves), tuning_for(device_kind))


def device_kind_of(context: mlir.LoweringRuleContext) -> str | None:
    """The kind of the devices that a lowering is for, or None if it does not say."""
    backend = context.module_context.backend
    devices = backend.devices() if backend is not None else ()
    return devices[0].device_kind if devices else None


def _lower(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any, or_xla: bool) -> Any:
    """For TPUs, and for the interpreter anywhere."""
    if or_xla and partitioned_by_xla(context):
        return _lower_xla(context, *leaves, tree=tree)
    function = functools.partial(_attend, tree=tree, device_kind=device_kind_of(context))
    return mlir.lower_fun(function, multiple_results=True)(context, *leaves)


def _lower_elsewhere(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any, or_xla: bool) -> Any:
    """For the other platforms of a program for several: they lower even the branch that only TPUs take."""
    if or_xla and not _effects():
        return _lower_xla(context, *leaves, tree=tree)
    return _lower(context, *leaves, tree=tree, or_xla=False)  # outside the interpreter Pallas says what is wrong


def _lower_xla(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any) -> Any:
    def function(*leaves: Array) -> tuple[Array, Array]:
        return xla.attend(jax.tree.unflatten(tree, leaves))

    return mlir.lower_fun(function, multiple_results=True)(context, *leaves)


def _abstract(*leaves: Any, tree: Any, or_xla: bool) -> tuple[list[Any], Any]:
    operands = jax.tree.unflatten(tree, leaves)
    batch, num_kv_heads, group, head_dim = operands.query.shape
    lse = jax.core.ShapedArray((batch, num_kv_heads, group), jnp.dtype(jnp.float32))
    return [lse.update(shape=(*lse.shape, head_dim)), lse], _effects()


def _effects() -> Any:
    """What a kernel does besides its result: nothing on a TPU, but JAX's TPU interpreter calls back to the host.

    A program that has not imported Pallas cannot have asked for the interpreter.
    """
    if "jax.experimental.pallas.tpu" not in sys.modules:
        return set()
    from jax.experimental import pallas as pl

    nothing = pl.pallas_call(lambda x, y: None, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))
    return jax.make_jaxpr(nothing)(jax.ShapeDtypeStruct((8, 128), jnp.float32)).effects


attend_p.def_effectful_abstract_eval(_abstract)
attend_p.def_impl(lambda *leaves, **static: jax.jit(functools.partial(attend_p.bind, **static))(*leaves))
mlir.register_lowering(attend_p, _lower_elsewhere)
mlir.register_lowering(attend_p, _lower, platform="tpu")
