"""Every implementation against the oracle, over every feature and their combinations."""

import itertools

import jax
import pytest
from cases import Case, assert_close

from jax_ifa import incre_flash_attention
from jax_ifa.dispatch import implementation_names

CACHES = {
    "contiguous": dict(),
    "paged": dict(block=16),
    "paged_flat": dict(block=16, flat_pages=True),
    "paged_large": dict(block=64, capacity=150),
}
FEATURES = {
    "plain": dict(),
    "mask": dict(mask="4d"),
    "bias": dict(bias="batch"),
    "mask_bias": dict(mask="2d:int8", bias="shared"),
    "fully_masked": dict(mask="3d:uint8:full", lengths="zero"),
}
QUANT = {"": dict(), "out_int8": dict(quant="channel_offset")}


def grid() -> list[Case]:
    """Layout x cache form x dtype x features x output, then what is worth a case of its own."""
    cases = []
    for layout, cache, dtype, (name, feature), quant in itertools.product(
        ("BSH", "BNSD", "BSND"), CACHES, ("float32", "bfloat16", "float16"), FEATURES.items(), QUANT.values()
    ):
        if cache == "paged_flat" and layout != "BNSD":
            continue  # the other layouts' paged caches are flat already
        for int8 in (False, True):
            parts = dict(CACHES[cache]) | dict(layout=layout, dtype=dtype, int8=int8) | feature | quant
            if int8:
                parts |= dict(offset=name != "plain", antiquant="flat" if layout == "BSH" else "channel")
                if cache.startswith("paged") and parts["block"] % 32:
                    parts["block"] = 32
            cases.append(Case(**parts))
    heads = [(1, 1), (8, 8), (8, 1), (9, 3), (64, 1), (5, 5)]
    dims = [1, 7, 64, 80, 96, 128, 512]
    cases += [Case(heads=n, kv_heads=k, int8=int8, capacity=20) for n, k in heads for int8 in (False, True)]
    cases += [Case(head_dim=d, layout=layout, capacity=20) for d in dims for layout in ("BSH", "BNSD")]
    for lengths, padding in itertools.product((None, "ragged", "one", "zero", (48, 1)), (None, 0, 5, 48, 60)):
        cases.append(Case(lengths=lengths, padding=padding, mask="2d", bias="shared", layout="BSND"))
    for shape, kind, offset in itertools.product(
        ("tensor", "channel", "flat", "4d", "4d_bsnd"), ("float16", "float32"), (False, True)
    ):
        cases.append(Case(int8=True, dtype="float16", antiquant=shape, antiquant_dtype=kind, offset=offset))
    for quant, dtype in itertools.product(
        ("tensor", "channel", "tensor_offset", "channel_offset"), ("float32", "bfloat16", "float16")
    ):
        cases.append(Case(quant=quant, dtype=dtype))
    cases += [Case(capacity=s, lengths=None) for s in (1, 2, 127, 128, 129, 255, 700)]
    cases += [Case(capacity=s, block=b, batch=3) for s, b in ((33, 16), (700, 16), (700, 48), (1000, 512), (600, 1024))]
    cases += [Case(inner_precise=0, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    return list(dict.fromkeys(cases))


# The kernels of other platforms have tests of their own, under JAX's interpreters.
HERE = [name for name in implementation_names() if not name.startswith("mosaic")]


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("case", grid(), ids=str)
def test_against_oracle(case: Case, implementation: str) -> None:
    args, kwargs = case.inputs()
    call = jax.jit(
        lambda q, k, v: incre_flash_attention(q, k, v, implementation=implementation, return_lse=True, **kwargs)
    )
    assert_close(*call(*args), args, kwargs)
