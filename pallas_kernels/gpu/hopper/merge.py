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
    # As many rows as 128 numbers can touch; those past the last one are that one again.
    touched = (THREADS - 2) // plan.head_dim + 2 if THREADS % plan.head_dim else THREADS // plan.head_dim
    touched = 1 if plan.head_dim % THREADS == 0 else touched
    weights, inverses = [], []
    for n in range(touched):
        row = jnp.minimum(first + n, rows - 1)
        place = lax.div(row, np.int32(plan.heads)) * width + lax.rem(row, np.int32(plan.heads))
        places = [place + split * (plan.batch * plan.num_heads * width) for split in range(plan.splits)]
        tops = [top[place] for place in places]
        highest = functools.reduce(jnp.maximum, tops)
        base = jnp.where(highest == -jnp.inf, 0.0, highest)  # -inf - -inf would be NaN
        shares = [jnp.exp2(x - base) for x in tops]
        sums = functools.reduce(jnp.add, [share * total[place] for share, place in zip(shares, places, strict=True)])
        weights.append(shares)
        inverses.append(jnp.where(sums == 0.0, 0.0, 1.0 / sums))

        @pl.when((row * plan.head_dim >= begin) & (first + n < rows))  # once for each row
        def _lse(row: Array = row, base: Array = base, sums: Array = sums) -> None:
            lse[row] = base * math.log(2.0) + jnp.log(sums)

    def of_rows(scalars: list[Array]) -> Array:
        """For each number that of its row."""
        chosen = jnp.full((THREADS,), scalars[0])
        for n, scalar in enumerate(scalars[1:], 1):
            chosen = jnp.where(position < (first + n) * plan.head_dim, chosen, scalar)
        return chosen

    result = plgpu.layout_cast(jnp.zeros((THREADS,), jnp.float32), LAYOUT)
    load: Any = plgpu.load
    for split in range(plan.splits):
        part = load(out.at[pl.ds(split * (out.shape[0] // plan.splits) + begin, THREADS)], layout=LAYOUT)
        share = of_rows([shares[split] for shares in weights])
        result = result + jnp.where(share == 0.0, 0.0, share * part)  # selected: 0 * NaN is NaN
    merged_s[...] = (result * of_rows(inverses)).astype(plan.out_dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(merged_s, merged.at[pl.ds(begin, THREADS)])  # what is past the end is not written
    plgpu.wait_smem_to_gmem(0)
