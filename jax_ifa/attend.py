"""The decode loop as one differentiable, vmappable function of canonical operands."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jax_ifa import dispatch
from jax_ifa.batching import fold_into_batch, unfold_from_batch
from jax_ifa.dense import attend_dense
from jax_ifa.operands import Operands


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(operands: Operands, implementation: str | None = None) -> tuple[Array, Array]:
    """Attention of one query token per sequence over its window of the cache.

    Under `vmap` the mapped axis joins the batch: one loop runs, and what is not mapped is not copied. Under `grad` the
    backward pass is dense (`dense.py`): its memory grows with the cache. Reverse mode only.

    Args:
      operands: see `Operands`.
      implementation: None, or a name as in `incre_flash_attention`.

    Returns:
      out: (B, K, G, D) in `out_dtype`, normalised.
      lse: (B, K, G) float32, natural log of the sum of exponentiated scores; -inf for an empty row.
    """
    return _vmappable(implementation)(operands)


@functools.cache
def _vmappable(implementation: str | None) -> Callable[[Operands], tuple[Array, Array]]:
    @jax.custom_batching.custom_vmap
    def run(operands: Operands) -> tuple[Array, Array]:
        return dispatch.run(operands, implementation)

    @run.def_vmap
    def _fold(size: int, mapped: tuple[Operands], operands: Operands):  # type: ignore[no-untyped-def]
        (mapped_operands,) = mapped
        out, lse = run(fold_into_batch(operands, mapped_operands, size))
        return (unfold_from_batch(out, size), unfold_from_batch(lse, size)), (True, True)

    return run


def _forward(operands: Operands, implementation: str | None) -> tuple[tuple[Array, Array], Operands]:
    return attend(operands, implementation), operands


def _backward(implementation: str | None, operands: Operands, cotangents: tuple[Array, Array]) -> tuple[Operands]:
    del implementation
    leaves, tree = jax.tree.flatten(operands)
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def of_floats(*values: Array) -> tuple[Array, Array]:
        filled = list(leaves)
        for i, value in zip(floats, values, strict=True):
            filled[i] = value
        return attend_dense(jax.tree.unflatten(tree, filled))

    _, pull = jax.vjp(of_floats, *(leaves[i] for i in floats))
    gradients: list[Array | None] = [None] * len(leaves)  # None: integers have no gradient
    of_out, of_lse = cotangents
    for i, gradient in zip(floats, pull((of_out.astype(jnp.float32), of_lse)), strict=True):
        gradients[i] = gradient
    return (jax.tree.unflatten(tree, gradients),)


attend.defvjp(_forward, _backward)
