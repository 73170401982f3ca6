"""Reading prompts: dense causal attention over whole texts, which fills the caches.

Letters as in model.py, and R rows of a padded text. Prompts of different lengths are padded on the right to a
bucket, so that few shapes are ever compiled.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jax_ifa.cache import calibrate_antiquant
from llama.caches import Cache, CacheOptions, append, create_cache
from llama.model import Block, Llama

SMALLEST_BUCKET = 16


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Text:
    """Rows on their way through the layers.

    Attributes:
      hidden: (R, T, hidden_size), padded on the right.
      counts: (R,) int32, how many tokens of each row count.
      rotation: of positions 0 to T - 1, by `Rotary`.
    """

    hidden: Array
    counts: Array
    rotation: tuple[Array, Array]


def read_prompts(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    calibration: Sequence[int],
    table: Array | None,
    capacity: int,
    options: CacheOptions,
) -> tuple[Array, tuple[Cache, ...]]:
    """Last hidden states (B, T, hidden_size) of the padded prompts, and the caches that hold them, one per layer.

    All layers are alike, so one compiled program serves each of them: much less to compile than one for the whole
    model, and it happens once for each bucket of lengths.
    """
    texts = [embed(model, prompts)]
    if options.dtype == "int8" and len(calibration):
        texts.append(embed(model, [calibration]))
    caches = []
    for block in model.blocks:
        graphdef, weights = nnx.split(block)
        texts, cache = read_layer(graphdef, weights, texts, table, capacity=capacity, options=options)
        caches.append(cache)
    return texts[0].hidden, tuple(caches)


def embed(model: Llama, rows: Sequence[Sequence[int]]) -> Text:
    """What the first layer reads."""
    counts = [len(row) for row in rows]
    tokens = np.zeros((len(rows), bucket(max(counts))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    rotation = model.rotary(jnp.arange(tokens.shape[1])[None])
    return Text(model.embedding(jnp.asarray(tokens)), jnp.asarray(counts, jnp.int32), rotation)


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity", "options"))
def read_layer(
    graphdef: nnx.GraphDef[Block],
    weights: nnx.State,
    texts: list[Text],
    table: Array | None,
    *,
    capacity: int,
    options: CacheOptions,
) -> tuple[list[Text], Cache]:
    """One block over whole texts, and its cache of the first; the others only show an int8 cache what to expect."""
    block = nnx.merge(graphdef, weights)
    results = [block(text.hidden, text.rotation, attend_causal) for text in texts]
    scale = None
    if options.dtype == "int8":
        # Symmetric scales grow with the largest value, so the larger one fits both texts.
        scales = [
            calibrate_antiquant(key, value, counts=text.counts, headroom=options.headroom)[0]
            for text, (_, (key, value)) in zip(texts, results, strict=True)
        ]
        scale = functools.reduce(jnp.maximum, scales)
    _, (key, value) = results[0]
    batch, num_kv_heads, _, head_dim = key.shape
    cache = create_cache(num_kv_heads, head_dim, batch, capacity, options, scale)
    counts = texts[0].counts
    cache = append(cache, key, value, jnp.zeros_like(counts), table, counts)
    return [dataclasses.replace(text, hidden=x) for text, (x, _) in zip(texts, results, strict=True)], cache


def attend_causal(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, Array]]:
    """Dense causal attention over the prompt itself; keeps the keys and values.

    Padding is on the right, where no real token looks. In tiles of queries, each against the keys up to its end, so
    that the scores of long prompts fit in memory and their empty half is mostly not computed.
    """
    batch, _, length, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, length, head_dim) * head_dim**-0.5
    tile = max(256, -(-length // 8))
    outputs = []
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        scores = jnp.einsum("bkgqd,bksd->bkgqs", grouped[..., start:stop, :], key[:, :, :stop])
        visible = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
        weights = jax.nn.softmax(scores, axis=-1, where=visible[None, None, None])
        outputs.append(jnp.einsum("bkgqs,bksd->bkgqd", weights, value[:, :, :stop]))
    return jnp.concatenate(outputs, axis=3).reshape(query.shape), (key, value)


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is not below a length: few shapes, little padding."""
    size = SMALLEST_BUCKET
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size
