"""Merging partial results of attention over disjoint sets of positions.

With lse = log sum exp(s) of each part, and w = exp(lse - lse_total), the whole is

    lse_total = log(exp(lse_a) + exp(lse_b)),     out = w_a * out_a + w_b * out_b

which is associative and commutative, with (out = 0, lse = -inf), the result over no positions, as its identity. Split
sequences, context parallelism over devices and prefixes shared by many sequences all reduce with it.

One case is approximate: a row whose positions are masked in every part. Its lse is -1e12 + log(n), float32 has no room
for log(n) beside -1e12, and so the means of the parts count equally, whatever their numbers of positions.
"""

import jax.numpy as jnp
from jax import Array


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Two partial results into one.

    Args:
      out_a, out_b: (..., D), normalised outputs.
      lse_a, lse_b: (...,) float32, natural log-sum-exp of their scores; -inf for a part without positions, whose
        output is then not read.

    Returns:
      out: (..., D) in float32, and lse: (...,) float32.
    """
    return merge_all(jnp.stack([out_a, out_b]), jnp.stack([lse_a, lse_b]))


def merge_all(out: Array, lse: Array, axis: int = 0) -> tuple[Array, Array]:
    """Any number of partial results along `axis` into one.

    Args:
      out: (..., parts, ..., D), normalised outputs.
      lse: as `out` without D, float32.
      axis: of the parts, counted in `lse`.

    Returns:
      out: (..., D) float32, and lse: (...,) float32, without the axis of the parts.
    """
    axis = axis % lse.ndim
    lse = lse.astype(jnp.float32)
    top = jnp.max(lse, axis=axis, keepdims=True)
    top = jnp.where(jnp.isneginf(top), 0.0, top)  # exp(-inf - -inf) would be NaN
    weight = jnp.exp(lse - top)
    total = jnp.sum(weight, axis=axis, keepdims=True)
    none = total == 0.0
    total = jnp.where(none, 1.0, total)
    share = (weight / total)[..., None]
    # Selected before it is multiplied: 0 * NaN would let an unused part spoil the rest, or its gradient.
    merged = jnp.sum(share * jnp.where(share == 0.0, 0.0, out.astype(jnp.float32)), axis=axis)
    return merged, jnp.squeeze(jnp.where(none, -jnp.inf, top + jnp.log(total)), axis=axis)
