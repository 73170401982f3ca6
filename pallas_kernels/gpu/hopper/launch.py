"""One launch of the kernel: canonical operands into the arrays it reads, and the splits' results into one."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_ifa.operands import Operands
from pallas_kernels.gpu.hopper.kernel import decode_kernel, scratch
from pallas_kernels.gpu.hopper.merge import merge_splits
from pallas_kernels.gpu.hopper.plan import (
    BIAS_LINE,
    DIGIT,
    LINE,
    ROW_GROUP,
    THREADS,
    Plan,
    largest_number,
    make_plan,
    round_up,
)

NAME = "incre_flash_attention"


def attend(operands: Operands, device_kind: str | None) -> tuple[Array, Array]:
    """`Operands` to (out (B, K, G, D) in `out_dtype`, lse (B, K, G) float32)."""
    return launch(operands, make_plan(operands, device_kind))


def launch(operands: Operands, plan: Plan) -> tuple[Array, Array]:
    """(out, lse) of `operands` by the plan."""
    kv = operands.kv
    arrays = [*_query(operands.query, plan), _rows(kv.key, plan), _rows(kv.value, plan)]
    arrays += [operands.start, operands.stop, operands.scale]
    arrays += [table.reshape(-1) for table in (kv.table, kv.value_table) if table is not None]
    mask_rows, bias_rows = (0, 0), 0
    if operands.mask is not None:
        mask = _positions(operands.mask.astype(jnp.int8), plan, LINE)
        mask_rows = mask.shape[0], mask.shape[1]
        arrays.append(mask.reshape(-1))
    if operands.bias is not None:
        bias = _positions(_heads(operands.bias, plan, axis=2), plan, BIAS_LINE)
        bias_rows = bias.shape[0]
        arrays.append(bias)

    rows = plan.batch * plan.num_heads
    out_shape: tuple[int, ...] = (rows, plan.heads, plan.head_dim)
    if plan.splits > 1:  # with more rows where a thread block of the merge would read past the last
        row = plan.heads * plan.head_dim
        out_shape = (plan.splits, -(-round_up(rows * row, THREADS) // row), plan.heads, plan.head_dim)
    per_head = jax.ShapeDtypeStruct((plan.splits, rows, plan.blocks * plan.columns), jnp.float32)
    out, top, total = plgpu.kernel(
        functools.partial(decode_kernel, plan=plan, mask_rows=mask_rows, bias_rows=bias_rows),
        out_type=[jax.ShapeDtypeStruct(out_shape, plan.kernel_out_dtype), per_head, per_head],
        scratch_types=scratch(plan),
        grid=(plan.items * plan.splits,),
        grid_names=("unit",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=NAME,
    )(*arrays)
    return _result(out, top, total, plan)


def _query(query: Array, plan: Plan) -> list[Array]:
    """(B, K, G, D) as `kernel.Refs` has it, and for int8 also the largest of each row."""
    if not plan.staged:
        query = _heads(query, plan, axis=2)
        return [query.reshape(-1, query.shape[2], plan.head_dim)]
    query = query.astype(jnp.float32)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, plan.blocks * plan.columns - plan.group), (0, 0)))
    query = query.reshape(plan.items, plan.columns, plan.head_dim)
    digits, top = int8_digits(query, plan.query_terms)
    return [jnp.concatenate(digits, axis=1).astype(plan.query_dtype), top]


def int8_digits(x: Array, terms: int) -> tuple[list[Array], Array]:
    """Rows of float32 as `terms` rows of int8 digits, highest first, and the largest of each row, without its sign.

    That one becomes the largest number there is, so the error is below 2**-23 of it for 3 digits (and the last bit of
    top / largest_number, which the kernel multiplies by: one factor for the row).
    """
    top = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(top == 0.0, 1.0, top / largest_number(terms))
    number = jnp.round(x / scale[..., None])
    digits = []
    for place in range(terms - 1, -1, -1):
        digit = jnp.clip(jnp.round(number / DIGIT**place), -127, 127)
        number = number - digit * DIGIT**place
        digits.append(digit.astype(jnp.int8))
    return digits, top


def _heads(array: Array, plan: Plan, *, axis: int) -> Array:
    """`array` with its axis of G heads padded where copies could not take it in groups of 8 heads."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, plan.heads - plan.group)
    return array if plan.heads == plan.group else jnp.pad(array, padding)


def _rows(pages: Array, plan: Plan) -> Array:
    """The cache with its positions in one axis, which moves nothing."""
    if plan.head_major:
        return pages.reshape(-1, plan.head_dim)
    return pages.reshape(-1, plan.num_heads, plan.head_dim)


def _positions(array: Array, plan: Plan, line: int) -> Array:
    """`array` with a last axis of whole lines, and room in front where a tile may begin before the first position."""
    front = ROW_GROUP if plan.ragged else 0
    width = front + array.shape[-1]
    back = round_up(width, line) - width
    if front == back == 0:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(front, back)])


def _result(out: Array, top: Array, total: Array, plan: Plan) -> tuple[Array, Array]:
    """What the kernel wrote as (out (B, K, G, D), lse (B, K, G)); see `kernel.Refs`."""
    if plan.splits == 1:
        lse = top[0] * math.log(2.0) + jnp.log(total[0])
    else:
        out, lse = merge_splits(out, top, total, plan)
    heads = (plan.batch, plan.num_heads, plan.group)
    return out[:, : plan.group].reshape(*heads, plan.head_dim), lse[:, : plan.group].reshape(heads)
