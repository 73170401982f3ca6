"""Compiles calls of the public function for a GPU that this machine does not have; run in a process of its own.

    python tests/gpu_compile.py TARGET < cases.json

reads a list of `Call` fields and writes one line of JSON for each: what the compiler said of its kernel, or its error.
One process per target: Mosaic keeps compiled kernels by their text, which does not name the target.
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpu_compile import Call

TARGETS = {
    "h200": dict(name="NVIDIA H200", major=9, minor=0, extension="ACCELERATED_FEATURES", cores=132, shared=232448),
    "b200": dict(name="NVIDIA B200", major=10, minor=0, extension="ACCELERATED_FEATURES", cores=148, shared=232448),
    "a100": dict(name="NVIDIA A100-SXM4-80GB", major=8, minor=0, extension="NONE", cores=108, shared=166912),
}

DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {per_core}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""

INSTRUCTIONS = ("HGMMA", "IGMMA", "UTMALDG", "UTMASTG", "FENCE.VIEW.ASYNC")
INSTRUCTION = re.compile(r"Y?:(\d\d)\s+/\*([0-9a-f]{4,5})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][A-Z0-9_.]+)(.*)")


@dataclasses.dataclass(frozen=True)
class GPUCall(Call):
    """A call that asks for the LSE, which may take a kernel more, only if told to."""

    lse: bool = False
    implementation: str | None = "mosaic_gpu"


def topology(target: str) -> Any:
    """A machine with one such GPU, to compile for."""
    from jax.experimental import topologies

    description = DESCRIPTION.format(**TARGETS[target], per_core=TARGETS[target]["shared"] + 1024)
    return topologies.get_topology_desc(topology_name="", platform="cuda", target_config=description, topology="1x1x1")


def compile_for(call: Call, target: str) -> Any:
    """The executable of a call, which cannot run here."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(topology(target).devices[0])
    (query, key, value), arrays = call.specs()
    jitted = jax.jit(call.function(), in_shardings=sharding, out_shardings=sharding)
    return jitted.lower(query, key, value, arrays).compile()


@contextmanager
def recorded_copies() -> Iterator[list[dict[str, Any]]]:
    """What the driver will be asked to describe for TMA: a list of arrays as they are, and the boxes copied of them."""
    from jax._src.lib.mlir import ir
    from jax.experimental.mosaic.gpu import launch_context, utils

    describe = launch_context.LaunchContext._get_tma_desc
    copies: list[dict[str, Any]] = []

    def recording(self: Any, ref: Any, transforms: Any, peer: Any, box: Any, swizzle: Any, *rest: Any) -> Any:
        seen = ref
        for transform in transforms:
            seen = transform.apply(seen)
        kind = ir.MemRefType(seen.type)
        copy = {
            "shape": list(kind.shape),
            "strides": list(kind.get_strides_and_offset()[0]),
            "box": list(box),
            "swizzle": 0 if swizzle is None else int(swizzle),
            "bytes": utils.bitwidth(kind.element_type) // 8,
        }
        if copy not in copies:
            copies.append(copy)
        return describe(self, ref, transforms, peer, box, swizzle, *rest)

    launch_context.LaunchContext._get_tma_desc = recording
    try:
        yield copies
    finally:
        launch_context.LaunchContext._get_tma_desc = describe


def read_dumps(folder: Path) -> dict[str, dict[str, Any]]:
    """By kernel that was compiled: registers, spills, shared memory, instructions. Empties the folder."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.iterdir()):
        kernel = found.setdefault(re.sub(r"_\d+\..*", "", file.name), {})
        if file.suffix in (".ptxas", ".txt"):
            text = file.read_text(errors="replace")
            for name, pattern in {
                "registers": r"Used (\d+) registers",
                "spills": r"(\d+) bytes spill stores",
                "stack": r"(\d+) bytes stack frame",
                "shared": r"smem_scratch_bytes=(\d+)",
            }.items():
                if (match := re.search(pattern, text)) is not None:
                    kernel[name] = int(match.group(1))
        if "sass" in file.suffix:
            lines = file.read_text(errors="replace").splitlines()
            opcodes = [match.group(4) for match in map(INSTRUCTION.search, lines) if match]
            kernel["instructions"] = {i: sum(o.startswith(i) for o in opcodes) for i in INSTRUCTIONS}
            kernel["instructions"]["all"] = len(opcodes)
            kernel["loop"] = main_loop(lines)
        file.unlink()
    # A kernel that an earlier call had too, as merges are, is not compiled again by every JAX.
    return {name: kernel for name, kernel in found.items() if "registers" in kernel}


def main_loop(lines: list[str]) -> dict[str, int]:
    """Of the loop that has the most products: what a warp issues in a turn, and cycles that it waits for itself.

    Lines of machine code have the cycles that the compiler makes a warp wait after each instruction. What
    a branch leaps over is left out where it stores to shared memory and starts neither copies nor products: the
    values at the ends of windows. (What waits for memory does so out of line, and is not in the loop.)
    """
    labels: dict[str, int] = {}
    code: list[tuple[int, str, str]] = []  # cycles, opcode, operands
    for line in lines:
        if (label := re.match(r"\s*(\.L_x_\d+):", line)) is not None:
            labels[label.group(1)] = len(code)
        elif (match := INSTRUCTION.search(line)) is not None:
            code.append((int(match.group(1)), match.group(4), match.group(5)))

    def target(i: int) -> int | None:
        label = re.search(r"\.L_x_\d+", code[i][2]) if code[i][1].startswith("BRA") else None
        return labels.get(label.group(0)) if label else None

    def count(begin: int, end: int, *opcodes: str) -> int:
        return sum(code[i][1].startswith(opcodes) for i in range(begin, end))

    loops = [(to, i + 1) for i in range(len(code)) if (to := target(i)) is not None and to <= i]
    if not loops:
        return {}
    begin, end = max(loops, key=lambda loop: (count(*loop, "HGMMA", "IGMMA"), loop[0] - loop[1]))
    skipped: set[int] = set()
    for i in range(begin, end):
        to = target(i)
        edge = to is not None and i < to <= end
        if edge and count(i, to, "STS", "STSM") and not count(i, to, "UTMALDG", "HGMMA", "IGMMA"):
            skipped |= set(range(i + 1, to))
    taken = [code[i] for i in range(begin, end) if i not in skipped]
    names = ("HGMMA", "IGMMA", "BAR", "FENCE.VIEW.ASYNC", "MUFU", "LDS", "STS", "LDG", "UTMALDG")
    return {
        "instructions": len(taken),
        "cycles": sum(max(1, cycles) for cycles, _, _ in taken),
        "at the ends": len(skipped),
    } | {name: sum(o.startswith(name) for _, o, _ in taken) for name in names}


def copied_bytes(call: Call) -> int:
    """What a call may have to copy before the loop: all but the cache, padded; the query as float32 digits."""
    import jax

    (query, _, _), arrays = call.specs()
    others = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    return 8 * 4 * query.size + 2 * others + 2**16


def launches(text: str) -> int:
    """Kernels and copies in the entry computation of a compiled program."""
    entry = text[text.index("\nENTRY") :]
    return len(
        re.findall(r"^\s+(?:ROOT )?%\S+ = .* (?:fusion|custom-call|copy|transpose|reduce)\(", entry, re.MULTILINE)
    )


def examine(call: Call, target: str, folder: Path) -> dict[str, Any]:
    """What became of a call; `folder` is where the compiler writes."""
    from pallas_kernels.gpu.hopper import launch

    plans: list[Any] = []
    make_plan = launch.make_plan

    def recording(*args: Any) -> Any:
        plans.append(make_plan(*args))
        return plans[-1]

    launch.make_plan = recording
    try:
        with recorded_copies() as copies:
            compiled = compile_for(call, target)
    finally:
        launch.make_plan = make_plan
    text = compiled.as_text()
    result: dict[str, Any] = {
        "temp": compiled.memory_analysis().temp_size_in_bytes,
        "cache": call.cache_bytes,
        "copied": copied_bytes(call),
        "kernel": "mosaic_gpu" in text,
        "launches": launches(text),
        "copies": copies,
        "kernels": read_dumps(folder),
    }
    if plans:
        plan = plans[-1]
        fields = dataclasses.asdict(plan) | {"shared_memory": plan.shared_memory, "result_bytes": plan.result_bytes}
        result["plan"] = {name: value for name, value in fields.items() if isinstance(value, int)}
        result["plan"] |= {"query_bytes": plan.query_dtype.itemsize, "in_place": plan.heads == plan.group}
    return result


def main() -> None:
    folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    for fields in json.load(sys.stdin):
        began = time.perf_counter()
        try:
            result = examine(GPUCall(**fields), sys.argv[1], folder)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(result | {"seconds": round(time.perf_counter() - began, 2)}), flush=True)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with tempfile.TemporaryDirectory() as dumps:
        os.environ.update(
            {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTXAS", "SASS")} | {"MOSAIC_GPU_DUMP_TO": dumps}
        )
        main()
