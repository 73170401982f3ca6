"""What the rows of the GPU benchmark should reach, and whether they do.

Bytes are those of the visible keys and values, counted once; the share is that of the bandwidth of a copy, which counts
bytes read and written.
"""

from typing import Any

from benchmarks.gpu_contenders import Shape

LARGE, MIDDLE = 256e6, 64e6
LARGE_SHARE, MIDDLE_SHARE = 0.90, 0.80
SMALL_TIMES = 1.3
INT8_SPEEDUP = 1.7
PAGED_SLOWDOWN = {128: 1.02, 16: 1.08, 32: 1.08}


def verdicts(row: dict[str, Any], rows: list[dict[str, Any]], bandwidth: float, launch: float) -> dict[str, bool]:
    """Each goal that a row has, and whether it is met.

    Args:
      row: of the report.
      rows: all of it, where rows to compare with are looked for.
      bandwidth: bytes/s of a copy.
      launch: seconds that a kernel takes that does nothing.
    """
    shape, ours = Shape(**row["shape"]), row["us"]["jax_ifa"]
    size = shape.cache_bytes
    share = row["share of copy bandwidth"]
    if size >= LARGE:
        found = {f"at least {LARGE_SHARE:.0%} of the bandwidth": share >= LARGE_SHARE}
    elif size >= MIDDLE:
        found = {f"at least {MIDDLE_SHARE:.0%} of the bandwidth": share >= MIDDLE_SHARE}
    else:
        least = (launch + size / bandwidth) * 1e6
        found = {f"at most {SMALL_TIMES} times a launch and the bytes": ours <= SMALL_TIMES * least}
    found["no rival is faster"] = all(ratio >= 1 for ratio in row["time / ours"].values())

    def other(**changes: Any) -> float | None:
        wanted = row["shape"] | changes
        return next((r["us"]["jax_ifa"] for r in rows if r["shape"] == wanted), None)

    if shape.dtype == "int8":
        block = 16 if shape.block == 32 else shape.block
        if (wide := other(dtype="bfloat16", block=block)) is not None:
            found[f"at least {INT8_SPEEDUP} times as fast as bfloat16"] = wide / ours >= INT8_SPEEDUP
    if shape.block and (whole := other(block=0)) is not None:
        slowdown = PAGED_SLOWDOWN[shape.block]
        found[f"at most {slowdown} times a contiguous cache"] = ours / whole <= slowdown
    return found


def summary(report: dict[str, Any]) -> str:
    """For each goal how many rows meet it, and those that do not."""
    bandwidth, launch = (report["ceilings"][name] for name in ("copy bytes/s", "launch s"))
    met: dict[str, list[str]] = {}
    missed: dict[str, list[str]] = {}
    for row in report["rows"]:
        for goal, reached in verdicts(row, report["rows"], bandwidth, launch).items():
            (met if reached else missed).setdefault(goal, []).append(str(Shape(**row["shape"])))
    lines = []
    for goal in dict.fromkeys([*met, *missed]):
        few, many = len(met.get(goal, [])), len(met.get(goal, [])) + len(missed.get(goal, []))
        lines.append(f"{'PASS' if few == many else 'FAIL'}  {goal}: {few} of {many}")
        lines += [f"      missed: {shape}" for shape in missed.get(goal, [])]
    return "\n".join(lines)
