"""The Llama architecture as Flax NNX modules: RMSNorm, rotary embedding, grouped-query attention, SwiGLU.

Letters: B batch, T tokens, N query heads, K key/value heads, D head dim. The modules hold weights only. How a token
sees earlier ones is the caller's: each takes an `attend` function, so that reading a prompt and decoding one token
against a cache (decoding.py) run the same code.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from numba_kernels.blocks import take_rows
from numba_kernels.product import row_product

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""(query (B, N, T, D), key (B, K, T, D), value (B, K, T, D)) -> (output (B, N, T, D), what to keep)."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of one model."""

    vocab_size: int
    hidden_size: int
    feed_forward_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rope_base: float
    rms_eps: float
    tied_embeddings: bool


class Llama(nnx.Module):
    """Embedding, blocks and the matrix that turns the last hidden state into logits."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.rotary = Rotary(config)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.head = Head(config, rngs=rngs)

    def __call__(self, tokens: Array, positions: Array, attends: Sequence[Attend]) -> tuple[Array, list[Any]]:
        """Logits (B, T, vocab_size) of tokens (B, T) at positions (B, T), and what each layer's attend kept."""
        x = self.embedding(tokens)
        rotation = self.rotary(positions)
        kept = []
        for block, attend in zip(self.blocks, attends, strict=True):
            x, keep = block(x, rotation, attend)
            kept.append(keep)
        return self.head(x, self.embedding), kept


class Embedding(nnx.Module):
    """A row of a matrix (vocab_size, hidden_size) for each token."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        start = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        self.weight = nnx.Param(start(rngs.params(), (config.vocab_size, config.hidden_size)))

    def __call__(self, tokens: Array) -> Array:
        """(B, T, hidden_size) of tokens (B, T)."""
        return take_rows(self.weight.get_value(), tokens)

    def logits(self, x: Array) -> Array:
        """(B, T, vocab_size) of x (B, T, hidden_size)."""
        return row_product(x, self.weight.get_value())


class Rotary(nnx.Module):
    """The angles by which positions turn queries and keys."""

    def __init__(self, config: LlamaConfig):
        exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
        self.frequencies = nnx.Param(config.rope_base**-exponents)

    def __call__(self, positions: Array) -> tuple[Array, Array]:
        """Cosines and sines (B, 1, T, D/2) of positions (B, T)."""
        angles = positions[:, None, :, None].astype(jnp.float32) * self.frequencies[None, None, None]
        return jnp.cos(angles), jnp.sin(angles)


class Block(nnx.Module):
    """Attention, then a gated feed-forward layer, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = rms_norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(self, x: Array, rotation: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        """x is (B, T, hidden_size)."""
        mixed, kept = self.attention(self.attention_norm(x), rotation, attend)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), kept


class Attention(nnx.Module):
    """Projects to heads, turns queries and keys by their positions, attends, projects back."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = Linear(config.hidden_size, heads * config.head_dim, rngs=rngs)
        self.output = Linear(config.num_heads * config.head_dim, config.hidden_size, rngs=rngs)

    def __call__(self, x: Array, rotation: tuple[Array, Array], attend: Attend) -> tuple[Array, Any]:
        """x is (B, T, hidden_size); so is what comes out."""
        batch, length, _ = x.shape
        num_heads, num_kv_heads = self.config.num_heads, self.config.num_kv_heads
        heads = self.qkv(x).reshape(batch, length, -1, self.config.head_dim).swapaxes(1, 2)
        query, key, value = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
        mixed, kept = attend(rotate(query, rotation), rotate(key, rotation), value)
        return self.output(mixed.swapaxes(1, 2).reshape(batch, length, -1)), kept


class FeedForward(nnx.Module):
    """SwiGLU: silu(gate) * up, projected down."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate_up = Linear(config.hidden_size, 2 * config.feed_forward_size, rngs=rngs)
        self.down = Linear(config.feed_forward_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x is (B, T, hidden_size); so is what comes out."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Linear(nnx.Module):
    """A matrix (outputs, inputs), as in GGUF files: float32, or a `BlockMatrix`; Llama models have no biases."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.lecun_normal(in_axis=1, out_axis=0)(rngs.params(), (outputs, inputs)))

    def __call__(self, x: Array) -> Array:
        """(..., outputs) of x (..., inputs)."""
        return row_product(x, self.weight.get_value())


class Head(nnx.Module):
    """The last norm and the output matrix, which small models share with the embedding."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.norm = rms_norm(config, rngs)
        tied = config.tied_embeddings
        self.output = None if tied else Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def __call__(self, x: Array, embedding: Embedding) -> Array:
        """Logits (B, T, vocab_size) of x (B, T, hidden_size)."""
        x = self.norm(x)
        return embedding.logits(x) if self.output is None else self.output(x)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Turn each pair of neighbours in the last axis of x (B, heads, T, D).

    The interleaved form of the rotary embedding: GGUF files order the rows of the q and k matrices for it. (Files of
    other formats pair entry i with entry i + D/2. The wrong form still writes fluent text, with wrong logits.)
    """
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """A norm of hidden states."""
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_eps, rngs=rngs)
