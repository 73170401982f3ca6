"""Time decode attention on this machine, beside the rivals: `python -m benchmarks.run` (or `make benchmark`)."""

import importlib.util
import json
import pathlib
from typing import Annotated, Any

import jax
import typer
from tabulate import tabulate

from benchmarks import contenders
from benchmarks.timing import Timing, interleave, machine, read_bandwidth

RESULTS = pathlib.Path(__file__).parent / "results"
FORMS = {"BNSD": ("BNSD", 0), "BSND": ("BSND", 0), "BNSD, paged 128": ("BNSD", 128), "BSH, paged 128": ("BSH", 128)}
FORMS |= {"BNSD, paged 16": ("BNSD", 16), "BSH, paged 16": ("BSH", 16)}


def main(
    name: Annotated[str, typer.Option(help="Results go to results/NAME.json, .md and .png.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each contender.")] = 7,
    batch: int = 8,
    heads: int = 32,
    kv_heads: int = 8,
    length: int = 4096,
    head_dim: int = 128,
) -> None:
    """Time every cache dtype and form, and the rivals that can do them, in one run."""
    shape = contenders.Shape(batch, heads, kv_heads, length, head_dim)
    about = machine() | {"shape": f"B={batch} N={heads} K={kv_heads} S={length} D={head_dim}"}
    name = name or f"{jax.default_backend()}-jax{jax.__version__}"
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        entries = {"memory": read_bandwidth()}
        for form, (layout, block) in FORMS.items():
            block = 32 if dtype == "int8" and block == 16 else block
            form = form.replace("paged 16", "paged 32") if block == 32 else form
            entries[f"jax_ifa {form}"] = contenders.ours(shape, dtype, layout, block)
        entries["XLA's loop, BNSD"] = contenders.ours(shape, dtype, "BNSD", implementation="xla")
        entries |= rivals(shape, dtype)
        rows += report(interleave(entries, rounds=rounds, title=dtype), dtype, shape.cache_bytes(dtype))
    write(name, about, rows, by_capacity(batch, heads, kv_heads, head_dim))


def by_capacity(batch: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, float]:
    """Milliseconds of what must not follow the capacity of the cache: a short window in it, and one appended token."""

    def shape(length: int) -> contenders.Shape:
        return contenders.Shape(batch, heads, kv_heads, length, head_dim)

    calls: dict[str, contenders.Contender] = {}
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        for capacity in (128, 8192):
            calls[f"attend to 100 positions, {dtype}, capacity {capacity}"] = contenders.ours(
                shape(100), dtype, "BNSD", capacity=capacity
            )
        for capacity in (128, 8192):
            calls[f"append one token, {dtype}, capacity {capacity}"] = contenders.append_one(shape(capacity), dtype)
    return {label: timing.median * 1e3 for label, timing in interleave(calls, title="by capacity").items()}


def rivals(shape: contenders.Shape, dtype: str) -> dict[str, contenders.Contender]:
    """Those that accept this dtype here."""
    found: dict[str, contenders.Contender] = {}
    if dtype == "int8":
        return found  # none of them reads an int8 cache
    makers = {"jax.nn": lambda: contenders.jax_nn(shape, dtype)}
    if importlib.util.find_spec("torch"):
        makers["torch enable_gqa"] = lambda: contenders.torch_sdpa(shape, dtype, folded=False)
        makers["torch, heads folded by hand"] = lambda: contenders.torch_sdpa(shape, dtype, folded=True)
    for label, make in makers.items():
        contender = make()
        try:
            contender()
        except Exception as error:  # a rival may fail in any way: say so and go on
            print(f"{label} cannot do {dtype} here: {str(error).splitlines()[0]}")
            continue
        found[label] = contender
    return found


def report(timings: dict[str, Timing], dtype: str, cache_bytes: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    bandwidth = 512 * 2**20 / timings.pop("memory").median
    best = timings["jax_ifa BSND"].median
    return [
        {
            "cache": dtype,
            "contender": label,
            "ms": timing.median * 1e3,
            "spread": timing.spread,
            "GB/s": cache_bytes / timing.median / 1e9,
            "of bandwidth": cache_bytes / timing.median / bandwidth,
            "time / ours (BSND)": timing.median / best,
            "bandwidth GB/s": bandwidth / 1e9,
        }
        for label, timing in timings.items()
    ]


def write(name: str, about: dict[str, str], rows: list[dict[str, Any]], window: dict[str, float]) -> None:
    """The figures as JSON, as a table and as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows, "window": window}, indent=1))
    formats = {"ms": "{:.2f}", "spread": "±{:.0%}", "GB/s": "{:.1f}", "of bandwidth": "{:.0%}"}
    formats |= {"time / ours (BSND)": "{:.2f}", "bandwidth GB/s": "{:.1f}"}
    cells = [{k: formats.get(k, "{}").format(v) for k, v in row.items()} for row in rows]
    table = tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)
    lines = [", ".join(f"{k} {v}" for k, v in about.items()), "", table, ""]
    lines.append(tabulate([(k, f"{ms:.3f}") for k, ms in window.items()], headers=["call", "ms"], tablefmt="github"))
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    kinds = list(dict.fromkeys(row["cache"] for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4 * len(kinds), 4), layout="constrained", sharex=True)
    for axis, kind in zip(axes, kinds, strict=True):
        mine = [row for row in rows if row["cache"] == kind][::-1]
        colours = ["tab:blue" if row["contender"].startswith("jax_ifa") else "tab:gray" for row in mine]
        axis.barh([row["contender"] for row in mine], [row["of bandwidth"] for row in mine], color=colours)
        axis.set(title=f"{kind} cache", xlabel="share of read bandwidth", xlim=(0, 1))
    figure.suptitle(f"Decode attention, {about['shape']}, JAX {about['jax']}, {about['processor']}")
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
