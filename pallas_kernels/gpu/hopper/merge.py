"""The results of the splits into one: a launch of its own, since thread blocks cannot wait for each other.

What `jax_ifa.merge` does, by one kernel where XLA would need several. Tops and totals of weights are kept apart: beside
the -1e12 of a split that is masked whole, float32 would have no room for the number of its positions. A thread block
takes 128 neighbouring numbers of the output, one for each of its threads, whatever heads they are of.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.hopper.plan import THREADS, Plan

NAME = "incre_flash_attention_merge"
AT_A_TIME = 32
"""Tops of splits that a thread block looks at together."""
LAYOUT = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)


def merge_splits(out: Array, top: Array, total: Array, plan: Plan) -> tuple[Array, Array]:
    """What the kernel wrote, as one result.

    Args:
      out: (splits, B * K or more, heads, D), of each split the values times its weights.
      top: (splits, B * K, blocks * columns), the largest score of each split in base 2.
      total: as `top`, the sums of the weights.
      plan: of the launch.

    Returns:
      out: (B * K, heads, D) in the plan's `out_dtype`, normalised, and lse: (B * K, heads) float32, natural.
    """
    rows = plan.batch * plan.num_heads * plan.heads
    size = rows * plan.head_dim
    merged, lse = plgpu.kernel(
        functools.partial(_merge_kernel, plan=plan, rows=rows, width=top.shape[2]),
        out_type=[jax.ShapeDtypeStruct((size,), plan.out_dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)],
        scratch_types=[plgpu.SMEM((THREADS,), plan.out_dtype)],
        grid=(-(-size // THREADS),),
        grid_names=("unit",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=NAME,
    )(out.reshape(-1), top.reshape(-1), total.reshape(-1))
    shape = (plan.batch * plan.num_heads, plan.heads)
    return merged.reshape(*shape, plan.head_dim), lse.reshape(shape)


def _merge_kernel(
    out: Any, top: Any, total: Any, merged: Any, lse: Any, merged_s: Any, *, plan: Plan, rows: int, width: int
) -> None:
    """One thread block. All arrays have one axis; `rows` are B * K * heads, `width` is that of the tops of B * K."""
    begin = lax.axis_index("unit") * np.int32(THREADS)
    first = lax.div(begin, np.int32(plan.head_dim))
    position = begin + plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (THREADS,), 0), LAYOUT)
    touched = [jnp.minimum(first + n, rows - 1) for n in range(rows_touched(plan.head_dim))]
    places = [lax.div(row, np.int32(plan.heads)) * width + lax.rem(row, np.int32(plan.heads)) for row in touched]
    split_size, split_tops = out.shape[0] // plan.splits, top.shape[0] // plan.splits

    def of_rows(scalars: list[Array]) -> Array:
        """For each number that of its row."""
        chosen = jnp.full((THREADS,), scalars[0])
        for n, scalar in enumerate(scalars[1:], 1):
            chosen = jnp.where(position < (first + n) * plan.head_dim, chosen, scalar)
        return chosen

    # So many splits at a time that their loads wait together, and few enough that registers hold them.
    turns = -(-plan.splits * len(touched) // AT_A_TIME)
    each = -(-plan.splits // turns)

    def visit(turn: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        bases, sums, result = carry
        splits = [turn * each + n for n in range(each)]
        present = [split < plan.splits for split in splits]
        splits = [jnp.minimum(split, plan.splits - 1) for split in splits]
        parts = [_load(out.at[pl.ds(split * split_size + begin, THREADS)]) for split in splits]
        shares, decays, new_bases, new_sums = [], [], [], []
        for place, base, summed in zip(places, bases, sums, strict=True):
            at = [split * split_tops + place for split in splits]
            tops = [jnp.where(is_there, top[i], -jnp.inf) for i, is_there in zip(at, present, strict=True)]
            highest = functools.reduce(jnp.maximum, tops, base)
            finite = jnp.where(highest == -jnp.inf, 0.0, highest)  # -inf - -inf would be NaN
            shares.append([jnp.exp2(x - finite) for x in tops])
            decays.append(jnp.exp2(base - finite))
            new_bases.append(highest)
            of_splits = [jnp.where(x == 0.0, 0.0, x * total[i]) for x, i in zip(shares[-1], at, strict=True)]
            new_sums.append(functools.reduce(jnp.add, of_splits, summed * decays[-1]))
        result = result * of_rows(decays)
        for part, *share in zip(parts, *shares, strict=True):
            factor = of_rows(share)
            result = result + jnp.where(factor == 0.0, 0.0, factor * part)  # selected: 0 * NaN is NaN
        return new_bases, new_sums, result

    state = (
        [jnp.float32(-jnp.inf) for _ in touched],
        [jnp.float32(0.0) for _ in touched],
        plgpu.layout_cast(jnp.zeros((THREADS,), jnp.float32), LAYOUT),
    )
    bases, sums, result = lax.fori_loop(jnp.int32(0), jnp.int32(turns), visit, state)
    for n, (row, base, summed) in enumerate(zip(touched, bases, sums, strict=True)):

        @pl.when((row * plan.head_dim >= begin) & (first + n < rows))  # once for each row
        def _lse(row: Array = row, base: Array = base, summed: Array = summed) -> None:
            lse[row] = base * math.log(2.0) + jnp.log(summed)

    inverse = of_rows([jnp.where(summed == 0.0, 0.0, 1.0 / summed) for summed in sums])
    merged_s[...] = (result * inverse).astype(plan.out_dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(merged_s, merged.at[pl.ds(begin, THREADS)])  # what is past the end is not written
    plgpu.wait_smem_to_gmem(0)


def rows_touched(head_dim: int) -> int:
    """Most rows that 128 neighbouring numbers, from a multiple of 128 on, are of."""
    return 1 + max((THREADS * n % head_dim + THREADS - 1) // head_dim for n in range(head_dim))


def _load(ref: Any) -> Array:
    load: Any = plgpu.load  # see kernel.py
    return load(ref, layout=LAYOUT)
