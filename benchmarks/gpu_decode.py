"""The example model's decode step on a GPU: tokens per second by XLA's loop and by the kernel.

A model of SmolLM2-135M's shape with random weights, which cost the same as trained ones; a cache that holds as many
tokens as it is said to, whatever they are.
"""

import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from llama.caches import CacheOptions
from llama.decoding import Decoder
from llama.model import Llama, LlamaConfig

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    feed_forward_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    context_length=2**18,
    rope_base=1e5,
    rms_eps=1e-5,
    tied_embeddings=True,
)
TINY = dataclasses.replace(
    SMOLLM2, vocab_size=64, hidden_size=32, feed_forward_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16
)
CONTEXTS, BATCHES, DTYPES = (1024, 8192, 65536), (1, 8, 64), ("bfloat16", "int8")
CACHE_BYTES = 40e9
IMPLEMENTATIONS = {"xla": "xla", "kernel": "mosaic_gpu"}


def points(*, dry_run: bool) -> list[tuple[int, int, CacheOptions]]:
    """(context, batch, cache) of every row, as far as memory allows."""
    if dry_run:
        return [(32, 2, CacheOptions(dtype="bfloat16"))]
    found = []
    kinds: tuple[Literal["contiguous", "paged"], ...] = ("contiguous", "paged")
    for context, batch, kind, dtype in itertools.product(CONTEXTS, BATCHES, kinds, DTYPES):
        per_token = 2 * SMOLLM2.num_layers * SMOLLM2.num_kv_heads * SMOLLM2.head_dim * jnp.dtype(dtype).itemsize
        if batch * context * per_token <= CACHE_BYTES:
            found.append((context, batch, CacheOptions(kind, dtype)))
    return found


def measure(
    context: int, batch: int, cache: CacheOptions, *, rounds: int, tokens: int = 16, dry_run: bool = False
) -> dict[str, Any]:
    """Tokens per second at a context, by each implementation: median over rounds of `tokens` steps."""
    model = Llama(TINY if dry_run else SMOLLM2, rngs=nnx.Rngs(0))
    row: dict[str, Any] = {"context": context, "batch": batch, "cache": f"{cache.kind} {cache.dtype}"}
    for name, implementation in IMPLEMENTATIONS.items():
        capacity = -(-(context + (rounds + 1) * tokens) // 64) * 64  # the kernel wants multiples of 8
        prompts = [[1 + (b + i) % 60 for i in range(4)] for b in range(batch)]
        calibration = list(range(1, 33)) if cache.dtype == "int8" else []
        decoder = Decoder(
            model, prompts, capacity=capacity, cache=cache, implementation=implementation, calibration=calibration
        )
        decoder._grow(np.full(batch, context - 4))  # as if the context had been read
        decoder.lengths = np.full(batch, context)
        decoder._state = dataclasses.replace(decoder._state, lengths=jnp.asarray(decoder.lengths, jnp.int32))
        seconds = []
        for _ in tqdm(range(rounds + 1), desc=f"context {context}, B={batch}, {row['cache']}, {name}", leave=False):
            began = time.perf_counter()
            for _ in range(tokens):
                decoder.step()  # returns when the tokens are there, as a user needs them
            seconds.append((time.perf_counter() - began) / tokens)
        row[f"{name} tokens/s"] = batch / float(np.median(seconds[1:]))  # the first compiles
    row["kernel / xla"] = row["kernel tokens/s"] / row["xla tokens/s"]
    return row
