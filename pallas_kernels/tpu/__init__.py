"""The decode loop as a Pallas Mosaic TPU kernel.

storage.py   how XLA keeps each form of the cache in memory, and so which forms can be read without a copy
tuning.py    tile sizes per TPU generation, from tuning.json
plan.py      every static number of one launch
kernel.py    the kernel body
launch.py    the arrays around one launch
parts.py     calls that need more than one launch: long tables, ragged ends, odd batches on two cores
merging.py   the parts of a call into one result
lowering.py  the primitive that learns the TPU generation when it is lowered
"""

from jax import Array

from jax_ifa.operands import Operands
from pallas_kernels.tpu.storage import unsupported_reason as unsupported_reason


def attend(operands: Operands, *, or_xla: bool = False) -> tuple[Array, Array]:
    """`Operands` to (out (B, K, G, D) float32, lse (B, K, G) float32); see `jax_ifa.operands`.

    `or_xla` leaves to XLA's loop what only the lowering can tell the kernel cannot do; see `lowering.py`.
    """
    from pallas_kernels.tpu.lowering import attend_for_any_generation  # registers a primitive: for those who use it

    return attend_for_any_generation(operands, or_xla=or_xla)
