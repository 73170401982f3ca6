"""The public function compiled for TPUs that are not there: it compiles, it is the kernel, and XLA copies no cache."""

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


@functools.cache
def compiled(generation: str) -> list[dict[str, Any]]:
    """What became of each call; one process per generation, since libtpu reads its settings once and may end it."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tpu_compile.py")), generation],
        input=json.dumps([dataclasses.asdict(call) for call in CALLS]),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    missing = {"error": f"the compiler ended the process: {process.stderr[-1000:]}"}
    return lines + [missing] * (len(CALLS) - len(lines))


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_compiles_without_copying_the_cache(generation: str, call: Call) -> None:
    result = compiled(generation)[CALLS.index(call)]
    assert "error" not in result, result["error"]
    assert result["kernel"], "XLA's loop was compiled, not the kernel"
    assert result["temp"] < SHARE * result["cache"], f"{result['temp'] / result['cache']:.1%} of the cache"
