"""The decode loop as Pallas Mosaic GPU kernels, one per generation of GPUs.

lowering.py  the primitive that learns the GPU's generation when it is lowered, and which generation has which kernel
hopper/      the kernel for compute capability 9.0
"""

from jax import Array

from jax_ifa.operands import Operands
from pallas_kernels.gpu.hopper.support import unsupported_reason as unsupported_reason
from pallas_kernels.gpu.lowering import bind


def attend(operands: Operands) -> tuple[Array, Array]:
    """`Operands` to (out (B, K, G, D) float32, lse (B, K, G) float32) by a kernel; see `jax_ifa.operands`.

    Raises, when it is lowered for a GPU that is known to have no kernel, NotImplementedError. Lowered for an unknown
    GPU, the program is for Hopper.
    """
    return bind(operands, or_xla=False)


def attend_or_xla(operands: Operands) -> tuple[Array, Array]:
    """The same where the GPU is known to have a kernel, XLA's loop otherwise."""
    return bind(operands, or_xla=True)
