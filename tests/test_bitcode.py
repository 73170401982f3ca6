"""What Numba makes of its functions comes with the package, and is used where it fits."""

import importlib
import pathlib
import zipfile

import pytest
from llvmlite import binding as llvm
from llvmlite import ir
from test_numba import RUN, in_a_process

from numba_kernels import bitcode, build, linked
from numba_kernels.formats import Format, format_of
from numba_kernels.machine import Machine, this_machine
from numba_kernels.product import RowProduct
from numba_kernels.tiles import Tile
from numba_kernels.vectors import I64

FORMS = [
    *(format_of(dtype, False, this_machine()) for dtype in ("float32", "bfloat16", "float16", "int8")),
    *map(RowProduct, (None, "q8_0")),
]


@pytest.mark.parametrize("source", bitcode.SOURCES)
def test_it_is_of_these_sources(source: str) -> None:
    first, _ = bitcode.file_of(source).read_bytes().split(b"\n", 1)
    assert first.decode().split()[0] == bitcode.digest_of_sources(), (
        "numba_kernels/ has changed: run `make bitcode` and commit what it writes"
    )


@pytest.mark.parametrize("made", [bitcode.kept, bitcode.typed], ids=["kept", "typed"])
@pytest.mark.parametrize("source", bitcode.SOURCES)
def test_nothing_in_it_is_for_one_platform(source: str, made) -> None:
    code = made(source)
    assert code is not None, "see test_it_is_of_these_sources"
    module = llvm.parse_bitcode(code)
    assert (module.triple, module.data_layout) == ("", "")
    assert "target-cpu" not in str(module)
    defined = {f.name for f in module.functions if not f.is_declaration and f.linkage.name == "external"}
    assert defined == {bitcode.ENTRY, bitcode.TASK}
    importlib.import_module(f"numba_kernels.{source}")  # where more names are
    found = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    assert found <= {*linked.NAMES, "malloc", "free", "sched_yield"}
    assert not {f.name for f in module.functions if f.name.startswith(("llvm.x86", "llvm.aarch64"))}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_numbers_are_constants_in_the_end(form: build.Kernel) -> None:
    machine = this_machine()
    module = build._linked(form, machine)
    numbers = {name for name, tile in form.tiles(machine).items() if tile.number}
    assert numbers < {f.name for f in module.functions}
    build._optimise(module, build._target(machine, None))
    assert not numbers & {f.name for f in module.functions}


def test_numba_is_not_needed_for_the_first_call(tmp_path: pathlib.Path) -> None:
    code = RUN + "check()\nprint('numba' in sys.modules)"
    assert in_a_process(code, JAX_IFA_CACHE_DIR=str(tmp_path)).strip() == "False"


FAULTS = {
    "of other sources": lambda whole: b"0" + whole[1:] if whole[:1] != b"0" else b"1" + whole[1:],
    "of a newer LLVM": lambda whole: whole.replace(b" LLVM", b"0 LLVM", 1),
    "damaged": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    "cut off": lambda whole: whole[:1000],
    "without a line": lambda whole: whole.replace(b"\n", b""),
    "not of text": lambda whole: b"\xff\xfe" + whole,
    "short": lambda whole: b"x\n" + whole,
    "empty": lambda whole: b"",
    "absent": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_not_used(fault: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.bc"
    monkeypatch.setattr(bitcode, "file_of", lambda source: path)
    whole = (pathlib.Path(bitcode.__file__).parent / "rows.bc").read_bytes()
    path.write_bytes(whole)
    assert bitcode.kept("rows") is not None, "see test_it_is_of_these_sources"
    name = build.name_of.__wrapped__(RowProduct(None), this_machine())
    if FAULTS[fault] is None:
        path.unlink()
    else:
        path.write_bytes(FAULTS[fault](whole))
    assert bitcode.kept("rows") is None
    assert build.name_of.__wrapped__(RowProduct(None), this_machine()) != name  # of the machine code that is kept


def test_then_numba_makes_it(tmp_path: pathlib.Path) -> None:
    code = (
        RUN
        + """
from numba_kernels import bitcode
import jax.numpy as jnp, numpy as np
from numba_kernels.product import row_product
bitcode.kept = lambda source: None
check(int8=True, dtype="bfloat16", heads=9, kv_heads=3)
x, matrix = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(4, 3)
np.testing.assert_array_equal(jax.jit(row_product)(x, matrix), x @ matrix.T)
print("numba" in sys.modules)
"""
    )
    assert in_a_process(code, JAX_IFA_CACHE_DIR=str(tmp_path)).strip() == "True"


def test_writing_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitcode, "file_of", lambda source: tmp_path / f"{source}.bc")
    bitcode.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"schedule.bc", "rows.bc"}
    for source in bitcode.SOURCES:
        assert bitcode.kept(source) == bitcode.typed(source)


@pytest.mark.parametrize("suffix", [".py", ".pyc"])
def test_in_an_archive_the_sources_count_too(suffix: str, tmp_path: pathlib.Path) -> None:
    """Of two versions without a folder of their own, each has its own name for machine code."""
    root = pathlib.Path(bitcode.__file__).parent.parent
    digests = []
    for change in ("", "pass\n"):
        archive = tmp_path / f"{len(change)}.zip"
        with zipfile.PyZipFile(archive, "w") as file:
            for package in ("jax_ifa", "jax_ifa/cache", "numba_kernels"):
                for path in sorted((root / package).glob("*.py")):
                    text = path.read_text() + (change if path.name == "tiles.py" else "")
                    name = f"{package}/{path.name}"
                    if suffix == ".py":
                        file.writestr(name, text)
                    else:
                        code = compile(text, name, "exec")
                        file.writestr(f"{name}c", importlib._bootstrap_external._code_to_timestamp_pyc(code))
        code = "from numba_kernels import bitcode; print(bitcode.__file__, bitcode.digest_of_sources())"
        found, digest = in_a_process(f"import sys; sys.path.insert(0, {str(archive)!r}); {code}").split()
        assert found.startswith(str(archive))
        digests.append(digest)
    assert digests[0] != digests[1]


def test_a_step_that_takes_other_arguments_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker would accept it."""
    tiles = Format.tiles

    def with_another(self: Format, machine: Machine) -> dict[str, Tile]:
        return tiles(self, machine) | {"divide": Tile("divide", 1, lambda v, x: ir.Constant(I64, 0))}

    monkeypatch.setattr(Format, "tiles", with_another)
    with pytest.raises(RuntimeError, match=r"divide: Numba code calls i64 \(i64, i64, i64, i64\), got i64 \(i64\)"):
        build.compile_object(format_of("float32", False, this_machine()), this_machine())
