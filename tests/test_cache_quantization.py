"""int8 caches: rounding to the nearest stored value, and scales calibrated from data."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_model import LAYOUTS, in_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jax_ifa import antiquantize
from jax_ifa.cache import ContiguousCache, calibrate_antiquant, quantize_kv
from jax_ifa.cache.calibration import SMALLEST_SCALE

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def by_hand(values, scale, offset):
    """float64, so that rounding is visible where it matters."""
    exact = values.astype(np.float64) / scale - offset
    return np.clip(np.rint(exact), -128, 127)


def test_quantize_by_hand():
    scale, offset = jnp.float32(0.5), jnp.float32(3.0)
    values = jnp.array([0.0, 1.5, 1.75, 2.25, 2.75, 65.0, 64.75, -62.5, 1e30, -1e30, jnp.inf, -jnp.inf, jnp.nan])
    got = quantize_kv(values, scale, offset)
    assert got.dtype == jnp.int8
    assert got.tolist() == [-3, 0, 0, 2, 2, 127, 126, -128, 127, -128, 127, -128, 0]  # ties go to even
    assert quantize_kv(jnp.array([0.25, 0.75, -0.25]), scale).tolist() == [0, 2, 0]


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16))
def test_quantize_narrow_values_in_float32(dtype):
    values = jnp.linspace(-6, 6, 1001).astype(dtype)
    scale, offset = jnp.float32(0.0473), jnp.float32(-7.25)
    want = by_hand(np.asarray(values.astype(jnp.float32)), np.float64(scale), np.float64(offset))
    assert (np.asarray(quantize_kv(values, scale, offset)) == want).all()


def test_quantize_every_integer_comes_back():
    integers = jnp.arange(-128, 128, dtype=jnp.int8)
    for scale, offset in ((0.1, 0.0), (1.7e-3, 11.0), (3e4, -0.375), (2.0**-120, 2.0**14)):
        scale, offset = jnp.float32(scale), jnp.float32(offset)
        assert (quantize_kv(antiquantize(integers, scale, offset), scale, offset) == integers).all()


def assert_restored(values, scale, offset, low, high):
    """|v - v'| <= scale / 2 for every value in [low, high], and float32 rounding."""
    restored = np.asarray(antiquantize(quantize_kv(values, scale, offset), scale, offset), np.float64)
    values, scale = np.asarray(values, np.float64), np.asarray(scale, np.float64)
    rounding = 2.0**-22 * np.maximum(np.abs(low), np.abs(high)) + 2.0**-126  # or flushed subnormals
    assert (np.abs(restored - values) <= scale / 2 * (1 + 2.0**-6) + rounding).all()


@settings(max_examples=150)
@given(
    data=hnp.arrays(np.float32, (2, 2, 3, 4), elements=FLOATS),
    symmetric=st.booleans(),
    per_tensor=st.booleans(),
    headroom=st.sampled_from((1.0, 1.5, 3.0)),
)
def test_every_sample_is_restored(data, symmetric, per_tensor, headroom):
    """Constant, zero, tiny and huge channels included: B=1, K=2, T=3, D=4 for key and value."""
    key, value = data[:, None]
    scale, offset = calibrate_antiquant(key, value, symmetric=symmetric, per_tensor=per_tensor, headroom=headroom)
    assert np.isfinite(scale).all()
    assert (np.asarray(scale) >= SMALLEST_SCALE).all()  # and so safe where subnormal numbers are flushed to 0
    chex.assert_shape(scale, (2,) if per_tensor else (2, 2, 4))
    if symmetric:
        assert offset is None
        offset = jnp.zeros_like(scale)
    assert (np.abs(offset) <= 2.0**15).all()
    shape = (2, 1, 1, 1) if per_tensor else (2, 2, 1, 4)
    axes = (1, 2, 3) if per_tensor else (2,)
    low, high = data.min(axes, keepdims=True), data.max(axes, keepdims=True)
    assert_restored(jnp.asarray(data), scale.reshape(shape), offset.reshape(shape), low, high)


def test_the_algebra():
    key = jnp.stack([jnp.linspace(-2, 6, 17), jnp.linspace(-8, 1, 17)])[None, :, :, None]  # B=1, K=2, T=17, D=1
    scale, offset = calibrate_antiquant(key, key, headroom=1.5)
    chex.assert_trees_all_close(scale[0, :, 0], jnp.array([9.0, 12.0]) / 127)
    assert offset is None
    scale, offset = calibrate_antiquant(key, key, symmetric=False)
    chex.assert_trees_all_close(scale[1, :, 0], jnp.array([4.0, 4.5]) / 127)
    chex.assert_trees_all_close(offset[1, :, 0], jnp.array([2.0, -3.5]) / scale[1, :, 0], rtol=1e-6)
    integers = quantize_kv(key, scale[0][None, :, None], offset[0][None, :, None])
    assert (int(integers.min()), int(integers.max())) == (-127, 127)


def test_channels_that_do_not_vary():
    key = jnp.zeros((1, 1, 5, 3)).at[..., 1].set(-7.5).at[..., 2].set(1e-38)
    for symmetric in (True, False):
        scale, offset = calibrate_antiquant(key, key, symmetric=symmetric)
        offset = jnp.zeros_like(scale) if offset is None else offset
        parameters = scale[:1, :, None], offset[:1, :, None]
        restored = antiquantize(quantize_kv(key, *parameters), *parameters)
        assert scale[0, 0, 0] == 1.0
        assert not restored[..., 0].any()
        chex.assert_trees_all_close(restored[..., 1], key[..., 1], rtol=2.0**-16)


def test_the_widest_range_does_not_overflow():
    largest = float(jnp.finfo(jnp.float32).max)
    key = jnp.array([-largest, largest, 0.0])[None, None, :, None]
    scale, offset = calibrate_antiquant(key, key, symmetric=False)
    chex.assert_trees_all_close(scale, jnp.full((2, 1, 1), largest / 127))
    assert not offset.any()
    assert quantize_kv(key, scale[:1, :, None], offset[:1, :, None]).ravel().tolist() == [-127, 127, 0]


def test_an_offset_is_finer_off_zero():
    key = 10 + jax.random.normal(jax.random.key(0), (1, 2, 64, 8))
    symmetric, _ = calibrate_antiquant(key, key)
    asymmetric, _ = calibrate_antiquant(key, key, symmetric=False)
    assert (asymmetric < symmetric / 3).all()


@pytest.mark.parametrize("symmetric", (True, False))
def test_layouts_and_leading_axes(symmetric):
    tokens = jax.random.normal(jax.random.key(0), (6, 5, 2, 4))  # (B, T, K, D)
    want = calibrate_antiquant(tokens, 2 * tokens, input_layout="BSND", symmetric=symmetric)
    for layout in LAYOUTS:
        new = in_layout(tokens, layout)
        for sample in (new, new.reshape(2, 3, *new.shape[1:])):
            got = calibrate_antiquant(sample, 2 * sample, input_layout=layout, num_kv_heads=2, symmetric=symmetric)
            chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_close(want[0][1], 2 * want[0][0])
    no_batch = calibrate_antiquant(tokens.reshape(30, 2, 4), 2 * tokens.reshape(30, 2, 4), input_layout="BSND")
    chex.assert_trees_all_equal(no_batch[0], calibrate_antiquant(tokens, 2 * tokens, input_layout="BSND")[0])


@pytest.mark.parametrize("symmetric", (True, False))
def test_padding_is_not_calibrated_on(symmetric):
    key = jax.random.normal(jax.random.key(0), (3, 2, 6, 4))
    counts = np.array([6, 2, 0])
    padded = jnp.where(np.arange(6)[None, None, :, None] < counts[:, None, None, None], key, jnp.nan)
    real = jnp.concatenate([key[0], key[1, :, :2]], axis=1)[None]
    want = calibrate_antiquant(real, real, symmetric=symmetric)
    chex.assert_trees_all_equal(calibrate_antiquant(padded, padded, counts=counts, symmetric=symmetric), want)
    jitted = jax.jit(lambda key, counts: calibrate_antiquant(key, key, counts=counts, symmetric=symmetric))
    chex.assert_trees_all_close(jitted(padded, counts), want, rtol=1e-6)


def test_a_prompt_calibrates_its_own_cache():
    """bfloat16 keys with a large bias, as real ones have: int8 with an offset keeps the attention scores."""
    key = (jax.random.normal(jax.random.key(0), (2, 4, 24, 16)) + 6).astype(jnp.bfloat16)
    scale, offset = calibrate_antiquant(key, key, symmetric=False)
    kv = ContiguousCache.create(2, 32, 4, 16, jnp.int8, antiquant_scale=scale, antiquant_offset=offset)
    kv = kv.append(key, key, [0, 0])
    restored = antiquantize(kv.value[:, :, :24], scale[None, 1, :, None], offset[None, 1, :, None])
    error = jnp.abs(restored - key.astype(jnp.float32))
    assert (error <= 0.505 * scale[None, 1, :, None]).all()
    assert float(error.max()) < 0.02


@pytest.mark.parametrize(
    "error, match, given",
    (
        (ValueError, "input_layout names the axes", dict(input_layout="SBH")),
        (ValueError, "needs num_kv_heads", dict(input_layout="BSH")),
        (ValueError, r"\(..., T, K\*D\) with K = 3", dict(input_layout="BSH", num_kv_heads=3)),
        (ValueError, "key has num_kv_heads heads: expected 3, got 2", dict(num_kv_heads=3)),
        (ValueError, "expected a factor of at least 1, got 0.5", dict(headroom=0.5)),
        (ValueError, "a factor of at least 1", dict(headroom=float("nan"))),
        (ValueError, r"counts has one shape: expected shape \(1,\)", dict(counts=[1, 2])),
        (ValueError, "how many tokens to look at: expected 0 to 4", dict(counts=[5])),
        (ValueError, "calibration needs data", dict(counts=[0])),
        (TypeError, "counts must hold integers", dict(counts=[1.0])),
        (ValueError, "value has the shape of key", dict(value=np.ones((1, 2, 5, 8), np.float32))),
        (TypeError, "value is a sample of the values to quantise", dict(value=np.ones((1, 2, 4, 8), np.int8))),
        (ValueError, "value is a sample to calibrate on", dict(value=np.full((1, 2, 4, 8), np.nan, np.float32))),
        (ValueError, "key in BNSD: expected", dict(key=np.ones((4, 8), np.float32))),
    ),
)
def test_mistakes_raise(error, match, given):
    sample = np.ones((1, 2, 4, 8), np.float32)
    with pytest.raises(error, match=match):
        calibrate_antiquant(**({"key": sample, "value": sample} | given))


def test_a_traced_sample_that_is_not_finite_is_not_hidden():
    key = jnp.ones((1, 1, 2, 2)).at[0, 0, 0, 0].set(jnp.nan)
    scale, _ = jax.jit(calibrate_antiquant)(key, key)
    assert np.isnan(scale[:, 0, 0]).all()
    with pytest.raises(ValueError, match="antiquant_scale divides"):
        ContiguousCache.create(1, 8, 1, 2, jnp.int8, antiquant_scale=scale)
