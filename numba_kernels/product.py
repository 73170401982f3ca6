"""The product of a few vectors with a matrix, as fast as the matrix can be read.

A decode step of a small model reads every weight once, for one row or a few. XLA's products are made for many, and read
more slowly than the memory gives. This is for a model around the attention, as in examples/llama; the operator itself
has no use for it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import numba_kernels
from jax_ifa.lowering import partitioned_by_xla
from jax_ifa.sharding import vary_together
from numba_kernels.machine import Machine, this_machine
from numba_kernels.targets import builds, registered

MOST_ROWS = 12  # of x: from 16 on XLA is as fast


def row_product(x: Array, matrix: Array) -> Array:
    """x @ matrix.T, for a matrix that is stored with its outputs first.

    Up to `MOST_ROWS` float32 rows on a CPU with Numba run as a foreign call; everything else is XLA's product.

    Args:
      x: (..., inputs).
      matrix: (outputs, inputs), in the dtype of x.

    Returns:
      (..., outputs), in the dtype of x.

    Raises:
      ValueError: for shapes that do not fit.
      TypeError: for two dtypes.
    """
    if matrix.ndim != 2 or x.ndim == 0 or x.shape[-1] != matrix.shape[1]:
        raise ValueError(f"expected x (..., inputs) and a matrix (outputs, inputs), got {x.shape} and {matrix.shape}")
    if x.dtype != matrix.dtype:
        raise TypeError(f"expected x and the matrix in one dtype, got {x.dtype} and {matrix.dtype}")
    rows = math.prod(x.shape[:-1])
    native = x.dtype == jnp.float32 and 0 < rows <= MOST_ROWS and matrix.size > 0
    if not native or numba_kernels.missing() or _distributed(x) or _distributed(matrix):
        return _by_xla(x, matrix)
    flat, matrix = vary_together((x.reshape(rows, -1), matrix))
    return row_product_p.bind(flat, matrix).reshape(*x.shape[:-1], -1)


def _distributed(array: Array) -> bool:
    """Whether the type says that an axis lies on several devices, which XLA's products know what to make of."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def _by_xla(x: Array, matrix: Array) -> Array:
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())))


row_product_p = Primitive("row_product")
row_product_p.def_impl(jax.jit(row_product_p.bind))
row_product_p.def_abstract_eval(lambda x, matrix: x.update(shape=(x.shape[0], matrix.shape[0]), weak_type=False))
ad.defjvp(row_product_p, lambda t, x, matrix: _by_xla(t, matrix), lambda t, x, matrix: _by_xla(x, t))


def _batch(arguments: tuple[Array, Array], axes: tuple[Any, Any]) -> tuple[Array, int]:
    """vmap: more rows of one matrix, or a product of XLA's for each of several."""
    x, matrix = arguments
    if axes[1] is None:
        return row_product(jnp.moveaxis(x, axes[0], 0), matrix), 0
    return jax.vmap(_by_xla, axes)(x, matrix), 0


batching.primitive_batchers[row_product_p] = _batch


@dataclasses.dataclass(frozen=True)
class RowProduct:
    """The kernel, for `build`."""

    name: str = "row_product"

    def code(self, machine: Machine) -> Any:
        """See `build.Kernel`."""
        from numba_kernels import rows

        return rows.make(machine)


def _target() -> str:
    return registered(RowProduct(), this_machine())


def _call(x: Array, matrix: Array) -> Array:
    result = jax.ShapeDtypeStruct((x.shape[0], matrix.shape[0]), x.dtype)
    return jax.ffi.ffi_call(_target(), result)(x, matrix)


def _lower(context: mlir.LoweringRuleContext, *arguments: Any) -> Any:
    """For a CPU."""
    exported = context.module_context.lowering_parameters.for_export
    as_xla = exported or partitioned_by_xla(context) or not builds(_target, "XLA's slower product runs instead.")
    return mlir.lower_fun(_by_xla if as_xla else _call, multiple_results=False)(context, *arguments)


mlir.register_lowering(row_product_p, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(row_product_p, _lower, platform="cpu")
