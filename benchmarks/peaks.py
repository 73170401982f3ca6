"""The peak rate of the instruction that a format of the Numba kernels multiplies with, measured on all cores."""

import ctypes
import os
import threading
from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir

from benchmarks.contenders import Contender
from numba_kernels import amx
from numba_kernels.build import native_engine
from numba_kernels.formats import Format
from numba_kernels.machine import Machine
from numba_kernels.vectors import I64, Vectors

CHAINS = 12  # sums that do not wait for each other: more than the instruction's latency
STEPS = 2_000_000


def peak(form: Format, machine: Machine) -> Contender:
    """A contender that issues `instructions()` dot instructions in all, and nothing else."""
    function, engine = _chains(form, machine)
    room = [ctypes.create_string_buffer(4096) for _ in os.sched_getaffinity(0)]

    def call() -> None:
        threads = [threading.Thread(target=function, args=(ctypes.addressof(x), STEPS)) for x in room]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    call.engine = engine  # type: ignore[attr-defined]  # the machine code lives as long as this
    return call


def instructions() -> int:
    """Dot instructions of one call of a `peak`."""
    return len(os.sched_getaffinity(0)) * CHAINS * STEPS


def multiply_adds(form: Format, machine: Machine) -> int:
    """Of one dot instruction."""
    return (16 * 16 * 16 if form.amx else machine.lanes) * form.pack


def _chains(form: Format, machine: Machine) -> tuple[Callable[[int, int], None], object]:
    module = ir.Module("peak")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64, I64]), "peak")
    builder = ir.IRBuilder(function.append_basic_block())
    v = Vectors(builder, machine)
    address, steps = function.args
    if form.amx:
        _chains_of_matrices(v, form, steps)
    else:
        _chains_of_vectors(v, form, address, steps)
    builder.ret_void()
    engine = native_engine(llvm.parse_assembly(str(module)), machine)
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("peak")), engine


def _chains_of_vectors(v: Vectors, form: Format, address: ir.Value, steps: ir.Value) -> None:
    builder = v.builder
    kind = v.ints if form.integer else v.floats
    factor = v.load(address, v.ints)
    totals = [v.variable(kind) for _ in range(CHAINS)]
    for total in totals:
        builder.store(v.constant(kind, 0), total)
    with v.loop(steps):
        for total in totals:
            sum_ = builder.load(total)
            # Of int16 the product and its sum are two instructions: the first must not be the same in every step.
            builder.store(v.dot(sum_, factor, sum_ if form.words else factor, form, "a"), total)
    for i, total in enumerate(totals):
        v.store(builder.load(total), v.address(address, i, 4 * v.lanes))


def _chains_of_matrices(v: Vectors, form: Format, steps: ir.Value) -> None:
    found = v.room(64)
    amx.make(form)["configure"].body(v, ir.Constant(I64, 16), found)
    *totals, a, b = range(8)
    for register in range(8):
        amx.instruction(v, "tilezero", register)
    with v.loop(steps):
        for i in range(CHAINS):
            amx.instruction(v, amx.SIGNED if form.integer else amx.BFLOAT16, totals[i % len(totals)], a, b)
    amx.make(form)["reset"].body(v, found)
