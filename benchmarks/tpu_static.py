"""Static cost of the TPU kernel, without a TPU: cycles per tile against the time its bytes take at specified bandwidth.

    python -m benchmarks.tpu_static            # every generation and case, into benchmarks/results/tpu_static.{json,md}
    python -m benchmarks.tpu_static v6e tpu7x  # some generations

Every row is stored as soon as it is known, with a fingerprint of the kernel, JAX and libtpu. A command that was
stopped goes on where it was; rows of another kernel are dropped.

libtpu compiles the kernel for a TPU that need not be there, and simulates the program it made: it follows the scalar
code, unrolls the loops and adds up what each bundle of instructions waits for. Lengths must be known, so the kernel
is built here with the window's ends replaced by constants. The cost of a tile is the slope between two lengths, so
what happens once per call drops out.

What this does not know: how much of the specified bandwidth the memory gives,
how long copies of a few KiB keep the copy engines busy, the cost of waiting on a semaphore, and clocks (taken from
published peak rates). A ratio below 1 says that the kernel's own instructions leave the memory busy all the time; it
says nothing about the speed of the memory.
"""

import ast
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from tpu_compile import ENVIRONMENT, TOPOLOGIES, Call  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TILES = (4, 12)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Per TensorCore. Bandwidth in bytes/s as specified (half the chip's where it has two cores), clock in Hz."""

    bandwidth: float
    clock: float
    goal_bfloat16: float
    goal_int8: float | None


CHIPS = {
    "v5e": Chip(819e9, 1.5e9, 0.8, 0.9),
    "v5p": Chip(2765e9 / 2, 1.75e9, 0.8, 0.9),
    "v6e": Chip(1640e9, 1.75e9, 0.8, 0.9),
    "tpu7x": Chip(7370e9 / 2, 2.2e9, 0.9, None),
}

HEADS = [  # (N, K, D)
    (32, 8, 128),
    (16, 8, 128),
    (32, 32, 128),
    (32, 4, 128),
    (32, 1, 128),
    (32, 8, 64),
    (32, 32, 64),
    (16, 2, 256),
]


def cases() -> list[Call]:
    """Dtype x heads x block size x layout, as far as the kernel reads it in place."""
    rows = []
    for cache in ("bfloat16", "int8"):
        small = 32 if cache == "int8" else 16
        for heads, kv_heads, head_dim in HEADS:
            shape = dict(batch=1, heads=heads, kv_heads=kv_heads, head_dim=head_dim, cache=cache, lse=False)
            rows += [Call(**shape, layout="BSH", block=block) for block in (small, 128)]
            if head_dim % 128 == 0:
                rows.append(Call(**shape, layout="BNSD", block=small))
            if (heads, kv_heads) == (32, 8):
                rows += [Call(**shape, layout=layout) for layout in ("BSH", "BNSD")]
                if head_dim % 128 == 0 and cache == "bfloat16":
                    rows.append(Call(**shape, layout="BSND"))
    return rows


class Constant:
    """Stands for a reference to scalar memory whose every element is known."""

    def __init__(self, value: int):
        self.value = value

    def __getitem__(self, _: Any) -> Any:
        import jax.numpy as jnp

        return jnp.int32(self.value)


def lower_static(
    generation: str, fields: dict[str, Any], tiles: int, overrides: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """The plan of a call's kernel, and the kernel lowered for a window of exactly so many tiles, known to the compiler.

    The kernel alone, without XLA's part around it: the simulator fails on some of XLA's copies.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental import topologies

    from pallas_kernels.tpu import kernel, launch, lowering, tuning

    call = Call(**fields)
    kernels: list[tuple[Any, Any, list[Any]]] = []

    def static_kernel(start: Any, stop: Any, *refs: Any, plan: Any, **rest: Any) -> None:
        del start, stop
        kernel.decode_kernel(Constant(0), Constant(tiles * plan.tile), *refs, plan=plan, **rest)

    def remember(body: Any, **fields: Any) -> Any:
        def run(*operands: Any) -> Any:
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in operands]
            kernels.append((body.keywords["plan"], pl.pallas_call(body, **fields), shapes))
            return [jnp.zeros(out.shape, out.dtype) for out in fields["out_shape"]]

        return run

    def one_core(kind: str | None) -> tuning.Tuning:
        return dataclasses.replace(tuning.tuning_for(kind), cores=1, **overrides)

    launch.decode_kernel = static_kernel  # type: ignore[assignment]
    launch.pl = types.SimpleNamespace(**vars(pl) | {"pallas_call": remember})  # type: ignore[assignment]
    lowering.tuning_for = one_core  # type: ignore[assignment]
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    jax.clear_caches()
    dataclasses.replace(call, capacity=max(TILES) * 16384).lower(TOPOLOGIES[generation])
    plan, kernel_call, shapes = kernels[0]  # there may be another, for keys that are not finite
    lowered = jax.jit(kernel_call, out_shardings=sharding).lower(*shapes)
    return dataclasses.asdict(plan) | {"tile": plan.tile}, lowered


def serve(lower: Callable[..., tuple[dict[str, Any], Any]]) -> None:
    """What an `Estimator`'s process does: requests come one on each line, as the arguments of `lower`.

    The answer is printed before its program is compiled, since libtpu may end the process then.
    """
    for line in sys.stdin:
        answer, lowered = lower(*json.loads(line))
        print(json.dumps(answer), flush=True)
        lowered.compile()
        print("compiled", flush=True)


class Estimator:
    """A process that compiles one program after another; a new one when libtpu ends it.

    `module` is run with --child and calls `serve`; the kernels' names begin with `kernel`; `flags` are libtpu's.
    """

    def __init__(self, module: str, kernel: str, *flags: str) -> None:
        self.module, self.kernel, self.flags = module, kernel, flags
        self.temporary = tempfile.TemporaryDirectory()  # as long as this lives
        self.folder = Path(self.temporary.name)
        self.process: subprocess.Popen[str] | None = None

    def estimate(self, *request: Any) -> tuple[dict[str, Any], int]:
        """The answer to a request, and libtpu's estimated cycles of its kernel."""
        if self.process is None or self.process.poll() is not None:
            # Where libtpu ends the process it would write the whole program, up to 1 GB, into three logs in /tmp.
            logs = {"TPU_LOG_DIR": str(self.folder), "TPU_MIN_LOG_LEVEL": "3"}
            flags = " ".join([f"--xla_jf_dump_static_llo_profile_to={self.folder}", *self.flags])
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, "--child"],
                env=os.environ | ENVIRONMENT | logs | {"LIBTPU_INIT_ARGS": flags},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for stale in self.folder.iterdir():
            stale.unlink()
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not self.process.stdout.readline():
            self.process.wait()  # for v5e and v5p libtpu may check its program once more, and end here, with a profile
        profiles = list(self.folder.glob(f"{self.kernel}*profile.textproto"))
        if not answer or not profiles:
            raise RuntimeError(f"{request}: libtpu wrote no profile")
        return json.loads(answer), int(re.findall(r"estimated_cycles: (\d+)", profiles[0].read_text())[0])


def measure(
    estimator: Estimator, generation: str, call: Call, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One row of the table."""
    import jax.numpy as jnp

    chip = CHIPS[generation]
    estimates = [estimator.estimate(generation, dataclasses.asdict(call), tiles, overrides or {}) for tiles in TILES]
    (plan, few), (_, many) = estimates
    cycles = (many - few) / (TILES[1] - TILES[0])
    tile_bytes = 2 * plan["tile"] * plan["item_heads"] * call.head_dim * jnp.dtype(call.cache).itemsize
    budget = tile_bytes / chip.bandwidth * chip.clock
    return {
        "chip": generation,
        "cache": call.cache,
        "layout": call.layout,
        "block": call.block or "-",
        "N": call.heads,
        "K": call.kv_heads,
        "D": call.head_dim,
        "T": plan["tile"],
        "tile KiB": tile_bytes // 1024,
        "cycles": round(cycles),
        "memory cycles": round(budget),
        "ratio": round(cycles / budget, 2),
    }


def fingerprint() -> str:
    """Of what a row depends on, comments aside."""
    package = ROOT / "pallas_kernels" / "tpu"
    files = ("kernel.py", "launch.py", "narrow.py", "parts.py", "plan.py", "storage.py")
    sources = [ast.dump(ast.parse((package / name).read_text())) for name in files]
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    text = "\n".join([*sources, (package / "tuning.json").read_text(), *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Store:
    """The rows that a kernel has, in files that several processes may add to; `order` is all their keys."""

    def __init__(self, name: str, kernel: str, order: list[str]) -> None:
        self.json, self.table = RESULTS / f"{name}.json", RESULTS / f"{name}.md"
        self.kernel, self.order = kernel, order

    def rows(self) -> list[dict[str, Any]]:
        """What is stored of this kernel."""
        stored = json.loads(self.json.read_text()) if self.json.exists() else []
        return [row for row in stored if row.get("kernel") == self.kernel]

    def __contains__(self, wanted: str) -> bool:
        return any(row["key"] == wanted for row in self.rows())

    def add(self, wanted: str, row: dict[str, Any]) -> None:
        """Stores one row more."""
        with open(self.json.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = [other for other in self.rows() if other["key"] != wanted]
            rows.append({"key": wanted, "kernel": self.kernel} | row)
            rows.sort(key=lambda row: self.order.index(row["key"]))
            self.json.write_text(json.dumps(rows, indent=1) + "\n")
            shown = [{k: v for k, v in row.items() if k not in ("key", "kernel")} for row in rows]
            self.table.write_text(tabulate(shown, headers="keys", tablefmt="github") + "\n")


def key(generation: str, call: Call) -> str:
    """What names a row."""
    return f"{generation} {call}"


def main(
    generations: Annotated[list[str] | None, typer.Argument(help="Of v5e, v5p, v6e, tpu7x; all by default.")] = None,
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
    only: Annotated[str, typer.Option(help="Cases whose description contains this; prints, and writes nothing.")] = "",
    override: Annotated[str, typer.Option(help="JSON of Tuning fields to try; prints, and writes nothing.")] = "{}",
) -> None:
    """Static cycles per tile for every generation and case."""
    if child:
        serve(lower_static)
        return
    estimator = Estimator("benchmarks.tpu_static", "incre_flash_attention")
    store = Store("tpu_static", fingerprint(), [key(generation, call) for generation in CHIPS for call in cases()])
    keep = not only and override == "{}"
    for generation in generations or CHIPS:
        for call in cases():
            if not re.search(only, str(call)) or (keep and key(generation, call) in store):
                continue
            try:
                row = measure(estimator, generation, call, json.loads(override))
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                continue
            print(*row.values(), flush=True)
            if keep:
                store.add(key(generation, call), row)


if __name__ == "__main__":
    typer.run(main)
