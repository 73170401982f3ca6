"""What the caches check, and how they say it. Concrete values raise where they are wrong; traced ones cannot."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_ifa.conversion import as_integers, as_static_integer, numpy_value
from jax_ifa.errors import fail

CACHE_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8)


def check_size(name: str, value: Any, *, minimum: int = 1) -> int:
    """A size that is known when tracing."""
    size = as_static_integer(name, value)
    if size < minimum:
        fail(f"{name} is a size", expected=f"at least {minimum}", got=size)
    return size


def check_cache_dtype(dtype: Any) -> np.dtype:
    """One of the four that the attention reads."""
    dtype = jnp.dtype(dtype)
    if dtype not in CACHE_DTYPES:
        names = " or ".join(jnp.dtype(allowed).name for allowed in CACHE_DTYPES)
        fail("dtype of a cache", expected=names, got=dtype, error=TypeError)
    return dtype


def check_integers(name: str, value: Any, shape: tuple[int, ...]) -> Array | np.ndarray:
    """Integers of one shape, in NumPy while concrete."""
    array = as_integers(name, value)
    if array is None:
        fail(f"{name} must be given", expected=f"integers of shape {shape}", got=None, error=TypeError)
    if array.shape != shape:
        fail(f"{name} has one shape", expected=f"shape {shape}", got=array.shape)
    return array


def check_new_tokens(
    lengths: ArrayLike, counts: ArrayLike | None, *, batch: int, num_tokens: int, capacity: int
) -> tuple[Array | np.ndarray, Array | np.ndarray | None]:
    """Integers (B,), for which, where concrete: 0 <= counts <= Q, 0 <= lengths, and lengths + counts <= capacity."""
    lengths = check_integers("lengths", lengths, (batch,))
    counts = None if counts is None else check_integers("counts", counts, (batch,))
    count_values = np.full(batch, num_tokens) if counts is None else numpy_value(counts)
    if count_values is not None and ((count_values < 0) | (count_values > num_tokens)).any():
        fail("counts says how many of the new tokens count", expected=f"0 to {num_tokens}", got=count_values.tolist())
    length_values = numpy_value(lengths)
    if length_values is None:
        return lengths, counts
    least = np.zeros(batch, int) if count_values is None else count_values
    if ((length_values < 0) | (length_values > capacity - least)).any():
        fail(
            "lengths says where the first new token goes, and the new tokens must fit the cache",
            expected=f"lengths >= 0 and lengths + counts <= {capacity}",
            got=f"lengths {length_values.tolist()} and counts {least.tolist()}",
        )
    return lengths, counts


def check_finite(name: str, tokens: Array, counts: Array | np.ndarray | None) -> None:
    """Where concrete: no NaN or infinity among the first counts[b] of (B, Q, K, D), for int8 has neither."""
    count_values = np.full(tokens.shape[:1], tokens.shape[1]) if counts is None else numpy_value(counts)
    token_values = numpy_value(tokens)
    if token_values is None or count_values is None:
        return
    written = np.arange(tokens.shape[1])[None] < count_values[:, None]
    if not np.isfinite(token_values[written]).all():
        fail(f"{name} is stored as int8", expected="finite values", got="infinity or NaN")
