"""The public function compiled for GPUs that are not there: it is the kernel where it should be, and it fits."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_interpreter import needs_interpreter
from tpu_compile import Call as AnyCall

pytestmark = [
    needs_interpreter,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="JAX's CUDA plugin, which compiles for a GPU without one, is not installed (the extra 'gpu-compile')",
    ),
]

Call = functools.partial(AnyCall, implementation="mosaic_gpu")
F16 = dict(cache="float16", query="float16")
MQA = dict(heads=64, kv_heads=1)

CALLS = [
    Call(implementation=None),
    Call(block=16),
    Call(block=512, **F16),
    Call(layout="BSH", block=16, head_dim=64),
    Call(layout="BSND", capacity=4092),
    Call(head_dim=80),
    Call(head_dim=96, layout="BSH", block=16),
    Call(head_dim=192),
    Call(head_dim=256, block=128),
    Call(head_dim=512, heads=16, kv_heads=2),
    Call(head_dim=512, heads=16, kv_heads=2, precise=True, mask=True, bias=True, block=16),
    Call(mask=True, bias=True, padding=True),
    Call(heads=12, kv_heads=1, bias=True),
    Call(precise=True),
    Call(precise=True, **F16),
    Call(heads=32, kv_heads=32),
    Call(**MQA),
    Call(**MQA, mask=True, bias=True, precise=True, block=16),
    Call(**MQA, head_dim=64, mask=True, bias=True),
    Call(**MQA, head_dim=256),
    Call(cache="int8"),
    Call(cache="int8", block=32, mask=True, bias=True),
    Call(cache="int8", head_dim=80, block=32),
    Call(cache="int8", head_dim=80, **MQA, mask=True, bias=True),
    Call(cache="int8", head_dim=96, layout="BSH", block=32),
    Call(cache="int8", head_dim=64, mask=True, bias=True, padding=True),
    Call(cache="int8", **MQA, mask=True, bias=True),
    Call(cache="int8", heads=16, kv_heads=1, block=32, mask=True, bias=True),
    Call(cache="int8", head_dim=512, heads=16, kv_heads=2),
    Call(batch=1, capacity=65536),
    Call(batch=256, capacity=1024),
]
# The same for GPUs that have no kernel: XLA's loop by default, a reason by name.
OTHERS = [Call(implementation=None), Call(implementation=None, cache="int8", block=32), Call()]
KILOBYTE = 1024


@functools.cache
def compiled(target: str) -> list[dict[str, Any]]:
    """What became of each call; one process per target."""
    calls = CALLS if target == "h200" else OTHERS
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gpu_compile.py")), target],
        input=json.dumps([dataclasses.asdict(call) for call in calls]),
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    missing = {"error": f"the compiler ended the process: {process.stderr[-1000:]}"}
    return lines + [missing] * (len(calls) - len(lines))


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_kernel_fits_an_h200(call: AnyCall) -> None:
    result = compiled("h200")[CALLS.index(call)]
    assert "error" not in result, result["error"]
    assert result["kernel"], "XLA's loop was compiled, not the kernel"
    plan = result["plan"]
    assert result["spills"] == result["stack"] == 0
    # 64 Ki registers and 228 KiB of shared memory; with 228 - 227 KiB of it for the driver.
    resident = max(1, 228 * KILOBYTE // (plan["shared_memory"] + KILOBYTE))
    assert result["registers"] <= 65536 // (128 * min(resident, 2))
    assert result["shared"] <= plan["shared_memory"] <= 227 * KILOBYTE


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_the_products_run_on_tensor_cores(call: AnyCall) -> None:
    """As many instructions as the tiles have parts of 64 rows and 32 bytes, in the order of the module's text."""
    result = compiled("h200")[CALLS.index(call)]
    plan = result["plan"]

    def products(terms: int) -> int:  # side by side, or one after the other
        return 1 if terms * plan["columns"] <= 64 else terms

    keys = plan["tile"] // 64 * (plan["head_dim"] * plan["query_bytes"] // 32) * products(plan["query_terms"])
    values = plan["padded"] // 64 * (plan["tile"] // 16) * products(plan["weight_terms"])
    integer = plan["query_bytes"] == 1
    assert integer == (call.cache == "int8" and call.head_dim % 32 == 0)
    assert result["instructions"]["HGMMA"] == (values if integer else keys + values)
    assert result["instructions"]["IGMMA"] == (keys if integer else 0)
    assert result["instructions"]["UTMALDG"] >= 2
    assert (
        result["instructions"]["FENCE.VIEW.ASYNC"] >= 2
    )  # what is stored before a product, and before the last copies


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_temporaries_are_the_splits_results(call: AnyCall) -> None:
    result = compiled("h200")[CALLS.index(call)]
    plan = result["plan"]
    blocks = plan["batch"] * plan["num_heads"] * plan["blocks"] * plan["splits"]
    partial = 4 * blocks * (plan["padded"] + 2) * plan["columns"]
    assert result["temp"] <= 3 * partial + 0.02 * result["cache"]


@pytest.mark.parametrize("target", ["a100", "b200"])
def test_other_gpus_get_xla_or_a_reason(target: str) -> None:
    *default, by_name = compiled(target)
    for result in default:
        assert "error" not in result, result["error"]
        assert not result["kernel"]
    assert "NotImplementedError" in by_name["error"]
    assert "compute capability 9.0" in by_name["error"]
