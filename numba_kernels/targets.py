"""Kernels under the names by which XLA calls them."""

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from numba_kernels.machine import Machine

if TYPE_CHECKING:
    from numba_kernels.build import Kernel


@functools.cache
def registered(kernel: "Kernel", machine: Machine) -> str:
    """The name under which XLA calls a kernel; it is compiled or loaded now."""
    from numba_kernels import build

    name = f"jax_ifa_{build.name_of(kernel, machine)}"
    capsule = jax.ffi.pycapsule(build.handler_address(kernel, machine))
    jax.ffi.register_ffi_target(name, capsule, platform="cpu", api_version=1)
    return name


def builds(target: Callable[[], str], instead: str) -> bool:
    """Whether a kernel could be made here: a Numba that does not work must not keep anyone from an answer.

    Args:
      target: makes it, by `registered`.
      instead: what the warning says if it cannot.
    """
    try:
        target()
    except Exception as error:
        warnings.warn(f"The CPU kernel could not be built: {error!r}. {instead}", RuntimeWarning)
        return False
    return True
