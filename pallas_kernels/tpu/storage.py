"""How XLA keeps a cache in TPU memory, and so how the kernel can read it in place.

A TPU array is stored in tiles of 8 to 32 rows by 128 lanes, padded to whole tiles, and XLA orders the axes of a
program's inputs to pad least. A kernel sees memory in one order only: row by row. So a cache is read in place only
through a view that spells out the order XLA chose; through any other, XLA copies the whole cache before every step.
The rules here restate that choice, as the compiled programs in the tests show it:

    heads     (pages, K, P, D)     positions are rows, a head is a matrix: D fills lanes
    lanes     (pages, P, K*D)      positions are rows, the heads lie side by side: K*D fills lanes
    columns   (pages, K, D, P)     positions are lanes: neither does, but P fills lanes
"""

import jax.numpy as jnp
from jax import Array

from jax_ifa.operands import KVView, Operands

LANES = 128
ROWS = 32  # rows of the tallest tile, that of int8


def form(kv: KVView) -> str:
    """The view through which this cache can be read where it lies: "heads", "lanes" or "columns"."""
    num_heads, head_dim = kv.num_kv_heads, kv.key.shape[-1]
    if kv.head_major or not kv.flat:
        return "heads" if head_dim % LANES == 0 else "columns"
    return "lanes" if num_heads * head_dim % LANES == 0 else "columns"


def interleaved(kv: KVView) -> bool:
    """Whether the heads of a position fill tiles of memory together: (B, S, K, D), D fills lanes and K rows.

    The same memory is (B, S * K, D), the cache of one kv head that has the K heads' keys in turn.
    """
    contiguous = kv.table is None and not kv.flat and not kv.head_major
    return contiguous and kv.num_kv_heads % 8 == 0 and kv.key.shape[-1] % LANES == 0 and kv.key.dtype != jnp.int8


def view(pages: Array, *, head_major: bool, to: str) -> Array:
    """`pages` of a `KVView` in the axis order of a form. Where `unsupported_reason` is None, XLA moves nothing."""
    if to == "lanes":
        num_pages, page_size, num_heads, head_dim = pages.shape
        return pages.reshape(num_pages, page_size, num_heads * head_dim)
    heads = pages if head_major else jnp.swapaxes(pages, 1, 2)
    return heads if to == "heads" else jnp.swapaxes(heads, 2, 3)


def alignment(kv: KVView) -> int:
    """Positions at which a copy out of this cache may begin and end: a multiple of this."""
    if form(kv) == "columns":
        return LANES
    return ROWS if kv.key.dtype == jnp.int8 or kv.table is None else ROWS // 2


def unsupported_reason(operands: Operands) -> str | None:
    """Why the kernel cannot run these operands, or None. Looks at shapes, dtypes and static fields only."""
    kv = operands.kv
    head_dim = kv.key.shape[-1]
    dtype = kv.key.dtype
    if jnp.float16 in (dtype, operands.query.dtype):
        return "Mosaic cannot load float16 on any TPU; use bfloat16"
    if kv.value_table is not None:
        return "keys and values have different block tables, as under a vmap over one of them"
    if kv.table is not None and form(kv) == "columns" and kv.page_size % LANES:
        return (
            f"XLA stores pages of {kv.page_size} positions with D={head_dim} and K={kv.num_kv_heads} block by block "
            "along the lanes, which a kernel could only read from a copy; use (blocks, P, K*D) pages with K*D a "
            "multiple of 128, or a block_size that is a multiple of 128"
        )
    if kv.table is not None and kv.page_size % alignment(kv):
        return f"copies begin at multiples of {alignment(kv)} positions, and pages of {kv.page_size} do not"
    if form(kv) == "columns" and kv.flat and not kv.head_major and head_dim % 8:
        return f"rows of K*D={kv.num_kv_heads * head_dim} numbers split into heads only where D is a multiple of 8"
    if interleaved(kv):
        if operands.bias is not None:
            return (
                "a bias would have to be spread over the heads of a (B, S, K, D) cache, whose positions lie in tiles "
                "with all their heads; use input_layout 'BSH', where the same numbers are (B, S, K*D)"
            )
        if kv.capacity * kv.num_kv_heads % ROWS:
            return f"a (B, S, K, D) cache is read in whole tiles, where S*K is a multiple of {ROWS}"
    elif form(kv) == "heads" and not kv.head_major and kv.num_kv_heads > 1:
        return (
            "XLA stores a (B, S, K, D) cache with D a multiple of 128 position by position, all heads of one in a "
            "tile, which the kernel reads in place only for K a multiple of 8 and not int8; use input_layout 'BSH', "
            "where the same numbers are (B, S, K*D)"
        )
    return None
