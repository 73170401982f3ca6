"""A primitive that waits for its lowering to choose the kernel of the GPU's generation.

While a function is traced, nothing says which GPU it will be compiled for, and asking which devices this machine has
would give the wrong answer when compiling for another. The lowering knows the devices it is for. Where even it does
not, as in an export from a machine without a GPU, only XLA's loop runs on every GPU there is.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.interpreters import mlir

from jax_ifa import dispatch
from jax_ifa.lowering import bind, loop_primitive, lower_as, partitioned_by_xla
from jax_ifa.operands import Operands

Attend = Callable[[Operands, str | None], tuple[Array, Array]]


def _hopper(operands: Operands, device_kind: str | None) -> tuple[Array, Array]:
    from pallas_kernels.gpu.hopper.launch import attend  # Pallas is imported by those who use it

    return attend(operands, device_kind)


KERNELS: dict[str, Attend] = {"9.0": _hopper}
"""The kernel of each compute capability; a function of the operands and of the device's kind, as JAX names it."""


def _effects(operands: Operands, or_xla: bool) -> Any:
    """By name the kernel may run under JAX's GPU interpreter, which calls back to the host."""
    if or_xla:
        return set()
    return jax.make_jaxpr(functools.partial(_hopper, device_kind=None))(operands).effects


attend_p = loop_primitive("incre_flash_attention_gpu", _effects, rounds=True)


def attend(operands: Operands, *, or_xla: bool) -> tuple[Array, Array]:
    """The decode loop, chosen when it is lowered; `or_xla` allows XLA's."""
    return bind(attend_p, operands, or_xla=or_xla)


def choose(devices: Any, *, partitioned: bool, or_xla: bool) -> tuple[Attend, str | None]:
    """The loop for the devices that a lowering is for, and their kind if known.

    Args:
      devices: those of the backend, or an empty list.
      partitioned: whether the compiler is to divide the program among devices, which it can do with XLA's loop only.
      or_xla: whether XLA's loop may be chosen.
    """
    capabilities: set[str | None] = {getattr(device, "compute_capability", None) for device in devices}
    known = {capability for capability in capabilities if capability is not None}
    if or_xla and (partitioned or len(capabilities) != 1 or not known <= KERNELS.keys()):
        return _xla, None
    if len(known) == 1 and not or_xla and not known <= KERNELS.keys():
        raise NotImplementedError(
            "implementation='mosaic_gpu' cannot do this call: there is a kernel for compute capability "
            f"{', '.join(KERNELS)} (Hopper), and this program is for {known.pop()}; leave `implementation` out for XLA"
        )
    if len(known) == 1:
        return KERNELS[known.pop()], devices[0].device_kind
    return (_xla, None) if or_xla else (_hopper, None)


def _xla(operands: Operands, device_kind: str | None) -> tuple[Array, Array]:
    del device_kind
    return dispatch.XLA.run(operands)


def _lower(context: mlir.LoweringRuleContext, *leaves: Any, tree: Any, or_xla: bool) -> Any:
    module = context.module_context
    devices = module.backend.devices() if module.backend is not None else []
    loop, device_kind = choose(devices, partitioned=partitioned_by_xla(context), or_xla=or_xla)
    return lower_as(lambda operands: loop(operands, device_kind), context, *leaves, tree=tree)


mlir.register_lowering(attend_p, _lower)
