"""One launch of the kernel: canonical operands into the arrays it reads, and its arrays back."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_ifa.operands import Operands
from jax_ifa.paging import clamp_table
from pallas_kernels.tpu.kernel import ROW_GROUP, decode_kernel
from pallas_kernels.tpu.merging import masked_positions, merge_parts
from pallas_kernels.tpu.plan import Plan, make_plan
from pallas_kernels.tpu.storage import LANES, view
from pallas_kernels.tpu.tuning import Tuning

NAME = "incre_flash_attention"


def launch(operands: Operands, tuning: Tuning, interleaved: int = 1) -> tuple[Array, Array]:
    """(out, lse) of `operands`, whose windows end at a multiple of `storage.alignment` or inside a page.

    Its table must fit in scalar memory, and its contiguous cache is read only up to the last aligned position; see
    `parts.py` for the rest. `interleaved` heads take turns in the positions of the only kv head; see `Plan`.
    """
    plan = make_plan(operands, tuning, interleaved)
    kv = operands.kv
    windows = split_windows(operands, plan)
    starts, stops = zip(*windows, strict=True)
    scalars = [per_item(starts, plan), per_item(stops, plan), per_item([operands.scale] * plan.splits, plan)]
    if kv.table is not None:
        scalars.append(clamp_table(kv.table, kv.key.shape[0]).reshape(-1))
    key, value = (_tiled(view(pages, head_major=kv.head_major, to=plan.form), plan) for pages in (kv.key, kv.value))
    query = packed_query(operands.query.astype(jnp.float32), plan)
    arrays, rows = [query, key, value], {"rows_of_mask": 0, "rows_of_bias": 0}
    if operands.mask is not None:
        mask = _whole_tiles(operands.mask[:, None, : kv.capacity].astype(jnp.float32), plan)
        arrays.append(mask)
        rows["rows_of_mask"] = mask.shape[0]
    if operands.bias is not None:
        bias = _whole_tiles(packed_bias(operands.bias, plan), plan)
        arrays.append(bias)
        rows["rows_of_bias"] = bias.shape[0]

    def run(plan: Plan) -> tuple[Array, Array]:
        kernel = functools.partial(decode_kernel, plan=plan, **rows)
        return unpacked(*_call(kernel, plan, scalars, arrays), plan)

    out, lse = run(plan)
    if plan.packed * plan.interleaved > 1 and key.dtype != jnp.int8:
        # Packed heads are kept apart by zeros in the query, and 0 * inf is NaN: a visible key that is not finite
        # reaches its neighbours. That leaves NaN in the LSE, and then the kernel runs again with every head's keys
        # alone. Of interleaved heads the values do the same, and leave NaN in the output.
        spoilt, packed = jnp.any(jnp.isnan(lse if plan.interleaved == 1 else out)), (out, lse)
        out, lse = jax.lax.cond(spoilt, lambda: run(dataclasses.replace(plan, apart=True)), lambda: packed)
    if plan.splits == 1:
        return out[0], lse[0]
    masked = jnp.stack([masked_positions(operands, *window) for window in windows])
    return merge_parts(out, lse, masked / plan.interleaved)


def _call(kernel: Callable[..., None], plan: Plan, scalars: list[Array], arrays: list[Array]) -> tuple[Array, Array]:
    """The kernel over all items: (items, groups, rows, own_width) and (items, groups * rows, 128)."""
    tuning, (query, key, value) = plan.tuning, arrays[:3]
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    per_core = plan.items // tuning.cores
    all_rows = plan.groups * plan.rows

    def place(core: Array, step: Array, *_: Array) -> tuple[Array | int, ...]:
        item = core * per_core + step
        return (
            jax.lax.rem(jax.lax.div(item, plan.head_blocks), plan.batch),
            jax.lax.rem(item, plan.head_blocks),
            0,
            0,
            0,
        )

    def item_block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda core, step, *_: (core * per_core + step,) + (0,) * len(shape))

    def slots(*shape: int, dtype: jnp.dtype) -> Any:
        return pltpu.VMEM((tuning.slots, *shape), dtype)

    def result(*shape: int) -> jax.ShapeDtypeStruct:
        varies = jax.typeof(query).manual_axis_type  # in a `shard_map`, as the operands do
        return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varies)

    chunk = _chunk_shape(plan)
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tuning.cores, per_core),
            in_specs=[pl.BlockSpec((1, 1, *query.shape[2:]), place)] + [in_hbm] * (len(arrays) - 1),
            out_specs=[item_block(plan.groups, plan.rows, plan.own_width), item_block(all_rows, LANES)],
            scratch_shapes=[
                slots(plan.chunks, *chunk, dtype=key.dtype),
                slots(plan.chunks, *chunk, dtype=value.dtype),
                *([slots(1, plan.tile, dtype=jnp.float32)] if plan.masked else []),
                *([slots(all_rows, plan.tile, dtype=arrays[-1].dtype)] if plan.biased else []),
                pltpu.SemaphoreType.DMA((tuning.slots, 4)),
                pltpu.SMEM((3,), jnp.int32),
                pltpu.VMEM((all_rows, LANES), jnp.float32),
                pltpu.VMEM((all_rows, LANES), jnp.float32),
                pltpu.VMEM((all_rows, plan.width), jnp.float32),
                pltpu.VMEM((plan.groups, plan.query_rows, plan.width), jnp.int8 if plan.digits else jnp.float32),
                *([pltpu.VMEM((all_rows, LANES), jnp.float32)] if plan.digits else []),
            ],
        ),
        out_shape=[
            result(plan.items, plan.groups, plan.rows, plan.own_width),
            result(plan.items, all_rows, LANES),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tuning.vmem_limit_bytes,
            # Ids were clamped and windows end inside the cache, so no copy leaves it; checking each one costs more
            # cycles than starting it.
            disable_bounds_checks=True,
        ),
        name=NAME,
    )(*scalars, *arrays)
    return out, lse


def split_windows(operands: Operands, plan: Plan) -> list[tuple[Array, Array]]:
    """The windows of the sequences, (B,) start and stop, cut into `splits` parts of as many tiles."""
    some = operands.start < operands.stop
    start, stop = jnp.where(some, operands.start, 0), jnp.where(some, operands.stop, 0)
    tiles = stop // plan.tile + 1 - start // plan.tile
    cuts = [start]
    for split in range(1, plan.splits):
        cut = (start // plan.tile + tiles * split // plan.splits) * plan.tile
        cuts.append(jnp.clip(cut, start, stop))
    parts = zip(cuts, [*cuts[1:], stop], strict=True)
    return [(jnp.where(first < last, first, 0), jnp.where(first < last, last, 0)) for first, last in parts]


def per_item(values: Sequence[Array], plan: Plan) -> Array:
    """(B,) of each split to (items,): item (split, sequence, block of heads), in that order; then 0."""
    items = jnp.repeat(jnp.stack(values).reshape(-1), plan.head_blocks)
    return jnp.pad(items, (0, plan.items - items.shape[0]))


def packed_query(query: Array, plan: Plan) -> Array:
    """(B, K, G, D) to (B, head_blocks, groups, rows, own_width): block diagonal, in the lanes that a row has."""
    blocks = (plan.batch, plan.head_blocks, plan.groups)
    query = query.reshape(*blocks, plan.packed * plan.group, plan.head_dim)
    query = jnp.pad(query, ((0, 0),) * 3 + ((0, plan.rows - plan.packed * plan.group), (0, 0)))
    head_of_row = jnp.arange(plan.rows, dtype=jnp.int32)[:, None] // plan.group
    head_of_lane = jnp.arange(plan.own_width, dtype=jnp.int32)[None] // plan.head_dim
    together = plan.own_width // plan.head_dim
    return jnp.where(head_of_row % together == head_of_lane, jnp.concatenate([query] * together, axis=-1), 0.0)


def packed_bias(bias: Array, plan: Plan) -> Array:
    """(R, K, G, S) to (R, head_blocks, groups * rows, S), in the order of the query's rows."""
    grouped = bias.reshape(bias.shape[0], plan.head_blocks, plan.groups, plan.packed * plan.group, bias.shape[3])
    padding = plan.rows - plan.packed * plan.group
    grouped = jnp.pad(grouped, ((0, 0),) * 3 + ((0, padding), (0, 0)))
    return grouped.reshape(bias.shape[0], plan.head_blocks, plan.groups * plan.rows, bias.shape[3])


def unpacked(out: Array, lse: Array, plan: Plan) -> tuple[Array, Array]:
    """The kernel's (items, groups, rows, own_width) and (items, groups * rows, 128) to (splits, B, K, G, D) and
    (splits, B, K, G).
    """
    used = plan.splits * plan.batch * plan.head_blocks
    blocks = (plan.splits, plan.batch, plan.head_blocks, plan.groups)
    rows = slice(0, plan.packed * plan.group)
    out = out[:used, :, rows]
    together = plan.own_width // plan.head_dim  # heads in the lanes of a row, of which one is its own
    out = out.reshape(*blocks, plan.packed // together, together, plan.group, together, plan.head_dim)
    out = jnp.stack([out[..., j, :, j, :] for j in range(together)], axis=5)
    out = out.reshape(plan.splits, plan.batch, plan.num_heads, plan.group, plan.head_dim)
    lse = lse[:used, :, 0].reshape(*blocks, plan.rows)[..., rows]
    return out, lse.reshape(plan.splits, plan.batch, plan.num_heads, plan.group)


def _whole_tiles(rows: Array, plan: Plan) -> Array:
    """`rows` with its last axis padded to whole tiles."""
    missing = -rows.shape[-1] % plan.tile
    return jnp.pad(rows, ((0, 0),) * (rows.ndim - 1) + ((0, missing),))


def _tiled(pages: Array, plan: Plan) -> Array:
    """The view of a cache whose rows lie in groups of 8, as a tile of memory has them."""
    if not plan.row_groups:
        return pages
    *outer, rows, lanes = pages.shape
    return pages.reshape(*outer, rows // ROW_GROUP, ROW_GROUP, lanes)


def _chunk_shape(plan: Plan) -> tuple[int, ...]:
    """Of one chunk of keys or values, in VMEM."""
    outer, rows, lanes = {
        "heads": ((plan.item_heads,), plan.chunk, plan.head_dim),
        "columns": ((plan.item_heads,), plan.head_dim, plan.chunk),
        "lanes": ((), plan.chunk, plan.item_heads * plan.head_dim),
    }[plan.form]
    return *outer, *((rows // ROW_GROUP, ROW_GROUP) if plan.row_groups else (rows,)), lanes
