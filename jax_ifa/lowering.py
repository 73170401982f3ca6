"""What a kernel's lowering asks about the program that it becomes part of."""

from typing import Any

from jax.interpreters import mlir


def partitioned_by_xla(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA is to cut the program up for several devices; in a `shard_map` over all axes it is cut already.

    XLA knows how to cut up its own loop, but not a kernel: it would gather the whole cache on every device.
    """
    axes: Any = context.module_context.axis_context
    manual = getattr(axes, "manual_axes", None)
    if manual is not None:
        return bool(manual) and manual | set(axes.mesh.manual_axes) != set(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) != 1
