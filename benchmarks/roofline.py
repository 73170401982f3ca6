"""The Numba kernels against this machine's limits: `python -m benchmarks.roofline`.

A decode step takes at least the time that its bytes need at the read bandwidth, and the time that its dot products need
at the peak rate of their instruction. Both are measured in the same run, in turns with the contenders:

    bytes          of the visible keys and values, once, at the bandwidth of `jnp.sum` over as many, just before: what
                   the memory of a shared machine gives may change by a factor of two within seconds
    instructions   2 * B * N * S * D multiply-adds, for each digit of the query and of the weights (formats.py),
                   at the rate of independent sums in registers, on all cores (of AMX: of whole matrices)

and the share is the larger of the two over the time, the median over turns. Beside them XLA's loop on the same forms
of the cache, and `jax.nn` and torch on the one that they have.
"""

import itertools
import json
import pathlib
from typing import Annotated, Any

import jax
import numpy as np
import typer
from tabulate import tabulate

from benchmarks import contenders
from benchmarks.peaks import instructions, multiply_adds, peak
from benchmarks.run import rivals
from benchmarks.timing import interleave, machine, read_bandwidth
from numba_kernels.formats import format_of
from numba_kernels.machine import this_machine

RESULTS = pathlib.Path(__file__).parent / "results"
FORMS = {"BNSD": ("BNSD", 0), "BSND": ("BSND", 0), "BNSD, paged 128": ("BNSD", 128), "BNSD, paged 16": ("BNSD", 16)}
# What a step reads, whatever S and the dtype: as much as the sum beside it. So no cache holds it, and a step is long
# beside what it takes to wake threads.
MEGABYTES = 512
KV_HEADS, HEAD_DIM = 8, 128
XLA, MEMORY = "XLA's loop", "memory"


def main(
    name: Annotated[str, typer.Option(help="Results go to results/NAME.json, .md and .png.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each contender.")] = 3,
    beside: Annotated[bool, typer.Option(help="Time XLA's loop, jax.nn and torch too.")] = True,
) -> None:
    """Every dtype, G = 1, 4 and 8, S = 1k, 8k and 64k, contiguous and paged."""
    rows: list[dict[str, Any]] = []
    for dtype, group, length in itertools.product(
        ("float32", "bfloat16", "float16", "int8"), (1, 4, 8), (1024, 8192, 65536)
    ):
        rows += measure(dtype, group, length, rounds, beside)
        write(name or f"roofline-{jax.default_backend()}-jax{jax.__version__}", rows)


def measure(dtype: str, group: int, length: int, rounds: int, beside: bool) -> list[dict[str, Any]]:
    """A row for each form of the cache, and for each rival."""
    position = contenders.Shape(1, KV_HEADS, KV_HEADS, 1, HEAD_DIM).cache_bytes(dtype)
    batch = MEGABYTES * 2**20 // (position * length)
    shape = contenders.Shape(batch, KV_HEADS * group, KV_HEADS, length, HEAD_DIM)
    form = format_of(dtype, False, this_machine(), narrow=dtype != "float32", group=group)  # as `ours` calls it
    calls: dict[str, Any] = {}
    for label, (layout, block) in FORMS.items():
        block = 32 if dtype == "int8" and block == 16 else block  # the operator's own rule
        label = label.replace("16", str(block)) if block else label
        calls[label] = contenders.ours(shape, dtype, layout, block)
        if beside:
            calls[f"{XLA}, {label}"] = contenders.ours(shape, dtype, layout, block, implementation="xla")
    if beside:
        calls |= rivals(shape, dtype)
    entries, read = {"peak": peak(form, this_machine())}, read_bandwidth(MEGABYTES)
    for label, call in calls.items():
        entries |= {f"{MEMORY}, {label}": read, label: call}
    timings = interleave(entries, rounds=rounds, seconds_per_turn=0.1, title=f"{dtype} G={group} S={length}")
    rate = instructions() / timings.pop("peak").median
    products = batch * KV_HEADS * group * length * HEAD_DIM * (form.query_digits + form.weight_digits)
    by_instructions = products / multiply_adds(form, this_machine()) / rate
    rows = []
    for label in calls:
        timing, memory = timings[label], timings[f"{MEMORY}, {label}"]
        bandwidth = MEGABYTES * 2**20 / memory.of_turns
        by_bytes = shape.cache_bytes(dtype) / bandwidth / timing.of_turns  # of every turn, to the memory just before
        by_products = by_instructions / timing.of_turns
        rows.append(
            {
                "cache": dtype,
                "G": group,
                "S": length,
                "contender": label,
                "ms": timing.median * 1e3,
                "spread": timing.spread,
                "bytes": float(np.median(by_bytes)),
                "instructions": float(np.median(by_products)),
                "share": float(np.median(np.maximum(by_bytes, by_products))),
                "GB/s": float(np.median(bandwidth)) / 1e9,
                "G instructions/s": rate / 1e9,
            }
        )
    return rows


def is_ours(row: dict[str, Any]) -> bool:
    """Whether it is a row of the kernels."""
    return str(row["contender"]).startswith(("BNSD", "BSND"))


def next_best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each cache, group and form: the time of the fastest rival on any form it has, over ours.

    XLA's loop counts on the same form only: the form is the user's choice, and it is no other library's.
    """
    leads: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in filter(is_ours, rows):
        point, label = (row["cache"], row["G"], row["S"]), row["contender"]
        others = [
            other["ms"]
            for other in rows
            if (other["cache"], other["G"], other["S"]) == point
            and not is_ours(other)
            and (other["contender"] == f"{XLA}, {label}" or not other["contender"].startswith(XLA))
        ]
        if others:
            form = label.replace("32", "16")  # of int8, beside the others' 16
            leads.setdefault(point[:2], {}).setdefault(form, []).append(min(others) / row["ms"])
    return [
        {"cache": cache, "G": group} | {form: f"{min(x):.1f} to {max(x):.1f}" for form, x in forms.items()}
        for (cache, group), forms in leads.items()
    ]


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """The figures as JSON, as a table and as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    RESULTS.mkdir(exist_ok=True)
    about = machine() | {"shape": f"keys and values of {MEGABYTES} MB, K={KV_HEADS} D={HEAD_DIM}"}
    (RESULTS / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    formats = {"ms": "{:.2f}", "spread": "±{:.0%}", "GB/s": "{:.1f}", "G instructions/s": "{:.2f}"}
    formats |= dict.fromkeys(("bytes", "instructions", "share"), "{:.2f}")
    cells = [{k: formats.get(k, "{}").format(v) for k, v in row.items()} for row in rows]
    table = tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)
    text = ", ".join(f"{k} {v}" for k, v in about.items()) + f"\n\n{table}\n"
    if leads := tabulate(next_best(rows), headers="keys", tablefmt="github"):
        text += f"\nThe time of the best rival, in units of ours, from the lowest to the highest over S:\n\n{leads}\n"
    (RESULTS / f"{name}.md").write_text(text)

    mine = [row for row in rows if is_ours(row)]
    kinds = list(dict.fromkeys(row["cache"] for row in mine))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4 * len(kinds), 4), layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for label in dict.fromkeys(row["contender"] for row in mine if row["cache"] == kind):
            points = [row for row in mine if (row["cache"], row["contender"]) == (kind, label)]
            places = [f"G={row['G']}\n{row['S'] // 1024}k" for row in points]
            axis.plot(places, [row["share"] for row in points], marker="o", label=label)
        axis.set(title=f"{kind} cache", ylabel="share of the roofline", ylim=(0, 1.1))
        axis.legend(fontsize="small")
    figure.suptitle(f"Decode attention, {about['shape']}, JAX {about['jax']}, {about['processor']}")
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
