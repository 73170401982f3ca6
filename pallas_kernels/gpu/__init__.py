"""The decode loop as Pallas Mosaic GPU kernels, one per generation of GPUs.

lowering.py  the primitive that learns the GPU's generation when it is lowered, and which generation has which kernel
hopper/      the kernel for compute capability 9.0
"""

from jax import Array

from jax_ifa import compat
from jax_ifa.operands import Operands
from pallas_kernels.gpu.hopper import support


def unsupported_reason(operands: Operands) -> str | None:
    """Why no kernel for GPUs can run these operands, or None if Hopper's can."""
    if not compat.GPU_KERNEL_TESTED:
        return "the GPU kernel has been tested on JAX 0.11.2 and newer only"
    return support.unsupported_reason(operands)


def attend(operands: Operands, *, or_xla: bool = False) -> tuple[Array, Array]:
    """`Operands` to (out (B, K, G, D) in `out_dtype`, lse (B, K, G) float32) by a kernel; see `jax_ifa.operands`.

    Raises, when it is lowered for a GPU that is known to have no kernel, NotImplementedError, unless `or_xla` allows
    XLA's loop. Lowered for an unknown GPU, the program is for Hopper, or with `or_xla` for all.
    """
    from pallas_kernels.gpu import lowering  # registers a primitive: for those who use it

    return lowering.attend(operands, or_xla=or_xla)
