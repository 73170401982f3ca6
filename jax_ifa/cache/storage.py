"""What the two caches have in common: the arrays of one layer, and how new tokens are brought to their form."""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_ifa import arguments
from jax_ifa.cache.calibration import quantize_kv
from jax_ifa.cache.rules import check_cache_dtype, check_finite
from jax_ifa.cache.tokens import write_tokens
from jax_ifa.conversion import as_array, numpy_value
from jax_ifa.errors import fail
from jax_ifa.quantization import split_antiquant

DATA_FIELDS = ("key", "value", "antiquant_scale", "antiquant_offset")
META_FIELDS = ("input_layout", "num_kv_heads")


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """Keys and values of one layer, with the scales that int8 ones need.

    Attributes:
      key, value: the storage, (pages, K, P, D) if `head_major`, else (pages, P, K, D) or (pages, P, K*D). A contiguous
        cache has one page per sequence.
      antiquant_scale, antiquant_offset: float32, in one of the operator's shapes, or None.
      input_layout: "BSH", "BNSD" or "BSND", of the new keys and values as of the queries.
      num_kv_heads: K.
    """

    key: Array
    value: Array
    antiquant_scale: Array | None
    antiquant_offset: Array | None
    input_layout: str
    num_kv_heads: int

    @property
    def dtype(self) -> jnp.dtype:
        """What is stored: float32, bfloat16, float16 or int8."""
        return self.key.dtype

    @property
    def head_major(self) -> bool:
        """Whether heads come before positions in the storage."""
        return self.input_layout == "BNSD"

    @property
    def head_dim(self) -> int:
        """D."""
        return self.key.shape[-1] if self.key.ndim == 4 else self.key.shape[-1] // self.num_kv_heads

    @property
    def page_size(self) -> int:
        """Positions of one page."""
        return self.key.shape[2 if self.head_major else 1]

    def _new_tokens(self, key: ArrayLike, value: ArrayLike, *, batch: int | None = None) -> tuple[Array, Array]:
        """New keys and values in the cache's layout as (B, Q, K, D), in their own dtypes."""
        keys = self._tokens("key", key, batch)
        values = self._tokens("value", value, keys.shape[0])
        if keys.shape != values.shape:
            fail("value has the shape of key", expected=jnp.shape(key), got=jnp.shape(value))
        return keys, values

    def _check_storable(self, key: Array, value: Array, counts: Array | np.ndarray | None) -> None:
        if self.dtype == jnp.int8:
            check_finite("key", key, counts)
            check_finite("value", value, counts)

    def _tokens(self, name: str, new: ArrayLike, batch: int | None) -> Array:
        array = as_array(name, new)
        if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
            got = None if array is None else array.dtype
            fail(f"{name} holds new tokens to store", expected="a floating point array", got=got, error=TypeError)
        heads, dim = self.num_kv_heads, self.head_dim
        form, shape = {
            "BNSD": ("(B, K, Q, D)", (batch, heads, None, dim)),
            "BSND": ("(B, Q, K, D)", (batch, None, heads, dim)),
            "BSH": ("(B, Q, K*D)", (batch, None, heads * dim)),
        }[self.input_layout]
        if array.ndim != len(shape) or any(e not in (None, g) for e, g in zip(shape, array.shape, strict=True)):
            expected = f"{form} with K = {heads}, D = {dim}" + ("" if batch is None else f", B = {batch}")
            fail(f"{name} has the axes of {self.input_layout}", expected=expected, got=array.shape)
        if self.head_major:
            return jnp.swapaxes(array, 1, 2)
        return array.reshape(*array.shape[:2], heads, dim)

    def _stored(self, tokens: Array, index: int) -> Array:
        """(B, Q, K, D) tokens in the cache's dtype; `index` is 0 for keys and 1 for values."""
        if self.antiquant_scale is None:
            return tokens.astype(self.dtype)
        scale = split_antiquant(self.antiquant_scale, num_kv_heads=self.num_kv_heads)[index][None, None]
        if self.antiquant_offset is None:
            return quantize_kv(tokens, scale)
        offset = split_antiquant(self.antiquant_offset, num_kv_heads=self.num_kv_heads)[index][None, None]
        return quantize_kv(tokens, scale, offset)

    def _write(self, key: Array, value: Array, page: Array, slot: Array, keep: Array) -> Self:
        """The cache with (B, Q, K, D) tokens at [page, slot], each (B, Q), wherever `keep`."""
        return dataclasses.replace(
            self,
            key=self._written(self.key, key, 0, page, slot, keep),
            value=self._written(self.value, value, 1, page, slot, keep),
        )

    def _written(self, storage: Array, tokens: Array, index: int, page: Array, slot: Array, keep: Array) -> Array:
        tokens = self._stored(tokens, index)
        if storage.ndim == 3:
            tokens = tokens.reshape(*tokens.shape[:2], -1)
        return write_tokens(storage, tokens, page, slot, keep, head_major=self.head_major)

    def _arguments(self, lengths: ArrayLike) -> dict[str, Any]:
        optional = {"antiquant_scale": self.antiquant_scale, "antiquant_offset": self.antiquant_offset}
        return {
            "key": self.key,
            "value": self.value,
            "actual_seq_lengths": lengths,
            "input_layout": self.input_layout,
            "num_key_value_heads": self.num_kv_heads,
        } | {name: parameter for name, parameter in optional.items() if parameter is not None}


def create_arrays(
    shape: tuple[int, ...],
    dtype: Any,
    antiquant_scale: ArrayLike | None,
    antiquant_offset: ArrayLike | None,
    *,
    num_kv_heads: int,
    head_dim: int,
) -> dict[str, Any]:
    """The data fields of a new cache: zeros, and the scales in float32, checked by the operator's rules."""
    dtype = check_cache_dtype(dtype)
    scale = _float32_copy("antiquant_scale", antiquant_scale)
    offset = _float32_copy("antiquant_offset", antiquant_offset)
    sizes = arguments.Sizes(0, num_kv_heads, num_kv_heads, head_dim, 0)
    arguments.check_antiquant(scale, offset, sizes, query_dtype=jnp.float32, kv_dtype=dtype)
    scales = None if scale is None else numpy_value(scale)
    if scales is not None and not ((scales > 0) & np.isfinite(scales)).all():
        fail("antiquant_scale divides", expected="positive finite scales", got=f"{scales.min()} to {scales.max()}")
    offsets = None if offset is None else numpy_value(offset)
    if offsets is not None and not np.isfinite(offsets).all():
        fail("antiquant_offset shifts", expected="finite offsets", got=f"{offsets.min()} to {offsets.max()}")
    return {
        "key": jnp.zeros(shape, dtype),
        "value": jnp.zeros(shape, dtype),
        "antiquant_scale": scale,
        "antiquant_offset": offset,
    }


def _float32_copy(name: str, parameter: ArrayLike | None) -> Array | None:
    """The cache's own copy: donating a cache must not delete the caller's scales or those of another layer."""
    array = as_array(name, parameter)
    if array is None:
        return None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        fail(f"{name} dtype", expected="floating point", got=array.dtype, error=TypeError)
    return jnp.array(array, jnp.float32, copy=True)
