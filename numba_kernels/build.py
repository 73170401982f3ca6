"""From the Numba functions to machine code that is called without Numba, and is kept for the next process.

Their bitcode (bitcode.py) is linked with the tiles' IR, optimised once as a whole, and emitted as an object file. The
object is kept in a cache of this user's: a process that finds it there loads it in a few milliseconds. What the object
depends on is in the name of its file: the sources of this package and the bitcode, the versions of Numba and llvmlite,
the processor and its features, and the kernel.

The cache lies in the folder that the environment variable JAX_IFA_CACHE_DIR names, else in the user's cache folder
(`platformdirs`; on Linux ~/.cache/jax_ifa). Where it cannot be written, every process compiles anew: that is
no error.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Protocol

import llvmlite.binding as llvm

from numba_kernels import bitcode
from numba_kernels.bitcode import ENTRY
from numba_kernels.machine import Machine

if TYPE_CHECKING:
    from numba_kernels.tiles import Tile

_lock = threading.Lock()
_loaded: dict[str, tuple[int, Any]] = {}  # addresses by name, and the engines, which must live as long as the process


class Kernel(Protocol):
    """What is compiled; its `repr` says all about it that the sources do not."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """For messages and the cache of compiled code."""

    @property
    def source(self) -> str:
        """The file with its Numba functions: one of `bitcode.SOURCES`.

        They are `handle`, which answers XLA's call frame at an address, and `take_ranges`, which takes a shared block.
        """

    def tiles(self, machine: Machine) -> "dict[str, Tile]":
        """What these are linked with, by name."""


def handler_address(kernel: Kernel, machine: Machine) -> int:
    """The address of a kernel's foreign function on a machine, compiled or loaded when first asked for."""
    name = name_of(kernel, machine)
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(_object_code(kernel, machine), machine)
        return _loaded[name][0]


@functools.cache
def name_of(kernel: Kernel, machine: Machine) -> str:
    """A name for the machine code: of all that it depends on."""
    digest = hashlib.sha256(repr((kernel, machine)).encode())
    for package in ("numba", "llvmlite"):
        digest.update(importlib.metadata.version(package).encode())
    digest.update(bitcode.digest_of_sources().encode())
    for source in bitcode.SOURCES:
        digest.update(bitcode.kept(source) or b"")
    return f"{kernel.name}_{digest.hexdigest()[:24]}"


def cache_folder() -> pathlib.Path:
    """Where compiled kernels are kept."""
    if named := os.environ.get("JAX_IFA_CACHE_DIR"):
        return pathlib.Path(named)
    import platformdirs

    return pathlib.Path(platformdirs.user_cache_dir("jax_ifa", appauthor=False))


def _object_code(kernel: Kernel, machine: Machine) -> bytes:
    """The object file, from the cache or compiled and put there. A kept file begins with the SHA-256 of the rest."""
    path = cache_folder() / f"{name_of(kernel, machine)}.bin"
    with contextlib.suppress(OSError):
        kept = path.read_bytes()
        if hashlib.sha256(kept[32:]).digest() == kept[:32]:
            return kept[32:]
    code = compile_object(kernel, machine)
    # A cache that cannot be written is no error. Renamed into place, so that nobody reads half a file.
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    return code


def _target(machine: Machine, triple: str | None) -> Any:
    if triple is None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = llvm.Target.from_triple(triple)
    # The large code model: the loader may put code and constants further apart than 2 GiB.
    return target.create_target_machine(cpu=machine.cpu, features=machine.features, opt=3, codemodel="large")


def compile_object(kernel: Kernel, machine: Machine, triple: str | None = None) -> bytes:
    """An object file with the foreign function `ENTRY`.

    Args:
      kernel: what to compile.
      machine: to run on.
      triple: LLVM's name of the platform to compile for; None is this one.
    """
    module = _linked(kernel, machine)
    target = _target(machine, triple)
    _optimise(module, target)
    missing = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if not missing <= {"malloc", "free", "sched_yield"}:
        raise RuntimeError(f"the kernel would need {missing}")
    return target.emit_object(module)


def native_engine(module: Any, machine: Machine) -> Any:
    """A module of LLVM IR, optimised and ready to be called on this machine."""
    target = _target(machine, None)
    _optimise(module, target)
    return _loaded_object(target.emit_object(module), machine)


def _optimise(module: Any, target: Any) -> None:
    module.triple, module.data_layout = target.triple, str(target.target_data)
    bitcode.optimise(module, target, 2)


def _linked(kernel: Kernel, machine: Machine) -> Any:
    """Tiles and Numba's functions as one module."""
    from numba_kernels import tiles

    steps = kernel.tiles(machine)
    module = llvm.parse_assembly(str(tiles.module_of(steps, machine)))
    functions = bitcode.module_of(kernel.source)
    for function in functions.functions:  # the linker would not look
        if function.is_declaration and function.name in steps:
            expected, got = (x.global_value_type for x in (function, module.get_function(function.name)))
            if expected != got:
                raise RuntimeError(f"{function.name}: Numba code calls {expected}, got {got}")
    module.link_in(functions)
    for function in module.functions:
        if not function.is_declaration and function.name != ENTRY:
            function.linkage = "internal"
            step = function.name in steps and not steps[function.name].number
            function.add_function_attribute("noinline" if step else "nounwind")
    return module


def _load(code: bytes, machine: Machine) -> tuple[int, Any]:
    """The address of `ENTRY` in an object file, and what keeps it in memory."""
    engine = _loaded_object(code, machine)
    return engine.get_function_address(ENTRY), engine


def _loaded_object(code: bytes, machine: Machine) -> Any:
    """The engine that holds an object file's functions."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target(machine, None))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine
