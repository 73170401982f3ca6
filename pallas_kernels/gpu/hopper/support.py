"""What the kernel can read in place."""

import jax.numpy as jnp

from jax_ifa.operands import Operands
from pallas_kernels.gpu.hopper.plan import LINE, ROW_GROUP, round_up

MAX_INDEX = 2**31 - 1024
"""Rows or elements that 32 bits count, with room for the last tile and what rows of the mask are padded with."""


def unsupported_reason(operands: Operands) -> str | None:
    """Why the kernel cannot run these operands, or None. Looks at shapes, dtypes and static fields only."""
    kv = operands.kv
    dtype, head_dim = kv.key.dtype, kv.key.shape[-1]
    if dtype == jnp.float32:
        return "tensor cores have no float32 products; the kernel reads bfloat16, float16 and int8 caches"
    if dtype != jnp.int8 and operands.query.dtype != dtype:
        return f"the products of a {dtype} cache take a query of its dtype, not {operands.query.dtype}"
    if head_dim % 16:
        return f"copies take 16 bytes and products 16 channels or a multiple, and D={head_dim} is neither"
    # The positions of all sequences, and of all heads if head-major, are rows of one array, copied in groups of 8.
    rows = kv.page_size * (kv.num_kv_heads if kv.head_major else 1)
    if kv.table is not None and kv.page_size % ROW_GROUP:
        return f"copies take groups of {ROW_GROUP} positions, and pages of {kv.page_size} are not made of them"
    if any(pages.shape[0] * rows % ROW_GROUP for pages in (kv.key, kv.value)):
        what = "B * K * S" if kv.head_major else "B * S"
        return f"copies take groups of {ROW_GROUP} rows, and {what} = {kv.key.shape[0] * rows} is not made of them"
    sizes = [kv.key.shape[0] * rows, kv.value.shape[0] * rows]
    sizes += [table.size for table in (kv.table, kv.value_table) if table is not None]
    if operands.mask is not None:
        sizes.append(operands.mask.shape[0] * round_up(ROW_GROUP + operands.mask.shape[1], LINE))
    if max(sizes) > MAX_INDEX:
        return f"positions, table entries and mask are counted in 32 bits, and there are {max(sizes)} of one"
    return None
