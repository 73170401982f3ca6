"""Runs the GPU kernel under the interpreter with a fault in it; fails if the interpreter sees it.

python tests/gpu_faults.py FAULT
"""

import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest
from cases import Case
from gpu_interpreter import interpret, small_tiles

from pallas_kernels.gpu.hopper import kernel


def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """For keys and values, whose barriers are one of several; that of the query is the only one of its kind."""
    wait = kernel.plgpu.barrier_wait
    monkeypatch.setattr(kernel.plgpu, "barrier_wait", lambda b: None if hasattr(b, "transforms") else wait(b))


def values_refilled_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the keys, before the second product has read them."""
    keys, values = kernel._Fetch.keys, kernel._Fetch.values

    def both(self: Any, i: Any, slot: Any, pages: Any) -> None:
        keys(self, i, slot, pages)
        values(self, i, slot, pages)

    monkeypatch.setattr(kernel._Fetch, "keys", both)
    monkeypatch.setattr(kernel._Fetch, "values", lambda *args: None)


def wrong_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys go to the slot that is read next."""
    keys = kernel._Fetch.keys

    def next_slot(self: Any, i: Any, slot: Any, pages: Any) -> None:
        keys(self, i, slot if isinstance(slot, int) else (slot + 1) % self.plan.stages, pages)

    monkeypatch.setattr(kernel._Fetch, "keys", next_slot)


def none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault."""


def main() -> None:
    monkeypatch = pytest.MonkeyPatch()
    small_tiles(monkeypatch, splits=1)
    globals()[sys.argv[1]](monkeypatch)
    args, kwargs = Case(
        batch=1, heads=1, kv_heads=1, head_dim=64, capacity=320, dtype="bfloat16", lengths=None
    ).inputs()
    said = StringIO()
    with redirect_stdout(said):
        interpret(args, kwargs, detect_races=True)
    sys.exit(said.getvalue() or 0)


if __name__ == "__main__":
    main()
