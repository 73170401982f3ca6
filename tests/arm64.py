"""The CPU kernels' code for 64-bit Arm, run instruction by instruction on any machine.

An emulator (Unicorn) executes the object file that LLVM makes, in a process of its own making: XLA's call frame, its
thread pool and what the code needs of C are here. It is stricter than a processor: operands may not be written, what
was freed is gone, and every array and every piece of memory that the code asks for lies beside a page that may not be
touched. Each call is made twice, with that page behind them and with it before them, and has to give the same bits.
Memory and the stack are full of NaN before they are written.

The emulator knows Arm's instructions up to 8.4. Of the later ones the kernels use those of bfloat16, which are done
here as Arm's manual (DDI 0487) defines them: their sums are rounded to odd, and what is not normal is 0.
"""

import bisect
import collections
import dataclasses
import functools
import io
import struct
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from cases import Case
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from unicorn import UC_ARCH_ARM64, UC_HOOK_BLOCK, UC_HOOK_CODE, UC_HOOK_INTR, UC_MODE_ARM, Uc
from unicorn import arm64_const as arm
from unicorn.unicorn_const import UC_PROT_EXEC, UC_PROT_READ, UC_PROT_WRITE

from jax_ifa import incre_flash_attention
from numba_kernels import build, launch, product
from numba_kernels.bitcode import ENTRY
from numba_kernels.build import Kernel
from numba_kernels.frame import ARGUMENTS, ATTRIBUTES, DATA, DIMS, ERROR_DESTROY, KIND, NUM_THREADS, RESULTS, SCHEDULE
from numba_kernels.machine import Machine, describe

TRIPLE = "aarch64-unknown-linux-gnu"
# As LLVM and the systems describe them: Linux on a Raspberry Pi 4 and on Neoverse V2, whose SVE is not used; macOS.
_LINUX = ("neon", "fp-armv8", "crc")
MACHINES = {
    "cortex-a72": describe("cortex-a72", dict.fromkeys(_LINUX, True), "aarch64"),
    "apple-m1": describe("apple-m1", {"bf16": False, "dotprod": True}, "arm64"),
    "neoverse-v2": describe(
        "neoverse-v2", dict.fromkeys((*_LINUX, "lse", "sve", "sve2", "sve-aes", "bf16", "dotprod"), True), "aarch64"
    ),
}
MODELS = {"cortex-a72": arm.UC_CPU_ARM64_A72}  # for the others: all that Unicorn knows

PAGE = 4096
STUBS, CODE, STACK, HEAP = 0x1000_0000, 0x1001_0000, 0x3000_0000, 0x4000_0000
STACK_SIZE = 1 << 20
RETURN = 0xD65F03C0  # the instruction `ret`
UNDEFINED = 1  # the exception
GARBAGE = b"\xff"  # NaN, of all float types
# XLA's numbers.
ELEMENT_TYPES = {"bool": 1, "int8": 2, "int32": 4, "uint8": 6, "float16": 10, "float32": 11, "bfloat16": 16}


def _movw(shift: int) -> Callable[[int, int, int], int]:
    return lambda word, value, place: word | (value >> shift & 0xFFFF) << 5


def _call(word: int, value: int, place: int) -> int:
    assert abs(value - place) < 1 << 27
    return word | (value - place) >> 2 & 0x3FFFFFF


# What the code model `large` leaves to the linker: R_AARCH64_MOVW_UABS_G0_NC, G1_NC, G2_NC, G3; JUMP26 and CALL26.
RELOCATIONS = {264: _movw(0), 266: _movw(16), 268: _movw(32), 269: _movw(48), 282: _call, 283: _call}
ABS64, PREL32 = 257, 260


class Process:
    """An object file in memory of its own.

    Args:
      code: an ELF file for 64-bit Arm.
      threads: of the pool, with the caller. The first other one begins at once and does all there is to do, the rest
        only when the caller is done.
      at_end: whether what lies in memory is at the end of its pages, or at the beginning.
      model: of the processor, by Unicorn's name: it does not execute what this one has not.
    """

    def __init__(self, code: bytes, threads: int = 3, at_end: bool = True, model: int = arm.UC_CPU_ARM64_MAX) -> None:
        self.threads, self.at_end = threads, at_end
        self.later: list[tuple[int, int]] = []
        self.begun = 0
        self.pieces: dict[int, tuple[int, int]] = {}  # of memory that the code asked for: first page and bytes
        self.instructions: collections.Counter[str] = collections.Counter()  # those that are done here
        self.executed: collections.Counter[str] = collections.Counter()  # all, by the function they are in
        self.functions: list[tuple[int, str]] = []
        self.machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.machine.ctl_set_cpu_model(model)
        self.free = HEAP
        self.stubs: list[Callable[[], int | None]] = []
        for thread in range(2):  # nobody runs inside anybody but the caller
            self._place(STACK + 2 * thread * STACK_SIZE, GARBAGE * STACK_SIZE, UC_PROT_READ | UC_PROT_WRITE)
        self.machine.mem_map(STUBS, PAGE, UC_PROT_READ | UC_PROT_EXEC)
        self.machine.mem_write(STUBS, struct.pack("<I", RETURN) * (PAGE // 4))
        self.machine.hook_add(UC_HOOK_CODE, self._stub, begin=STUBS, end=STUBS + PAGE - 1)
        self.machine.hook_add(UC_HOOK_INTR, self._exception)
        self.end = self._function(lambda: None)
        self.entry = self._load(code)

    def _load(self, code: bytes) -> int:
        """The sections of the file in memory, and the address of `ENTRY`."""
        file = ELFFile(io.BytesIO(code))
        imports = {
            "malloc": lambda: self._allocate(self._argument(0)),
            "free": lambda: self._release(self._argument(0)),
            "sched_yield": lambda: pytest.fail("the caller waits for a range that nobody works on"),
            "logf": self._log,
        }
        sections, bases, at = list(file.iter_sections()), {}, CODE
        for i, section in enumerate(sections):
            if section["sh_flags"] & 2:  # SHF_ALLOC
                bases[i] = at
                at += -(-section["sh_size"] // PAGE) * PAGE + PAGE
        symbols: list[int] = []
        for symbol in file.get_section_by_name(".symtab").iter_symbols():
            section = symbol["st_shndx"]
            if section == "SHN_UNDEF":
                symbols.append(self._function(imports[symbol.name]) if symbol.name else 0)
            else:
                symbols.append(bases.get(section, 0) + symbol["st_value"])
            if symbol["st_info"]["type"] == "STT_FUNC":
                self.functions.append((symbols[-1], symbol.name))
            if symbol.name == ENTRY:
                entry = symbols[-1]
        self.functions.sort()
        self.machine.hook_add(UC_HOOK_BLOCK, self._count_block, begin=CODE, end=at)
        contents = {i: bytearray(sections[i].data()) for i in bases}
        for section in sections:
            if isinstance(section, RelocationSection) and section["sh_info"] in bases:
                base, content = bases[section["sh_info"]], contents[section["sh_info"]]
                for entry_ in section.iter_relocations():
                    offset, kind = entry_["r_offset"], entry_["r_info_type"]
                    value = symbols[entry_["r_info_sym"]] + entry_["r_addend"]
                    if kind == ABS64:
                        struct.pack_into("<Q", content, offset, value)
                    elif kind == PREL32:
                        struct.pack_into("<i", content, offset, value - base - offset)
                    else:
                        (word,) = struct.unpack_from("<I", content, offset)
                        struct.pack_into("<I", content, offset, RELOCATIONS[kind](word, value, base + offset))
        for i, base in bases.items():
            runs = UC_PROT_EXEC if sections[i]["sh_flags"] & 4 else 0  # SHF_EXECINSTR
            self._place(base, bytes(contents[i]), UC_PROT_READ | runs)
        return entry

    def call(
        self, arrays: list[np.ndarray], results: list[jax.ShapeDtypeStruct], **attributes: int
    ) -> list[np.ndarray]:
        """The results of the foreign function for these operands."""
        pieces = set(self.pieces)
        before = [np.full(result.shape, 77, result.dtype) for result in results]
        arguments = [self._buffer(array) for array in arrays]
        outputs = [self._buffer(array, UC_PROT_READ | UC_PROT_WRITE) for array in before]
        api = [0] * 19
        api[ERROR_DESTROY] = self._function(lambda: pytest.fail("nothing fails here"))
        api[SCHEDULE] = self._function(self._schedule)
        api[NUM_THREADS] = self._function(self._count)
        frame = [0] * 21
        frame[2] = self._words(api)
        frame[ARGUMENTS] = self._words([self._words(buffer) for buffer in arguments])
        frame[RESULTS] = self._words([self._words(buffer) for buffer in outputs])
        values = [self._words([0, self._words([value])]) for value in attributes.values()]
        frame[ATTRIBUTES] = self._words(values) if values else 0
        assert self._run(self.entry, self._words(frame), 0) == 0
        while self.later:
            self._run(*self.later.pop(), 1)
        assert set(self.pieces) == pieces, "memory that was not freed"
        return [
            np.frombuffer(self.machine.mem_read(buffer[DATA], array.nbytes), array.dtype).reshape(array.shape)
            for buffer, array in zip(outputs, before, strict=True)
        ]

    def _run(self, function: int, argument: int, stack: int) -> int:
        self.machine.reg_write(arm.UC_ARM64_REG_X0, argument)
        self.machine.reg_write(arm.UC_ARM64_REG_SP, STACK + (2 * stack + 1) * STACK_SIZE - 64)
        self.machine.reg_write(arm.UC_ARM64_REG_LR, self.end)
        self.machine.emu_start(function, self.end)
        return self._argument(0)

    def _argument(self, i: int) -> int:
        return self.machine.reg_read((arm.UC_ARM64_REG_X0, arm.UC_ARM64_REG_X1)[i])

    # Memory.

    def _place(self, address: int, content: bytes, permission: int) -> None:
        self.machine.mem_map(address, -(-max(1, len(content)) // PAGE) * PAGE, permission)
        self.machine.mem_write(address, content)

    def _apart(self, content: bytes, permission: int) -> tuple[int, int]:
        """The content in pages of its own; its address and the first page's."""
        pages = -(-max(1, len(content)) // PAGE)
        first, self.free = self.free, self.free + (pages + 1) * PAGE
        rest = GARBAGE * (pages * PAGE - len(content))
        self._place(first, rest + content if self.at_end else content + rest, permission)
        return first + len(rest) * self.at_end, first

    def _words(self, words: list[int]) -> int:
        return self._apart(struct.pack(f"<{len(words)}q", *words), UC_PROT_READ)[0]

    def _buffer(self, array: np.ndarray, permission: int = UC_PROT_READ) -> list[int]:
        """XLA's description of an array."""
        buffer = [0] * 6
        buffer[KIND] = ELEMENT_TYPES[str(array.dtype)]
        buffer[DATA] = self._apart(array.tobytes(), permission)[0]
        buffer[DIMS] = self._words(list(array.shape))
        return buffer

    def _allocate(self, size: int) -> int:
        size = -(-size // 16) * 16  # as aligned as malloc's
        address, first = self._apart(GARBAGE * size, UC_PROT_READ | UC_PROT_WRITE)
        self.pieces[address] = first, self.free - PAGE - first
        return address

    def _release(self, address: int) -> None:
        self.machine.mem_unmap(*self.pieces.pop(address))

    # What the code calls.

    def _function(self, answer: Callable[[], int | None]) -> int:
        """The address of a function that gives this answer."""
        self.stubs.append(answer)
        return STUBS + 4 * (len(self.stubs) - 1)

    def _stub(self, _machine: Uc, address: int, _size: int, _data: Any) -> None:
        answer = self.stubs[(address - STUBS) // 4]()
        if answer is not None:
            self.machine.reg_write(arm.UC_ARM64_REG_X0, answer)

    def _log(self) -> None:
        x = np.uint32(self.machine.reg_read(arm.UC_ARM64_REG_S0)).view(np.float32)
        self.machine.reg_write(arm.UC_ARM64_REG_S0, int(np.log(x).view(np.uint32)))

    def _count(self) -> int:
        (answer,) = struct.unpack("<q", self.machine.mem_read(self._argument(0) + 24, 8))
        self.machine.mem_write(answer, struct.pack("<q", self.threads))
        return 0

    def _schedule(self) -> int:
        task = struct.unpack("<qq", self.machine.mem_read(self._argument(0) + 24, 16))
        self.begun += 1
        if self.begun % 2:
            context = self.machine.context_save()
            self._run(*task, 1)
            self.machine.context_restore(context)
        else:
            self.later.append(task)
        return 0

    def _count_block(self, _machine: Uc, address: int, size: int, _data: Any) -> None:
        _, name = self.functions[bisect.bisect_right(self.functions, address, key=lambda function: function[0]) - 1]
        self.executed[name] += size // 4

    # Instructions that the emulator does not know.

    def _exception(self, _machine: Uc, number: int, _data: Any) -> None:
        at = self.machine.reg_read(arm.UC_ARM64_REG_PC)
        (word,) = struct.unpack("<I", self.machine.mem_read(at, 4))
        found = [(name, do) for name, mask, code, do in INSTRUCTIONS if word & mask == code]
        assert number == UNDEFINED, f"exception {number} at {word:08x}"
        assert found, f"no instruction of this processor: {word:08x}"
        ((name, do),) = found
        do(self, word)
        self.instructions[name] += 1
        self.machine.reg_write(arm.UC_ARM64_REG_PC, at + 4)

    def vector(self, number: int) -> bytes:
        return self.machine.reg_read(arm.UC_ARM64_REG_Q0 + number).to_bytes(16, "little")

    def set_vector(self, number: int, value: bytes) -> None:
        self.machine.reg_write(arm.UC_ARM64_REG_Q0 + number, int.from_bytes(value, "little"))


def _normal(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, 0 * x, x)


def _sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of float32, cut off; and if something is lost by that, the last bit is 1."""
    with np.errstate(all="ignore"):
        a, b = a.astype(np.float64), b.astype(np.float64)
        total = a + b
        own = total - a
        lost = (a - (total - own)) + (b - own)  # of float64 too
        nearest = total.astype(np.float32)
        beyond = (np.abs(nearest) > np.abs(total)) | ((nearest == total) & (lost * np.sign(total) < 0))
        exact = ((nearest == total) & (lost == 0)) | ~np.isfinite(total)
        bits = nearest.view(np.uint32) - (beyond & ~exact)
        return _normal((bits | ~exact).astype(np.uint32).view(np.float32))


def _bfdot(process: Process, word: int, *, one_lane: bool = False) -> None:
    """Products of the pairs in four lanes are added to these: vd += vn * vm, or vn * one lane of vm."""
    d, n, m = word & 31, word >> 5 & 31, word >> 16 & 31
    left, right = (
        _normal(np.frombuffer(process.vector(i), ml_dtypes.bfloat16).astype(np.float32)).reshape(4, 2) for i in (n, m)
    )
    if one_lane:
        right = right[(word >> 11 & 1) << 1 | word >> 21 & 1]
    with np.errstate(all="ignore"):
        first, second = _normal(left * right).T  # exact
    total = _normal(np.frombuffer(process.vector(d), np.float32))
    process.set_vector(d, _sum_to_odd(total, _sum_to_odd(first, second)).tobytes())


def _to_bfloat16(process: Process, word: int) -> None:
    """The four lanes of vn rounded, in the lower half of vd, or the upper."""
    rounded = np.frombuffer(process.vector(word >> 5 & 31), np.float32).astype(ml_dtypes.bfloat16).tobytes()
    before = process.vector(word & 31)
    process.set_vector(word & 31, before[:8] + rounded if word >> 30 & 1 else rounded + bytes(8))


# name, the bits that are fixed, what they are, what it does
INSTRUCTIONS = [
    ("bfdot", 0xFFE0FC00, 0x6E40FC00, _bfdot),
    ("bfdot", 0xFFC0F400, 0x4F40F000, functools.partial(_bfdot, one_lane=True)),
    ("bfcvtn", 0xBFFFFC00, 0x0EA16800, _to_bfloat16),
]


_compiled: dict[str, bytes] = {}  # object files by the names of their kernels


class Emulated:
    """Foreign calls of the CPU kernels, while a test runs, go to processes of this machine.

    Attributes:
      calls: how many there were.
      instructions: those that the emulator does not know, and how often they were done.
      executed: how many of all kinds, by the function they are in.
    """

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, threads: int = 3) -> None:
        self.calls = 0
        self.instructions: collections.Counter[str] = collections.Counter()
        self.executed: collections.Counter[str] = collections.Counter()
        self._threads = threads
        self._model = MODELS.get(machine.cpu, arm.UC_CPU_ARM64_MAX)
        for module in (launch, product):
            monkeypatch.setattr(module, "this_machine", lambda: machine)
            monkeypatch.setattr(module, "registered", self._registered)
        monkeypatch.setattr(jax.ffi, "ffi_call", self._ffi_call)

    def _registered(self, kernel: Kernel, machine: Machine) -> str:
        name = build.name_of(kernel, machine)
        if name not in _compiled:
            _compiled[name] = build.compile_object(kernel, machine, TRIPLE)
        return name

    def _ffi_call(self, name: str, results: Any) -> Callable[..., Any]:
        several = results if isinstance(results, tuple) else (results,)

        def run(*arrays: Any, **attributes: Any) -> Any:
            def emulate(*arrays: Any) -> Any:
                operands, found = [np.asarray(x) for x in arrays], []
                for at_end in (True, False):
                    process = Process(_compiled[name], self._threads, at_end, self._model)
                    found.append(process.call(operands, list(several), **attributes))
                out, again = found
                for x, y in zip(out, again, strict=True):
                    np.testing.assert_array_equal(x.view(np.uint32), y.view(np.uint32))
                self.calls += 1
                self.instructions += process.instructions
                self.executed += process.executed
                return tuple(out) if isinstance(results, tuple) else out[0]

            return jax.pure_callback(emulate, results, *arrays)

        return run


def instructions_of_a_position(machine: Machine, case: Case, patch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How many a machine executes for one more position of a sequence, rounded, by the function they are in."""
    executed = []
    for capacity in (128, 256):
        calls = Emulated(machine, patch, threads=1)
        args, kwargs = dataclasses.replace(case, batch=1, capacity=capacity, lengths=None).inputs()
        call = functools.partial(incre_flash_attention, implementation="numba", **kwargs)
        jax.block_until_ready(jax.jit(call)(*args))
        executed.append(calls.executed)
    less, more = executed
    return collections.Counter({name: round((more[name] - less[name]) / 128) for name in more})
