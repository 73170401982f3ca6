"""Reading prompts and decoding tokens: a Llama, a KV cache per layer and `jax_ifa.incre_flash_attention`.

Letters as in model.py. A batch is ragged: prompts of different lengths are padded on the right, and `lengths` (B,) says
how many tokens each sequence holds. Everything that changes from step to step is an array, so each step runs the
same compiled program; the caches are donated to it and written in place.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jax_ifa import incre_flash_attention
from jax_ifa.cache import BlockAllocator, ContiguousCache, PagedCache, calibrate_antiquant
from llama.model import Block, Llama
from llama.sampling import GREEDY, Sampling

Cache = ContiguousCache | PagedCache
SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How keys and values are kept.

    Attributes:
      kind: "contiguous" or "paged".
      dtype: "float32", "bfloat16", "float16" or "int8".
      block_size: tokens per block of a paged cache.
      headroom: how far beyond the largest values that were seen the range of int8 reaches.
    """

    kind: Literal["contiguous", "paged"] = "contiguous"
    dtype: str = "float32"
    block_size: int = 64
    headroom: float = 1.25


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class State:
    """What a step consumes and makes anew.

    Attributes:
      caches: one per layer.
      lengths: (B,) int32, the tokens that each sequence holds.
      logits: (B, vocab_size), what the model expects after each sequence's last token.
    """

    caches: tuple[Cache, ...]
    lengths: Array
    logits: Array


class Decoder:
    """One batch of sequences: reads its prompts when made, then grows by a token per `step`.

    Attributes:
      lengths: (B,) NumPy integers, the tokens that each sequence holds.
      prompt_logits: with `keep_prompt_logits`, one (prompt length, vocab_size) array per prompt.
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        *,
        capacity: int,
        cache: CacheOptions = CacheOptions(),
        sampling: Sampling = GREEDY,
        implementation: str | None = None,
        keep_prompt_logits: bool = False,
        calibration: Sequence[int] = (),
    ):
        """Read the prompts.

        Args:
          model: its weights stay where they are.
          prompts: B lists of token ids, none empty.
          capacity: the most tokens that a sequence may hold, its prompt included.
          cache: how keys and values are kept.
          sampling: how tokens are chosen.
          implementation: of `incre_flash_attention`.
          keep_prompt_logits: also compute the logits of every prompt token.
          calibration: token ids of a text for an int8 cache: its scales fit the keys and values of this text and
            of the prompts. A prompt of a few tokens alone shows too little of what is to come.
        """
        check_prompts(prompts, capacity, model.config.context_length)
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.capacity = capacity
        graphdef, weights = nnx.split(model)
        self._weights, structure = jax.tree.flatten(weights)
        self._step = compiled_step(graphdef, structure, sampling, implementation)
        self._blocks = Blocks(len(prompts), capacity, cache.block_size) if cache.kind == "paged" else None
        self._grow(self.lengths)

        samples = [calibration] if cache.dtype == "int8" and len(calibration) else []
        tokens, counts = pad([*prompts, *samples])
        hidden, caches = read_prompts(model, tokens, counts, self._table, len(prompts), capacity, cache)
        hidden, counts = hidden[: len(prompts)], counts[: len(prompts)]
        last = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)
        self._state = State(caches, counts, logits_of(model, last)[:, 0])
        self.prompt_logits: list[np.ndarray] = []
        if keep_prompt_logits:
            logits = np.asarray(logits_of(model, hidden))
            self.prompt_logits = [row[:length] for row, length in zip(logits, self.lengths, strict=True)]

    @property
    def logits(self) -> np.ndarray:
        """(B, vocab_size), what the model expects after each sequence's last token."""
        return np.array(self._state.logits)  # a copy: the next step reuses the memory

    def step(self, active: np.ndarray | None = None, tokens: np.ndarray | None = None) -> np.ndarray:
        """Choose the next token of each sequence, from the present logits, and read it.

        Args:
          active: (B,) bool: only these sequences grow; None means all. The others' tokens mean nothing.
          tokens: (B,) read these instead of choosing.

        Returns:
          (B,) the tokens.
        """
        active = np.ones(len(self.lengths), bool) if active is None else active
        if (full := self.lengths[active] >= self.capacity).any():
            raise ValueError(f"{full.sum()} of the sequences already hold {self.capacity} tokens, the capacity")
        self._grow(active)
        self.lengths = self.lengths + active
        forced = None if tokens is None else jnp.asarray(tokens, jnp.int32)
        chosen, self._state = self._step(self._weights, self._state, jnp.asarray(active), self._table, forced)
        return np.asarray(chosen)

    def _grow(self, tokens: np.ndarray) -> None:
        """Make room for more tokens in each sequence, and have the block table up to date."""
        self._table = None if self._blocks is None else self._blocks.grow(tokens)


class Blocks:
    """The blocks of a batch in paged caches; one table serves all layers."""

    def __init__(self, batch: int, capacity: int, block_size: int):
        self.width = -(-capacity // block_size)
        self._allocator = BlockAllocator(batch * self.width, block_size)
        self._sequences = [self._allocator.allocate(0) for _ in range(batch)]
        self._table: Array | None = None

    def grow(self, tokens: np.ndarray) -> Array:
        """The (B, width) int32 block table once sequence b has tokens[b] more."""
        for sequence, count in zip(self._sequences, tokens, strict=True):
            self._allocator.grow(sequence, int(count))
        return jnp.asarray(self._allocator.block_table(self._sequences, self.width))


@functools.cache
def compiled_step(graphdef: nnx.GraphDef[Llama], structure: Any, sampling: Sampling, implementation: str | None) -> Any:
    """The decode step, compiled once for each shape: (weights, state, active, table, forced) -> (tokens, state).

    The weights are a plain list, which costs less to hand over in every step than the model's nested state.
    """

    @functools.partial(jax.jit, donate_argnames="state")
    def step(
        weights: list[Array], state: State, active: Array, table: Array | None, forced: Array | None
    ) -> tuple[Array, State]:
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
        tokens = sampling.choose(state.logits, state.lengths) if forced is None else forced
        attends = [
            functools.partial(
                attend_cached,
                cache=cache,
                lengths=state.lengths,
                active=active,
                table=table,
                implementation=implementation,
            )
            for cache in state.caches
        ]
        logits, caches = model(tokens[:, None], state.lengths[:, None], attends)
        lengths = state.lengths + active.astype(jnp.int32)
        return tokens, State(tuple(caches), lengths, logits[:, 0])

    return step


def attend_cached(
    query: Array,
    key: Array,
    value: Array,
    *,
    cache: Cache,
    lengths: Array,
    active: Array,
    table: Array | None,
    implementation: str | None,
) -> tuple[Array, Cache]:
    """Append one token (B, heads, 1, D) to the cache, where active, and attend to all it then holds."""
    counts = active.astype(jnp.int32)
    cache = append(cache, key, value, lengths, table, counts)
    out = incre_flash_attention(
        query if cache.dtype == jnp.int8 else query.astype(cache.dtype),
        **arguments(cache, lengths + counts, table),
        num_heads=query.shape[1],
        scale_value=query.shape[-1] ** -0.5,
        implementation=implementation,
    )
    return out.astype(query.dtype), cache


def pad(rows: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Token ids (rows, T) padded on the right to a bucket, and how many of each row count (rows,)."""
    counts = [len(row) for row in rows]
    tokens = np.zeros((len(rows), bucket(max(counts))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return jnp.asarray(tokens), jnp.asarray(counts, jnp.int32)


def append(cache: Cache, key: Array, value: Array, lengths: Array, table: Array | None, counts: Array) -> Cache:
    """The cache with new tokens; only a paged one has a block table."""
    if isinstance(cache, ContiguousCache):
        return cache.append(key, value, lengths, counts)
    assert table is not None
    return cache.append(key, value, lengths, table, counts)


def arguments(cache: Cache, lengths: Array, table: Array | None) -> dict[str, Any]:
    """What the attention takes of a cache; only a paged one has a block table."""
    if isinstance(cache, ContiguousCache):
        return cache.arguments(lengths)
    assert table is not None
    return cache.arguments(lengths, table)


def read_prompts(
    model: Llama, tokens: Array, counts: Array, table: Array | None, batch: int, capacity: int, options: CacheOptions
) -> tuple[Array, tuple[Cache, ...]]:
    """Last hidden states (R, T, hidden_size) of padded rows (R, T), and caches that hold the first B of them.

    Further rows only show an int8 cache what to expect. All layers are alike, so one compiled program serves each of
    them: much less to compile than one for the whole model, and it happens once for each bucket of lengths.
    """
    x = model.embedding(tokens)
    rotation = model.rotary(jnp.arange(tokens.shape[1])[None])
    caches = []
    for block in model.blocks:
        graphdef, weights = nnx.split(block)
        x, cache = read_layer(
            graphdef, weights, x, rotation, counts, table, batch=batch, capacity=capacity, options=options
        )
        caches.append(cache)
    return x, tuple(caches)


@functools.partial(jax.jit, static_argnames=("graphdef", "batch", "capacity", "options"))
def read_layer(
    graphdef: nnx.GraphDef[Block],
    weights: nnx.State,
    x: Array,
    rotation: tuple[Array, Array],
    counts: Array,
    table: Array | None,
    *,
    batch: int,
    capacity: int,
    options: CacheOptions,
) -> tuple[Array, Cache]:
    """One block over whole rows, and its cache."""
    x, (key, value) = nnx.merge(graphdef, weights)(x, rotation, attend_causal)
    scale = None
    if options.dtype == "int8":
        scale, _ = calibrate_antiquant(key, value, counts=counts, headroom=options.headroom)
    cache = create_cache(key.shape[1], key.shape[3], batch, capacity, options, scale)
    counts = counts[:batch]
    return x, append(cache, key[:batch], value[:batch], jnp.zeros_like(counts), table, counts)


def create_cache(
    num_kv_heads: int, head_dim: int, batch: int, capacity: int, options: CacheOptions, scale: Array | None
) -> Cache:
    """An empty cache for one layer."""
    heads = (num_kv_heads, head_dim, jnp.dtype(options.dtype))
    if options.kind == "contiguous":
        return ContiguousCache.create(batch, capacity, *heads, antiquant_scale=scale)
    blocks = batch * -(-capacity // options.block_size)
    return PagedCache.create(blocks, options.block_size, *heads, antiquant_scale=scale)


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


def logits_of(model: Llama, hidden: Array) -> Array:
    """Logits (B, T, vocab_size) of last hidden states (B, T, hidden_size)."""
    return model.head(hidden, model.embedding)


def bucket(length: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is not below a length: few shapes, little padding."""
    size = SMALLEST_BUCKET
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size


def check_prompts(prompts: Sequence[Sequence[int]], capacity: int, context_length: int) -> None:
    """Refuse what cannot be decoded."""
    if not 0 < capacity <= context_length:
        raise ValueError(
            f"capacity must be 1 to {context_length}, the context the model was trained for, got {capacity}"
        )
    if len(prompts) == 0:
        raise ValueError("at least one prompt is needed")
    for prompt in prompts:
        if len(prompt) == 0:
            raise ValueError("a prompt is empty: there is no token to begin from")
        if len(prompt) > capacity:
            raise ValueError(f"a prompt has {len(prompt)} tokens, more than the capacity of {capacity}")
