"""The only module that knows which JAX it runs on.

Supported: JAX 0.10.2 (the last release for Python 3.11), 0.11.x and 0.12.x.
"""

from typing import Any

import jax

MINIMUM_JAX = (0, 10, 2)

if jax.__version_info__ < MINIMUM_JAX:
    raise ImportError(
        f"jax_ifa needs JAX {'.'.join(map(str, MINIMUM_JAX))} or newer, got {jax.__version__}: "
        "pip install --upgrade jax"
    )

CPU_CONVERTS_BFLOAT16_UPDATES = jax.__version_info__ < (0, 11, 2)
"""XLA:CPU before this release updates a bfloat16 array in float32, by converting all of it there and back: 70 ms
instead of 10 us for one token in a cache of 64 MB."""

GPU_KERNEL_TESTED = jax.__version_info__ >= (0, 11, 2)
"""Whether the Pallas kernel for GPUs has been run under this JAX's interpreter."""


def is_concrete(value: Any) -> bool:
    """Whether `value` can be read now: anything but a tracer of jit, vmap, grad or scan."""
    return not isinstance(value, jax.core.Tracer)
