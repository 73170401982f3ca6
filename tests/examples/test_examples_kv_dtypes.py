"""Narrow caches on the real model: how far they may change what it expects next."""

import pytest
from divergence import compare, teacher_forced
from llama.caches import CacheOptions
from llama.calibration import calibration_ids

# `python -m benchmarks.kv_dtypes` measures, for `chat`, the worst of its texts, mean KL divergences of 6.8e-5 nats for
# bfloat16 (8 bits of significand), 9e-7 for float16 (11 bits: 8 times finer, squared) and 2.5e-3 for int8 (8 bits over
# a channel's whole range). Each bound is four times that; without the calibration text int8 is at 1e-1.
BOUNDS = {"bfloat16": (2.8e-4, 0.95), "float16": (4e-6, 0.98), "int8": (1e-2, 0.9)}
TOKENS = 32


@pytest.fixture(scope="module")
def exact(smollm2, references):
    chat = references["chat"]
    return teacher_forced(smollm2, chat.prompt_ids, chat.token_ids[:TOKENS], CacheOptions(), [])


@pytest.mark.parametrize(
    "dtype, kind", [("bfloat16", "contiguous"), ("float16", "paged"), ("int8", "contiguous"), ("int8", "paged")]
)
def test_divergence_from_a_float32_cache(smollm2, tokenizer, references, exact, dtype, kind):
    chat = references["chat"]
    cache = CacheOptions(kind, dtype)
    logits = teacher_forced(smollm2, chat.prompt_ids, chat.token_ids[:TOKENS], cache, calibration_ids(tokenizer))
    divergence, agreement = compare(exact, logits)
    bound, least = BOUNDS[dtype]
    assert 0 < divergence.mean() < bound
    assert agreement.mean() >= least
