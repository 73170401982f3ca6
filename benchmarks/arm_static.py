"""Static cost of the CPU kernels on 64-bit Arm, without such a processor: instructions for each position.

    python -m benchmarks.arm_static  # processors x caches x group sizes, into benchmarks/results/arm_static.{json,md}

The tests' emulator counts what it executes of two lengths; their difference is the cost of a position, to which what
happens once per call adds nothing. D=128, one kv head, where the query has the cache's dtype, or bfloat16.

    products      multiplications of vectors of 128 bits, the fewest that would do (int8: of two digits)
    instructions  that are executed, of keys, of values and in all
    GB/s          that a core reads which does 12 G instructions a second, four in a cycle at 3 GHz, say

What this does not know: how many instructions a processor does at a time, how long it waits for its memory, and what
that gives.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pytest
import typer
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from arm64 import MACHINES, instructions_of_a_position  # noqa: E402
from cases import Case  # noqa: E402

from numba_kernels.formats import Format, format_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
GROUPS = (1, 3, 4, 8)
DIM, LANES = 128, 4
INSTRUCTIONS = 12e9  # a second


def row(name: str, cache: str, group: int) -> dict[str, Any]:
    """One processor, cache and group size."""
    machine = MACHINES[name]
    form: Format = format_of(cache, False, machine, narrow=cache in ("bfloat16", "int8"), group=group)
    dtype = "bfloat16" if cache == "int8" else cache
    case = Case(heads=group, kv_heads=1, head_dim=DIM, dtype=dtype, int8=cache == "int8")
    with pytest.MonkeyPatch.context() as patch:
        executed = instructions_of_a_position(machine, case, patch)
    keys, values = (sum(n for f, n in executed.items() if f.startswith(step)) for step in ("scores", "values"))
    products = DIM // (LANES * form.pack) * group * (form.query_digits + form.weight_digits)
    return {
        "processor": name,
        "cache": cache,
        "G": group,
        "products": products,
        "keys": keys,
        "values": values,
        "instructions": executed.total(),
        "a product": round(executed.total() / products, 2),
        "GB/s": round(2 * DIM * form.itemsize / executed.total() * INSTRUCTIONS / 1e9, 1),
    }


def main() -> None:
    """Count, print and store."""
    grid = [
        (name, cache, group)
        for name in MACHINES
        for cache in ("float32", "bfloat16", "float16", "int8")
        for group in GROUPS
    ]
    rows = [row(*point) for point in tqdm(grid)]
    about = f"JAX {jax.__version__}, llvmlite {version('llvmlite')}, Python {platform.python_version()}"
    table = tabulate(rows, headers="keys", tablefmt="github")
    print(f"{about}\n\n{table}")
    (RESULTS / "arm_static.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    (RESULTS / "arm_static.md").write_text(f"{about}\n\n{table}\n")


if __name__ == "__main__":
    typer.run(main)
