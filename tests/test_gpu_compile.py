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
from gpu_compile import GPUCall
from gpu_copies import faults
from gpu_interpreter import needs_interpreter

pytestmark = [
    needs_interpreter,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="JAX's CUDA plugin, which compiles for a GPU without one, is not installed (the extra 'gpu-compile')",
    ),
]

Call = functools.partial(GPUCall, heads=32, kv_heads=8)
F16 = dict(cache="float16", query="float16")
MQA = dict(heads=64, kv_heads=1)

# The calls of a line are compiled by one process.
CALLS = [
    [
        Call(implementation=None),
        Call(lse=True, batch=2),
        Call(block=16),
        Call(block=512, **F16),
        Call(batch=256, capacity=1024),
    ],
    [Call(layout="BSH", block=16, head_dim=64), Call(layout="BSND", capacity=4092), Call(head_dim=80, lse=True)],
    [Call(head_dim=96, layout="BSH", block=16), Call(head_dim=192), Call(head_dim=256, block=128), Call(head_dim=16)],
    [
        Call(head_dim=512, heads=16, kv_heads=2),
        Call(head_dim=512, heads=16, kv_heads=2, precise=True, mask=True, bias=True, block=16),
        Call(precise=True, batch=256, lse=True),
        Call(precise=True, **F16),
    ],
    [
        Call(mask=True, bias=True, padding=True),
        Call(heads=12, kv_heads=1, bias=True, lse=True),
        Call(capacity=4100, mask=True, bias=True),  # sequences that begin inside a group of 8 rows
        Call(capacity=200, bias=True, batch=256),  # a bias whose rows are no whole squares
    ],
    [Call(heads=32, kv_heads=32), Call(**MQA), Call(**MQA, mask=True, bias=True, precise=True, block=16)],
    [Call(**MQA, head_dim=64, mask=True, bias=True), Call(**MQA, head_dim=256), Call(batch=1, capacity=65536)],
    [Call(cache="int8"), Call(cache="int8", block=32, mask=True, bias=True), Call(cache="int8", head_dim=80, block=32)],
    [
        Call(cache="int8", head_dim=80, **MQA, mask=True, bias=True),
        Call(cache="int8", head_dim=96, layout="BSH", block=32),
        Call(cache="int8", head_dim=64, mask=True, bias=True, padding=True),
        Call(cache="int8", capacity=200, query="float32", bias=True),
        Call(cache="int8", capacity=4100, query="float32", bias=True),
    ],
    [
        Call(cache="int8", **MQA, mask=True, bias=True),
        Call(cache="int8", heads=16, kv_heads=1, block=32, mask=True, bias=True),
        Call(cache="int8", head_dim=512, heads=16, kv_heads=2),
        Call(cache="int8", head_dim=512, heads=16, kv_heads=2, block=32, mask=True, bias=True),
        Call(cache="int8", batch=256, head_dim=256),
    ],
]
# The same for GPUs that have no kernel: XLA's loop by default, a reason by name.
OTHERS = [Call(implementation=None), Call(implementation=None, cache="int8", block=32), Call()]
KILOBYTE = 1024


def compiled(target: str, calls: list[GPUCall]) -> list[dict[str, Any]]:
    """What became of each call, compiled one after the other in a process."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gpu_compile.py")), target],
        input=json.dumps([dataclasses.asdict(call) for call in calls]),
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    missing = {"error": f"the compiler ended the process: {process.stderr[-1000:]}"}
    return lines + [missing] * (len(calls) - len(lines))


@pytest.mark.parametrize("calls", CALLS, ids=lambda calls: f"{calls[0]} and {len(calls) - 1} more")
def test_the_kernel_is_fit_for_an_h200(calls: list[GPUCall]) -> None:
    for call, result in zip(calls, compiled("h200", calls), strict=True):
        assert "error" not in result, (call, result["error"])
        assert result["kernel"], (call, "XLA's loop was compiled, not the kernel")
        wrong = [
            *wrong_resources(result),
            *wrong_products(call, result),
            *wrong_launches(call, result),
            *(fault for copy in result["copies"] for fault in faults(copy)),
        ]
        assert not wrong, (call, wrong)


def wrong_resources(result: dict[str, Any]) -> list[str]:
    """Registers and memory that do not fit."""
    plan, kernels = result["plan"], result["kernels"]
    kernel = kernels["incre_flash_attention"]
    # 64 Ki registers and 228 KiB of shared memory; with 228 - 227 KiB of it for the driver.
    resident = max(1, 228 * KILOBYTE // (plan["shared_memory"] + KILOBYTE))
    results = plan["result_bytes"] * plan["splits"] if plan["splits"] > 1 else 0
    rules = {
        "nothing spills": all(found["spills"] == found["stack"] == 0 for found in kernels.values()),
        "two thread blocks' registers": kernel["registers"] <= 65536 // (128 * min(resident, 2)),
        "shared memory as planned": kernel["shared"] <= plan["shared_memory"] <= 227 * KILOBYTE,
        # Beside the results of splits, what a call must copy: query, bias, mask.
        "temporaries as planned": result["temp"] <= 1.05 * results + 0.02 * result["cache"] + result["copied"],
    }
    return [rule for rule, kept in rules.items() if not kept]


def wrong_products(call: GPUCall, result: dict[str, Any]) -> list[str]:
    """Instructions that are missing. Tensor cores take 64 rows and 32 bytes at once, in the text's order."""
    plan, found = result["plan"], result["kernels"]["incre_flash_attention"]["instructions"]

    def products(terms: int) -> int:  # side by side, or one after the other
        return 1 if terms * plan["columns"] <= 64 else terms

    keys = plan["tile"] // 64 * (plan["head_dim"] * plan["query_bytes"] // 32) * products(plan["query_terms"])
    values = plan["padded"] // 64 * (plan["tile"] // 16) * products(plan["weight_terms"])
    integer = plan["query_bytes"] == 1
    fences = 2 + (call.cache == "int8" and not integer)  # before each product that reads stores, and the last copies
    rules = {
        "integer products where rows are whole": integer == (call.cache == "int8" and call.head_dim % 32 == 0),
        f"{values} or {keys + values} HGMMA": found["HGMMA"] == (values if integer else keys + values),
        f"{keys} or no IGMMA": found["IGMMA"] == (keys if integer else 0),
        "keys and values by TMA": found["UTMALDG"] >= 2,
        "a result that ends where the heads do": found["UTMASTG"] == 1,
        f"{fences} fences": found["FENCE.VIEW.ASYNC"] >= fences,
    }
    return [rule for rule, kept in rules.items() if not kept]


def wrong_launches(call: GPUCall, result: dict[str, Any]) -> list[str]:
    """Other launches than docs/gpu.md says: the kernel, a merge, and what the features need."""
    plan = result["plan"]
    expected = 1 + (plan["splits"] > 1)
    if call.cache == "int8":
        # The largest of the query's rows, their digits; the result times the values' scale. XLA divides by what a
        # digit is worth in the kernel of the digits, or where there are many rows before it.
        expected += 3 + (call.batch > 64)
    elif not plan["in_place"]:
        expected += 2  # the query's heads are padded, the result's cut off
    expected += call.mask  # which is bool
    expected += call.padding
    expected += call.bias and (not plan["in_place"] or call.capacity % 64 > 0)
    expected += call.lse and (plan["splits"] == 1 or not plan["in_place"])
    return [] if result["launches"] == expected else [f"{expected} launches, not {result['launches']}"]


@pytest.mark.parametrize("target", ["a100", "b200"])
def test_other_gpus_get_xla_or_a_reason(target: str) -> None:
    *default, by_name = compiled(target, OTHERS)
    for result in default:
        assert "error" not in result, result["error"]
        assert not result["kernel"]
    assert "NotImplementedError" in by_name["error"]
    assert "compute capability 9.0" in by_name["error"]
