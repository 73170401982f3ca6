"""The contract between the transforms and the kernels.

Every implementation of the decode loop takes one `Operands` and returns `(out, lse)`. Letters, here and everywhere:

    B  batch (sequences)          S  key/value positions of a sequence
    N  query heads                D  head dimension
    K  key/value heads            P  positions in a page (`block_size`)
    G  N // K, heads per group    M  pages per sequence
    T  key/value positions that an implementation reads at a time
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVView:
    """Key and value as pages, and which pages hold the positions of each sequence.

    Position t of sequence b is row `t % P` of page `table[b, t // P]`. A contiguous cache is the same thing with
    one page of P = S positions per sequence and no table (page b belongs to sequence b), so nothing is looked up.

    Attributes:
      key: (pages, K, P, D) if `head_major`, else (pages, P, K, D); float32, bfloat16, float16 or int8.
      value: same shape and dtype as `key`, unless `value_table` is given: then its number of pages may differ.
      table: (B, M) int32, or None for a contiguous cache. Entries past a sequence's window may hold anything.
      value_table: (B, M) int32 where values lie in other pages than keys, else None (as `table`). Only a `vmap` over
        one of key and value makes this: the other, unmapped, is then shared and not copied.
      head_major: the order of the axes above.
      flat: the caller's arrays were (pages, P, K*D), the heads of a position side by side in one row. Kernels for tiled
        memory read them so, and could read (pages, P, K, D) arrays only from a copy.
    """

    key: Array
    value: Array
    table: Array | None
    value_table: Array | None = None
    head_major: bool = dataclasses.field(default=True, metadata={"static": True})
    flat: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.key.shape[1 if self.head_major else 2]

    @property
    def page_size(self) -> int:
        """P."""
        return self.key.shape[2 if self.head_major else 1]

    @property
    def pages_per_sequence(self) -> int:
        """M."""
        return 1 if self.table is None else self.table.shape[1]

    @property
    def capacity(self) -> int:
        """M * P: the positions a sequence can have."""
        return self.pages_per_sequence * self.page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """All that the decode loop needs, in canonical form.

    For sequence b, kv head k, group member g, over the positions t in [start[b], stop[b]):

        s_t = scale[b] * sum_d query[b, k, g, d] * key_t[k, d]  + bias[b % R, k, g, t]
        s_t = MASK_VALUE                                          where mask[b % R, t] != 0
        out[b, k, g] = softmax_t(s) @ value;   lse[b, k, g] = log sum_t exp(s_t)

    A row without positions, or whose every score is -inf, gives out = 0 and lse = -inf. Whatever lies outside the
    window, NaN included, has no influence on the result.

    Attributes:
      query: (B, K, G, D), float32, bfloat16 or float16. Not scaled; key antiquantisation folded in (float32 then).
      scale: (R,) float32, multiplies the scores.
      kv: the cache.
      start, stop: (R,) int32, each: the visible window, what of [start, stop) lies in [0, kv.capacity).
      mask: (R, S'), bool or int8 or uint8, non-zero is masked out, or None. S' >= kv.capacity.
      bias: (R, K, G, S'), any float dtype, added to the scaled scores, or None. S' >= kv.capacity.
      precise: float32 throughout (`inner_precise=0`, or a float32 result); otherwise an implementation may round the
        softmax weights to the cache's 16-bit dtype for the product with the values, or of an int8 cache to 15 bits.
      out_dtype: what the caller rounds `out` to; an implementation may do so itself, or leave it float32.
      keeps_16_bits: the caller keeps of the result no more than `out`, and of that 16 bits in the end (whatever is done
        to it in between, as for int8 caches), so an implementation need not be more precise than that.

    R, of each array its own, divides B, and row b of the batch reads row b % R. So a bias of one row serves everyone,
    and a `vmap` that does not map the bias repeats nothing. Nothing has to be repeated or clamped before a kernel
    that can do so itself; the others take `per_sequence()`.
    """

    query: Array
    scale: Array
    kv: KVView
    start: Array
    stop: Array
    mask: Array | None = None
    bias: Array | None = None
    precise: bool = dataclasses.field(default=False, metadata={"static": True})
    out_dtype: jnp.dtype = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})
    keeps_16_bits: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def batch(self) -> int:
        """B."""
        return self.query.shape[0]

    @property
    def group(self) -> int:
        """G."""
        return self.query.shape[2]

    def per_sequence(self) -> "Operands":
        """The same with a scale and a window for each sequence: (B,), and 0 <= start <= stop <= kv.capacity."""
        scale, start, stop = (repeat_rows(rows, self.batch) for rows in (self.scale, self.start, self.stop))
        start = jnp.clip(start, 0, self.kv.capacity)
        return dataclasses.replace(self, scale=scale, start=start, stop=jnp.clip(stop, start, self.kv.capacity))


def repeat_rows(rows: Array, batch: int) -> Array:
    """(R, ...) to (batch, ...) by the rule of `Operands`: row b reads row b % R."""
    if rows.shape[0] == batch:
        return rows
    return jnp.tile(rows, (batch // rows.shape[0],) + (1,) * (rows.ndim - 1))
