"""Static cost of the Hopper kernel, without a GPU: what a tile takes to issue against the time its bytes take to come.

    python -m benchmarks.gpu_static              # the benchmark's grid, into benchmarks/results/gpu_static.{json,md}
    python -m benchmarks.gpu_static --only int8  # some of it: prints, and writes nothing

XLA compiles the public function for an H200 that need not be there, and the machine code says what one turn of the
kernel's loop issues, which is one tile of keys and of values. Each of the four warps of a thread block has a scheduler
of its multiprocessor for itself, and a scheduler issues one instruction a cycle. Bytes are taken to arrive at the
bandwidth of a copy on an H200, bytes read and written, shared equally by 132 multiprocessors, at an assumed clock.

    issue     instructions of a warp per tile / cycles its bytes take: below 1 the memory can be kept busy
    waits     the same with the cycles that the compiler makes a warp wait for its own results, over the thread blocks
              that a multiprocessor runs at once: while one waits, another can issue
    tensor    cycles of the tensor cores / the same: 16 for a product of 64 rows and 32 bytes from shared memory, or
              half a cycle for each of its columns if that is more

What this does not know: how long barriers, shared memory and the tensor cores make a warp wait, how well copies of a
page keep the memory busy, and the clock. A ratio above 0.6 is marked: what is not counted may take the rest.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from gpu_compile import GPUCall  # noqa: E402

from benchmarks.gpu_grid import BLOCKS, DIMS, DTYPES, HEADS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BANDWIDTH = 4.3e12
MULTIPROCESSORS = 132
CLOCK = 1.755e9
MARKED = 0.6
REGISTERS = 65536
THREADS = 128


def cases() -> list[GPUCall]:
    """Dtype x heads x D x block of the GPU benchmark, and a mask with a bias."""
    calls = []
    for dtype, (heads, kv_heads), head_dim, block in itertools.product(DTYPES, HEADS, DIMS, BLOCKS):
        block = 32 if dtype == "int8" and block == 16 else block
        calls.append(GPUCall(heads=heads, kv_heads=kv_heads, head_dim=head_dim, block=block, cache=dtype))
    for dtype, (heads, kv_heads) in itertools.product(DTYPES, ((32, 8), (64, 1))):
        calls.append(GPUCall(heads=heads, kv_heads=kv_heads, cache=dtype, mask=True, bias=True))
    return calls


def row(call: GPUCall, result: dict[str, Any]) -> dict[str, Any]:
    """One row of the table from what `gpu_compile.py` found out."""
    import jax.numpy as jnp

    plan, kernel = result["plan"], result["kernels"]["incre_flash_attention"]
    loop = kernel["loop"]
    resident = min(2, 228 * 1024 // (plan["shared_memory"] + 1024), REGISTERS // (THREADS * kernel["registers"]))
    tile_bytes = 2 * plan["tile"] * call.head_dim * jnp.dtype(call.cache).itemsize
    # Thread blocks that share a group read the same tiles, of which one reads from memory.
    budget = tile_bytes / plan["blocks"] / (BANDWIDTH / MULTIPROCESSORS) * CLOCK
    columns = plan["columns"]

    def product_cycles(count: int, terms: int) -> float:
        together = terms * columns if terms * columns <= 64 else columns
        return count * max(16, together / 2)

    if plan["query_bytes"] == 1:
        tensor = product_cycles(loop["IGMMA"], plan["query_terms"])
        tensor += product_cycles(loop["HGMMA"], plan["weight_terms"])
    else:
        tensor = product_cycles(loop["HGMMA"], plan["weight_terms"])
    ratios = {
        "issue": loop["instructions"] / budget,
        "waits": loop["cycles"] / budget / resident,
        "tensor": tensor / budget,
    }
    return {
        "cache": call.cache,
        "N": call.heads,
        "K": call.kv_heads,
        "D": call.head_dim,
        "block": call.block or "-",
        "mask, bias": "yes" if call.mask else "-",
        "T": plan["tile"],
        "stages": plan["stages"],
        "per SM": resident,
        "registers": kernel["registers"],
        "tile KiB": tile_bytes // 1024,
        "memory cycles": round(budget),
        "instructions": loop["instructions"],
        "barriers": loop["BAR"],
        **{name: round(ratio, 2) for name, ratio in ratios.items()},
        "above 0.6": ", ".join(name for name, ratio in ratios.items() if ratio > MARKED),
    }


def compile_all(calls: list[GPUCall]) -> list[dict[str, Any]]:
    """What `gpu_compile.py` finds out about each call, in a process of its own."""
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu_compile.py"), "h200"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        input=json.dumps([dataclasses.asdict(call) for call in calls]),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def main(
    only: Annotated[str, typer.Option(help="Cases whose description contains this; writes nothing.")] = "",
) -> None:
    """Static cost of a tile for every case."""
    import jax

    calls = [call for call in cases() if only in str(call)]
    rows = []
    for call, result in zip(calls, compile_all(calls), strict=True):
        if "error" in result:
            raise RuntimeError(f"{call}: {result['error']}")
        rows.append(row(call, result))
    table = tabulate(rows, headers="keys", tablefmt="github")
    print(table)
    if not only:
        about = f"jax {jax.__version__}, {BANDWIDTH / 1e12} TB/s, {MULTIPROCESSORS} multiprocessors, {CLOCK / 1e9} GHz"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu_static.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        (RESULTS / "gpu_static.md").write_text(f"{about}\n\n{table}\n")


if __name__ == "__main__":
    typer.run(main)
