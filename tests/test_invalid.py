"""Every call that the operator refuses, refused with a message that says why; and what looks wrong but is allowed."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cases import Case, assert_close

from jax_ifa import incre_flash_attention

Call = dict[str, Any]


def call_of(**fields: Any) -> Call:
    """A valid call, as keyword arguments."""
    (query, key, value), kwargs = Case(**fields).inputs()
    return dict(query=query, key=key, value=value) | kwargs


def run(call: Call) -> Any:
    rest = dict(call)
    return incre_flash_attention(rest.pop("query"), rest.pop("key"), rest.pop("value"), return_lse=True, **rest)


def run_traced(call: Call) -> Any:
    """The same call with every array traced, as a step under jit sees it."""
    arrays = {name: value for name, value in call.items() if isinstance(value, np.ndarray | jax.Array)}
    # What jit itself would narrow to 32 bits stays a constant.
    arrays = {
        name: value for name, value in arrays.items() if jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype
    }
    return jax.jit(lambda arrays: run(call | arrays))(arrays)


def check(call: Call) -> None:
    rest = dict(call)
    args = tuple(rest.pop(name) for name in ("query", "key", "value"))
    rest.pop("padding_mask", None)
    assert_close(*run(call), args, rest)


def f32(*shape: int) -> np.ndarray:
    return np.full(shape, 0.25, np.float32)


def f16(*shape: int) -> np.ndarray:
    return np.full(shape, 0.25, np.float16)


def bf16(*shape: int) -> np.ndarray:
    return np.full(shape, 0.25, ml_dtypes.bfloat16)


def i8(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int8)


def i32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int32)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """One broken rule: what is changed in a valid call, and what the error must say."""

    rule: str
    changes: Call
    error: type[Exception]
    message: str  # a regular expression with the rule, the expected and the given, in this order
    base: Call = dataclasses.field(default_factory=dict)
    values: bool = False  # it breaks a rule about values, which only concrete arguments show

    def call(self) -> Call:
        return call_of(**self.base) | self.changes


BSH, BSND = dict(layout="BSH"), dict(layout="BSND")
HALF, BRAIN = dict(dtype="float16"), dict(dtype="bfloat16")
INT8 = dict(int8=True)
PAGED = dict(block=16)  # M = 3, so 48 positions; 9 blocks
PAGED_BSH = dict(block=16, layout="BSH")
PAGED_INT8 = dict(block=32, int8=True)  # M = 2
QUANT = dict(quant="channel")
BIAS, MASK = dict(bias="batch"), dict(mask="2d")

# The valid call has B=2, N=4, K=2, D=16, S=48, BNSD, float32: query (2, 4, 1, 16), key and value (2, 2, 48, 16).
WRONG = [
    # query, key and value
    Wrong("query_empty", dict(query=f32(2, 4, 0, 16)), ValueError, r"query .*empty.*at least 1.*\(2, 4, 0, 16\)"),
    Wrong("query_no_batch", dict(query=f32(0, 4, 1, 16)), ValueError, r"query .*empty.*at least 1.*\(0, 4, 1, 16\)"),
    Wrong("kv_dtypes_differ", dict(value=f16(2, 2, 48, 16)), TypeError, r"one dtype.*float32.*float16"),
    Wrong(
        "kv_shapes_differ", dict(value=f32(2, 2, 47, 16)), ValueError, r"one shape.*\(2, 2, 48, 16\).*\(2, 2, 47, 16\)"
    ),
    Wrong("query_rank_bnsd", dict(query=f32(2, 4, 16)), ValueError, r"query has 4 axes in BNSD.*4.*\(2, 4, 16\)"),
    Wrong(
        "query_rank_bsh", dict(query=f32(2, 4, 1, 16)), ValueError, r"query has 3 axes in BSH.*3.*\(2, 4, 1, 16\)", BSH
    ),
    Wrong("query_rank_bsnd", dict(query=f32(2, 1, 64)), ValueError, r"query has 4 axes in BSND.*4.*\(2, 1, 64\)", BSND),
    *(
        Wrong(
            f"key_rank_{base.get('layout', 'BNSD')}",
            dict(key=f32(*shape), value=f32(*shape)),
            ValueError,
            rf"key has shape .* in {base.get('layout', 'BNSD')}.*S.*{re.escape(str(shape))}",
            base,
        )
        for base, shape in (({}, (2, 48, 32)), (BSH, (2, 48, 2, 16)), (BSND, (2, 48, 32)))
    ),
    Wrong("hidden_not_of_heads", dict(query=f32(2, 1, 66)), ValueError, r"H .*multiple of num_heads.*4.*66", BSH),
    Wrong("query_heads_bnsd", dict(query=f32(2, 8, 1, 16)), ValueError, r"num_heads .*query's N.*8.*got 4"),
    Wrong("query_heads_bsnd", dict(query=f32(2, 1, 8, 16)), ValueError, r"num_heads .*query's N.*8.*got 4", BSND),
    Wrong("query_tokens_bnsd", dict(query=f32(2, 4, 2, 16)), ValueError, r"one token.*BNSD.*1.*2 in .*\(2, 4, 2, 16\)"),
    Wrong("query_tokens_bsh", dict(query=f32(2, 3, 64)), ValueError, r"one token.*BSH.*1.*3 in .*\(2, 3, 64\)", BSH),
    Wrong("query_tokens_bsnd", dict(query=f32(2, 2, 4, 16)), ValueError, r"one token.*BSND.*1.*2 in .*\(2, 2, 4", BSND),
    *(
        Wrong(rule, dict(key=f32(*shape), value=f32(*shape)), ValueError, rf"key has shape .*{want}.*{got}", base)
        for rule, base, shape, want, got in (
            ("key_heads_bnsd", {}, (2, 4, 48, 16), r"=2.*\(2, 2, S, 16\)", r"\(2, 4, 48, 16\)"),
            ("key_heads_bsnd", BSND, (2, 48, 1, 16), r"=2.*\(2, S, 2, 16\)", r"\(2, 48, 1, 16\)"),
            ("key_hidden_bsh", BSH, (2, 48, 64), r"=2.*\(2, S, 32\)", r"\(2, 48, 64\)"),
            ("key_head_dim", {}, (2, 2, 48, 8), r"\(2, 2, S, 16\)", r"\(2, 2, 48, 8\)"),
            ("key_batch", {}, (3, 2, 48, 16), r"\(2, 2, S, 16\)", r"\(3, 2, 48, 16\)"),
            ("key_batch_bsh", BSH, (1, 48, 32), r"\(2, S, 32\)", r"\(1, 48, 32\)"),
        )
    ),
    Wrong("head_dim_limit", {}, ValueError, r"D has a limit.*512.*513", dict(head_dim=513, capacity=2)),
    Wrong("query_int8", dict(query=i8(2, 4, 1, 16)), TypeError, r"query cannot be int8.*float16.*int8"),
    Wrong("qkv_int8", dict(query=i8(2, 4, 1, 16)), TypeError, r"query cannot be int8.*float16.*int8", INT8),
    Wrong("query_integer", dict(query=i32(2, 4, 1, 16)), TypeError, r"query dtype.*float16.*int32"),
    Wrong("query_double", dict(query=np.ones((2, 4, 1, 16))), TypeError, r"query .*dtype.*float32.*float64"),
    *(
        Wrong(
            f"query_{query.dtype}_kv_{cache.dtype}",
            dict(query=query, key=cache, value=cache),
            TypeError,
            rf"key and value dtype for a {query.dtype} query.*{query.dtype} or int8.*{cache.dtype}",
        )
        for query in (f16(2, 4, 1, 16), bf16(2, 4, 1, 16), f32(2, 4, 1, 16))
        for cache in (f16(2, 2, 48, 16), bf16(2, 2, 48, 16), f32(2, 2, 48, 16), i8(2, 2, 48, 16).astype(np.uint8))
        if query.dtype != cache.dtype
    ),
    Wrong("query_none", dict(query=None), TypeError, r"query must be an array.*None"),
    Wrong("key_object", dict(key=object()), TypeError, r"key must be an array.*object"),
    # attributes
    Wrong("num_heads_zero", dict(num_heads=0), ValueError, r"num_heads.*at least 1.*got 0"),
    Wrong("num_heads_negative", dict(num_heads=-4), ValueError, r"num_heads.*at least 1.*got -4"),
    Wrong("num_heads_float", dict(num_heads=4.0), TypeError, r"num_heads is an integer.*4\.0"),
    Wrong(
        "num_heads_limit", {}, ValueError, r"num_heads has a limit.*256.*257", dict(heads=257, kv_heads=257, capacity=2)
    ),
    Wrong("kv_heads_more", dict(num_key_value_heads=8), ValueError, r"num_key_value_heads.*divi.*of 4.*8"),
    Wrong("kv_heads_indivisible", dict(num_key_value_heads=3), ValueError, r"num_key_value_heads.*divi.*of 4.*3"),
    Wrong("kv_heads_negative", dict(num_key_value_heads=-1), ValueError, r"num_key_value_heads.*at least 0.*-1"),
    Wrong("kv_heads_float", dict(num_key_value_heads=2.0), TypeError, r"num_key_value_heads is an integer.*2\.0"),
    Wrong("group_limit", {}, ValueError, r"num_heads / num_key.*limit.*64.*65", dict(heads=65, kv_heads=1, capacity=2)),
    *(
        Wrong(
            f"layout_{layout}", dict(input_layout=layout), ValueError, rf"input_layout.*BSH.*BNSD.*BSND.*got {layout!r}"
        )
        for layout in ("SH", "NSD", "TND", "bnsd", "", "BNSD_BSND", None)
    ),
    *(
        Wrong(f"inner_precise_{n}", dict(inner_precise=n), ValueError, rf"inner_precise.*0.*1.*got {n}")
        for n in (-1, 2, 3)
    ),
    Wrong("inner_precise_float", dict(inner_precise=1.0), TypeError, r"inner_precise is an integer.*1\.0"),
    Wrong("implementation", dict(implementation="fastest"), ValueError, r"implementation.*None.*xla.*'fastest'"),
    Wrong("scale_value_none", dict(scale_value=None), TypeError, r"scale_value.*real number.*None"),
    Wrong("scale_value_complex", dict(scale_value=1j), TypeError, r"scale_value.*real number.*1j"),
    Wrong("scale_value_bool", dict(scale_value=True), TypeError, r"scale_value.*real number.*True"),
    Wrong("scale_value_many", dict(scale_value=f32(2)), ValueError, r"scale_value.*one"),
    # lengths and left padding
    Wrong(
        "lengths_few",
        dict(actual_seq_lengths=[1, 2]),
        ValueError,
        r"actual_seq_lengths.*\(3,\) or \(1,\).*\(2,\)",
        dict(batch=3),
    ),
    Wrong(
        "lengths_many", dict(actual_seq_lengths=[1, 2, 3]), ValueError, r"actual_seq_lengths.*\(2,\) or \(1,\).*\(3,\)"
    ),
    Wrong("lengths_rank", dict(actual_seq_lengths=i32(2, 1)), ValueError, r"actual_seq_lengths.*\(2,\).*\(2, 1\)"),
    Wrong("lengths_scalar", dict(actual_seq_lengths=3), ValueError, r"actual_seq_lengths.*\(2,\).*\(\)"),
    Wrong("lengths_float", dict(actual_seq_lengths=f32(2)), TypeError, r"actual_seq_lengths.*integers.*float32"),
    Wrong("lengths_float_list", dict(actual_seq_lengths=[1.0, 2.0]), TypeError, r"actual_seq_lengths.*integers.*float"),
    Wrong("lengths_bool", dict(actual_seq_lengths=[True, False]), TypeError, r"actual_seq_lengths.*integers.*bool"),
    Wrong("lengths_ragged", dict(actual_seq_lengths=[[1], [2, 3]]), ValueError, r"actual_seq_lengths"),
    *(
        Wrong(
            f"length_{length}_{kind.__name__}",
            dict(actual_seq_lengths=kind([3, length])),
            ValueError,
            rf"actual_seq_lengths must fit.*0 to S = 48.*{re.escape(str([3, length]))}",
            values=True,
        )
        for length in (-1, 49, 2**31 - 1)
        for kind in (list, tuple, np.array, jnp.array)
    ),
    Wrong("length_of_64_bits", dict(actual_seq_lengths=[2**32 + 1]), ValueError, r"fit.*48.*4294967297", values=True),
    Wrong("padding_float", dict(kv_padding_size=f32(1)), TypeError, r"kv_padding_size.*integers.*float32"),
    Wrong("padding_bool", dict(kv_padding_size=True), TypeError, r"kv_padding_size.*integers.*bool"),
    Wrong("padding_many", dict(kv_padding_size=i32(2)), ValueError, r"kv_padding_size.*one.*\(1,\) or \(\).*\(2,\)"),
    Wrong("padding_rank", dict(kv_padding_size=i32(1, 1)), ValueError, r"kv_padding_size.*\(1,\) or \(\).*\(1, 1\)"),
    # position bias
    Wrong("bias_dtype", dict(pse_shift=f32(2, 4, 1, 48)), TypeError, r"pse_shift.*dtype.*float16.*float32", HALF),
    Wrong(
        "bias_dtype_brain", dict(pse_shift=f16(2, 4, 1, 48)), TypeError, r"pse_shift.*dtype.*bfloat16.*float16", BRAIN
    ),
    Wrong("bias_integer", dict(pse_shift=i32(2, 4, 1, 48)), TypeError, r"pse_shift.*dtype.*float32.*int32"),
    *(
        Wrong(
            f"bias_{'_'.join(map(str, shape))}",
            dict(pse_shift=f32(*shape)),
            ValueError,
            rf"pse_shift.*row.*head.*\(2 or 1, 4, 1, S\).*{re.escape(str(shape))}",
        )
        for shape in (
            (2, 4, 48),
            (4, 1, 48),
            (2, 4, 1, 1, 48),
            (3, 4, 1, 48),
            (0, 4, 1, 48),
            (2, 2, 1, 48),
            (2, 4, 2, 48),
        )
    ),
    Wrong(
        "bias_short", dict(pse_shift=f32(2, 4, 1, 47)), ValueError, r"pse_shift.*every position.*48.*\(2, 4, 1, 47\)"
    ),
    Wrong(
        "bias_short_paged",
        dict(pse_shift=f32(1, 4, 1, 47)),
        ValueError,
        r"pse_shift.*every position.*48.*1, 47\)",
        PAGED,
    ),
    Wrong(
        "bias_head_dim",
        {},
        ValueError,
        r"pse_shift.*head dimension.*multiple of 16.*24",
        dict(head_dim=24, bias="batch"),
    ),
    # mask
    *(
        Wrong(
            f"mask_{dtype}",
            dict(atten_mask=np.zeros((2, 48), dtype)),
            TypeError,
            rf"atten_mask dtype.*bool.*int8.*uint8.*{dtype}",
        )
        for dtype in ("int32", "float32", "float16")
    ),
    *(
        Wrong(
            f"mask_{'_'.join(map(str, shape))}",
            dict(atten_mask=i8(*shape)),
            ValueError,
            rf"atten_mask.*row.*sequence.*\(2, S\).*\(2, 1, S\).*\(2, 1, 1, S\).*{re.escape(str(shape))}",
        )
        for shape in (
            (48,),
            (1, 48),
            (3, 48),
            (1, 1, 1, 48),
            (2, 4, 1, 48),
            (2, 1, 4, 48),
            (2, 2, 48),
            (2, 1, 1, 1, 48),
        )
    ),
    Wrong(
        "mask_short",
        dict(atten_mask=i8(2, 47)),
        ValueError,
        r"atten_mask.*every position.*48.*\(2, 47\)",
        dict(lengths=None),
    ),
    Wrong(
        "mask_shorter_than_lengths",
        dict(atten_mask=i8(2, 39), actual_seq_lengths=[40, 3]),
        ValueError,
        r"atten_mask.*every position.*at least 40.*\(2, 39\)",
    ),
    Wrong(
        "mask_short_left_padded",
        dict(atten_mask=i8(2, 40), actual_seq_lengths=[4, 3]),
        ValueError,
        r"atten_mask.*every position.*48.*\(2, 40\)",
        dict(padding=0),
    ),
    Wrong(
        "mask_short_paged",
        dict(atten_mask=i8(2, 47), actual_seq_lengths=[4, 3]),
        ValueError,
        r"atten_mask.*every position.*48.*\(2, 47\)",
        PAGED,
    ),
    # quantisation
    *(
        Wrong(name, {name: f32(1)}, ValueError, rf"{name}.*int8 query.*not supported.*None.*array")
        for name in ("dequant_scale1", "quant_scale1", "dequant_scale2")
    ),
    Wrong(
        "out_offset_alone",
        dict(quant_offset2=f32(1)),
        ValueError,
        r"quant_offset2.*with quant_scale2.*quant_offset2 alone",
    ),
    Wrong("out_scale_half", dict(quant_scale2=f16(1)), TypeError, r"quant_scale2 dtype.*float32.*float16", HALF),
    Wrong(
        "out_scale_brain",
        dict(quant_scale2=bf16(1)),
        TypeError,
        r"quant_scale2 dtype.*float16 query.*float32.*bfloat16",
        HALF,
    ),
    Wrong(
        "out_scale_half_brain",
        dict(quant_scale2=f16(1)),
        TypeError,
        r"quant_scale2 dtype.*float32 or bfloat16.*float16",
        BRAIN,
    ),
    Wrong("out_scale_int", dict(quant_scale2=i32(1)), TypeError, r"quant_scale2 dtype.*float32.*int32"),
    Wrong(
        "out_offset_dtype",
        dict(quant_scale2=f32(1), quant_offset2=bf16(1)),
        TypeError,
        r"quant_offset2.*dtype of quant_scale2.*float32.*bfloat16",
        BRAIN,
    ),
    *(
        Wrong(
            f"out_scale_{'_'.join(map(str, shape))}",
            dict(quant_scale2=f32(*shape)),
            ValueError,
            rf"quant_scale2 is per tensor.*per channel.*64.*{re.escape(str(shape))}",
        )
        for shape in ((2,), (32,), (16,), (4, 1), (2, 16), (1, 2, 1, 16), (16, 4), (2, 1, 1, 32), (0,), (1, 1, 1, 64))
    ),
    Wrong(
        "out_offset_shape",
        dict(quant_offset2=f32(4, 4)),
        ValueError,
        r"quant_offset2 is per tensor.*per channel.*64.*\(4, 4\)",
        QUANT,
    ),
    Wrong("out_kinds", dict(quant_offset2=f32(1)), ValueError, r"both per.*per channel quant_offset2.*\(1,\)", QUANT),
    Wrong(
        "out_kinds_reversed",
        dict(quant_offset2=f32(64)),
        ValueError,
        r"both per.*per tensor quant_offset2.*\(64,\)",
        dict(quant="tensor"),
    ),
    Wrong(
        "antiquant_missing", dict(antiquant_scale=None), ValueError, r"int8 .*need antiquant_scale.*array.*None", INT8
    ),
    Wrong(
        "antiquant_offset_alone",
        dict(antiquant_scale=None),
        ValueError,
        r"int8 .*need antiquant_scale.*array.*None",
        dict(int8=True, offset=True),
    ),
    *(
        Wrong(f"{name}_float_cache", {name: f32(2)}, ValueError, rf"{name}.*for int8.*None with float32.*array")
        for name in ("antiquant_scale", "antiquant_offset")
    ),
    *(
        Wrong(
            f"antiquant_{'_'.join(map(str, shape))}",
            dict(antiquant_scale=f32(*shape)),
            ValueError,
            rf"antiquant_scale is per tensor.*per channel.*\(2, 2, 16\).*{re.escape(str(shape))}",
            INT8,
        )
        # The last but one is per token, (2, B, S), which is another operator's; the last has N in the place of K.
        for shape in (
            (1,),
            (2, 1),
            (2, 2),
            (2, 16),
            (32,),
            (2, 16, 2),
            (1, 2, 16),
            (2, 2, 16, 1),
            (2, 2, 48),
            (2, 4, 16),
        )
    ),
    Wrong(
        "antiquant_dtype",
        dict(antiquant_scale=bf16(2)),
        TypeError,
        r"antiquant_scale dtype.*float16.*float32.*bfloat16",
        INT8 | HALF,
    ),
    Wrong("antiquant_integer", dict(antiquant_scale=i32(2)), TypeError, r"antiquant_scale dtype.*float32.*int32", INT8),
    Wrong(
        "antiquant_offset_dtype",
        dict(antiquant_scale=f32(2), antiquant_offset=f16(2)),
        TypeError,
        r"antiquant_offset.*dtype of antiquant_scale.*float32.*float16",
        INT8 | HALF,
    ),
    *(
        Wrong(
            f"antiquant_offset_{'_'.join(map(str, shape))}",
            dict(antiquant_offset=f32(*shape)),
            ValueError,
            rf"antiquant_offset.*shape of antiquant_scale.*\(2, 2, 16\).*{re.escape(str(shape))}",
            INT8,
        )
        for shape in ((2,), (2, 2, 1, 16), (2, 32), (2, 2, 8))
    ),
    # paged caches
    Wrong(
        "paged_lengths_none",
        dict(actual_seq_lengths=None),
        ValueError,
        r"paged.*needs actual_seq_lengths.*2.*none",
        PAGED,
    ),
    Wrong(
        "paged_lengths_empty",
        dict(actual_seq_lengths=[]),
        ValueError,
        r"paged.*needs actual_seq_lengths.*2.*none",
        PAGED,
    ),
    *(
        Wrong(
            f"table_{'_'.join(map(str, shape))}",
            dict(block_table=i32(*shape)),
            ValueError,
            rf"block_table.*row.*\(B, M\) = \(2, at least 1\).*{re.escape(str(shape))}",
            PAGED,
        )
        for shape in ((2, 0), (0, 3), (6,), (2, 3, 1), (3, 3), (1, 3))
    ),
    *(
        Wrong(
            f"table_{dtype}",
            dict(block_table=np.ones((2, 3), dtype)),
            TypeError,
            rf"block_table.*int32.*{dtype}",
            PAGED,
        )
        for dtype in ("int64", "uint32", "int16", "float32")
    ),
    Wrong(
        "paged_length",
        dict(actual_seq_lengths=[49, 1]),
        ValueError,
        r"actual_seq_lengths must fit.*block_table.shape\[1\] \* block_size = 48.*\[49, 1\]",
        PAGED,
        values=True,
    ),
    *(
        Wrong(
            f"block_size_{n}", dict(block_size=n), ValueError, rf"block_size.*float32.*multiple of 16.*got {n}", PAGED
        )
        for n in (0, -16, 8, 24)
    ),
    *(
        Wrong(f"block_size_{n}_int8", dict(block_size=n), ValueError, rf"block_size.*int8.*of 32.*got {n}", PAGED_INT8)
        for n in (0, 16, 48)
    ),
    Wrong("block_size_float", dict(block_size=16.0), TypeError, r"block_size is an integer.*16\.0", PAGED),
    *(
        Wrong(
            f"paged_bnsd_cache_{layout}",
            dict(query=query, input_layout=layout),
            ValueError,
            rf"\(blocks, K, P, D\).*BNSD.*'{layout}'.*\(9, 2, 16, 16\)",
            PAGED,
        )
        for layout, query in (("BSND", f32(2, 1, 4, 16)), ("BSH", f32(2, 1, 64)))
    ),
    *(
        Wrong(
            f"pages_{'_'.join(map(str, shape))}",
            dict(key=f32(*shape), value=f32(*shape)),
            ValueError,
            rf"key has shape \(blocks, K, P, D\).*block_size=16.*=2.*\(blocks, 2, 16, 16\).*{re.escape(str(shape))}",
            PAGED,
        )
        for shape in ((9, 4, 16, 16), (9, 2, 32, 16), (9, 2, 16, 8), (9, 16, 2, 16))
    ),
    *(
        Wrong(
            f"pages_{'_'.join(map(str, shape))}",
            dict(key=f32(*shape), value=f32(*shape)),
            ValueError,
            rf"key has shape \(blocks, P, K\*D\).*block_size=16.*=2.*\(blocks, 16, 32\).*{re.escape(str(shape))}",
            base,
        )
        for base in (PAGED_BSH, PAGED)
        for shape in ((9, 32, 32), (9, 16, 16), (9, 16, 64), (9, 512), (9, 16, 2, 16, 1))
    ),
    Wrong(
        "pages_none",
        dict(key=f32(0, 16, 32), value=f32(0, 16, 32)),
        ValueError,
        r"needs blocks.*1.*\(0, 16, 32\)",
        PAGED_BSH,
    ),
    Wrong(
        "pages_differ",
        dict(value=f32(8, 2, 16, 16)),
        ValueError,
        r"one shape.*\(9, 2, 16, 16\).*\(8, 2, 16, 16\)",
        PAGED,
    ),
    *(
        Wrong(
            f"block_id_{block}",
            dict(block_table=np.array([[0, 1, 2], [3, block, 5]], np.int32), actual_seq_lengths=[48, 17]),
            ValueError,
            rf"block_table entries.*0 to 8.*{block} at \[1, 1\]",
            PAGED,
            values=True,
        )
        for block in (-1, 9, 2**31 - 1)
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.rule)
def test_is_refused(wrong: Wrong) -> None:
    call = wrong.call()
    with pytest.raises(wrong.error) as caught:
        run(call)
    assert type(caught.value) is wrong.error
    assert re.search(wrong.message, str(caught.value), re.DOTALL), str(caught.value)
    if (
        not wrong.values
    ):  # shapes and dtypes are known while tracing too, and nothing is looked at before they are right
        with pytest.raises(wrong.error) as caught:
            run_traced(call)
        assert re.search(wrong.message, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("wrong", [w for w in WRONG if w.values], ids=lambda wrong: wrong.rule)
def test_concrete_values_are_refused_inside_jit(wrong: Wrong) -> None:
    """A constant of the traced function is as concrete as an argument of an eager call."""
    call = wrong.call()
    with pytest.raises(wrong.error) as caught:
        jax.jit(lambda query: run(call | dict(query=query)))(call["query"])
    assert re.search(wrong.message, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.rule)
def test_the_call_is_valid_without_the_change(wrong: Wrong) -> None:
    """So it is the change, and nothing else, that is refused."""
    call = call_of(**wrong.base)
    if wrong.changes:
        jax.eval_shape(lambda: run(call))
        return
    # The base case itself is over a limit: one step back it is not.
    at_limit = {"head_dim": 512, "heads": {65: 64, 257: 256}.get(wrong.base.get("heads"))}
    at_limit |= dict(kv_heads=wrong.base.get("kv_heads") if wrong.base.get("kv_heads") != 257 else 256)
    base = {name: at_limit.get(name, value) for name, value in wrong.base.items()}
    jax.eval_shape(lambda: run(call_of(**base)))


def test_traced_lengths_do_not_shorten_the_mask() -> None:
    """A mask may end at the longest length only where the length is known."""
    call = call_of(lengths=(20, 3)) | dict(atten_mask=i8(2, 20) * 0)
    check(call)
    with pytest.raises(ValueError, match=r"atten_mask must cover every position: expected .*48, got \(2, 20\)"):
        run_traced(call | dict(actual_seq_lengths=i32(2)))


def test_static_arguments_cannot_be_traced() -> None:
    call = call_of()
    for name in ("num_heads", "num_key_value_heads", "inner_precise"):
        with pytest.raises(TypeError, match=f"{name} is an integer known when tracing"):
            jax.jit(lambda n, name=name: run(call | {name: n}))(1)


# --- What looks wrong but is allowed ---

MAX32, MIN32 = 2**31 - 1, -(2**31)
PADDED = dict(lengths=(40, 3), layout="BSND")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call_of(**PADDED, padding=-3), id="padding_negative"),
        pytest.param(call_of(**PADDED, padding=MIN32), id="padding_lowest"),
        pytest.param(call_of(**PADDED, padding=9), id="padding_too_large_for_one"),
        pytest.param(call_of(**PADDED, padding=49), id="padding_above_capacity"),
        pytest.param(call_of(**PADDED, padding=MAX32), id="padding_highest"),
        pytest.param(call_of(**PADDED) | dict(kv_padding_size=2**40), id="padding_of_64_bits"),
        pytest.param(call_of(**PADDED) | dict(kv_padding_size=np.int64(5)), id="padding_scalar"),
        pytest.param(call_of(**PADDED) | dict(kv_padding_size=np.zeros(0, np.int32)), id="padding_empty"),
        pytest.param(call_of(lengths=None, padding=7), id="padding_without_lengths"),
        pytest.param(call_of() | dict(actual_seq_lengths=[], kv_padding_size=7), id="padding_with_empty_lengths"),
        pytest.param(call_of(block=16, padding=7, lengths=(40, 3)), id="padding_with_paging"),
        pytest.param(call_of() | dict(block_size=16), id="block_size_without_table"),
        pytest.param(call_of() | dict(block_size=5), id="unaligned_block_size_without_table"),
        pytest.param(call_of(lengths=(0, 0)), id="lengths_zero"),
        pytest.param(call_of(lengths=(0, 5), int8=True, offset=True, quant="channel_offset"), id="length_zero_int8"),
        pytest.param(call_of(lengths=(0, 0), block=16), id="lengths_zero_paged"),
        pytest.param(call_of() | dict(actual_seq_lengths=[]), id="lengths_empty"),
        pytest.param(call_of() | dict(actual_seq_lengths=jnp.zeros(0, jnp.int32)), id="lengths_empty_array"),
        pytest.param(call_of(mask="2d:full"), id="row_fully_masked"),
        pytest.param(call_of(mask="2d:full", int8=True, offset=True, quant="tensor"), id="row_fully_masked_int8"),
        pytest.param(call_of() | dict(atten_mask=np.ones((2, 48), bool)), id="all_rows_masked"),
        pytest.param(call_of() | dict(atten_mask=np.zeros((0,), bool)), id="mask_empty"),
        pytest.param(call_of(lengths=(5, 9)) | dict(atten_mask=i8(2, 9) * 0), id="mask_up_to_longest"),
        pytest.param(call_of() | dict(atten_mask=(np.arange(120).reshape(2, 60) % 3 == 0)), id="mask_wide"),
        pytest.param(
            call_of() | dict(atten_mask=np.int8(-7) * (np.arange(96).reshape(2, 48) % 3 == 0)), id="mask_not_0_or_1"
        ),
        pytest.param(
            call_of() | dict(pse_shift=np.linspace(-2, 2, 240, dtype=np.float32).reshape(1, 4, 1, 60)), id="bias_wide"
        ),
        pytest.param(call_of() | dict(padding_mask=object()), id="padding_mask"),
        pytest.param(call_of(heads=4, kv_heads=4) | dict(num_key_value_heads=0), id="kv_heads_default"),
        pytest.param(call_of(capacity=0, lengths=None), id="capacity_zero"),
        pytest.param(call_of(capacity=0, lengths=(0, 0), layout="BSH"), id="capacity_zero_bsh"),
        pytest.param(
            call_of(capacity=0, lengths=None, int8=True, offset=True, quant="tensor_offset"), id="capacity_zero_int8"
        ),
        pytest.param(call_of(capacity=1024, block=1024, batch=1), id="block_above_512"),
        pytest.param(call_of(int8=True, antiquant="4d_bsnd", layout="BSH"), id="antiquant_of_another_layout"),
        pytest.param(call_of(int8=True, dtype="float16", antiquant_dtype="float32"), id="antiquant_float32_scale"),
        pytest.param(call_of(dtype="bfloat16") | dict(quant_scale2=bf16(4, 16)), id="out_scale_bfloat16"),
        pytest.param(call_of() | dict(quant_scale2=f32(1, 1, 1, 1, 1) * 200), id="out_scale_of_one_element"),
        pytest.param(call_of() | dict(scale_value=np.float64(0.25)), id="scale_value_numpy_double"),
        pytest.param(call_of() | dict(scale_value=1 / np.sqrt(16)), id="scale_value_by_numpy"),
        pytest.param(call_of() | dict(scale_value=2), id="scale_value_integer"),
        pytest.param(call_of() | dict(scale_value=np.float32(-0.5)), id="scale_value_negative"),
    ],
)
def test_is_allowed(call: Call) -> None:
    check(call)


def test_shared_blocks_and_garbage_in_unused_entries() -> None:
    call = call_of(block=16, lengths=(20, 17))
    for garbage in (-1, 0x7FFFFFFF, MIN32, 9):
        table = np.full((2, 3), garbage, np.int32)
        table[:, :2] = [[4, 7], [4, 1]]
        check(call | dict(block_table=table))
        out, lse = run_traced(call | dict(block_table=table))
        assert np.isfinite(out).all()
        assert np.isfinite(lse).all()


@pytest.mark.parametrize(
    ("batch", "capacity", "heads", "head_dim", "block"),
    [(65536, 1, 1, 1, 0), (70000, 16, 1, 8, 16), (1, 262145, 1, 8, 0), (2, 32, 256, 512, 16), (1, 32, 129, 512, 4096)],
    ids=["batch", "batch_paged", "sequence", "flat_page_of_131072", "flat_page_of_66048"],
)
def test_limits_of_one_npu_are_not_limits_here(
    batch: int, capacity: int, heads: int, head_dim: int, block: int
) -> None:
    def spec(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    arrays = dict(query=spec(batch, 1, heads * head_dim))
    hidden = heads * head_dim
    if block:
        arrays |= dict(key=spec(4, block, hidden), value=spec(4, block, hidden))
        arrays |= dict(block_table=spec(batch, 2, dtype=jnp.int32), actual_seq_lengths=spec(batch, dtype=jnp.int32))
    else:
        arrays |= dict(key=spec(batch, capacity, hidden), value=spec(batch, capacity, hidden))
    out, lse = jax.eval_shape(lambda arrays: run(arrays | dict(num_heads=heads, block_size=block)), arrays)
    assert out.shape == (batch, 1, hidden)
    assert out.dtype == jnp.bfloat16
    assert lse.shape == (batch, heads, 1)


# --- Traced values that no check can see: clamped, so the result is defined ---


@pytest.mark.parametrize("block", [0, 16], ids=["contiguous", "paged"])
def test_traced_lengths_out_of_range_are_clamped(block: int) -> None:
    call = call_of(block=block, mask="2d", lengths=(1, 1))
    wild = run_traced(call | dict(actual_seq_lengths=np.array([MAX32, MIN32], np.int32)))
    tame = run_traced(call | dict(actual_seq_lengths=np.array([48, 0], np.int32)))
    jax.tree.map(np.testing.assert_array_equal, wild, tame)
    assert np.isfinite(wild[0]).all()
    assert np.all(np.asarray(wild[0][1]) == 0)


@pytest.mark.parametrize("flat", [False, True])
def test_traced_block_ids_out_of_range_are_clamped(flat: bool) -> None:
    call = call_of(block=16, lengths=(48, 48), flat_pages=flat)
    table = np.array([[0, MAX32, 9], [MIN32, -1, 8]], np.int32)
    wild = run_traced(call | dict(block_table=table))
    tame = run_traced(call | dict(block_table=np.clip(table, 0, 8)))
    jax.tree.map(np.testing.assert_array_equal, wild, tame)
    assert np.isfinite(wild[0]).all()


@pytest.mark.parametrize(
    ("padding", "lengths", "tame_padding", "tame_lengths"),
    [
        (MIN32, (40, 3), 0, (40, 3)),
        (-1, (40, 3), 0, (40, 3)),
        (MAX32, (40, 3), 49, (40, 3)),
        (MAX32, (MAX32, MIN32), 49, (48, 0)),
        (MIN32, (MAX32, MIN32), 0, (48, 0)),
        (5, (MAX32, 43), 5, (48, 43)),
    ],
)
def test_traced_padding_out_of_range_is_clamped(
    padding: int, lengths: tuple[int, int], tame_padding: int, tame_lengths: tuple[int, int]
) -> None:
    call = call_of(layout="BSND")
    wild = run_traced(
        call | dict(kv_padding_size=np.array([padding], np.int32), actual_seq_lengths=np.array(lengths, np.int32))
    )
    tame = call | dict(kv_padding_size=[tame_padding], actual_seq_lengths=list(tame_lengths))
    rest = dict(tame)
    args = tuple(rest.pop(name) for name in ("query", "key", "value"))
    assert_close(*wild, args, rest)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "uint32", "int64", "uint64"])
def test_integers_of_any_width(dtype: str) -> None:
    call = call_of(layout="BSND") | dict(
        kv_padding_size=np.array([5], dtype), actual_seq_lengths=np.array([9, 40], dtype)
    )
    check(call)
    if dtype not in ("int64", "uint64"):  # JAX has no 64-bit arrays by default
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run_traced(call), run(call))
