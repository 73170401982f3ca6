"""The error against float64, beside that of `jax.nn.dot_product_attention` on the same inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, run_reference

from jax_ifa import incre_flash_attention

SHAPES = [(2, 8, 2, 500, 64), (1, 4, 4, 300, 128), (3, 6, 1, 129, 96)]


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("inner_precise", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_jax_nn(dtype: str, shape: tuple[int, ...], inner_precise: int) -> None:
    b, n, k, s, d = shape
    rng = np.random.default_rng(1)
    query = rng.normal(size=(b, 1, n, d)).astype(DTYPES[dtype])
    key, value = (rng.normal(size=(b, s, k, d)).astype(DTYPES[dtype]) for _ in range(2))
    lengths = np.linspace(s // 3, s, b).astype(np.int32)
    kwargs = dict(
        num_heads=n,
        num_key_value_heads=k,
        input_layout="BSND",
        scale_value=d**-0.5,
        actual_seq_lengths=lengths,
        inner_precise=inner_precise,
    )
    exact, _ = run_reference((query, key, value), kwargs)
    ours = np.asarray(incre_flash_attention(query, key, value, **kwargs), np.float64)
    with jax.numpy_dtype_promotion("standard"):  # theirs needs it
        theirs = jax.nn.dot_product_attention(
            jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), key_value_seq_lengths=jnp.asarray(lengths)
        )
    print(f"{rms(ours - exact) / rms(np.asarray(theirs, np.float64) - exact):.3f} of the error of jax.nn")
    assert rms(ours - exact) <= rms(np.asarray(theirs, np.float64) - exact)
