"""From the Numba functions to machine code that is called without Numba, and is kept for the next process.

Numba types the functions and lowers them to LLVM IR. That is linked with the tiles' IR, optimised once as a whole, and
emitted as an object file. The object is kept in a cache of this user's: a process that finds it there loads it in a few
milliseconds, without importing Numba. What the object depends on is in the name of its file: the sources of this
package, the versions of Numba and llvmlite, the processor and its features, and the kernel.

The cache lies in the folder that the environment variable JAX_IFA_CACHE_DIR names, else in the user's cache folder
(`platformdirs`; on Linux ~/.cache/jax_ifa). Where it cannot be written, every process compiles anew: that is
no error.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import llvmlite.binding as llvm

from numba_kernels.machine import Machine

if TYPE_CHECKING:
    from numba_kernels.tiles import Tile

ENTRY = "jax_ifa_handle"
_lock = threading.Lock()
_loaded: dict[str, tuple[int, Any]] = {}  # addresses by name, and the engines, which must live as long as the process


class Kernel(Protocol):
    """What is compiled; its `repr` says all about it that the sources do not."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """For messages and the cache of compiled code."""

    def code(self, machine: Machine) -> "tuple[dict[str, Tile], tuple[Any, Any]]":
        """Its tiles, and two Numba functions of an int64 address that return one.

        The first answers XLA's call frame at the address; the second is `sharing.TASK`, and takes a shared block.
        """


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
    for source in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
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
    assert missing <= {"malloc", "free", "sched_yield"}, f"the kernel would need {missing}"
    return target.emit_object(module)


def native_engine(module: Any, machine: Machine) -> Any:
    """A module of LLVM IR, optimised and ready to be called on this machine."""
    target = _target(machine, None)
    _optimise(module, target)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    return engine


def _optimise(module: Any, target: Any) -> None:
    module.triple, module.data_layout = target.triple, str(target.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # The tiles are vectors, and as wide as it helps, already.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)


def _linked(kernel: Kernel, machine: Machine) -> Any:
    """Tiles, Numba's functions and their C entry points as one module."""
    from numba import types

    from numba_kernels import sharing, tiles

    parts, functions = kernel.code(machine)
    # A Numba without the private names of `_only_typed` makes machine code too, and asks for these symbols.
    for name in (*parts, sharing.TASK):
        llvm.add_symbol(name, ctypes.cast(_never_called, ctypes.c_void_p).value)
    texts = [str(tiles.module_of(parts, machine))]
    names = []
    for function in functions:
        with _only_typed():
            function.compile((types.int64,))
        compiled = function.overloads[(types.int64,)]
        # What Numba does not optimise it marks as not to be optimised by anyone.
        texts.append(compiled.library.get_llvm_str().replace(" optnone", "").replace(" noinline", ""))
        names.append(compiled.fndesc.llvm_func_name)
    texts.append(_entry_points(names, (ENTRY, sharing.TASK)))
    module = llvm.parse_assembly(_for_any_platform(texts[0]))
    for text in texts[1:]:
        module.link_in(llvm.parse_assembly(_for_any_platform(text)))
    for function in module.functions:
        if not function.is_declaration and function.name != ENTRY:
            function.linkage = "internal"
            function.add_function_attribute("noinline" if function.name in parts else "nounwind")
    return module


@contextlib.contextmanager
def _only_typed() -> Iterator[None]:
    """Meanwhile Numba types functions and writes IR, and leaves the rest to us.

    It would optimise a function with all that it calls, again for each caller, and then make machine code that nobody
    calls: here the whole is optimised once, at the end. The lock keeps other threads' compilations from seeing this.
    Numba keeps what it types meanwhile, also of its own (`max` of two int64), for others' functions to be linked with.
    As IR that is whole, so long as it raises nothing and prints nothing.

    It makes millions of objects, few of them garbage: looking for that meanwhile took a seventh of the time.
    """
    from numba import config
    from numba.core import codegen
    from numba.core.compiler_lock import global_compiler_lock

    optimisation: Any = getattr(config, "OPT")  # noqa: B009 (made at run time)
    settings: list[tuple[Any, str, Any]] = [(config, "OPT", type(optimisation)(0)), (config, "LOOP_VECTORIZE", 0)]
    # No public names: to have a module compiled, and to write into it when it is. Without them this only takes longer.
    steps = ("_add_module", "set_env")
    if all(hasattr(codegen.JITCPUCodegen, step) for step in steps):
        settings += [(codegen.JITCPUCodegen, step, lambda *arguments: None) for step in steps]
    with global_compiler_lock:
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
        collects = gc.isenabled()
        gc.disable()
        try:
            for setting in settings:
                setattr(*setting)
            yield
        finally:
            for setting in before:
                setattr(*setting)
            if collects:
                gc.enable()


def _for_any_platform(text: str) -> str:
    """IR without what says which platform it is for: `_optimise` says that of the whole."""
    return "\n".join(line for line in text.splitlines() if not line.startswith(("target triple", "target datalayout")))


def _entry_points(numba_names: list[str], c_names: tuple[str, ...]) -> str:
    """IR of C functions `int64 NAME(int64)` that call Numba's, whose convention has a place for the result first."""
    lines = []
    for inner, outer in zip(numba_names, c_names, strict=True):
        lines.append(f"""
            declare i32 @{inner}(ptr, ptr, i64)
            define i64 @{outer}(i64 %argument) {{
              %result = alloca i64
              %exception = alloca ptr
              store i64 0, ptr %result
              %status = call i32 @{inner}(ptr %result, ptr %exception, i64 %argument)
              %answer = load i64, ptr %result
              ret i64 %answer
            }}""")
    return "\n".join(lines)


@ctypes.CFUNCTYPE(None)
def _never_called() -> None:
    raise AssertionError("a placeholder was called")


def _load(code: bytes, machine: Machine) -> tuple[int, Any]:
    """The address of `ENTRY` in an object file, and what keeps it in memory."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target(machine, None))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine.get_function_address(ENTRY), engine
