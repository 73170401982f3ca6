"""Operands inside a `jax.shard_map`, where JAX keeps account of which values differ from device to device."""

from typing import TypeVar

import jax
from jax import lax

Tree = TypeVar("Tree")


def vary_together(operands: Tree) -> Tree:
    """The operands, each of them marked as different along every mesh axis along which one of them is.

    So is the state of a loop over them, and the types of what goes into a loop and comes out of it must agree. Outside
    of a `shard_map` nothing is marked.
    """
    leaves, tree = jax.tree.flatten(operands)
    varying = [jax.typeof(leaf).manual_axis_type.varying for leaf in leaves]
    together = frozenset().union(*varying)
    marked = [lax.pcast(leaf, tuple(together - own), to="varying") for leaf, own in zip(leaves, varying, strict=True)]
    return jax.tree.unflatten(tree, marked)
