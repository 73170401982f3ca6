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


def read_dumps(folder: Path) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of the one kernel whose dumps a folder has; then empties it."""
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        text = file.read_text(errors="replace")
        for name, pattern in {
            "registers": r"Used (\d+) registers",
            "spills": r"(\d+) bytes spill stores",
            "stack": r"(\d+) bytes stack frame",
            "shared": r"smem_scratch_bytes=(\d+)",
        }.items():
            if (match := re.search(pattern, text)) is not None:
                found[name] = int(match.group(1))
        if "sass" in file.suffix:
            opcodes = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text)
            found["instructions"] = {i: sum(o.startswith(i) for o in opcodes) for i in INSTRUCTIONS}
            found["instructions"]["all"] = len(opcodes)
        file.unlink()
    return found


def launches(text: str) -> int:
    """Kernels and copies in the entry computation of a compiled program."""
    entry = text[text.index("\nENTRY") :]
    return len(
        re.findall(r"^\s+(?:ROOT )?%\S+ = .* (?:fusion|custom-call|copy|transpose|reduce)\(", entry, re.MULTILINE)
    )


def main() -> None:
    from pallas_kernels.gpu.hopper import launch

    folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    plans: list[Any] = []
    make_plan = launch.make_plan

    def recording(*args: Any) -> Any:
        plans.append(make_plan(*args))
        return plans[-1]

    launch.make_plan = recording
    for fields in json.load(sys.stdin):
        call = Call(**fields)
        began = time.perf_counter()
        plans.clear()
        try:
            compiled = compile_for(call, sys.argv[1])
            text = compiled.as_text()
            result = {
                "temp": compiled.memory_analysis().temp_size_in_bytes,
                "cache": call.cache_bytes,
                "kernel": "mosaic_gpu" in text,
                "launches": launches(text),
            } | read_dumps(folder)
            if plans:
                plan = dataclasses.asdict(plans[-1]) | {"shared_memory": plans[-1].shared_memory}
                result["plan"] = {name: value for name, value in plan.items() if isinstance(value, int)}
                result["plan"]["query_bytes"] = plans[-1].query_dtype.itemsize
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
