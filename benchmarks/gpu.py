"""Decode attention on this machine's GPU: is it right, how fast is it, which tile sizes suit it.

    python -m benchmarks.gpu run            # checks against the oracle, then everything that can be timed: the
                                            # ceilings, the grid beside the rivals, the example model's decode step
    python -m benchmarks.gpu run --batch 8 --length 8192 --dtype bfloat16    # a part of it
    python -m benchmarks.gpu tune           # tries tile sizes, and rewrites pallas_kernels/gpu/hopper/tuning.json
    python -m benchmarks.gpu run --dry-run  # on any machine: tiny shapes under JAX's GPU interpreter, no meaning

A time is what one more step of a chain of steps costs: the difference between a longer and a shorter program, over the
number of steps between them, median of several rounds. Steps take turns at copies of the cache that are four times L2
in all. Contenders are timed one after the other, since a device holds the caches of one only. Rows are written as they
are measured, and a run goes on where one of the same name ended. The goals of `gpu_goals.py` are checked at the end.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import time
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import numpy as np
import typer
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import gpu_check, gpu_decode, gpu_goals
from benchmarks.gpu_contenders import MOST_STEPS, Run, Shape, contenders, copy, nothing, ours
from benchmarks.gpu_grid import BATCHES, BLOCKS, DIMS, DTYPES, HEADS, LENGTHS
from benchmarks.timing import machine

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TUNING = ROOT / "pallas_kernels" / "gpu" / "hopper" / "tuning.json"

MEMORY = 48e9  # bytes that the copies of one contender's cache may take
TILES, STAGES, RESIDENT = (64, 128), (1, 2, 3, 4, 6), (1, 2, 3)

app = typer.Typer(add_completion=False, help=__doc__)


def grid(
    batches: tuple[int, ...] = BATCHES,
    lengths: tuple[int, ...] = LENGTHS,
    dtypes: tuple[str, ...] = DTYPES,
    heads: tuple[tuple[int, int], ...] = HEADS,
    dims: tuple[int, ...] = DIMS,
    blocks: tuple[int, ...] = BLOCKS,
) -> list[Shape]:
    """The shapes to time, as far as memory allows. An int8 cache has blocks of 32 where others have 16."""
    shapes = [
        Shape(batch, length, n, k, dim, 32 if dtype == "int8" and block == 16 else block, dtype)
        for dtype, (n, k), dim, block, batch, length in itertools.product(dtypes, heads, dims, blocks, batches, lengths)
    ]
    return [shape for shape in shapes if shape.cache_bytes * shape.copies <= MEMORY]


def per_step(run: Run, *, steps: int, rounds: int) -> tuple[float, float]:
    """Median seconds of one step, and half the distance between the quartiles as a share of it."""
    run(steps)  # compiles
    run(2 * steps)
    samples = [(run(2 * steps) - run(steps)) / steps for _ in range(rounds)]
    low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float(median), float((high - low) / 2 / median)


def steps_for(shape: Shape) -> int:
    """Enough steps for a few milliseconds at 4 TB/s, and no more than a program can hold."""
    return max(4, min(MOST_STEPS // 2, int(5e-3 / (shape.cache_bytes / 4e12 + 5e-6))))


def measure(shape: Shape, bandwidth: float, *, steps: int, rounds: int, implementation: str | None) -> dict[str, Any]:
    """One row: every contender that can do the shape."""
    timings: dict[str, tuple[float, float]] = {}
    refused: dict[str, str] = {}
    for name, make in contenders(shape, implementation).items():
        try:
            timings[name] = per_step(make(), steps=steps, rounds=rounds)
        except Exception as error:  # a rival may fail in any way: say so and go on
            if name == "jax_ifa":
                raise
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    seconds = {name: median for name, (median, _) in timings.items()}
    return {
        "shape": dataclasses.asdict(shape),
        "us": {name: median * 1e6 for name, median in seconds.items()},
        "spread": {name: spread for name, (_, spread) in timings.items()},
        "share of copy bandwidth": shape.cache_bytes / seconds["jax_ifa"] / bandwidth,
        "time / ours": {name: median / seconds["jax_ifa"] for name, median in seconds.items() if name != "jax_ifa"},
        "cannot": refused,
    }


def write(name: str, report: dict[str, Any]) -> str:
    """The rows as JSON and as a table, which is returned."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    rivals = list(dict.fromkeys(rival for row in report["rows"] for rival in row["time / ours"]))
    cells = [
        {
            "shape": str(Shape(**row["shape"])),
            "us": f"{row['us']['jax_ifa']:.1f}",
            "spread": f"±{row['spread']['jax_ifa']:.0%}",
            "of copy bandwidth": f"{row['share of copy bandwidth']:.0%}",
        }
        | {rival: f"{row['time / ours'][rival]:.2f}" if rival in row["time / ours"] else "-" for rival in rivals}
        for row in report["rows"]
    ]
    table = tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)
    about = ", ".join(f"{key} {value}" for key, value in report["about"].items())
    text = f"{about}\n\nRivals: their time over ours.\n\n{table}\n"
    if report["decode"]:
        decode = tabulate(report["decode"], headers="keys", tablefmt="github", floatfmt=".2f")
        text += f"\nThe example model's decode step.\n\n{decode}\n"
    text += f"\n{gpu_goals.summary(report)}\n" if report["rows"] else ""
    (RESULTS / f"{name}.md").write_text(text)
    return text


def plot(name: str, report: dict[str, Any]) -> None:
    """The share of copy bandwidth over the bytes of the cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    kinds = dict.fromkeys((row["shape"]["dtype"], row["shape"]["block"]) for row in report["rows"])
    for dtype, block in kinds:
        rows = [row for row in report["rows"] if (row["shape"]["dtype"], row["shape"]["block"]) == (dtype, block)]
        megabytes = [Shape(**row["shape"]).cache_bytes / 1e6 for row in rows]
        shares = [row["share of copy bandwidth"] for row in rows]
        axis.scatter(megabytes, shares, s=12, label=f"{dtype}, {f'paged {block}' if block else 'contiguous'}")
    axis.set(xscale="log", xlabel="MB of keys and values", ylabel="share of copy bandwidth", ylim=(0, 1.1))
    axis.legend()
    figure.suptitle(f"Decode attention on {report['about']['device']}, JAX {report['about']['jax']}")
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)


@contextlib.contextmanager
def interpreted(dry_run: bool) -> Iterator[None]:
    """JAX's GPU interpreter for a dry run; else a machine with a GPU is needed."""
    if not dry_run:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to torch
        if jax.default_backend() != "gpu":
            raise typer.BadParameter(f"JAX finds no GPU here, only {jax.default_backend()}; --dry-run works anywhere")
        yield
        return
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # JAX 0.10 has no interpreter in public
    with plgpu.force_gpu_interpret_mode():
        yield


@app.command()
def run(
    name: Annotated[str, typer.Option(help="Results go to results/NAME.json, .md and .png.")] = "",
    batch: Annotated[list[int], typer.Option(help="B, one or more.")] = list(BATCHES),  # noqa: B006
    length: Annotated[list[int], typer.Option(help="S, one or more.")] = list(LENGTHS),  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Of the cache, one or more.")] = list(DTYPES),  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Turns of each contender.")] = 9,
    dry_run: Annotated[
        bool, typer.Option(help="Tiny shapes under JAX's GPU interpreter; checks only this program.")
    ] = False,
) -> None:
    """Check against the oracle, then time the ceilings, the grid beside the rivals, and the example model."""
    with interpreted(dry_run):
        shapes = grid(tuple(batch), tuple(length), tuple(dtype))
        implementation, steps = None, None
        if dry_run:
            shapes = [Shape(1, 64, 2, 1, 64), Shape(1, 64, 2, 1, 64, 32, "int8")]
            implementation, steps, rounds = "mosaic_gpu", 1, 1
        right = gpu_check.check(time.time_ns() % 2**31, dry_run=dry_run)
        print(f"{right} calls agree with the oracle.")
        megabytes = 1 if dry_run else 2048
        bandwidth = 2 * megabytes * 2**20 / per_step(copy(megabytes), steps=8, rounds=rounds)[0]
        launch = per_step(nothing(), steps=MOST_STEPS, rounds=rounds)[0]
        print(f"A copy reaches {bandwidth / 1e9:.0f} GB/s, a kernel that does nothing takes {launch * 1e6:.2f} us.")
        name = name or f"gpu-{jax.devices()[0].device_kind.replace(' ', '-')}-jax{jax.__version__}"
        report: dict[str, Any] = {
            "about": machine() | {"copy GB/s": f"{bandwidth / 1e9:.0f}", "launch us": f"{launch * 1e6:.2f}"},
            "ceilings": {"copy bytes/s": bandwidth, "launch s": launch, "calls checked": right},
            "rows": [],
            "decode": [],
        }
        if (RESULTS / f"{name}.json").exists():
            before = json.loads((RESULTS / f"{name}.json").read_text())
            report |= {part: before[part] for part in ("rows", "decode")}
        done = [Shape(**row["shape"]) for row in report["rows"]]
        for shape in tqdm([shape for shape in shapes if shape not in done]):
            row = measure(
                shape, bandwidth, steps=steps or steps_for(shape), rounds=rounds, implementation=implementation
            )
            report["rows"].append(row)
            write(name, report)
            jax.clear_caches()
        known = {(row["context"], row["batch"], row["cache"]) for row in report["decode"]}
        for context, size, cache in gpu_decode.points(dry_run=dry_run):
            if (context, size, f"{cache.kind} {cache.dtype}") not in known:
                tokens = 1 if dry_run else 16
                row = gpu_decode.measure(context, size, cache, rounds=rounds, tokens=tokens, dry_run=dry_run)
                report["decode"].append(row)
                write(name, report)
                jax.clear_caches()
        print(write(name, report))
        plot(name, report)


def classes() -> list[Shape]:
    """One shape for each class of the tuning file: 8 sequences, as many positions as make 512 MB."""
    shapes = []
    for dtype, dim, group in itertools.product(DTYPES, (64, 128, 192, 256, 512), (8, 16, 32, 64)):
        kv_heads = max(1, 32 // group)
        length = 2**29 // (2 * 8 * kv_heads * dim * jax.numpy.dtype(dtype).itemsize) // 1024 * 1024
        shapes.append(Shape(8, length, group * kv_heads, kv_heads, dim, 128, dtype))
    return shapes


def candidates(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What to try for a class: the settings as they are first, then every tile, stages and thread blocks."""
    tried = [
        settings | {"tile": tile, "stages": stages, "blocks_per_multiprocessor": resident}
        for tile, stages, resident in itertools.product(TILES, STAGES, RESIDENT)
    ]
    return [settings, *(candidate for candidate in tried if candidate != settings)]


def best_of(shape: Shape, settings: dict[str, Any], time: Callable[[Shape, dict[str, Any]], float]) -> dict[str, Any]:
    """The fastest candidate, the settings as they are unless another is faster by more than 1%."""
    taken = {json.dumps(candidate): time(shape, candidate) for candidate in candidates(settings)}
    fastest = min(taken, key=lambda candidate: taken[candidate])
    return json.loads(fastest) if taken[fastest] < 0.99 * taken[json.dumps(settings)] else settings


def time_with(shape: Shape, settings: dict[str, Any], *, steps: int, rounds: int) -> float:
    """Seconds of a step with these settings; infinite where the compiler refuses them."""
    from pallas_kernels.gpu.hopper import plan
    from pallas_kernels.gpu.hopper.tuning import Tuning

    jax.clear_caches()
    with unittest.mock.patch.object(plan, "tuning_for", return_value=Tuning(**settings)):
        try:
            return per_step(ours(shape, "mosaic_gpu"), steps=steps, rounds=rounds)[0]
        except Exception as error:
            print(f"{shape} {settings}: {type(error).__name__}: {error}".splitlines()[0])
            return float("inf")


def rewrite(table: dict[str, Any], kind: str, multiprocessors: int, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The tuning file's contents with what was found for a device; a class has what differs from the device's only."""
    device = table["default"]["device"] | {"multiprocessors": multiprocessors}
    differing = {
        name: {field: value for field, value in settings.items() if value != device[field]}
        for name, settings in found.items()
    }
    others = {name: entry for name, entry in table.items() if kind not in entry["kinds"]}
    own = kind.removeprefix("NVIDIA ").lower().replace(" ", "-")
    return others | {own: {"kinds": [kind], "device": device, "classes": differing}}


@app.command()
def tune(
    rounds: Annotated[int, typer.Option(help="Timings of each candidate.")] = 5,
    dry_run: Annotated[
        bool, typer.Option(help="One class, two candidates, under the interpreter; writes nothing.")
    ] = False,
) -> None:
    """Try tile sizes for each class of shapes on this GPU, and rewrite the tuning file."""
    from pallas_kernels.gpu.hopper.tuning import shape_class, tuning_for

    with interpreted(dry_run):
        device = jax.devices()[0]
        shapes = [Shape(1, 128, 2, 1, 64, 32, "int8")] if dry_run else classes()
        found: dict[str, dict[str, Any]] = {}
        for shape in tqdm(shapes):
            of_class = dict(
                dtype=jax.numpy.dtype(shape.dtype), head_dim=shape.head_dim, group=shape.heads // shape.kv_heads
            )
            settings = dataclasses.asdict(tuning_for(device.device_kind, **of_class))
            settings["multiprocessors"] = getattr(device, "core_count", settings["multiprocessors"])
            if dry_run:
                times = [time_with(shape, candidate, steps=1, rounds=1) for candidate in candidates(settings)[:2]]
                print(dict(zip(("as they are", "another"), times, strict=True)))
                continue

            def time(shape: Shape, candidate: dict[str, Any]) -> float:
                return time_with(shape, candidate, steps=steps_for(shape), rounds=rounds)

            found[shape_class(**of_class)] = best_of(shape, settings, time)
            print(shape_class(**of_class), found[shape_class(**of_class)])
            table = rewrite(json.loads(TUNING.read_text()), device.device_kind, settings["multiprocessors"], found)
            TUNING.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    app()
