"""The product of a few vectors with a matrix, as fast as the matrix can be read.

A decode step of a small model reads every weight once, for one row or a few. XLA's products are made for many, and read
more slowly than the memory gives. This is for a model around the attention, as in examples/llama; the operator itself
has no use for it.
"""

import dataclasses
import functools
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
from numba_kernels.blocks import BlockMatrix
from numba_kernels.machine import Machine, this_machine
from numba_kernels.targets import builds, registered

MOST_ROWS = 64  # of x: the most that were compared; a step of 64 took 0.84 to 0.91 of the time of XLA's products


def row_product(x: Array, matrix: Array | BlockMatrix) -> Array:
    """x @ matrix.T, for a matrix that is stored with its outputs first.

    For float32 on a CPU with Numba, up to `MOST_ROWS` rows are a foreign call, and any number with a `BlockMatrix`.
    Everything else is XLA's product. Few rows meet the codes of a `BlockMatrix` as integers of 23 bits (22 for q8_0)
    with a scale for every block of x (`block_dots`); for more, its weights become float32 in the processor's caches.

    Args:
      x: (..., inputs).
      matrix: (outputs, inputs), in the dtype of x; a `BlockMatrix` has float32.

    Returns:
      (..., outputs), in the dtype of x.

    Raises:
      ValueError: for shapes that do not fit.
      TypeError: for two dtypes.
    """
    if len(matrix.shape) != 2 or x.ndim == 0 or x.shape[-1] != matrix.shape[1]:
        raise ValueError(f"expected x (..., inputs) and a matrix (outputs, inputs), got {x.shape} and {matrix.shape}")
    if x.dtype != matrix.dtype:
        raise TypeError(f"expected x and the matrix in one dtype, got {x.dtype} and {matrix.dtype}")
    weights, kind = (matrix.rows, matrix.kind) if isinstance(matrix, BlockMatrix) else (matrix, None)
    return _product(x, weights, kind)


def _product(x: Array, weights: Array, kind: str | None) -> Array:
    """By the primitive where it may come to a foreign call; `weights` are the rows of a `BlockMatrix`, or all of it."""
    rows = math.prod(x.shape[:-1])
    some = isinstance(rows, int) and rows > 0  # no integer: a symbol, of a program that is exported
    native = some and x.dtype == jnp.float32 and weights.size > 0 and (kind is not None or rows <= MOST_ROWS)
    if not native or numba_kernels.missing() or _distributed(x) or _distributed(weights):
        return _by_xla(x, weights, kind=kind)
    flat, weights = vary_together((x.reshape(rows, -1), weights))
    return row_product_p.bind(flat, weights, kind=kind).reshape(*x.shape[:-1], -1)


def _distributed(array: Array) -> bool:
    """Whether the type says that an axis lies on several devices, which XLA's products know what to make of."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def _by_xla(x: Array, weights: Array, *, kind: str | None) -> Array:
    return lax.dot_general(x, _dense(weights, kind), (((x.ndim - 1,), (1,)), ((), ())))


def _dense(weights: Array, kind: str | None) -> Array:
    return weights if kind is None else BlockMatrix(weights, kind).dense()


def _abstract(x: Any, weights: Any, *, kind: str | None) -> Any:
    return x.update(shape=(x.shape[0], weights.shape[0]), weak_type=False)


row_product_p = Primitive("row_product")
row_product_p.def_impl(jax.jit(row_product_p.bind, static_argnames="kind"))
row_product_p.def_abstract_eval(_abstract)
ad.defbilinear(
    row_product_p,
    lambda cotangent, x, weights, *, kind: cotangent @ _dense(weights, kind),
    lambda cotangent, x, weights, *, kind: cotangent.T @ x,
)


def _batch(arguments: tuple[Array, Array], axes: tuple[Any, Any], *, kind: str | None) -> tuple[Array, int]:
    """vmap: more rows of one matrix, or a product of XLA's for each of several."""
    x, weights = arguments
    if axes[1] is None:
        return _product(jnp.moveaxis(x, axes[0], 0), weights, kind), 0
    return jax.vmap(functools.partial(_by_xla, kind=kind), axes)(x, weights), 0


batching.primitive_batchers[row_product_p] = _batch


@dataclasses.dataclass(frozen=True)
class RowProduct:
    """The kernel, for `build`.

    Attributes:
      kind: of the `BlockMatrix`, or None for a float32 array.
    """

    kind: str | None

    @property
    def name(self) -> str:
        """See `build.Kernel`."""
        return f"row_product_{self.kind or 'float32'}"

    source = "rows"  # see `build.Kernel`

    def tiles(self, machine: Machine) -> Any:
        """See `build.Kernel`."""
        from numba_kernels import meetings

        return meetings.make(machine, self.kind)


def _target(kind: str | None) -> str:
    return registered(RowProduct(kind), this_machine())


def _call(x: Array, weights: Array, *, kind: str | None) -> Array:
    result = jax.ShapeDtypeStruct((x.shape[0], weights.shape[0]), x.dtype)
    return jax.ffi.ffi_call(_target(kind), result)(x, weights)


def _lower(context: mlir.LoweringRuleContext, *arguments: Any, kind: str | None) -> Any:
    """For a CPU."""
    exported = context.module_context.lowering_parameters.for_export
    target = functools.partial(_target, kind)
    as_xla = exported or partitioned_by_xla(context) or not builds(target, "XLA's slower product runs instead.")
    return mlir.lower_fun(_by_xla if as_xla else _call, multiple_results=False)(context, *arguments, kind=kind)


mlir.register_lowering(row_product_p, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(row_product_p, _lower, platform="cpu")
