"""What the driver accepts of a copy by TMA, and the copies that a plan makes, worked out without a compiler.

A copy, as `gpu_compile.recorded_copies` has it, is an array as the driver sees it (`shape`, `strides` in elements,
`bytes` of an element) and a `box` of it, whose rows are swizzled over `swizzle` bytes of shared memory (16: not).
"""

import math
from typing import Any

from pallas_kernels.gpu.hopper.plan import BIAS_LINE, LINE, ROW_GROUP, Plan, round_up

Copy = dict[str, Any]


def faults(copy: Copy) -> list[str]:
    """The rules of cuTensorMapEncodeTiled that a copy breaks."""
    shape, strides, box, size = copy["shape"], copy["strides"], copy["box"], copy["bytes"]
    inner = box[-1] * size
    rules = {
        "1 to 5 axes": 1 <= len(shape) <= 5 and len(shape) == len(strides) == len(box),
        "axes of at most 2**32": all(0 < n <= 2**32 for n in shape),
        "neighbours along the last axis": strides[-1] == 1,
        "strides of whole 16 bytes, below 2**40": all(
            0 < n * size < 2**40 and n * size % 16 == 0 for n in strides[:-1]
        ),
        "boxes of at most 256": all(0 < n <= 256 for n in box),
        "rows of whole 16 bytes": inner % 16 == 0,
        "rows as wide as the swizzle": copy["swizzle"] in (0, 16) or inner <= copy["swizzle"],
        "a swizzle there is": copy["swizzle"] in (0, 16, 32, 64, 128),
        "a box that shared memory holds": math.prod(box) * size <= 227 * 1024,
    }
    return [rule for rule, kept in rules.items() if not kept]


def copies(plan: Plan, *, value_pages: int, bias_rows: int, mask_rows: int, width: int) -> list[Copy]:
    """Every copy of a launch of the kernel; `width` is that of a row of mask and bias."""
    rows, cache = plan.batch * plan.num_heads, plan.key_dtype.itemsize
    found = []
    for pages, channels in ((plan.pages, plan.head_dim), (value_pages, plan.padded)):
        across = plan.key_swizzle // cache
        if plan.head_major:
            cache_shape = (pages * plan.num_heads * plan.page, plan.head_dim)
            found.append(_copy(cache_shape, (), (plan.chunk, channels), cache, across))
        else:
            cache_shape = (pages * plan.page, plan.num_heads, plan.head_dim)
            found.append(_copy(cache_shape, (1,), (plan.chunk, channels), cache, across))
    size = plan.query_dtype.itemsize
    query_rows = plan.query_terms * plan.columns
    query_shape = (plan.items, query_rows, plan.head_dim) if plan.staged else (rows, plan.heads, plan.head_dim)
    found.append(_copy(query_shape, (0,), (query_rows, plan.head_dim), size, plan.query_swizzle // size))
    if plan.staged:
        found.append(_copy((plan.items, plan.columns), (0,), (plan.columns,), 4))
    front = ROW_GROUP if plan.ragged else 0
    if plan.masked:
        found.append(_copy((mask_rows * round_up(front + width, LINE),), (), (plan.mask_width,), 1))
    if plan.bias_dtype is not None:
        size = plan.bias_dtype.itemsize
        shape = (bias_rows, plan.num_heads, plan.heads, round_up(front + width, BIAS_LINE))
        across = 0 if plan.ragged else 128 // size
        found.append(_copy(shape, (0, 1), (plan.columns, plan.tile), size, across))
    size = plan.kernel_out_dtype.itemsize
    out_shape: tuple[int, ...] = (rows, plan.heads, plan.head_dim)
    if plan.splits > 1:
        row = plan.heads * plan.head_dim
        out_shape = (plan.splits, -(-round_up(rows * row, 128) // row), plan.heads, plan.head_dim)
    fixed = tuple(range(len(out_shape) - 2))
    found.append(_copy(out_shape, fixed, (plan.columns, plan.padded), size, plan.out_swizzle // size))
    return found


def _copy(shape: tuple[int, ...], fixed: tuple[int, ...], box: tuple[int, ...], size: int, across: int = 0) -> Copy:
    """A copy of a box from a contiguous array at one index of the `fixed` axes, which come first for the driver.

    The last two axes are in squares of 8 rows and `across` elements, or for 0 as they are.
    """
    strides = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    rest = [n for n in range(len(shape)) if n not in fixed]
    axes = [(shape[n], strides[n], 1) for n in fixed]
    moved = [(shape[n], strides[n], extent) for n, extent in zip(rest, box, strict=True)]
    if across:
        (rows, row, some_rows), (columns, one, some_columns) = moved
        square = (min(ROW_GROUP, rows), min(across, columns))
        assert rows % square[0] == columns % square[1] == some_rows % ROW_GROUP == some_columns % across == 0
        moved = [(rows // square[0], row * square[0], some_rows // ROW_GROUP)]
        moved += [(columns // square[1], one * square[1], some_columns // across)]
        moved += [(square[0], row, ROW_GROUP), (square[1], one, across)]
    axes = [axis for axis in [*axes, *moved] if axis[0] != 1 or axis[2] != 1]
    if len(axes) > 5:  # the fixed ones become one
        outer, inner = axes[: len(fixed)], axes[len(fixed) :]
        common = math.gcd(*(stride for _, stride, _ in outer))
        axes = [(sum((n - 1) * stride // common for n, stride, _ in outer) + 1, common, 1), *inner]
    return {
        "shape": [axis[0] for axis in axes],
        "strides": [axis[1] for axis in axes],
        "box": [axis[2] for axis in axes],
        "swizzle": across * size if across else 16,
        "bytes": size,
    }
