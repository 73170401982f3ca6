"""The GPU benchmark, as far as a machine without a GPU can run it."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from cases import Case
from gpu_interpreter import needs_interpreter

for package in ("typer", "tabulate", "tqdm", "matplotlib", "flax"):
    pytest.importorskip(package, reason=f"{package} is not installed (the extra 'benchmarks')")

from benchmarks import gpu, gpu_check, gpu_goals  # noqa: E402
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
    assert {"torch SDPA flash", "torch SDPA cudnn", "FlashInfer", "tokamax"} <= set(contenders(Shape(1, 64, 2, 1, 64)))
    assert {"pallas paged_attention", "FlashAttention"} <= set(contenders(Shape(1, 64, 2, 1, 64, 16)))
    assert list(contenders(Shape(1, 64, 2, 1, 64, 32, "int8"))) == ["jax_ifa", "jax_ifa xla"]


def row(shape: Shape, us: float, share: float = 1.0, **rivals: float) -> dict[str, Any]:
    """A row of a report."""
    return {
        "shape": dataclasses.asdict(shape),
        "us": {"jax_ifa": us},
        "share of copy bandwidth": share,
        "time / ours": rivals,
    }


def test_goals() -> None:
    """Each kind of goal, met and missed."""
    large = Shape(8, 8192, 32, 8, 128)  # 268 MB
    paged, int8 = dataclasses.replace(large, block=128), dataclasses.replace(large, dtype="int8")
    small = Shape(1, 1024, 32, 8, 128)
    rows = [
        row(large, 100.0, 0.91, torch=1.2),
        row(paged, 103.0, 0.89),
        row(int8, 55.0, 0.85),
        row(small, 6.0, xla=0.9),
    ]

    def met(one: dict[str, Any]) -> list[bool]:
        return list(gpu_goals.verdicts(one, rows, bandwidth=4e12, launch=3e-6).values())

    assert met(rows[0]) == [True, True]  # the bandwidth; the rivals
    assert met(rows[1]) == [False, True, False]  # 3% slower than contiguous
    assert met(rows[2]) == [True, True, True]  # 134 MB; 1.8 times as fast
    assert met(rows[3]) == [False, False]  # 1.3 * (3 + 1.05) us is 5.3
    report = {"ceilings": {"copy bytes/s": 4e12, "launch s": 3e-6}, "rows": rows}
    text = gpu_goals.summary(report)
    assert "FAIL  at least 90% of the bandwidth: 1 of 2" in text
    assert "PASS  at least 1.7 times as fast as bfloat16: 1 of 1" in text
    assert f"missed: {paged}" in text


def test_dead_rows_are_poisoned() -> None:
    for form in (dict(), dict(layout="BSH"), dict(block=16), dict(block=16, flat_pages=True)):
        case = Case(capacity=40, dtype="bfloat16", lengths=(40, 3), **form)
        (_, key, _), kwargs = case.inputs()
        spoilt = gpu_check.poisoned(case, key, kwargs).astype(np.float32)
        alive = np.isfinite(spoilt)
        assert alive.sum() == (40 + 3) * case.kv_heads * case.head_dim
        assert np.all(spoilt[alive] == key.astype(np.float32)[alive])


def test_what_is_checked_covers_the_features() -> None:
    cases = gpu_check.check_cases(seed=0)
    assert {case.block for case in cases} >= {0, 16, 32, 128, 512}
    assert {case.layout for case in cases} == {"BNSD", "BSND", "BSH"}
    assert {case.lengths for case in cases} >= {"ragged", "zero", (1, 1)}
    assert max(case.batch for case in cases) == 256
    assert max(case.capacity for case in cases) == 262144
    assert len({case.seed for case in cases}) == len(cases)


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
    assert report["ceilings"]["calls checked"] == 4
    assert report["ceilings"]["launch s"] != 0
    (decode,) = report["decode"]
    assert decode["kernel tokens/s"] > 0
    assert decode["xla tokens/s"] > 0
    before = (tmp_path / "dry.md").read_text()
    monkeypatch.setattr(gpu.gpu_check, "check", lambda seed, dry_run: 4)  # it has been seen to run
    gpu.run(name="dry", batch=[1], length=[64], dtype=["bfloat16"], rounds=1, dry_run=True)
    again = (tmp_path / "dry.md").read_text()
    rows = [line for line in before.splitlines() if line.startswith("|")]
    assert [line for line in again.splitlines() if line.startswith("|")] == rows
    assert "of the bandwidth" in again or "a launch and the bytes" in again


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
