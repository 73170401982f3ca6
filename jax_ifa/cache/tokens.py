"""Where new tokens go, and how they get there without copying the cache."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_ifa.compat import CPU_CONVERTS_BFLOAT16_UPDATES


def token_positions(lengths: Array, counts: Array | None, *, num_tokens: int, capacity: int) -> tuple[Array, Array]:
    """The position of each new token in its sequence, and whether it is written at all.

    Token q of sequence b goes to lengths[b] + q. It is dropped if q >= counts[b], if that is past the capacity, or if
    lengths[b] is negative, which is never a place.

    Args:
      lengths: (B,) int32.
      counts: (B,) int32, or None for all.
      num_tokens: Q.
      capacity: positions per sequence.

    Returns:
      (B, Q) int32 positions, in [0, capacity) wherever kept, and (B, Q) bool.
    """
    length = lengths[:, None]
    token = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    keep = (length >= 0) & (length < capacity - token)  # no sum that could overflow
    if counts is not None:
        keep &= token < counts[:, None]
    return jnp.where(keep, length + token, 0), keep


def write_tokens(storage: Array, tokens: Array, page: Array, slot: Array, keep: Array, *, head_major: bool) -> Array:
    """storage[page, slot] = token for every token that is kept, in place where `storage` is donated.

    Args:
      storage: (pages, K, P, D) if `head_major`, else (pages, P, K, D) or (pages, P, K*D).
      tokens: (B, Q, K, D), or (B, Q, K*D) like the storage; in its dtype.
      page, slot: (B, Q) int32, where each token goes; read only where kept, and then in range.
      keep: (B, Q) bool. No two kept tokens may go to the same place.
      head_major: the order of the storage's axes.
    """
    page = jnp.where(keep, page, storage.shape[0])  # past the end, where a scatter drops it
    scatter = functools.partial(_scatter, head_major)
    if storage.dtype == jnp.bfloat16 and CPU_CONVERTS_BFLOAT16_UPDATES:
        select = functools.partial(_select, head_major)
        return lax.platform_dependent(storage, tokens, page, slot, cpu=select, default=scatter)
    return scatter(storage, tokens, page, slot)


def _scatter(head_major: bool, storage: Array, tokens: Array, page: Array, slot: Array) -> Array:
    """One scatter of Q rows per sequence. Its cost follows the tokens written, not the cache."""
    place = (page, slice(None), slot) if head_major else (page, slot)
    return storage.at[place].set(tokens, mode="drop")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _select(head_major: bool, storage: Array, tokens: Array, page: Array, slot: Array) -> Array:
    """The same as one elementwise pass over the storage's bits, which XLA fuses and does in place.

    Only an int32 per position is scattered: the number of the token that goes there, or -1. The compiled loop skips
    rows without one, so that the pass costs a look at each position and not a rewrite of the cache.
    """
    number = jnp.arange(page.size, dtype=jnp.int32).reshape(page.shape)
    positions = storage.shape[2 if head_major else 1]
    source = jnp.full((storage.shape[0], positions), -1, jnp.int32).at[page, slot].set(number, mode="drop")
    rows = lax.bitcast_convert_type(tokens, jnp.uint16).reshape(-1, *tokens.shape[2:])

    def write(i: Array, storage: Array) -> Array:
        # The barrier keeps the look-up of the rows in the loop, where it joins the pass; before the loop, its result
        # would be as large as the storage.
        which, _ = lax.optimization_barrier((source, i))
        picked = rows[jnp.maximum(which, 0)]
        if head_major:
            picked, which = jnp.swapaxes(picked, 1, 2), which[:, None]
        has_token = which.reshape(which.shape + (1,) * (storage.ndim - which.ndim)) >= 0
        bits = lax.bitcast_convert_type(storage, jnp.uint16)
        return lax.bitcast_convert_type(jnp.where(has_token, picked, bits), storage.dtype)

    # A loop of one turn, or none: XLA:CPU then fuses neither what computes the tokens nor what reads the storage into
    # the pass, which would make it again in another form.
    return lax.fori_loop(0, (page < storage.shape[0]).any().astype(jnp.int32), write, storage)


@_select.defjvp
def _select_jvp(head_major: bool, primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """Bits have no derivative, but the scatter that they stand for has."""
    return jax.jvp(functools.partial(_scatter, head_major), primals, tangents)
