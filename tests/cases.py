"""Calls of the operator, made from a few words: the grid that every implementation is tested on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_ifa import incre_flash_attention
from jax_ifa.dispatch import implementation_names
from jax_ifa.reference import incre_flash_attention_reference

# The kernels of other platforms have tests of their own, under JAX's interpreters.
IMPLEMENTATIONS_HERE = [name for name in implementation_names() if not name.startswith("mosaic")]

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# Error of the output and of the LSE against float64, relative to the largest output. The inputs are what they are after
# rounding to their dtype, so what remains is float32 arithmetic and, for 16-bit outputs, the rounding of the result:
# half a unit in the last place is 2**-9 for bfloat16 and 2**-12 for float16, and one rounding is all there may be.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-11}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `inputs` makes its arrays, the same ones every time."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    capacity: int = 48  # rounded up to whole blocks when paged
    layout: str = "BNSD"
    dtype: str = "float32"  # of the query
    int8: bool = False  # cache
    block: int = 0  # block_size; 0 is a contiguous cache
    flat_pages: bool = False  # (blocks, P, K*D) pages in BNSD too
    lengths: Any = "ragged"  # None, "ragged", "one", "zero" (some rows empty), or a tuple
    padding: int | None = None
    mask: str | None = None  # None, "2d", "3d", "4d"; + ":int8" or ":uint8"; + ":full" hides a whole row
    bias: str | None = None  # None, "shared" (leading 1) or "batch"
    antiquant: str = "channel"  # shape of the scale of int8 caches: tensor, channel, flat, 4d, 4d_bsnd
    antiquant_dtype: str | None = None  # None: the query's
    offset: bool = False
    quant: str | None = None  # None, "tensor", "channel", "channel_offset", "tensor_offset"
    inner_precise: int = 1
    seed: int = 0

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(changed) or "plain"

    @property
    def blocks_per_sequence(self) -> int:
        return -(-self.capacity // self.block)

    @property
    def positions(self) -> int:
        return self.blocks_per_sequence * self.block if self.block else self.capacity

    def inputs(self) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], dict[str, Any]]:
        """(query, key, value) and the keyword arguments, in NumPy."""
        rng = np.random.default_rng(self.seed)
        dtype = DTYPES[self.dtype]
        b, n, k, d, s = self.batch, self.heads, self.kv_heads, self.head_dim, self.positions
        query = rng.normal(size=(b, n, d)).astype(dtype)
        query = query.reshape({"BSH": (b, 1, n * d), "BNSD": (b, n, 1, d), "BSND": (b, 1, n, d)}[self.layout])
        kwargs: dict[str, Any] = dict(
            num_heads=n,
            num_key_value_heads=k,
            input_layout=self.layout,
            scale_value=d**-0.5,
            inner_precise=self.inner_precise,
        )

        if self.block:
            blocks = b * self.blocks_per_sequence + 3  # more than needed, shuffled, wider than needed
            table = rng.permutation(blocks)[: b * self.blocks_per_sequence].reshape(b, -1).astype(np.int32)
            kwargs |= dict(block_table=table, block_size=self.block)
            head_major = self.layout == "BNSD" and not self.flat_pages
            shape = (blocks, k, self.block, d) if head_major else (blocks, self.block, k * d)
        else:
            shape = {"BSH": (b, s, k * d), "BNSD": (b, k, s, d), "BSND": (b, s, k, d)}[self.layout]

        def cache() -> np.ndarray:
            if self.int8:
                return rng.integers(-128, 128, shape).astype(np.int8)
            return rng.normal(size=shape).astype(dtype)

        key, value = cache(), cache()

        lengths = self.lengths
        if lengths == "ragged":
            lengths = [int(x) for x in rng.integers(1, s + 1, b)]
            lengths[0] = max(0, s - (self.padding or 0))
        elif lengths == "zero":
            lengths = [0 if i % 2 else int(rng.integers(1, s + 1)) for i in range(b)]
        elif lengths == "one":
            lengths = [int(rng.integers(1, s + 1))]
        if lengths is not None:
            kwargs["actual_seq_lengths"] = lengths
        if self.padding is not None:
            kwargs["kv_padding_size"] = np.array([self.padding], np.int32)

        if self.mask:
            form, *words = self.mask.split(":")
            mask = rng.random((b, s)) < 0.4
            if "full" in words:
                mask[0] = True
            kind = next((w for w in words if w != "full"), "bool")
            shape = {"2d": (b, s), "3d": (b, 1, s), "4d": (b, 1, 1, s)}[form]
            kwargs["atten_mask"] = mask.astype(kind).reshape(shape)
        if self.bias:
            rows = 1 if self.bias == "shared" else b
            kwargs["pse_shift"] = rng.normal(size=(rows, n, 1, s)).astype(dtype)

        if self.int8:
            parameter = DTYPES[self.antiquant_dtype or self.dtype]
            form = {
                "tensor": (2,),
                "flat": (2, k * d),
                "channel": (2, k, d),
                "4d": (2, k, 1, d),
                "4d_bsnd": (2, 1, k, d),
            }[self.antiquant]
            kwargs["antiquant_scale"] = rng.uniform(0.005, 0.02, form).astype(parameter)
            if self.offset:
                kwargs["antiquant_offset"] = rng.integers(-20, 21, form).astype(parameter)
        if self.quant:
            form = (1,) if self.quant.startswith("tensor") else (1, n, 1, d)
            kwargs["quant_scale2"] = rng.uniform(40, 120, form).astype(np.float32)
            if self.quant.endswith("offset"):
                kwargs["quant_offset2"] = rng.uniform(-9, 9, form).astype(np.float32)
        return (query, key, value), kwargs


def run_everywhere(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Output and LSE of a call by the default, after every implementation that runs here has given the same."""
    out, lse = incre_flash_attention(*args, return_lse=True, **kwargs)
    for name in IMPLEMENTATIONS_HERE:
        other, other_lse = incre_flash_attention(*args, return_lse=True, implementation=name, **kwargs)
        assert other.dtype == out.dtype
        a, b = np.asarray(other, np.float64), np.asarray(out, np.float64)
        largest = np.nanmax(np.abs(b), initial=1.0, where=np.isfinite(b))
        tolerance = 1.0 if out.dtype == jnp.int8 else 2 * TOLERANCE[str(out.dtype)] * largest
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(np.asarray(other_lse), np.asarray(lse), rtol=4e-6, atol=8e-6, err_msg=name)
    return out, lse


def call_numba(case: Case) -> tuple[tuple[Any, Any], tuple[Any, ...], dict[str, Any]]:
    """Output and LSE of a case by Numba, under jit, and what it was called with."""
    args, kwargs = case.inputs()
    kwargs = {"implementation": "numba"} | kwargs
    return jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, return_lse=True, **kwargs))(*args), args, kwargs


def run_reference(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The oracle on the same call."""
    rest = {k: v for k, v in kwargs.items() if k not in ("inner_precise", "implementation", "return_lse")}
    return incre_flash_attention_reference(*args, **rest)


def assert_close(out: Any, lse: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Output and LSE of a call against the oracle, at the tolerance of the query's dtype."""
    expected, expected_lse = run_reference(args, kwargs)
    query = args[0]
    assert out.shape == query.shape
    assert lse.shape == (query.shape[0], kwargs["num_heads"], 1)
    assert lse.dtype == jnp.float32
    if "quant_scale2" in kwargs:
        assert_int8_close(out, expected)
    else:
        assert out.dtype == query.dtype
        tolerance = TOLERANCE[str(np.dtype(query.dtype))] * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.asarray(lse, np.float64), expected_lse, rtol=2e-6, atol=4e-6)


def assert_out_close(case: Case) -> None:
    """The output of a case by Numba, under jit, against the oracle; no LSE is asked for, which would show more bits."""
    args, kwargs = case.inputs()
    out = jax.jit(lambda q, k, v: incre_flash_attention(q, k, v, implementation="numba", **kwargs))(*args)
    expected, _ = run_reference(args, kwargs)
    tolerance = TOLERANCE[case.dtype] * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=tolerance)


def assert_int8_close(out: Any, unrounded: np.ndarray) -> None:
    """int8 results equal the rounded oracle, but for values that lie on a tie to within float32 arithmetic."""
    assert out.dtype == jnp.int8
    expected = np.clip(np.rint(unrounded), -128, 127)
    tie = np.abs(np.abs(unrounded - np.trunc(unrounded)) - 0.5) < 1e-3
    difference = np.abs(np.asarray(out, np.float64) - expected)
    assert np.all(difference[~tie] == 0), f"{np.argwhere(~tie & (difference > 0))[:5]=}"
    assert np.all(difference <= 1)
