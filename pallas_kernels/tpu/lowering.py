"""A primitive that waits for its lowering to choose tile sizes.

While a function is traced, nothing says which TPU it will be compiled for, and asking which devices this machine has
would give the wrong answer when compiling for another. The lowering knows the devices it is for: so the kernel's
program is traced then, with that generation's tuning, or with the default's where even then no TPU is known (an export
from another machine).
"""

import functools
from typing import Any

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_ifa.operands import Operands
from pallas_kernels.tpu import parts
from pallas_kernels.tpu.tuning import tuning_for

attend_p = Primitive("incre_flash_attention_tpu")
attend_p.multiple_results = True


def attend_for_any_generation(operands: Operands) -> tuple[Array, Array]:
    """The decode loop, tuned when it is lowered."""
    leaves, tree = jax.tree.flatten(operands)
    out, lse = attend_p.bind(*leaves, tree=tree)
    return out, lse


def _attend(*leaves: Array, tree: Any, device_kind: str | None) -> tuple[Array, Array]:
    return parts.attend(jax.tree.unflatten(tree, leaves), tuning_for(device_kind))


def device_kind_of(context: mlir.LoweringRuleContext) -> str | None:
    """The kind of the devices that a lowering is for, or None if it does not say."""
    backend = context.module_context.backend
    devices = backend.devices() if backend is not None else ()
    return devices[0].device_kind if devices else None


def _lower(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any) -> Any:
    function = functools.partial(_attend, tree=tree, device_kind=device_kind_of(context))
    return mlir.lower_fun(function, multiple_results=True)(context, *leaves)


def _abstract(*leaves: Any, tree: Any) -> tuple[list[Any], Any]:
    body = jax.make_jaxpr(functools.partial(_attend, tree=tree, device_kind=None))(*leaves)
    return list(body.out_avals), body.effects  # none on a TPU; JAX's TPU interpreter calls back to the host


attend_p.def_effectful_abstract_eval(_abstract)
attend_p.def_impl(lambda *leaves, tree: jax.jit(functools.partial(attend_p.bind, tree=tree))(*leaves))
mlir.register_lowering(attend_p, _lower)
