"""Structures of int64 words in memory, whose fields Numba code reads by name.

A tuple of thirty numbers would do the same, but Numba passes it as thirty arguments, and the code for that takes
seconds to compile.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, models, register_model

from numba_kernels.native import I64, INT


class RecordType(types.Type):
    """The address of a structure whose words have the names of a NamedTuple's fields."""

    def __init__(self, fields: type) -> None:
        self.fields: tuple[str, ...] = fields._fields  # type: ignore[attr-defined]
        super().__init__(name=f"Record({fields.__name__})")


@register_model(RecordType)
class _RecordModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: RecordType) -> None:
        super().__init__(manager, kind, I64)


@infer_getattr
class _RecordAttributes(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, kind: RecordType, name: str) -> Any:  # type: ignore[override]
        return types.int64 if name in kind.fields else None


@lower_getattr_generic(RecordType)
def _read(_context: Any, builder: ir.IRBuilder, kind: RecordType, address: ir.Value, name: str) -> ir.Value:
    at = builder.add(address, ir.Constant(I64, 8 * kind.fields.index(name)))
    return builder.load(builder.inttoptr(at, I64.as_pointer()), align=8)


def record_of(fields: type) -> tuple[Any, Any]:
    """Two intrinsics: `at(address)`, the record there, and `put(address, values)`, which stores its fields first."""
    kind = RecordType(fields)

    @intrinsic
    def at(_context: Any, address: Any) -> Any:
        return kind(INT), lambda _context, _builder, _signature, values: values[0]

    @intrinsic
    def put(_context: Any, address: Any, values: Any) -> Any:
        def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> ir.Value:
            address, values = arguments
            for i in range(len(kind.fields)):
                place = builder.add(address, ir.Constant(I64, 8 * i))
                builder.store(builder.extract_value(values, i), builder.inttoptr(place, I64.as_pointer()), align=8)
            return address

        return kind(INT, types.UniTuple(types.int64, len(kind.fields))), generate

    return at, put
