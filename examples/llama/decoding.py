"""Decoding: a Llama, a KV cache per layer and `jax_ifa.incre_flash_attention`, one compiled step for every token.

Letters as in model.py. A batch is ragged: `lengths` (B,) says how many tokens each sequence holds. Everything that
changes from step to step is an array, so each step runs the same compiled program; the caches are donated to it and
written in place.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jax_ifa import incre_flash_attention
from llama.caches import DEFAULT_CACHE, Blocks, Cache, CacheOptions, append, arguments
from llama.model import Llama
from llama.prefill import read_prompts
from llama.sampling import GREEDY, Sampling


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class State:
    """What a step makes anew.

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
        cache: CacheOptions = DEFAULT_CACHE,
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
        self._choose = compiled_choice(sampling)
        self._step = compiled_step(graphdef, structure, implementation)
        self._blocks = Blocks(len(prompts), capacity, cache.block_size) if cache.kind == "paged" else None
        self._grow(self.lengths)

        hidden, caches = read_prompts(model, prompts, calibration, self._table, capacity, cache)
        counts = jnp.asarray(self.lengths, jnp.int32)
        last = jnp.take_along_axis(hidden, counts[:, None, None] - 1, axis=1)
        self._state = State(caches, counts, logits_of(model, last)[:, 0])
        self.prompt_logits: list[np.ndarray] = []
        if keep_prompt_logits:
            logits = np.asarray(logits_of(model, hidden))
            self.prompt_logits = [row[:length] for row, length in zip(logits, self.lengths, strict=True)]

    @property
    def logits(self) -> np.ndarray:
        """(B, vocab_size), what the model expects after each sequence's last token."""
        return np.asarray(self._state.logits)

    def step(self, active: np.ndarray | None = None, tokens: np.ndarray | None = None) -> np.ndarray:
        """Choose the next token of each sequence, from the present logits, and have it read.

        The tokens are there when the step before is done: what this one computes goes on while the caller looks at
        them, and asks for the next.

        Args:
          active: (B,) bool: only these sequences grow; None means all. The others' tokens mean nothing.
          tokens: (B,) read these instead of choosing.

        Returns:
          (B,) the tokens.
        """
        # Copies: the caller may change its arrays while the step, which may read them in place, is still to come.
        active = np.ones(len(self.lengths), bool) if active is None else np.array(active, bool)
        if (full := self.lengths[active] >= self.capacity).any():
            raise ValueError(f"{full.sum()} of the sequences already hold {self.capacity} tokens, the capacity")
        self._grow(active)
        self.lengths = self.lengths + active
        state = self._state
        chosen = self._choose(state.logits, state.lengths) if tokens is None else np.array(tokens, np.int32)
        self._state = self._step(self._weights, state.caches, state.lengths, chosen, active, self._table)
        return np.asarray(chosen)

    def _grow(self, tokens: np.ndarray) -> None:
        """Make room for more tokens in each sequence, and have the block table up to date."""
        self._table = None if self._blocks is None else self._blocks.grow(tokens)


@functools.cache
def compiled_choice(sampling: Sampling) -> Any:
    """`Sampling.choose`, compiled; apart from the step, so that the tokens do not wait for it."""
    return jax.jit(sampling.choose)


@functools.cache
def compiled_step(graphdef: nnx.GraphDef[Llama], structure: Any, implementation: str | None) -> Any:
    """The decode step, compiled once for each shape: (weights, caches, lengths, tokens, active, table) -> `State`.

    The weights are a plain list, which costs less to hand over in every step than the model's nested state.
    """

    @functools.partial(jax.jit, donate_argnames="caches")
    def step(
        weights: list[Array],
        caches: tuple[Cache, ...],
        lengths: Array,
        tokens: Array,
        active: Array,
        table: Array | None,
    ) -> State:
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, weights))
        attends = [
            functools.partial(
                attend_cached,
                cache=cache,
                lengths=lengths,
                active=active,
                table=table,
                implementation=implementation,
            )
            for cache in caches
        ]
        logits, kept = model(tokens[:, None], lengths[:, None], attends)
        return State(tuple(kept), lengths + active.astype(jnp.int32), logits[:, 0])

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


def logits_of(model: Llama, hidden: Array) -> Array:
    """Logits (B, T, vocab_size) of last hidden states (B, T, hidden_size)."""
    return model.head(hidden, model.embedding)


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
