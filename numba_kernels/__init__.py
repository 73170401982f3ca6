"""The decode loop for CPUs, in Numba, called from XLA as a foreign function.

machine.py   what the processor offers
formats.py   how the elements of a cache meet the query: as float32, or in narrow dot products
vectors.py   vector instructions as LLVM IR
fetching.py  the rows of the next tile, fetched meanwhile
tiles.py     the steps on a tile of positions, made of those
dots.py      two of these steps, the products of keys and of values
amx.py       the same in products of matrices
native.py    what Numba lacks for code without Python
records.py   structures in memory, whose fields Numba reads by name
frame.py     XLA's call frame
call.py      one call as read from it, and a thread's scratch
stream.py    the loop over the tiles of a window
schedule.py  cutting a call into ranges
sharing.py   the ranges of a call among XLA's threads
linked.py    what the Numba code of these calls, and finds when all is linked: the steps, numbers of the format
bitcode.py   what Numba makes of that code, which comes with the package: schedule.bc, rows.bc
build.py     from all that to machine code, and its cache
targets.py   machine code by the names that XLA calls
launch.py    the foreign call in a JAX program

And a second, small kernel, for the model around the attention:

product.py   a few vectors times a matrix, in a JAX program
blocks.py    matrices whose weights are codes of a few bits
weights.py   reading rows of either as float32
meetings.py  the steps of the product
rows.py      the loop over them
"""

import functools
import importlib.util
import os
import sys

from jax import Array

from jax_ifa.operands import Operands


@functools.cache
def missing() -> str | None:
    """Why no kernel can be made here, or None."""
    if os.name != "posix" or sys.maxsize < 2**32:
        return "the Numba kernel needs a 64-bit POSIX system"
    absent = [name for name in ("numba", "platformdirs") if importlib.util.find_spec(name) is None]
    if absent:
        return f"it needs {' and '.join(absent)}, not installed here: pip install 'jax-ifa[numba]'"
    return None


def unsupported_reason(operands: Operands) -> str | None:
    """Why the kernel cannot run these operands, or None: it can do every call, where Numba is installed."""
    del operands
    return missing()


def attend(operands: Operands, *, or_xla: bool = False) -> tuple[Array, Array]:
    """`Operands` to (out (B, K, G, D) float32, lse (B, K, G) float32); see `jax_ifa.operands`.

    Scale and window are those of `Operands.per_sequence()`, which the dispatcher calls.

    `or_xla` leaves to XLA's loop what only the lowering can tell should not be a foreign call; see `launch.py`.
    """
    from numba_kernels import launch  # imported by those who use it

    return launch.attend(operands, or_xla=or_xla)
