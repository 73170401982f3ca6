"""What Numba lacks for code that runs without Python: addresses, atomic counters, C's memory, function pointers."""

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I64 = ir.IntType(64)
INT = types.int64


# No exceptions: a division by zero must not look for Python. Nobody calls these from Python. And there is nothing to
# rewrite: no expressions of arrays, for instance; looking for such takes a tenth of the compiling.
_OPTIONS: dict[str, Any] = dict(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, no_rewrites=True)
native = numba.njit(**_OPTIONS)
"""Compiles a function for use without Python."""


def _loader(result: types.Type, kind: ir.Type, convert: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    @intrinsic
    def load(context: Any, address: Any) -> Any:
        del context

        def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
            return convert(builder, builder.load(builder.inttoptr(values[0], kind.as_pointer()), align=1))

        return result(INT), generate

    return load


load_int32 = _loader(types.int64, ir.IntType(32), lambda builder, x: builder.sext(x, I64))
load_byte = _loader(types.int64, ir.IntType(8), lambda builder, x: builder.zext(x, I64))
load_float32 = _loader(types.float32, ir.FloatType(), lambda builder, x: x)
load_float16 = _loader(types.float32, ir.HalfType(), lambda builder, x: builder.fpext(x, ir.FloatType()))
load_bfloat16 = _loader(
    types.float32,
    ir.IntType(16),
    lambda builder, x: builder.bitcast(
        builder.shl(builder.zext(x, ir.IntType(32)), ir.Constant(ir.IntType(32), 16)), ir.FloatType()
    ),
)


def _storer(value_type: types.Type, narrow: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    @intrinsic
    def store(context: Any, address: Any, value: Any) -> Any:
        del context

        def generate(context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
            value = narrow(builder, values[1])
            builder.store(value, builder.inttoptr(values[0], value.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(INT, value_type), generate

    return store


store_int64 = _storer(types.int64, lambda builder, x: x)
store_int32 = _storer(types.int64, lambda builder, x: builder.trunc(x, ir.IntType(32)))
store_float32 = _storer(types.float32, lambda builder, x: x)


@intrinsic
def fetch_add(context: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, for all threads to see, and return what it was."""
    del context

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
        return builder.atomic_rmw("add", builder.inttoptr(values[0], I64.as_pointer()), values[1], "seq_cst")

    return INT(INT, INT), generate


@intrinsic
def fetch(context: Any, address: Any) -> Any:
    """Have what lies at an address fetched into the processor's cache; any address will do."""
    del context

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
        pointer = builder.inttoptr(values[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, *[ir.IntType(32)] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, (pointer, *(ir.Constant(ir.IntType(32), x) for x in (0, 2, 1))))
        return values[0]

    return INT(INT), generate


allocate = types.ExternalFunction("malloc", INT(INT))
release = types.ExternalFunction("free", INT(INT))  # the answer has no meaning
give_way = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def word(context: Any, address: Any, index: Any) -> Any:
    """Word `index` of a structure of 64-bit words."""
    del context

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
        at = builder.add(values[0], builder.mul(values[1], ir.Constant(I64, 8)))
        return builder.load(builder.inttoptr(at, I64.as_pointer()), align=8)

    return INT(INT, INT), generate


@intrinsic
def up(context: Any, size: Any, multiple: Any) -> Any:
    """A positive size, rounded up to a multiple."""
    del context

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
        size, multiple = values
        return builder.mul(
            builder.udiv(builder.sub(builder.add(size, multiple), ir.Constant(I64, 1)), multiple), multiple
        )

    return INT(INT, INT), generate


@intrinsic
def call_pointer(context: Any, function: Any, argument: Any) -> Any:
    """function(argument), where both are addresses, and so is the answer."""
    del context

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, values: Any) -> ir.Value:
        kind = ir.FunctionType(I64, [I64])
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])

    return INT(INT, INT), generate


def pointer_to(name: str) -> Any:
    """An intrinsic that gives the address of the C function `name`."""

    @intrinsic
    def address(context: Any) -> Any:
        del context

        def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, _values: Any) -> ir.Value:
            kind = ir.FunctionType(I64, [I64])
            return builder.ptrtoint(cgutils.get_or_insert_function(builder.module, kind, name), I64)

        return INT(), generate

    return address
