"""The GPU benchmark, as far as a machine without a GPU can run it."""

import json
import pathlib
from typing import Any

import jax
import pytest
from gpu_interpreter import needs_interpreter

for package in ("typer", "tabulate", "tqdm", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed (the extra 'benchmarks')")

from benchmarks import gpu  # noqa: E402
from benchmarks.gpu_contenders import L2_BYTES, Shape, contenders  # noqa: E402
from pallas_kernels.gpu.hopper import tuning  # noqa: E402

SETTINGS = tuning.table()["default"]["device"]


def test_the_grid_is_as_large_as_memory_allows() -> None:
    shapes = gpu.grid()
    assert len(shapes) == len(set(shapes))
    assert {shape.batch for shape in shapes} == set(gpu.BATCHES)
    assert {shape.length for shape in shapes} == set(gpu.LENGTHS)
    assert {shape.block for shape in shapes if shape.dtype == "int8"} == {0, 32, 128}
    assert max(shape.cache_bytes * shape.copies for shape in shapes) <= gpu.MEMORY
    for shape in shapes:
        assert shape.cache_bytes * shape.copies >= 4 * L2_BYTES or shape.copies >= 2 * gpu.steps_for(shape)


def test_rivals_get_the_forms_they_know() -> None:
    assert "torch SDPA" in contenders(Shape(1, 64, 2, 1, 64))
    assert "pallas paged_attention" in contenders(Shape(1, 64, 2, 1, 64, 16))
    assert list(contenders(Shape(1, 64, 2, 1, 64, 32, "int8"))) == ["jax_ifa", "jax_ifa xla"]


def test_one_step_is_the_difference_of_two_programs() -> None:
    median, spread = gpu.per_step(lambda steps: 1.0 + 0.25 * steps, steps=4, rounds=3)
    assert (median, spread) == (0.25, 0.0)


def test_tuning_keeps_what_is_not_clearly_beaten() -> None:
    shape = Shape(1, 64, 2, 1, 64)

    def time(_: Shape, settings: dict[str, Any]) -> float:
        return 1.0 if settings == SETTINGS else 0.995

    assert gpu.best_of(shape, SETTINGS, time) == SETTINGS

    def faster(_: Shape, settings: dict[str, Any]) -> float:
        return 0.5 if (settings["tile"], settings["stages"]) == (128, 2) else 1.0

    best = gpu.best_of(shape, SETTINGS, faster)
    assert (best["tile"], best["stages"]) == (128, 2)


def test_the_rewritten_tuning_file_is_read_back() -> None:
    found = {"16-bit, D<=128, G<=8": SETTINGS | {"stages": 4}, "8-bit, D<=64, G<=8": SETTINGS}
    table = gpu.rewrite(tuning.table(), "NVIDIA H100 PCIe", 114, found)
    entry = table["h100-pcie"]
    assert entry["kinds"] == ["NVIDIA H100 PCIe"]
    assert entry["device"]["multiprocessors"] == 114
    assert entry["classes"]["16-bit, D<=128, G<=8"]["stages"] == 4
    assert "tile" not in entry["classes"]["8-bit, D<=64, G<=8"]
    again = gpu.rewrite(table, "NVIDIA H100 PCIe", 114, found)
    assert json.dumps(again, sort_keys=True) == json.dumps(table, sort_keys=True)


@needs_interpreter
def test_dry_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command under the interpreter; and again, when there is nothing left to do."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    gpu.run(name="dry", batch=[1], length=[64], dtype=["bfloat16"], rounds=1, dry_run=True)
    report = json.loads((tmp_path / "dry.json").read_text())
    assert [Shape(**row["shape"]).dtype for row in report["rows"]] == ["bfloat16", "int8"]
    assert all(row["us"]["jax_ifa"] and "jax_ifa xla" in row["time / ours"] for row in report["rows"])
    assert "jax.nn cudnn" in report["rows"][0]["cannot"]
    assert (tmp_path / "dry.png").stat().st_size > 0
    before = (tmp_path / "dry.md").read_text()
    gpu.run(name="dry", batch=[1], length=[64], dtype=["bfloat16"], rounds=1, dry_run=True)
    assert (tmp_path / "dry.md").read_text().splitlines()[3:] == before.splitlines()[3:]


@needs_interpreter
def test_dry_run_of_the_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    before = gpu.TUNING.read_text()
    gpu.tune(rounds=1, dry_run=True)
    assert "another" in capsys.readouterr().out
    assert gpu.TUNING.read_text() == before


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(gpu.typer.BadParameter, match="finds no GPU here, only cpu; --dry-run works anywhere"):
        gpu.run(name="none", batch=[1], length=[64], dtype=["int8"], rounds=1, dry_run=False)
