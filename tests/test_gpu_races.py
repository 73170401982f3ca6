"""The kernel's copies and waits, under JAX's race detector; and that these tests would see a fault."""

import subprocess
import sys
from pathlib import Path

import pytest
from cases import Case, assert_close
from gpu_interpreter import interpret, needs_interpreter, small_tiles

pytestmark = needs_interpreter

CASES = [
    Case(batch=3, head_dim=64, capacity=320, block=16, dtype="bfloat16", lengths=(320, 0, 150)),
    Case(batch=1, head_dim=64, capacity=320, layout="BSH", dtype="float16", mask="2d", bias="batch"),
    Case(batch=1, head_dim=64, capacity=320, int8=True, padding=9, lengths=(300,)),
]


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_races(case: Case, stages: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    small_tiles(monkeypatch, stages=stages)
    args, kwargs = case.inputs()
    # JAX 0.12 raises if there is a race, JAX 0.11 says so only.
    assert_close(*interpret(args, kwargs, detect_races=True), args, kwargs)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("fault", ["none", "no_wait", "values_refilled_too_early", "wrong_slot"])
def test_a_planted_fault_is_caught(fault: str) -> None:
    """In a process of its own: the interpreter cannot be used again in one that it has raised in."""
    script = Path(__file__).with_name("gpu_faults.py")
    process = subprocess.run([sys.executable, str(script), fault], capture_output=True, text=True)
    if fault == "none":
        assert process.returncode == 0, process.stdout + process.stderr
    else:
        assert process.returncode != 0
        assert any(word in process.stdout + process.stderr for word in ("RACE", "completed phase")), process.stderr
