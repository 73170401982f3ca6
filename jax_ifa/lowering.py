"""Primitives of decode loops, whose kernels are chosen only when the program around them is lowered.

While a function is traced, nothing says what it will be compiled for. The lowering knows: the platform and the kind of
its devices, whether the program is being exported, and whether XLA is to distribute it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_ifa.operands import Operands

Loop = Callable[[Operands], tuple[Array, Array]]
Effects = Callable[[Operands, bool], Any]


def no_effects(operands: Operands, or_xla: bool) -> Any:
    """Of a kernel that does nothing besides its result."""
    del operands, or_xla
    return set()


def loop_primitive(name: str, effects: Effects = no_effects, *, rounds: bool = False) -> Primitive:
    """A primitive from the leaves of `Operands` to (out (B, K, G, D) float32, lse (B, K, G) float32).

    It has the parameters `tree`, of the operands, and `or_xla`, whether its lowering may take XLA's loop instead. The
    caller registers its lowerings.

    Args:
      name: of the primitive.
      effects: of the operands and `or_xla`: what the kernel does besides its result.
      rounds: whether `out` is in the operands' `out_dtype` instead.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def abstract(*leaves: Any, tree: Any, or_xla: bool) -> tuple[list[Any], Any]:
        operands = jax.tree.unflatten(tree, leaves)
        lse_dtype = jnp.dtype(jnp.float32)
        out_dtype = operands.out_dtype if rounds else lse_dtype
        out = operands.query.update(dtype=out_dtype, weak_type=False)  # varies as the operands do
        return [out, out.update(shape=out.shape[:-1], dtype=lse_dtype)], effects(operands, or_xla)

    primitive.def_effectful_abstract_eval(abstract)
    primitive.def_impl(lambda *leaves, **static: jax.jit(functools.partial(primitive.bind, **static))(*leaves))
    return primitive


def bind(primitive: Primitive, operands: Operands, *, or_xla: bool) -> tuple[Array, Array]:
    """The operands through a `loop_primitive`."""
    leaves, tree = jax.tree.flatten(operands)
    out, lse = primitive.bind(*leaves, tree=tree, or_xla=or_xla)
    return out, lse


def lower_as(loop: Loop, context: mlir.LoweringRuleContext, *leaves: Any, tree: Any) -> Any:
    """The lowering of a `loop_primitive` as this loop of JAX's own operations."""

    def function(*leaves: Array) -> tuple[Array, Array]:
        return loop(jax.tree.unflatten(tree, leaves))

    return mlir.lower_fun(function, multiple_results=True)(context, *leaves)


def partitioned_by_xla(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA is to cut the program up for several devices; in a `shard_map` over all axes it is cut already.

    XLA knows how to cut up its own loop, but not a kernel: it would gather the whole cache on every device.
    """
    axes: Any = context.module_context.axis_context
    manual = getattr(axes, "manual_axes", None)
    if manual is not None:
        return bool(manual) and manual | set(axes.mesh.manual_axes) != set(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) != 1
