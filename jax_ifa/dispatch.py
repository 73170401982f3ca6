"""Choosing an implementation: the fastest one that can do the call, per platform, when the program is lowered.

Nothing here asks which devices this machine has. A traced call carries every platform's choice, so it lowers and
exports for any platform from any machine.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax import Array

from jax_ifa import xla
from jax_ifa.operands import Operands

Result = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run the decode loop.

    Attributes:
      name: what `implementation=` calls it.
      default_on: platforms (as JAX names them: "cpu", "cuda", "rocm", "tpu") where it is preferred.
      unsupported_reason: why it cannot run these operands, as a sentence for the user, or None if it can. Looks at
        shapes, dtypes and static fields only.
      attend: the loop itself: `Operands` to (out (B, K, G, D) float32, lse (B, K, G) float32).
      attend_by_default: the same for a call that named no implementation, if it differs: where only the lowering can
        tell that this implementation cannot do the call, it then lowers XLA's loop instead of raising.
    """

    name: str
    default_on: tuple[str, ...]
    unsupported_reason: Callable[[Operands], str | None]
    attend: Callable[[Operands], Result]
    attend_by_default: Callable[[Operands], Result] | None = None


def _tpu_unsupported_reason(operands: Operands) -> str | None:
    from pallas_kernels import tpu  # imported when first asked: the kernels import this package

    return tpu.unsupported_reason(operands)


def _tpu_attend(operands: Operands) -> Result:
    from pallas_kernels import tpu

    return tpu.attend(operands)


def _tpu_attend_by_default(operands: Operands) -> Result:
    from pallas_kernels import tpu

    return tpu.attend(operands, or_xla=True)


MOSAIC_TPU = Implementation("mosaic_tpu", ("tpu",), _tpu_unsupported_reason, _tpu_attend, _tpu_attend_by_default)
XLA = Implementation("xla", (), xla.unsupported_reason, xla.attend)

IMPLEMENTATIONS: tuple[Implementation, ...] = (MOSAIC_TPU, XLA)
"""In order of preference; XLA, which does everything everywhere, is last."""


def implementation_names() -> tuple[str, ...]:
    """The values that `implementation=` accepts besides None."""
    return tuple(candidate.name for candidate in IMPLEMENTATIONS)


def run(operands: Operands, implementation: str | None) -> Result:
    """The decode loop by the named implementation, or for None by the best one of the platform it is lowered for.

    Raises:
      NotImplementedError: the named implementation cannot do this call; the message says why.
    """
    if implementation is None:
        return _by_platform(operands)
    candidate = next(c for c in IMPLEMENTATIONS if c.name == implementation)
    reason = candidate.unsupported_reason(operands)
    if reason is not None:
        raise NotImplementedError(f"implementation={implementation!r} cannot do this call: {reason}")
    return candidate.attend(operands)


def _by_platform(operands: Operands) -> Result:
    capable = [c for c in IMPLEMENTATIONS if c.default_on and c.unsupported_reason(operands) is None]
    branches: dict[str, Callable[[Operands], Result]] = {}
    for candidate in capable:
        for platform in candidate.default_on:
            branches.setdefault(platform, candidate.attend_by_default or candidate.attend)
    if not branches:
        return XLA.attend(operands)
    return jax.lax.platform_dependent(operands, default=XLA.attend, **branches)
