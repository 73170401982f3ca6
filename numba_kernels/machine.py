"""What the processor offers to the kernels: how wide its vectors are, and which narrow dot products it has.

Found at run time from the processor's own list of features. Nothing else in this package depends on the architecture.
"""

import ctypes
import dataclasses
import functools
import platform
import sys

_ARM = ("aarch64", "arm64")
# Linux lets a process use the registers of AMX once it has asked: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_ARCH_PRCTL, _REQUEST, _TILES = 158, 0x1023, 18
# Arm's narrow products by LLVM's names; not every LLVM looks for them. Linux has bits for them, of getauxval(16),
# AT_HWCAP, and getauxval(26), AT_HWCAP2; macOS has names.
_LINUX_BITS = {"dotprod": (16, 1 << 20), "bf16": (26, 1 << 14)}
_MACOS_NAMES = {"dotprod": b"hw.optional.arm.FEAT_DotProd", "bf16": b"hw.optional.arm.FEAT_BF16"}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A processor, as the code generator sees it.

    Attributes:
      cpu, features: as LLVM names them.
      lanes: 32-bit lanes of a vector register.
      registers: vectors that the processor names.
      bfloat16_dot: the instruction that multiplies pairs of bfloat16 and adds them to float32 lanes, or None.
      int8_dot: the instruction that multiplies quads of bytes and adds them to int32 lanes, or None.
      int16_dot: the instruction that multiplies pairs of int16 and adds the two products, in int32 lanes, or None.
      int8_signed: whether the bytes are int8 on both sides; else they are uint8 on the first.
      by_lane: whether a vector meets one lane of another in its products, for nothing.
      amx: whether it multiplies matrices of bfloat16 and of int8: x86's AMX.
    """

    cpu: str
    features: str
    lanes: int
    registers: int
    bfloat16_dot: str | None
    int8_dot: str | None
    int16_dot: str | None = None
    int8_signed: bool = False
    by_lane: bool = False
    amx: bool = False


def describe(cpu: str, features: dict[str, bool], architecture: str) -> Machine:
    """The `Machine` of a processor with these LLVM features."""

    def has(*names: str) -> bool:
        return all(features.get(name, False) for name in names)

    if architecture in _ARM:
        # Vectors have 128 bits here, for which SVE gains nothing; and without it there is one kind of code to test.
        features = {name: on and not name.startswith("sve") for name, on in features.items()} | {"sve": False}
    flags = ",".join(("+" if on else "-") + name for name, on in sorted(features.items()))
    bfloat16_dot = int8_dot = None
    if architecture in ("x86_64", "AMD64"):
        if has("avx512f", "avx512bw", "avx512vl"):
            if has("avx512bf16"):
                bfloat16_dot = "llvm.x86.avx512bf16.dpbf16ps.512"
            if has("avx512vnni"):
                int8_dot = "llvm.x86.avx512.vpdpbusd.512"
            amx = has("amx-tile", "amx-bf16", "amx-int8")
            return Machine(cpu, flags, 16, 32, bfloat16_dot, int8_dot, "llvm.x86.avx512.pmaddw.d.512", amx=amx)
        if has("avx2", "fma"):
            if has("avxvnni"):
                int8_dot = "llvm.x86.avx512.vpdpbusd.256"
            return Machine(cpu, flags, 8, 16, None, int8_dot, "llvm.x86.avx2.pmadd.wd")
    elif architecture in _ARM:
        if has("bf16"):
            bfloat16_dot = "llvm.aarch64.neon.bfdot.v4f32.v8bf16"
        if has("dotprod"):
            int8_dot = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return Machine(cpu, flags, 4, 32, bfloat16_dot, int8_dot, int8_signed=True, by_lane=True)
    return Machine(cpu, flags, 4, 16, None, None)


@functools.cache
def this_machine() -> Machine:
    """The processor that this process runs on, as far as the system lets it be used."""
    import llvmlite.binding as llvm

    architecture, features = platform.machine(), dict(llvm.get_host_cpu_features())
    if architecture in _ARM:
        features |= _narrow_products_of_arm()
    machine = describe(llvm.get_host_cpu_name(), features, architecture)
    return dataclasses.replace(machine, amx=machine.amx and _permits_amx())


def _narrow_products_of_arm() -> dict[str, bool]:
    """Which of them the system says that this processor has, by LLVM's names; empty if it cannot be asked."""
    system = ctypes.CDLL(None)
    if sys.platform.startswith("linux"):
        system.getauxval.restype = ctypes.c_ulong
        return {name: system.getauxval(ctypes.c_ulong(which)) & bit != 0 for name, (which, bit) in _LINUX_BITS.items()}
    if sys.platform == "darwin":
        return {name: _sysctl(system, asked) == 1 for name, asked in _MACOS_NAMES.items()}
    return {}


def _sysctl(system: ctypes.CDLL, name: bytes) -> int | None:
    """A number that macOS knows by name; None if it does not."""
    value = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    failed = system.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else value.value


def _permits_amx() -> bool:
    """Ask the system for the registers of AMX, for all threads of this process and for its children."""
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILES) == 0
