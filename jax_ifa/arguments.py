"""Every rule of the operator, one error each.

A message states the rule, what was expected and what was given. Shapes and dtypes are checked always; values only where
they are concrete. Traced values cannot be read: the transforms clamp them instead.

Limits of the operator that describe one NPU's hardware and nothing else are not enforced: a batch of at most 65535, a
sequence of at most 262144, a block of at most 512 positions, K*D of at most 65535 in a paged (blocks, P, K*D) cache.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_ifa.conversion import as_array, as_static_integer, numpy_value
from jax_ifa.dispatch import implementation_names
from jax_ifa.errors import fail
from jax_ifa.layout import INPUT_LAYOUTS

MAX_HEADS = 256
MAX_GROUP = 64
MAX_HEAD_DIM = 512
BLOCK_ALIGNMENT = 16
BLOCK_ALIGNMENT_INT8 = 32
BIAS_HEAD_DIM_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the shapes of a valid call say, in the letters of `operands.py`."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    capacity: int


def _names(*dtypes: Any) -> str:
    return " or ".join(dict.fromkeys(str(np.dtype(dtype)) for dtype in dtypes))


# --- heads, layout, query, key and value ---


def required(name: str, value: Any) -> Array:
    """An array that must be there."""
    array = as_array(name, value)
    if array is None:
        fail(f"{name} must be an array", expected="numbers", got=None, error=TypeError)
    return array


def check_implementation(implementation: Any) -> None:
    """None, or a name that this version has."""
    names = implementation_names()
    if implementation is not None and implementation not in names:
        fail("implementation names the loop to run", expected=f"None or one of {names}", got=repr(implementation))


def check_heads(num_heads: Any, num_key_value_heads: Any) -> tuple[int, int]:
    """N and K from the operator's attributes, where 0 key/value heads means as many as query heads."""
    num_heads = as_static_integer("num_heads", num_heads)
    num_kv_heads = as_static_integer("num_key_value_heads", num_key_value_heads)
    if num_heads <= 0:
        fail("num_heads counts the query's heads", expected="at least 1", got=num_heads)
    if num_heads > MAX_HEADS:
        fail("num_heads has a limit", expected=f"at most {MAX_HEADS}", got=num_heads)
    if num_kv_heads < 0:
        fail("num_key_value_heads counts heads, 0 meaning num_heads", expected="at least 0", got=num_kv_heads)
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        fail(
            "num_key_value_heads must divide num_heads",
            expected=f"a divisor of {num_heads}",
            got=num_kv_heads,
        )
    if num_heads // num_kv_heads > MAX_GROUP:
        fail(
            "num_heads / num_key_value_heads has a limit",
            expected=f"at most {MAX_GROUP}",
            got=f"{num_heads} / {num_kv_heads} = {num_heads // num_kv_heads}",
        )
    return num_heads, num_kv_heads


def check_layout(input_layout: Any) -> str:
    """One of the operator's three."""
    if input_layout not in INPUT_LAYOUTS:
        fail("input_layout names the axes", expected=f"one of {INPUT_LAYOUTS}", got=repr(input_layout))
    return input_layout


def check_query(query: Array, *, num_heads: int, input_layout: str) -> tuple[int, int]:
    """(B, D) of a query with one token per sequence."""
    rank = 3 if input_layout == "BSH" else 4
    if query.ndim != rank:
        fail(f"query has {rank} axes in {input_layout}", expected=f"rank {rank}", got=f"shape {query.shape}")
    if query.size == 0:
        fail("query must not be empty", expected="every axis at least 1", got=f"shape {query.shape}")
    if query.dtype == jnp.int8:
        fail(
            "query cannot be int8 (an int8 query, key and value together are not supported by the operator)",
            expected=_names(jnp.float16, jnp.bfloat16, jnp.float32),
            got=query.dtype,
            error=TypeError,
        )
    if query.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        fail("query dtype", expected=_names(jnp.float16, jnp.bfloat16, jnp.float32), got=query.dtype, error=TypeError)
    tokens = query.shape[2 if input_layout == "BNSD" else 1]
    if tokens != 1:
        fail(
            f"query holds one token per sequence (its S axis in {input_layout})",
            expected=1,
            got=f"{tokens} in shape {query.shape}",
        )
    if input_layout == "BSH":
        hidden = query.shape[2]
        if hidden % num_heads:
            fail("query H must be a multiple of num_heads", expected=f"a multiple of {num_heads}", got=hidden)
        head_dim = hidden // num_heads
    else:
        heads, head_dim = query.shape[1 if input_layout == "BNSD" else 2], query.shape[3]
        if heads != num_heads:
            fail(
                "num_heads must equal the query's N axis",
                expected=f"num_heads={heads} for shape {query.shape}",
                got=num_heads,
            )
    if head_dim > MAX_HEAD_DIM:
        fail("the head dimension D has a limit", expected=f"at most {MAX_HEAD_DIM}", got=head_dim)
    return query.shape[0], head_dim


def check_kv_dtypes(query: Array, key: Array, value: Array) -> None:
    """One dtype for key and value: the query's, or int8."""
    if key.dtype != value.dtype:
        fail(
            "key and value must have one dtype", expected=f"value {key.dtype}, as key", got=value.dtype, error=TypeError
        )
    if key.dtype not in (query.dtype, jnp.int8):
        fail(
            f"key and value dtype for a {query.dtype} query",
            expected=_names(query.dtype, jnp.int8),
            got=key.dtype,
            error=TypeError,
        )


def check_contiguous(
    key: Array, value: Array, *, batch: int, num_kv_heads: int, head_dim: int, input_layout: str
) -> int:
    """S of a contiguous cache."""
    if key.shape != value.shape:
        fail("key and value must have one shape", expected=f"value {key.shape}, as key", got=value.shape)
    axes, expected = {
        "BSH": ("(B, S, K*D)", (batch, "S", num_kv_heads * head_dim)),
        "BNSD": ("(B, K, S, D)", (batch, num_kv_heads, "S", head_dim)),
        "BSND": ("(B, S, K, D)", (batch, "S", num_kv_heads, head_dim)),
    }[input_layout]
    _check_shape("key", key, axes, expected, f"in {input_layout} with num_key_value_heads={num_kv_heads}")
    return key.shape[2 if input_layout == "BNSD" else 1]


def check_paged(
    key: Array,
    value: Array,
    *,
    batch: int,
    num_kv_heads: int,
    head_dim: int,
    input_layout: str,
    block_table: Array,
    block_size: Any,
) -> int:
    """The capacity M * P of a paged cache."""
    block_size = as_static_integer("block_size", block_size)
    if block_table.dtype != jnp.int32:
        fail("block_table dtype", expected="int32", got=block_table.dtype, error=TypeError)
    if block_table.ndim != 2 or block_table.shape[0] != batch or block_table.shape[1] == 0:
        fail(
            "block_table has a row of blocks for each sequence",
            expected=f"shape (B, M) = ({batch}, at least 1)",
            got=block_table.shape,
        )
    alignment = BLOCK_ALIGNMENT_INT8 if key.dtype == jnp.int8 else BLOCK_ALIGNMENT
    if block_size <= 0 or block_size % alignment:
        fail(
            f"block_size with a block_table and {key.dtype} caches",
            expected=f"a positive multiple of {alignment}",
            got=block_size,
        )
    if key.shape != value.shape:
        fail("key and value must have one shape", expected=f"value {key.shape}, as key", got=value.shape)
    if key.ndim == 4:
        if input_layout != "BNSD":
            fail(
                "a paged cache of shape (blocks, K, P, D) goes with input_layout='BNSD'",
                expected="input_layout 'BNSD', or a cache of shape (blocks, P, K*D)",
                got=f"input_layout {input_layout!r} and shape {key.shape}",
            )
        axes = "(blocks, K, P, D)"
        expected: tuple[Any, ...] = ("blocks", num_kv_heads, block_size, head_dim)
    else:
        axes, expected = "(blocks, P, K*D)", ("blocks", block_size, num_kv_heads * head_dim)
    _check_shape("key", key, axes, expected, f"with block_size={block_size} and num_key_value_heads={num_kv_heads}")
    if key.shape[0] == 0:
        fail("a paged cache needs blocks", expected="at least 1 block", got=f"shape {key.shape}")
    return block_table.shape[1] * block_size


def _check_shape(name: str, array: Array, axes: str, expected: tuple[Any, ...], context: str) -> None:
    """Axis lengths that are numbers must agree; names stand for any length."""
    agree = array.ndim == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(array.shape, expected, strict=True)
    )
    if not agree:
        shown = "(" + ", ".join(map(str, expected)) + ")"
        fail(f"{name} has shape {axes} {context}", expected=shown, got=array.shape)


# --- lengths, padding, mask and bias ---


def check_lengths(lengths: Array | np.ndarray | None, sizes: Sizes, *, paged: bool) -> Array | np.ndarray | None:
    """Lengths of one dimension and in range, or None; an empty list counts as None, as on the NPU."""
    if lengths is not None and lengths.ndim == 1 and lengths.shape[0] == 0:
        lengths = None
    if lengths is None:
        if paged:
            fail("a paged cache needs actual_seq_lengths", expected=f"{sizes.batch} integers, or one", got="none")
        return None
    if lengths.ndim != 1 or lengths.shape[0] not in (1, sizes.batch):
        fail(
            "actual_seq_lengths has one length per sequence, or one for all",
            expected=f"shape ({sizes.batch},) or (1,)",
            got=lengths.shape,
        )
    values = numpy_value(lengths)
    if values is not None and (values.min() < 0 or values.max() > sizes.capacity):
        limit = "block_table.shape[1] * block_size" if paged else "S"
        fail(
            "actual_seq_lengths must fit the cache",
            expected=f"0 to {limit} = {sizes.capacity}",
            got=values.tolist(),
        )
    return lengths


def check_block_ids(
    block_table: Array | np.ndarray, lengths: Array | np.ndarray, num_blocks: int, block_size: int
) -> None:
    """Entries that lengths make visible must name blocks; the rest of the table may hold anything."""
    table, counts = numpy_value(block_table), numpy_value(lengths)
    if table is None or counts is None:
        return
    used = np.arange(table.shape[1])[None, :] * block_size < counts[:, None]
    wrong = used & ((table < 0) | (table >= num_blocks))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        fail(
            "block_table entries within the sequence length must name blocks",
            expected=f"0 to {num_blocks - 1}",
            got=f"{table[row, column]} at [{row}, {column}]",
        )


def check_left_padding(kv_padding_size: Array | np.ndarray | None) -> Array | np.ndarray | None:
    """One integer in shape () or (1,), or None; an empty one counts as None."""
    if kv_padding_size is None or kv_padding_size.size == 0:
        return None
    if kv_padding_size.shape not in ((), (1,)):
        fail("kv_padding_size is one number for all sequences", expected="shape (1,) or ()", got=kv_padding_size.shape)
    return kv_padding_size


def check_mask(
    atten_mask: Array | None, sizes: Sizes, *, lengths: Array | np.ndarray | None, paged: bool, left_padded: bool
) -> Array | None:
    """A mask of the operator's shapes, or None; an empty one counts as None."""
    if atten_mask is None or atten_mask.size == 0:
        return None
    if atten_mask.dtype not in (jnp.bool_, jnp.int8, jnp.uint8):
        fail("atten_mask dtype", expected=_names(jnp.bool_, jnp.int8, jnp.uint8), got=atten_mask.dtype, error=TypeError)
    shape, batch = atten_mask.shape, sizes.batch
    if len(shape) not in (2, 3, 4) or shape[0] != batch or any(axis != 1 for axis in shape[1:-1]):
        fail(
            "atten_mask has a row for each sequence and no head axis",
            expected=f"shape ({batch}, S), ({batch}, 1, S) or ({batch}, 1, 1, S) with S = {sizes.capacity}",
            got=shape,
        )
    required = sizes.capacity
    counts = numpy_value(lengths)
    if counts is not None and not paged and not left_padded:
        required = int(counts.max())  # the rest of the mask is never looked at
    if shape[-1] < required:
        fail("atten_mask must cover every position", expected=f"a last axis of at least {required}", got=shape)
    return atten_mask


def check_bias(pse_shift: Array | None, sizes: Sizes, *, query_dtype: Any) -> None:
    """A position bias of shape (B or 1, N, 1, S) in the query's dtype."""
    if pse_shift is None:
        return
    if pse_shift.dtype != query_dtype:
        fail("pse_shift has the query's dtype", expected=query_dtype, got=pse_shift.dtype, error=TypeError)
    shape = pse_shift.shape
    if len(shape) != 4 or shape[0] not in (1, sizes.batch) or shape[1:3] != (sizes.num_heads, 1):
        fail(
            "pse_shift has a row for each query head",
            expected=f"shape ({sizes.batch} or 1, {sizes.num_heads}, 1, S)",
            got=shape,
        )
    if shape[3] < sizes.capacity:
        fail("pse_shift must cover every position", expected=f"a last axis of at least {sizes.capacity}", got=shape)
    if sizes.head_dim % BIAS_HEAD_DIM_ALIGNMENT:
        fail(
            "pse_shift needs an aligned head dimension D",
            expected=f"a multiple of {BIAS_HEAD_DIM_ALIGNMENT}",
            got=sizes.head_dim,
        )


# --- quantisation ---


def check_antiquant(
    scale: Array | None, offset: Array | None, sizes: Sizes, *, query_dtype: Any, kv_dtype: Any
) -> None:
    """A scale exactly when the cache is int8, and an offset of the same shape and dtype or none."""
    if kv_dtype != jnp.int8:
        for name, parameter in (("antiquant_scale", scale), ("antiquant_offset", offset)):
            if parameter is not None:
                fail(f"{name} is for int8 key and value", expected=f"None with {kv_dtype} caches", got="an array")
        return
    if scale is None:
        fail("int8 key and value need antiquant_scale", expected="an array of scales", got=None)
    if scale.dtype not in (query_dtype, jnp.float32):
        fail(
            f"antiquant_scale dtype for a {query_dtype} query",
            expected=_names(query_dtype, jnp.float32),
            got=scale.dtype,
            error=TypeError,
        )
    heads, dim = sizes.num_kv_heads, sizes.head_dim
    shapes = ((2,), (2, heads * dim), (2, heads, dim), (2, heads, 1, dim), (2, 1, heads, dim))
    if scale.shape not in shapes:
        fail(
            "antiquant_scale is per tensor (2,) or per channel with K heads of D",
            expected=f"one of {shapes}",
            got=scale.shape,
        )
    if offset is None:
        return
    if offset.dtype != scale.dtype:
        fail(
            "antiquant_offset has the dtype of antiquant_scale", expected=scale.dtype, got=offset.dtype, error=TypeError
        )
    if offset.shape != scale.shape:
        fail("antiquant_offset has the shape of antiquant_scale", expected=scale.shape, got=offset.shape)


def check_output_quantization(scale: Array | None, offset: Array | None, sizes: Sizes, *, query_dtype: Any) -> None:
    """Scale per tensor or per channel; an offset of the same kind and dtype, and only with a scale."""
    if scale is None:
        if offset is not None:
            fail("quant_offset2 goes with quant_scale2", expected="quant_scale2 as well", got="quant_offset2 alone")
        return
    allowed = (jnp.float32, jnp.bfloat16) if query_dtype == jnp.bfloat16 else (jnp.float32,)
    if scale.dtype not in allowed:
        fail(
            f"quant_scale2 dtype for a {query_dtype} query", expected=_names(*allowed), got=scale.dtype, error=TypeError
        )
    per_tensor = _check_output_parameter("quant_scale2", scale, sizes)
    if offset is None:
        return
    if offset.dtype != scale.dtype:
        fail("quant_offset2 has the dtype of quant_scale2", expected=scale.dtype, got=offset.dtype, error=TypeError)
    if _check_output_parameter("quant_offset2", offset, sizes) != per_tensor:
        kinds = {True: "per tensor", False: "per channel"}
        fail(
            "quant_scale2 and quant_offset2 are both per tensor or both per channel",
            expected=f"a {kinds[per_tensor]} quant_offset2, as quant_scale2 {scale.shape}",
            got=offset.shape,
        )


def _check_output_parameter(name: str, parameter: Array, sizes: Sizes) -> bool:
    """Whether it is per tensor; an error if it is neither that nor per channel."""
    if parameter.size == 1:
        return True
    n, d = sizes.num_heads, sizes.head_dim
    channels = ((n * d,), (n, d), (1, n * d), (n, 1, d), (1, n, d), (1, 1, n * d), (1, n, 1, d), (1, 1, n, d))
    if parameter.shape not in channels:
        fail(
            f"{name} is per tensor (one element) or per channel with N query heads of D",
            expected=f"one element or one of {channels}",
            got=parameter.shape,
        )
    return False


def check_unused(**parameters: Any) -> None:
    """Parameters of the operator's int8 x int8 chain, which needs an int8 query, which the operator refuses."""
    for name, parameter in parameters.items():
        if parameter is not None:
            fail(f"{name} is for an int8 query, which is not supported", expected=None, got="an array")


def check_scale_value(scale_value: Any) -> Array:
    """One real number, as a float32 scalar; it may be traced."""
    # NumPy's 64-bit scalars too: 1 / np.sqrt(D) is one, and a float32 attribute is what the operator makes of it.
    scale = scale_value if isinstance(scale_value, Array) else np.asarray(scale_value)
    if not (jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)):
        fail("scale_value must be one real number", expected="a real dtype", got=repr(scale_value), error=TypeError)
    if scale.size != 1:
        fail("scale_value is one real number for all", expected="shape () or (1,)", got=scale.shape)
    return jnp.asarray(scale, jnp.float32).reshape(())


def check_inner_precise(inner_precise: Any) -> bool:
    """Whether the call asks for high precision."""
    inner_precise = as_static_integer("inner_precise", inner_precise)
    if inner_precise not in (0, 1):
        fail("inner_precise is 0 (high precision) or 1 (high performance)", expected="0 or 1", got=inner_precise)
    return inner_precise == 0
