"""A contiguous cache: each sequence owns `capacity` positions."""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ifa.arguments import check_layout
from jax_ifa.cache.rules import check_new_tokens, check_size
from jax_ifa.cache.storage import DATA_FIELDS, META_FIELDS, Storage, create_arrays
from jax_ifa.cache.tokens import token_positions
from jax_ifa.conversion import as_int32


@functools.partial(jax.tree_util.register_dataclass, data_fields=DATA_FIELDS, meta_fields=META_FIELDS)
@dataclasses.dataclass(frozen=True, eq=False)
class ContiguousCache(Storage):
    """Keys and values of B sequences in one layer, `capacity` positions each.

    A pytree, for use inside `jit`, `scan`, `while_loop` and `vmap`. Donate it to a jitted step, and `append` writes in
    place. How many tokens each sequence holds, the same for all layers, is the caller's (B,) int32 `lengths`.

    Attributes:
      key, value: (B, K, S, D) in BNSD, (B, S, K, D) in BSND, (B, S, K*D) in BSH; S is the capacity.
      antiquant_scale, antiquant_offset: what int8 stands for, float32, or None.
      input_layout, num_kv_heads: static.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ifa import incre_flash_attention
      >>> from jax_ifa.cache import ContiguousCache
      >>> kv = ContiguousCache.create(2, 128, 4, 64, jnp.float32)              # B=2, S=128, K=4, D=64
      >>> prompt = jnp.ones((2, 4, 10, 64))                                   # (B, K, Q, D): prompts of up to 10 tokens
      >>> kv = kv.append(prompt, prompt, lengths=[0, 0], counts=[10, 7])
      >>> token = jnp.ones((2, 4, 1, 64))
      >>> kv = kv.append(token, token, lengths=[10, 7])                        # the first decode step
      >>> query = jnp.ones((2, 8, 1, 64))
      >>> incre_flash_attention(query, **kv.arguments([11, 8]), num_heads=8, scale_value=64**-0.5).shape
      (2, 8, 1, 64)
    """

    @classmethod
    def create(
        cls,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Any = jnp.bfloat16,
        *,
        input_layout: str = "BNSD",
        antiquant_scale: ArrayLike | None = None,
        antiquant_offset: ArrayLike | None = None,
    ) -> Self:
        """An empty cache.

        Args:
          batch: B.
          capacity: S, the most tokens a sequence can hold.
          num_kv_heads: K.
          head_dim: D.
          dtype: float32, bfloat16, float16, or int8, which needs `antiquant_scale`.
          input_layout: "BNSD", "BSND" or "BSH": of this cache, of what is appended, and of the queries. On TPUs
            take "BSH" where D is a multiple of 128 and K > 1: the kernel reads such "BSND" caches only for K a multiple
            of 8, and with more arithmetic.
          antiquant_scale: for int8, which stands for ``(x + offset) * scale``: positive, any floating point dtype, per
            tensor (2,) or per channel (2, K, D), (2, K, 1, D), (2, 1, K, D) or (2, K*D); index 0 for keys. It is
            copied. `calibrate_antiquant` makes it.
          antiquant_offset: in the shape of `antiquant_scale`; None means 0.

        Raises:
          ValueError, TypeError: for a size, layout, dtype or scale that is none.
        """
        check_layout(input_layout)
        batch, capacity = check_size("batch", batch), check_size("capacity", capacity)
        num_kv_heads, head_dim = check_size("num_kv_heads", num_kv_heads), check_size("head_dim", head_dim)
        shape = {
            "BNSD": (batch, num_kv_heads, capacity, head_dim),
            "BSND": (batch, capacity, num_kv_heads, head_dim),
            "BSH": (batch, capacity, num_kv_heads * head_dim),
        }[input_layout]
        arrays = create_arrays(
            shape, dtype, antiquant_scale, antiquant_offset, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        return cls(**arrays, input_layout=input_layout, num_kv_heads=num_kv_heads)

    @property
    def batch(self) -> int:
        """B."""
        return self.key.shape[0]

    @property
    def capacity(self) -> int:
        """S, the most tokens a sequence can hold."""
        return self.page_size

    def append(self, key: ArrayLike, value: ArrayLike, lengths: ArrayLike, counts: ArrayLike | None = None) -> Self:
        """The cache with new tokens: one decode step, or whole prompts.

        Args:
          key, value: Q new tokens per sequence in the cache's layout, (B, K, Q, D) in BNSD, (B, Q, K, D) in BSND,
            (B, Q, K*D) in BSH, floating point. Cast to the cache's dtype, or quantised to int8 by `quantize_kv`.
          lengths: (B,) integers, the tokens each sequence already holds, which is where the first new one goes.
          counts: (B,) integers: only the first counts[b] of the Q tokens are written. None means all.

        Returns:
          A new cache; the old one is unchanged, unless donated, and then nothing is copied. Tokens that do not fit, by
          traced `lengths` or `counts`, are dropped: nothing is ever written elsewhere. For int8, a traced NaN becomes 0
          and infinities saturate.

        Raises:
          ValueError: for shapes, for concrete lengths and counts that do not fit the capacity, and for concrete
            values that are not finite when the cache is int8.
          TypeError: for dtypes.
        """
        key, value = self._new_tokens(key, value, batch=self.batch)
        lengths, counts = check_new_tokens(
            lengths, counts, batch=self.batch, num_tokens=key.shape[1], capacity=self.capacity
        )
        self._check_storable(key, value, counts)
        return _append(self, key, value, as_int32(lengths), None if counts is None else as_int32(counts))

    def arguments(self, lengths: ArrayLike) -> dict[str, Any]:
        """What `incre_flash_attention` takes: ``incre_flash_attention(query, **kv.arguments(lengths), ...)``.

        Args:
          lengths: (B,) integers, the tokens each sequence holds now, and sees.

        Returns:
          key, value, actual_seq_lengths, input_layout, num_key_value_heads, and for int8 antiquant_scale and, if there
          is one, antiquant_offset. The arrays are the cache's own: nothing is copied.
        """
        return self._arguments(lengths)


# jit, so that an eager call is compiled once and reused; inside a traced program it is simply inlined.
@jax.jit
def _append(cache: ContiguousCache, key: Array, value: Array, lengths: Array, counts: Array | None) -> ContiguousCache:
    """The pure part, on (B, Q, K, D) tokens."""
    position, keep = token_positions(lengths, counts, num_tokens=key.shape[1], capacity=cache.capacity)
    sequence = jnp.broadcast_to(jnp.arange(cache.batch, dtype=jnp.int32)[:, None], position.shape)
    return cache._write(key, value, sequence, position, keep)
