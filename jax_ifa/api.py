"""The public function: validate, bring to canonical form, run the decode loop, bring back."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_ifa import arguments as rules
from jax_ifa.attend import attend
from jax_ifa.conversion import as_array, as_int32, as_integers
from jax_ifa.layout import InputLayout, join_output, split_query, view_kv
from jax_ifa.masking import bias_rows, mask_rows, window_rows
from jax_ifa.operands import Operands
from jax_ifa.quantization import (
    antiquantize_output,
    fold_key_scale,
    key_offset_score,
    quantize_output,
    split_antiquant,
)


def incre_flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    padding_mask: ArrayLike | None = None,
    atten_mask: ArrayLike | None = None,
    pse_shift: ArrayLike | None = None,
    actual_seq_lengths: ArrayLike | Sequence[int | Array] | None = None,
    antiquant_scale: ArrayLike | None = None,
    antiquant_offset: ArrayLike | None = None,
    block_table: ArrayLike | None = None,
    dequant_scale1: ArrayLike | None = None,
    quant_scale1: ArrayLike | None = None,
    dequant_scale2: ArrayLike | None = None,
    quant_scale2: ArrayLike | None = None,
    quant_offset2: ArrayLike | None = None,
    kv_padding_size: ArrayLike | None = None,
    num_heads: int = 1,
    scale_value: ArrayLike = 1.0,
    input_layout: InputLayout | str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    r"""Attention of one new token per sequence over its key/value cache, as `torch_npu.npu_incre_flash_attention`.

    Three things differ from what JAX users may be used to: a mask value of **1 or True hides** a position (the opposite
    of `jax.nn.dot_product_attention`), `scale_value` defaults to **1.0** (pass ``1 / sqrt(D)``), and
    `num_heads` must be given.

    For sequence b and query head h, over its visible positions t, with kv head ``h // (N // K)``:

    .. code-block:: text

        s_t = scale_value * (q . k_t) + pse_shift[b or 0, h, 0, t]
        s_t = -1e12  where atten_mask[b, t] is not 0
        out = softmax_t(s) @ v

    Letters: B batch, N query heads, K key/value heads (N // K an integer up to 64), D head dimension (up to 512), S
    positions of the cache, P positions of a page (`block_size`), M pages per sequence.

    It is a pure function: use it under `jit`, `vmap` (a mapped axis joins the batch, an unmapped cache is not copied),
    `scan`, `grad` (reverse mode; the backward pass is dense), `jax.checkpoint` and `jax.export`. Everything but heads,
    layout, block size, precision and implementation may be traced and causes no retrace when it changes.

    Args:
      query: one token per sequence: (B, 1, N*D) in BSH, (B, N, 1, D) in BNSD, (B, 1, N, D) in BSND. float32, bfloat16
        or float16.
      key: the cache, in the query's dtype or int8: (B, S, K*D) in BSH, (B, K, S, D) in BNSD, (B, S, K, D) in BSND. With
        `block_table`: (blocks, P, K*D) in any layout, or (blocks, K, P, D) in BNSD.
      value: shape and dtype of `key`.
      padding_mask: reserved by the operator, which ignores it; so does this function.
      atten_mask: (B, S), (B, 1, S) or (B, 1, 1, S), bool, int8 or uint8; non-zero hides the position. A row that
        is hidden whole gives the mean of its visible values. It may end at the longest of concrete lengths.
      pse_shift: (B or 1, N, 1, S) in the query's dtype, added to the scaled scores; needs D % 16 == 0. By absolute
        position, also under left padding.
      actual_seq_lengths: (B,) or (1,) integers: the visible positions of each sequence; None means all. A list, tuple,
        NumPy or JAX array, traced or not. A sequence of length 0 gives 0.
      antiquant_scale: for int8 caches, which mean ``(x + offset) * scale``: per tensor (2,), or per channel
        (2, K*D), (2, K, D), (2, K, 1, D) or (2, 1, K, D); index 0 is for the key, 1 for the value. In the query's dtype
        or float32.
      antiquant_offset: shape and dtype of `antiquant_scale`, in units of the int8 values; None means 0.
      block_table: (B, M) int32, the blocks of each sequence in a paged cache, in order. Entries past a sequence's
        length are never followed and may hold anything. Needs `actual_seq_lengths` and `block_size`.
      dequant_scale1: of the operator's int8 query, which it does not support: must be None.
      quant_scale1: likewise.
      dequant_scale2: likewise.
      quant_scale2: makes the output int8: ``round(out * scale + offset)``, half to even, saturating. One element, or
        one per query channel, N*D in any of (N*D,), (1, N*D), (N, D), (1, N, D), (N, 1, D), (1, 1, N*D), (1, N, 1, D),
        (1, 1, N, D). float32, or bfloat16 with a bfloat16 query.
      quant_offset2: like `quant_scale2`; None means 0.
      kv_padding_size: one integer, () or (1,): positions of padding after the last visible one, so that each
        sequence's window is [S - padding - length, S - padding); one that begins before 0 gives 0. Negative
        counts as 0. Only with `actual_seq_lengths`, and without `block_table`; ignored otherwise.
      num_heads: N.
      scale_value: multiplies the scores, one real number.
      input_layout: "BSH", "BNSD" or "BSND".
      num_key_value_heads: K; 0 means N.
      block_size: P, a multiple of 16, or of 32 for int8 caches. Read only with `block_table`.
      inner_precise: 0 keeps float32 throughout; 1 lets an implementation round the softmax weights to the cache's
        16-bit dtype, and, for a 16-bit result without the LSE, an int8 cache's query (times the key's scales) to 16
        bits of the largest number in its row. Take 0 if one channel is hundreds of times as large as the others. The
        XLA implementation keeps float32 for both.
      implementation: None takes the fastest that can do the call on the platform it is lowered for; "xla" works
        everywhere.
      return_lse: also return the natural log of the sum of exponentiated scores.

    Returns:
      The output in the query's shape and dtype, or int8 with `quant_scale2`. With `return_lse`, also (B, N, 1)
      float32, including the offset of the keys, -inf for a sequence without positions; see `merge`.

    Raises:
      ValueError: a shape or a concrete value breaks a rule; the message names the rule, what it expected and got.
      TypeError: a dtype does.
      NotImplementedError: the named implementation cannot do this call; the message says why.

    Source: the operator's documentation for torch_npu, and aclnnIncreFlashAttentionV4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_ifa import incre_flash_attention
      >>> q = jnp.ones((2, 8, 1, 64))                       # B=2, N=8, one token, D=64
      >>> k = v = jnp.ones((2, 2, 128, 64))                 # K=2 key/value heads, S=128
      >>> out = incre_flash_attention(q, k, v, num_heads=8, num_key_value_heads=2, input_layout="BNSD",
      ...                             scale_value=64**-0.5, actual_seq_lengths=[100, 3])
      >>> out.shape
      (2, 8, 1, 64)
    """
    del padding_mask
    rules.check_unused(dequant_scale1=dequant_scale1, quant_scale1=quant_scale1, dequant_scale2=dequant_scale2)
    rules.check_layout(input_layout)
    rules.check_implementation(implementation)
    precise = rules.check_inner_precise(inner_precise)
    num_heads, num_kv_heads = rules.check_heads(num_heads, num_key_value_heads)

    query = rules.required("query", query)
    key = rules.required("key", key)
    value = rules.required("value", value)
    batch, head_dim = rules.check_query(query, num_heads=num_heads, input_layout=input_layout)
    rules.check_kv_dtypes(query, key, value)
    table = as_array("block_table", block_table)
    paged = table is not None
    check_cache = (
        rules.check_contiguous
        if table is None
        else functools.partial(rules.check_paged, block_table=table, block_size=block_size)
    )
    capacity = check_cache(
        key, value, batch=batch, num_kv_heads=num_kv_heads, head_dim=head_dim, input_layout=input_layout
    )
    sizes = rules.Sizes(batch, num_heads, num_kv_heads, head_dim, capacity)

    lengths = rules.check_lengths(as_integers("actual_seq_lengths", actual_seq_lengths), sizes, paged=paged)
    if table is not None and lengths is not None:
        # A NumPy table or a list inside jit is known, though as a JAX array it is traced.
        ids = table if isinstance(block_table, Array) else np.asarray(block_table)
        rules.check_block_ids(ids, lengths, key.shape[0], capacity // table.shape[1])
    padding = rules.check_left_padding(as_integers("kv_padding_size", kv_padding_size))
    if paged or lengths is None:
        padding = None
    mask = rules.check_mask(
        as_array("atten_mask", atten_mask), sizes, lengths=lengths, paged=paged, left_padded=padding is not None
    )
    bias = as_array("pse_shift", pse_shift)
    rules.check_bias(bias, sizes, query_dtype=query.dtype)
    scale = as_array("antiquant_scale", antiquant_scale)
    offset = as_array("antiquant_offset", antiquant_offset)
    rules.check_antiquant(scale, offset, sizes, query_dtype=query.dtype, kv_dtype=key.dtype)
    out_scale = as_array("quant_scale2", quant_scale2)
    out_offset = as_array("quant_offset2", quant_offset2)
    rules.check_output_quantization(out_scale, out_offset, sizes, query_dtype=query.dtype)

    out, lse = _pipeline(
        query,
        key,
        value,
        rules.check_scale_value(scale_value),
        lengths=None if lengths is None else as_int32(lengths),
        padding=None if padding is None else as_int32(padding),
        table=table,
        mask=mask,
        bias=bias,
        antiquant=(scale, offset),
        quant=(out_scale, out_offset),
        sizes=sizes,
        input_layout=input_layout,
        precise=precise,
        return_lse=return_lse,
        implementation=implementation,
    )
    return (out, lse) if return_lse else out


# jit, so that an eager call is compiled once and reused; inside a traced program it is simply inlined.
@functools.partial(jax.jit, static_argnames=("sizes", "input_layout", "precise", "return_lse", "implementation"))
def _pipeline(
    query: Array,
    key: Array,
    value: Array,
    scale_value: Array,
    *,
    lengths: Array | None,
    padding: Array | None,
    table: Array | None,
    mask: Array | None,
    bias: Array | None,
    antiquant: tuple[Array | None, Array | None],
    quant: tuple[Array | None, Array | None],
    sizes: rules.Sizes,
    input_layout: str,
    precise: bool,
    return_lse: bool,
    implementation: str | None,
) -> tuple[Array, Array]:
    """The transforms around the loop, on valid arguments."""
    num_kv_heads, out_dtype = sizes.num_kv_heads, query.dtype
    q = split_query(query, num_heads=sizes.num_heads, num_kv_heads=num_kv_heads)
    kv = view_kv(key, value, num_kv_heads=num_kv_heads, input_layout=input_layout, block_table=table)
    start, stop = window_rows(capacity=sizes.capacity, lengths=lengths, left_padding=padding)
    scale = scale_value.reshape(1)

    antiquant_scale, antiquant_offset = antiquant
    if antiquant_scale is not None:
        key_scale, value_scale = split_antiquant(antiquant_scale, num_kv_heads=num_kv_heads)
        q = fold_key_scale(q, key_scale)

    if sizes.capacity == 0:  # a cache without positions: every row is empty, and there is nothing to loop over
        out = jnp.zeros(q.shape, jnp.float32)
        lse = jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    else:
        operands = Operands(
            query=q,
            scale=scale,
            kv=kv,
            start=start,
            stop=stop,
            mask=None if mask is None else mask_rows(mask, sizes.capacity),
            bias=None if bias is None else bias_rows(bias, num_kv_heads=num_kv_heads),
            precise=precise or out_dtype == jnp.float32,
            # What int8 adds to the result comes after the loop.
            out_dtype=out_dtype if antiquant_scale is None and quant[0] is None else jnp.dtype(jnp.float32),
            keeps_16_bits=out_dtype.itemsize == 2 and quant[0] is None and not return_lse,
        )
        out, lse = attend(operands, implementation)

    if antiquant_scale is not None:
        key_offset = value_offset = None
        empty = jnp.isneginf(lse)
        if antiquant_offset is not None:
            key_offset, value_offset = split_antiquant(antiquant_offset, num_kv_heads=num_kv_heads)
            lse = lse + key_offset_score(q, key_offset, scale)
        out = antiquantize_output(out, value_scale, value_offset, empty)

    quant_scale, quant_offset = quant
    out = out.astype(out_dtype) if quant_scale is None else quantize_output(out, quant_scale, quant_offset)
    return join_output(out, input_layout=input_layout), lse.reshape(sizes.batch, sizes.num_heads, 1)
