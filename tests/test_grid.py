"""Every implementation against the oracle, over every feature and their combinations."""

import itertools

import jax
import pytest
from cases import IMPLEMENTATIONS_HERE, Case, assert_close

from jax_ifa import incre_flash_attention

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


def grid() -> list[Case]:
    """Layout x cache form x dtype x features, then what is worth a case of its own."""
    cases = []
    for layout, cache, dtype, (name, feature) in itertools.product(
        ("BSH", "BNSD", "BSND"), CACHES, ("float32", "bfloat16", "float16"), FEATURES.items()
    ):
        if cache == "paged_flat" and layout != "BNSD":
            continue  # the other layouts' paged caches are flat already
        for int8 in (False, True):
            parts = dict(CACHES[cache]) | dict(layout=layout, dtype=dtype, int8=int8) | feature
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
        cases.append(Case(quant=quant, dtype=dtype, int8=True, block=32, offset=True, mask="3d:full", lengths="zero"))
        cases.append(Case(quant=quant, dtype=dtype, layout="BSH", block=16, mask="2d", bias="shared"))
        cases.append(Case(quant=quant, dtype=dtype, layout="BSND", int8=True, bias="batch", padding=3))
    cases += [Case(capacity=s, lengths=None) for s in (1, 2, 127, 128, 129, 255, 700)]
    cases += [Case(capacity=s, block=b, batch=3) for s, b in ((33, 16), (700, 16), (700, 48), (1000, 512), (600, 1024))]
    cases += [Case(inner_precise=0, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    return list(dict.fromkeys(cases))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS_HERE)
@pytest.mark.parametrize("case", grid(), ids=str)
def test_against_oracle(case: Case, implementation: str) -> None:
    args, kwargs = case.inputs()
    call = jax.jit(
        lambda q, k, v: incre_flash_attention(q, k, v, implementation=implementation, return_lse=True, **kwargs)
    )
    assert_close(*call(*args), args, kwargs)


@pytest.mark.parametrize("case", [Case(layout=x, lengths="ragged") for x in ("BNSD", "BSND")], ids=str)
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS_HERE])
def test_where_python_numbers_have_64_bits(implementation: str | None, case: Case) -> None:
    with jax.enable_x64(True):
        args, kwargs = case.inputs()
        result = incre_flash_attention(*args, implementation=implementation, return_lse=True, **kwargs)
    assert_close(*result, args, kwargs)
