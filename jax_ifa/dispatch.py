"""Choosing an implementation: the fastest one that can do the call, per platform, when the program is lowered.

Nothing here asks which devices this machine has. A traced call carries every platform's choice, so it lowers and
exports for any platform from any machine.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
from jax import Array

from jax_ifa import xla
from jax_ifa.operands import Operands
from jax_ifa.sharding import vary_together

Result = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run the decode loop.

    Attributes:
      name: what `implementation=` calls it.
      default_on: platforms (as JAX names them: "cpu", "cuda", "rocm", "tpu") where it is preferred.
      unsupported_reason: why it cannot run these operands, as a sentence for the user, or None if it can. Looks at
        shapes, dtypes and static fields only.
      attend: the loop itself: `Operands` to (out (B, K, G, D) in float32 or `out_dtype`, lse (B, K, G) float32).
      attend_by_default: the same where nobody asked for it by name, and it may take XLA's loop for what only the
        lowering can tell: the devices it is for, and whether the program is exported.
      takes_rows: whether it repeats and clamps what comes in rows itself; the others are given
        `Operands.per_sequence()`.
    """

    name: str
    default_on: tuple[str, ...]
    unsupported_reason: Callable[[Operands], str | None]
    attend: Callable[[Operands], Result]
    attend_by_default: Callable[[Operands], Result]
    takes_rows: bool = False

    def run(self, operands: Operands, *, by_default: bool = False) -> Result:
        """(out (B, K, G, D) in `out_dtype`, lse (B, K, G) float32)."""
        attend = self.attend_by_default if by_default else self.attend
        out, lse = attend(operands if self.takes_rows else operands.per_sequence())
        return out.astype(operands.out_dtype), lse


def _kernels(name: str, default_on: tuple[str, ...], package: str, *, takes_rows: bool = False) -> Implementation:
    """An implementation in a package of its own, imported when first asked, since the kernels import this one.

    The package has `unsupported_reason(operands)` and `attend(operands, or_xla=...)`.
    """
    find = functools.partial(importlib.import_module, package)
    return Implementation(
        name,
        default_on,
        lambda operands: find().unsupported_reason(operands),
        lambda operands: find().attend(operands, or_xla=False),
        lambda operands: find().attend(operands, or_xla=True),
        takes_rows,
    )


MOSAIC_GPU = _kernels("mosaic_gpu", ("cuda",), "pallas_kernels.gpu", takes_rows=True)
MOSAIC_TPU = _kernels("mosaic_tpu", ("tpu",), "pallas_kernels.tpu")
NUMBA = _kernels("numba", ("cpu",), "numba_kernels")
XLA = Implementation("xla", (), xla.unsupported_reason, xla.attend, xla.attend)

IMPLEMENTATIONS: tuple[Implementation, ...] = (MOSAIC_GPU, MOSAIC_TPU, NUMBA, XLA)
"""In order of preference; XLA, which does everything everywhere, is last."""


def implementation_names() -> tuple[str, ...]:
    """The values that `implementation=` accepts besides None."""
    return tuple(candidate.name for candidate in IMPLEMENTATIONS)


def run(operands: Operands, implementation: str | None) -> Result:
    """The decode loop by the named implementation, or for None by the best one of the platform it is lowered for.

    Raises:
      NotImplementedError: the named implementation cannot do this call; the message says why.
    """
    operands = vary_together(operands)
    if implementation is None:
        return _by_platform(operands)
    candidate = next(c for c in IMPLEMENTATIONS if c.name == implementation)
    reason = candidate.unsupported_reason(operands)
    if reason is not None:
        raise NotImplementedError(f"implementation={implementation!r} cannot do this call: {reason}")
    return candidate.run(operands)


def _by_platform(operands: Operands) -> Result:
    capable = [c for c in IMPLEMENTATIONS if c.default_on and c.unsupported_reason(operands) is None]
    branches: dict[str, Callable[[Operands], Result]] = {}
    for candidate in capable:
        for platform in candidate.default_on:
            branches.setdefault(platform, functools.partial(candidate.run, by_default=True))
    if not branches:
        return XLA.run(operands)
    return jax.lax.platform_dependent(operands, default=XLA.run, **branches)
