"""The narrow operands that stand for float32 ones, and the TPU kernel's error on int8 caches, against float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tpu_interpreter import interpret, small_tiles

from pallas_kernels.tpu.narrow import from_digits, int8_digits, largest

BATCH, HEADS, KV_HEADS, POSITIONS, HEAD_DIM = 1, 8, 2, 256, 128


@pytest.mark.parametrize("count", [2, 3])
def test_digits_are_right_to_half_a_step(count: int) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 256)) * 10.0 ** np.arange(-12, 9, 3)[:, None]
    rows = np.concatenate([rows, np.zeros((1, 256)), np.full((1, 256), -3.0)]).astype(np.float32)
    found, steps = int8_digits(jnp.asarray(rows), count)
    (high, *others), step = np.asarray(found, np.float64), np.asarray(steps, np.float64)
    assert np.abs(high).max() == 127
    assert min(digit.min() for digit in others) >= -128
    assert max(digit.max() for digit in others) <= 127
    np.testing.assert_allclose(step[:7, 0], np.abs(rows[:7]).max(1) / largest(count), rtol=1e-6)
    whole = high
    for digit in others:
        whole = whole * 256 + digit
    error = np.abs(whole * step - rows)
    assert np.all(error <= 0.5 * step + 2e-7 * np.abs(rows))  # the step and its inverse are rounded


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan(value: float) -> None:
    rows = np.ones((2, 128), np.float32)
    rows[1, 5] = value
    step = np.asarray(int8_digits(jnp.asarray(rows), 3)[1])
    assert np.isfinite(step[0, 0])
    assert np.isnan(step[1, 0])


@pytest.mark.parametrize("key", [-128, 127])
@pytest.mark.parametrize("digit", [-128, 127])
def test_the_largest_products_stay_inside_int32(key: int, digit: int) -> None:
    high, others = max(digit, -127), digit  # the first digit has room for the carry of the others
    products = [jnp.full((1, 512), x, jnp.int32) @ jnp.full((512, 1), key, jnp.int32) for x in (high, others, others)]
    whole = 512 * key * ((high * 256 + others) * 256 + others)
    np.testing.assert_allclose(np.asarray(from_digits(products), np.float64), whole, rtol=2e-7)
    np.testing.assert_allclose(
        np.asarray(from_digits(products[:2]), np.float64), 512 * key * (high * 256 + others), rtol=1e-7
    )


@pytest.mark.parametrize(
    "sharpness, loud, int8_products, return_lse, bound",
    [
        (0.02, 1, True, True, 1.001),
        (8.0, 1, True, True, 1.001),
        (0.02, 1, True, False, 1.01),
        (8.0, 1, True, False, 1.01),
        (1.0, 300, True, False, 2.0),
        (8.0, 1, False, True, 1.001),
        (8.0, 1, False, False, 1.01),
        (1.0, 300, False, False, 1.01),
    ],
    ids=[
        "flat, digits",
        "peaked, digits",
        "flat, two digits",
        "peaked, two digits",
        "a loud channel, two digits",
        "peaked, terms",
        "peaked, two terms",
        "a loud channel, two terms",
    ],
)
def test_int8_error_is_no_worse_than_of_16_bit_attention(
    sharpness: float, loud: float, int8_products: bool, return_lse: bool, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`jax.nn` on the cache dequantised to 16 bits; though the weights have two terms. The LSE has no such excuse.

    `bound` is in units of the error of the exact result, rounded once. `loud` is how much larger one channel is.
    """
    small_tiles(monkeypatch, tile_bytes=1 << 17, int8_products=int8_products)
    rng = np.random.default_rng(1)
    channels = np.where(np.arange(HEAD_DIM) == 5, loud, 1)
    query = (channels * rng.normal(size=(BATCH, 1, HEADS, HEAD_DIM))).astype(ml_dtypes.bfloat16)
    key, value = (rng.integers(-128, 128, (BATCH, POSITIONS, KV_HEADS * HEAD_DIM)).astype(np.int8) for _ in range(2))
    key_scale, value_scale = rng.uniform(0.005, 0.02, (2, KV_HEADS, HEAD_DIM)).astype(np.float32)
    scale = sharpness * HEAD_DIM**-0.5

    def whole(cache: np.ndarray, factor: np.ndarray) -> np.ndarray:
        return cache.reshape(BATCH, POSITIONS, KV_HEADS, HEAD_DIM).astype(np.float64) * factor

    k, v = whole(key, key_scale), whole(value, value_scale)
    q = query.astype(np.float64).reshape(BATCH, KV_HEADS, -1, HEAD_DIM)
    scores = np.einsum("bkgd,bskd->bkgs", q, k) * scale
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    truth_lse = (np.log(weights.sum(-1)) + top[..., 0]).reshape(BATCH, HEADS, 1)
    truth = np.einsum("bkgs,bskd->bkgd", weights / weights.sum(-1, keepdims=True), v).reshape(query.shape)

    kwargs = dict(
        num_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        input_layout="BSH",
        scale_value=scale,
        antiquant_scale=np.stack([key_scale, value_scale]),
    )
    out, *lse = interpret((query.reshape(BATCH, 1, -1), key, value), kwargs, return_lse=return_lse)
    assert out.dtype == jnp.bfloat16
    with jax.numpy_dtype_promotion("standard"):
        theirs = jax.nn.dot_product_attention(
            *(jnp.asarray(x.astype(ml_dtypes.bfloat16)) for x in (query, k, v)), scale=scale
        )

    def error(got: jax.Array) -> float:
        return float(np.sqrt(np.mean(np.square(np.asarray(got, np.float64).reshape(truth.shape) - truth))))

    rounding = error(jnp.asarray(truth.astype(ml_dtypes.bfloat16)))
    assert error(out) <= error(theirs)
    assert error(out) <= bound * rounding
    if return_lse:
        np.testing.assert_allclose(np.asarray(*lse, np.float64), truth_lse, rtol=2e-6, atol=4e-6)
