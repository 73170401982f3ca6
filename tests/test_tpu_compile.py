"""The public function compiled for TPUs that are not there: it compiles, it is the kernel, and XLA copies no cache.

By default every call is compiled for v6e, and for each other generation a third of them, every generation another
one; JAX_IFA_FULL_TPU_GRID=1 compiles all for all.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tpu_compile import ENVIRONMENT, TOPOLOGIES, Call

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for a TPU without one, is not installed (the extra 'tpu-compile')",
)

SHARE = 0.02  # of the bytes of the cache
LONG = 32768

CALLS = [
    Call(),
    Call(block=16),
    Call(block=128),
    Call(block=512, cache="int8"),
    Call(block=16, flat=True),
    Call(layout="BSH"),
    Call(layout="BSH", block=16, head_dim=64),
    Call(layout="BSH", block=32, head_dim=64, cache="int8"),
    Call(layout="BSH", block=32, kv_heads=1, cache="int8", capacity=LONG, lse=False),
    Call(layout="BSH", block=16, head_dim=80, capacity=LONG),
    Call(layout="BSH", block=16, head_dim=96, capacity=LONG),
    Call(layout="BSND", head_dim=64, mask=True),
    Call(layout="BSND"),
    Call(layout="BSND", mask=True, cache="float32", query="float32"),
    Call(head_dim=64, cache="int8", mask=True, bias=True, padding=True),
    Call(head_dim=80),
    Call(head_dim=96, block=128),
    Call(head_dim=512, heads=16, kv_heads=2),
    Call(cache="float32", query="float32"),
    Call(cache="float32", query="float32", layout="BSH", block=16),
    Call(mask=True, bias=True, block=16, flat=True),
    Call(precise=True),
    Call(kv_heads=1, block=16, capacity=LONG),
    Call(kv_heads=32, block=16),
    Call(batch=1),
    Call(batch=32, capacity=65536, block=16),
    Call(layout="BSH", capacity=4000),
    Call(head_dim=64, capacity=LONG - 32),
]


def calls_for(generation: str) -> list[Call]:
    if generation == "v6e" or os.environ.get("JAX_IFA_FULL_TPU_GRID"):
        return CALLS
    return CALLS[list(TOPOLOGIES).index(generation) % 3 :: 3]


@functools.cache
def compiled(generation: str) -> dict[Call, dict[str, Any]]:
    """What became of each call; one process per generation, since libtpu reads its settings once and may end it."""
    calls = calls_for(generation)
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tpu_compile.py")), generation],
        input=json.dumps([dataclasses.asdict(call) for call in calls]),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    missing = {"error": f"the compiler ended the process: {process.stderr[-1000:]}"}
    return dict(zip(calls, lines + [missing] * (len(calls) - len(lines)), strict=True))


@pytest.mark.parametrize(
    "generation, call",
    [
        pytest.param(generation, call, id=f"{generation}-{call}")
        for generation in TOPOLOGIES
        for call in calls_for(generation)
    ],
)
def test_compiles_without_copying_the_cache(generation: str, call: Call) -> None:
    result = compiled(generation)[call]
    assert "error" not in result, result["error"]
    assert result["kernel"], "XLA's loop was compiled, not the kernel"
    assert result["temp"] < SHARE * result["cache"], f"{result['temp'] / result['cache']:.1%} of the cache"
