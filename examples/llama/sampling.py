"""Choosing the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy.

    Attributes:
      temperature: 0 takes the best token; above, tokens are drawn, the more evenly the higher it is.
      top_k: draw among this many best tokens; 0 means all.
      seed: the same seed draws the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")

    def choose(self, logits: Array, lengths: Array) -> Array:
        """One token per sequence, (B,) int32, from logits (B, V) after reading `lengths` (B,) tokens.

        A draw depends on the seed, the sequence's number and its length, and so not on the rest of the batch.
        """
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)

        def draw(row: Array, length: Array, logits: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), row), length)
            return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)

        return jax.vmap(draw)(jnp.arange(logits.shape[0]), lengths, logits)


GREEDY = Sampling()
