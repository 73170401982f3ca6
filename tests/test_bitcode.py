"""What Numba makes of its functions comes with the package, and is what it would make here."""

import pathlib

import pytest
from llvmlite import binding as llvm
from llvmlite import ir
from test_numba import RUN, in_a_process

from numba_kernels import bitcode, build
from numba_kernels.formats import Format, format_of
from numba_kernels.machine import Machine, this_machine
from numba_kernels.tiles import Tile
from numba_kernels.vectors import I64

RENEW = "the sources have changed: run `make bitcode` and commit what it writes"


@pytest.mark.parametrize("source", bitcode.SOURCES)
def test_it_is_of_these_sources(source: str) -> None:
    origin, _ = bitcode.kept(source)
    assert origin.split()[0] == bitcode.digest_of_sources(), RENEW


def test_it_is_what_numba_makes_of_them() -> None:
    """In a process of its own: Numba numbers what it types."""
    origins, codes = zip(*map(bitcode.kept, bitcode.SOURCES), strict=True)
    if set(origins) != {bitcode.made_of()}:
        pytest.skip(f"made by {origins[0].split(maxsplit=1)[1]}, here is {bitcode.made_of().split(maxsplit=1)[1]}")
    made = in_a_process("from numba_kernels import bitcode as b\nfor x in b.SOURCES: print(b.typed(x).hex())")
    assert list(map(bytes.fromhex, made.split())) == list(codes), RENEW


@pytest.mark.parametrize("source", bitcode.SOURCES)
def test_nothing_in_it_is_for_one_platform(source: str) -> None:
    module = llvm.parse_bitcode(bitcode.typed(source))
    assert (module.triple, module.data_layout) == ("", "")
    assert "target-cpu" not in str(module)


def test_numba_is_not_needed_for_the_first_call(tmp_path: pathlib.Path) -> None:
    try:
        llvm.parse_bitcode(bitcode.kept("schedule")[1])
    except RuntimeError:
        pytest.skip("the LLVM here is older than the one that wrote it")
    code = RUN + "check()\nprint('numba' in sys.modules)"
    assert in_a_process(code, JAX_IFA_CACHE_DIR=str(tmp_path)).strip() == "False"


PRODUCT = """
import jax.numpy as jnp, numpy as np
from numba_kernels.product import row_product
x, matrix = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(4, 3)
np.testing.assert_array_equal(jax.jit(row_product)(x, matrix), x @ matrix.T)
print("numba" in sys.modules)
"""


@pytest.mark.parametrize("fault", ["stale", "unreadable", "absent"])
def test_otherwise_numba_makes_it(fault: str, tmp_path: pathlib.Path) -> None:
    kept = {
        "stale": "lambda source: ('0' * 64 + ' numba 1', b'never read')",
        "unreadable": "lambda source: (bitcode.digest_of_sources() + ' numba 1', b'of another LLVM')",
        "absent": "lambda source: open('/there/is/none')",
    }[fault]
    checks = "".join(f"check(dtype='{x}', heads=9, kv_heads=3)\n" for x in ("float32", "bfloat16", "float16"))
    checks += "check(int8=True, dtype='bfloat16', layout='BSND')\n" + PRODUCT
    code = RUN + f"from numba_kernels import bitcode\nbitcode.kept = {kept}\n" + checks
    assert in_a_process(code, JAX_IFA_CACHE_DIR=str(tmp_path)).strip() == "True"


def test_a_step_that_takes_other_arguments_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker would accept it."""
    tiles = Format.tiles

    def with_another(self: Format, machine: Machine) -> dict[str, Tile]:
        return tiles(self, machine) | {"divide": Tile("divide", 1, lambda v, x: ir.Constant(I64, 0))}

    monkeypatch.setattr(Format, "tiles", with_another)
    with pytest.raises(AssertionError, match="divide"):
        build.compile_object(format_of("float32", False, this_machine()), this_machine())
