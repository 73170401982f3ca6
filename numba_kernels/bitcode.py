"""Numba's functions as LLVM bitcode, which comes with the package, so that nobody has to wait for Numba.

What Numba makes of schedule.py and rows.py is the same for every format and processor (linked.py), and takes it two
thirds of a first call. So it is kept beside them, in schedule.bc and rows.bc, whose first line says what they were made
of. Where that is no longer so, or a file is missing, damaged or of a newer LLVM than is here, Numba does its work again
in every process that compiles, until

    make bitcode

writes the files anew. It does so with the oldest Numba that pyproject.toml allows: LLVM reads what older ones wrote.
"""

import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import pathlib
import platform
import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import llvmlite.binding as llvm

from jax_ifa.masking import MASK_VALUE

ENTRY = "jax_ifa_handle"  # the C functions that are made of a source's `handle` and `take_ranges`
TASK = "jax_ifa_take_ranges"
SOURCES = ("schedule", "rows")
MAKER = "numba 0.62.1 python 3.11 x86_64"
# What all platforms that this is for have in common: the order of bytes, and the alignment of int64.
_ANY_LAYOUT = "e-i64:64-n32:64-S128"


@functools.cache
def digest_of_sources() -> str:
    """Of all that Numba's functions are made of, and what they are linked with."""
    digest = hashlib.sha256(repr(MASK_VALUE).encode())
    # Resources, since the package may lie in an archive; and some have no sources but what Python makes of them.
    files = {file.name: file for file in resources.files("numba_kernels").iterdir()}
    for name in sorted(name for name in files if name.endswith((".py", ".pyc"))):
        digest.update(files[name].read_bytes())
    return digest.hexdigest()


def file_of(source: str) -> Traversable:
    """The file that comes with the package."""
    return resources.files("numba_kernels") / f"{source}.bc"


def module_of(source: str) -> Any:
    """The LLVM module of the functions `ENTRY` and `TASK` of a source, `int64 name(int64)`."""
    code = kept(source)
    if code is not None:
        with contextlib.suppress(RuntimeError):
            return llvm.parse_bitcode(code)
    return llvm.parse_bitcode(typed(source))


def kept(source: str) -> bytes | None:
    """The bitcode that comes with the package, if it is whole, of these sources, and of no newer LLVM than is here."""
    try:
        first, code = file_of(source).read_bytes().split(b"\n", 1)
        digest, checksum, version, *_ = first.decode().split()
        known = int(version) <= llvm.llvm_version_info[0]
    except (OSError, ValueError):
        return None
    # An older LLVM may take what it does not know for something else, and says nothing.
    fits = known and digest == digest_of_sources() and checksum == hashlib.sha256(code).hexdigest()
    return code if fits else None


def write(folder: pathlib.Path) -> None:
    """Write the files that come with the package. Their first line: two digests, LLVM's version; Numba's, Python's."""
    for source in SOURCES:
        code = typed(source)
        checksum = hashlib.sha256(code).hexdigest()
        first = f"{digest_of_sources()} {checksum} {llvm.llvm_version_info[0]} LLVM {_maker()}\n"
        new = folder / f"{source}.new"
        new.write_bytes(first.encode() + code)
        new.replace(folder / f"{source}.bc")


def _maker() -> str:
    python = ".".join(platform.python_version_tuple()[:2])
    return f"numba {importlib.metadata.version('numba')} python {python} {platform.machine()}"


@functools.cache
def typed(source: str) -> bytes:
    """The bitcode that Numba makes of a source: nothing in it is for one platform only."""
    from numba import types

    from numba_kernels.linked import NAMES

    functions = importlib.import_module(f"numba_kernels.{source}")
    # A Numba without the private names of `_only_typed` makes machine code too, and asks for these symbols.
    for name in (*NAMES, TASK):
        llvm.add_symbol(name, ctypes.cast(_never_called, ctypes.c_void_p).value)
    module, names = llvm.parse_assembly(""), []
    for function in (functions.handle, functions.take_ranges):
        with _only_typed():
            function.compile((types.int64,))
        compiled = function.overloads[(types.int64,)]
        # What Numba does not optimise it marks as not to be optimised by anyone.
        text = compiled.library.get_llvm_str().replace(" optnone", "").replace(" noinline", "")
        module.link_in(llvm.parse_assembly(_for_any_platform(text)))
        names.append(compiled.fndesc.llvm_func_name)
    module.link_in(llvm.parse_assembly(_entry_points(names, (ENTRY, TASK))))
    for symbol in (*module.functions, *module.global_variables):
        if not symbol.is_declaration and symbol.name not in (ENTRY, TASK):
            symbol.linkage = "internal"
    for function in module.functions:
        function.add_function_attribute("nounwind")
    # Simplified, it is a third as large, and what is left to do with it takes half as long.
    module.data_layout = _ANY_LAYOUT
    llvm.initialize_native_target()
    optimise(module, llvm.Target.from_default_triple().create_target_machine(), 1)
    module.data_layout = ""
    return bytes(module.as_bitcode())


def optimise(module: Any, target: Any, level: int) -> None:
    """LLVM's passes of a level, but those that make vectors: the tiles are, and as wide as it helps, already."""
    options = llvm.create_pipeline_tuning_options(speed_level=level)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(module, passes)


@contextlib.contextmanager
def _only_typed() -> Iterator[None]:
    """Meanwhile Numba types functions and writes IR, and leaves the rest to us.

    It would optimise a function with all that it calls, again for each caller, and then make machine code that nobody
    calls: here the whole is optimised once, at the end. The lock keeps other threads' compilations from seeing this.
    Numba keeps what it types meanwhile, also of its own (`max` of two int64), for others' functions to be linked with.
    As IR that is whole, so long as nothing is printed and nothing that it raises can come to pass.

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
    """IR without what says which platform it is for, or differs from one process to the next: addresses in names."""
    numbers: dict[str, int] = {}

    def renamed(found: re.Match[str]) -> str:
        return found[1] + str(numbers.setdefault(found[2], len(numbers)))

    text = re.sub(r"(\.const\.pickle[a-z]+\.)(\d+)(?![0-9a-z])", renamed, text)
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


if __name__ == "__main__":
    if _maker() != MAKER:
        raise SystemExit(f"expected {MAKER}, so that everyone writes the same, got {_maker()}")
    write(pathlib.Path(__file__).parent)
