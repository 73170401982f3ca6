"""Is the GPU kernel right on this device? Fresh random inputs, and NaN in everything that must not be read.

Each call is jitted, compared with the oracle in float64 by the tests' own tolerances, and called with caches whose dead
rows, and blocks of no sequence, are NaN (int8 has none).
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_ifa import incre_flash_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cases import Case, assert_close

LENGTHS = ("ragged", "zero", (1, 1))
HEADS = ((4, 4, 64), (8, 2, 128), (64, 1, 128), (12, 1, 80), (16, 2, 256), (16, 2, 512), (9, 3, 16))  # N, K, D


def check_cases(seed: int) -> list[Case]:
    """Dtypes x forms of the cache x head shapes, with features that take turns; then the largest B and S."""
    forms: list[dict[str, Any]] = [dict(layout=layout) for layout in ("BNSD", "BSND", "BSH")]
    forms += [dict(block=block) for block in (16, 32, 128, 512)] + [dict(block=64, layout="BSH")]
    features = itertools.cycle(
        [{}, dict(mask="2d"), dict(bias="batch"), dict(mask="4d:full", bias="shared"), dict(inner_precise=0)]
    )
    lengths = itertools.cycle(LENGTHS)
    cases: list[Case] = []
    for dtype, form, (heads, kv_heads, head_dim) in itertools.product(
        ("bfloat16", "float16", "int8", "int8 float32"), forms, HEADS
    ):
        kind, _, query = dtype.partition(" ")
        block = max(form.get("block", 0), 32) if kind == "int8" and "block" in form else form.get("block", 0)
        cases.append(
            Case(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                capacity=1028,
                dtype=query or ("bfloat16" if kind == "int8" else kind),
                int8=kind == "int8",
                lengths=next(lengths),
                seed=seed + len(cases),
                **next(features) | form | dict(block=block),
            )
        )
    large: list[dict[str, Any]] = [
        dict(batch=256, capacity=520),
        dict(batch=256, capacity=520, block=16),
        dict(batch=1, capacity=262144),
        dict(batch=1, capacity=262144, block=128),
        dict(batch=2, capacity=262144, block=16),
    ]
    for shape, int8 in itertools.product(large, (False, True)):
        block = max(shape["block"], 32) if int8 and "block" in shape else shape.get("block", 0)
        common = dict(heads=4, kv_heads=1, head_dim=64, dtype="bfloat16", int8=int8, seed=seed + len(cases))
        cases.append(Case(**common | shape | dict(block=block)))
    return cases


def small_cases(seed: int) -> list[Case]:
    """Two calls, for a dry run."""
    common = dict(batch=2, heads=2, kv_heads=1, capacity=72, seed=seed)
    return [Case(**common, dtype="bfloat16"), Case(**common, dtype="bfloat16", int8=True, block=32, mask="2d")]


def poisoned(case: Case, cache: np.ndarray, kwargs: dict[str, Any]) -> np.ndarray:
    """The cache with NaN wherever no sequence looks."""
    lengths = kwargs.get("actual_seq_lengths")
    if case.int8 or lengths is None or case.padding is not None:
        return cache
    lengths = np.broadcast_to(np.asarray(lengths), (case.batch,))
    spoilt = np.full_like(cache, np.nan)
    heads_first = cache.ndim == 4 and case.layout == "BNSD"
    for b, length in enumerate(lengths):
        for first in range(0, length, case.block or case.capacity):
            page = kwargs["block_table"][b, first // case.block] if case.block else b
            rows = slice(0, min(length - first, case.block or length))
            index = (page, slice(None), rows) if heads_first else (page, rows)
            spoilt[index] = cache[index]
    return spoilt


def attend(kwargs: dict[str, Any]) -> Any:
    """The kernel, by name."""
    return lambda *args: incre_flash_attention(*args, implementation="mosaic_gpu", return_lse=True, **kwargs)


def check(seed: int, *, dry_run: bool) -> int:
    """Every case once, and some under vmap; returns how many calls were right.

    Raises:
      AssertionError: one was not; it names the case and the seed.
    """
    cases = small_cases(seed) if dry_run else check_cases(seed)
    for case in tqdm(cases, desc=f"against the oracle, seed {seed}"):
        (query, key, value), kwargs = case.inputs()
        args = query, poisoned(case, key, kwargs), poisoned(case, value, kwargs)
        try:
            assert_close(*jax.jit(attend(kwargs))(*args), (query, key, value), kwargs)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
        jax.clear_caches()
    return len(cases) + check_vmap(dataclasses.replace(cases[0], seed=seed, batch=2))


def check_vmap(case: Case) -> int:
    """Two queries at one cache, two caches for one query; returns how many calls."""
    args, kwargs = case.inputs()
    for mapped in ((0, None, None), (None, 0, 0)):
        stacked = [a if axis is None else np.stack([a, a[::-1]]) for a, axis in zip(args, mapped, strict=True)]
        out, lse = jax.jit(jax.vmap(attend(kwargs), in_axes=mapped))(*map(jnp.asarray, stacked))
        for i in range(2):
            one = tuple(a if axis is None else a[i] for a, axis in zip(stacked, mapped, strict=True))
            assert_close(out[i], lse[i], one, kwargs)
    return 2
