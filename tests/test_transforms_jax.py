"""The function under JAX's own transforms: jit, vmap, scan, while_loop, grad, checkpoint, export."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IMPLEMENTATIONS_HERE, Case, run_reference

import jax_ifa
from jax_ifa import dispatch, incre_flash_attention
from jax_ifa.dense import attend_dense

Call = dict[str, Any]

SMALL = dict(batch=2, heads=4, kv_heads=2, head_dim=16, capacity=32)
CASES = {
    "contiguous": Case(**SMALL, mask="2d", bias="batch", lengths=(20, 7), padding=3),
    "paged": Case(**SMALL, block=16, mask="3d", bias="shared", lengths=(32, 7)),
    "int8": Case(**SMALL, layout="BSND", int8=True, offset=True, lengths=(32, 7), quant="channel_offset"),
    "paged_int8": Case(**SMALL | dict(capacity=64), block=32, layout="BSH", int8=True, offset=True, lengths=(40, 7)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def call_of(case: Case) -> Call:
    """Keyword arguments with every array in its final form, so that any of them can be mapped or traced."""
    (query, key, value), kwargs = case.inputs()
    call = dict(query=query, key=key, value=value) | kwargs
    call["actual_seq_lengths"] = np.array(call["actual_seq_lengths"], np.int32)
    call["scale_value"] = np.float32(call["scale_value"])
    return call


def arrays_in(call: Call) -> Call:
    return {name: x for name, x in call.items() if isinstance(x, np.ndarray | np.generic | jax.Array)}


def run(call: Call, **changes: Any) -> tuple[jax.Array, jax.Array]:
    rest = call | changes
    return incre_flash_attention(rest.pop("query"), rest.pop("key"), rest.pop("value"), return_lse=True, **rest)


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """The same numbers up to the order of float32 sums; int8 results may then differ by one next to a tie."""

    def compare(a: Any, b: Any) -> None:
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        if a.dtype == np.int8:
            difference = np.abs(a.astype(int) - b)
            assert difference.max(initial=0) <= 1
            assert np.mean(difference) < 0.01
        else:
            np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, actual, expected)


# --- jit ---


@each_case
def test_jit_equals_eager(case: Case) -> None:
    call = call_of(case)
    assert_same(jax.jit(lambda arrays: run(call, **arrays))(arrays_in(call)), run(call))


@each_case
def test_values_do_not_retrace_under_jit(case: Case) -> None:
    call = call_of(case)
    step = jax.jit(chex.assert_max_traces(lambda arrays: run(call, **arrays), 1))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        changed = {name: x if x.ndim == 0 else rng.permuted(x, axis=-1) for name, x in arrays_in(call).items()}
        assert_same(step(changed), run(call, **changed))
    chex.clear_trace_counter()


def test_values_do_not_retrace_in_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    original = dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda *args: (traces.append(1), original(*args))[1])
    call = call_of(Case(**SMALL | dict(head_dim=48), block=32, int8=True, offset=True, mask="2d", lengths=(9, 32)))
    table, scale = call["block_table"], call["antiquant_scale"]
    for changes in (
        dict(),
        dict(actual_seq_lengths=[3, 4]),
        dict(actual_seq_lengths=(32, 0)),
        dict(actual_seq_lengths=jnp.array([5, 6])),
        dict(actual_seq_lengths=np.array([5, 6])),
        dict(block_table=table[::-1]),
        dict(atten_mask=~call["atten_mask"]),
        dict(antiquant_scale=scale * np.float32(2), antiquant_offset=-call["antiquant_offset"]),
        dict(scale_value=0.5),
        dict(scale_value=2),
        dict(scale_value=jnp.float32(3)),
        dict(kv_padding_size=None),
        dict(kv_padding_size=4),  # a paged call ignores it
    ):
        run(call, **changes)
    assert len(traces) == 1

    traces.clear()
    call = call_of(Case(**SMALL | dict(head_dim=48), padding=3, lengths=(5, 6)))
    for padding in (np.array([3]), [4], jnp.array([-1]), np.array([2**40])):
        run(call, kv_padding_size=padding)
    assert len(traces) == 1


@each_case
def test_abstract_evaluation(case: Case) -> None:
    call = call_of(case)
    out, lse = jax.eval_shape(lambda arrays: run(call, **arrays), arrays_in(call))
    actual_out, actual_lse = run(call)
    chex.assert_trees_all_equal_shapes_and_dtypes((out, lse), (actual_out, actual_lse))
    assert out.shape == call["query"].shape
    assert out.dtype == (jnp.int8 if case.quant else call["query"].dtype)
    assert lse.shape == (case.batch, case.heads, 1)
    assert lse.dtype == jnp.float32
    jaxpr = jax.make_jaxpr(lambda arrays: run(call, **arrays))(arrays_in(call))
    assert [v.aval.shape for v in jaxpr.jaxpr.outvars] == [out.shape, lse.shape]
    assert not jaxpr.effects


# --- vmap ---


def stack(call: Call, names: tuple[str, ...], size: int, axis: int = 0) -> Call:
    """Each named array `size` times with different contents, along a new axis."""
    rng = np.random.default_rng(len(names))
    stacked = {}
    for name in names:
        x = np.asarray(call[name])
        if name == "scale_value":
            versions = [x * np.float32(1 + i) for i in range(size)]
        elif name == "actual_seq_lengths":
            versions = [np.maximum(x - i, 0) for i in range(size)]
        elif name == "block_table":  # other blocks, some shared
            versions = [np.roll(x, i) for i in range(size)]
        elif name == "kv_padding_size":
            versions = [x + np.int32(i) for i in range(size)]
        else:
            versions = [x, *(rng.permuted(x, axis=-1) for _ in range(size - 1))]
        stacked[name] = np.stack(versions, axis=min(axis, x.ndim))
    return stacked


def loop(call: Call, stacked: Call, size: int, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What vmap must give, one example after the other."""
    results = []
    for i in range(size):
        example = {name: np.take(x, i, axis=min(axis, x.ndim - 1)) for name, x in stacked.items()}
        results.append(run(call, **example))
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *results)


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [chosen for n in range(1, len(names) + 1) for chosen in itertools.combinations(names, n)]


MAPPED = {
    "contiguous": ("query", "key", "value", "actual_seq_lengths", "atten_mask", "pse_shift"),
    "paged": ("query", "key", "value", "block_table", "pse_shift"),
    "paged_int8": ("query", "key", "value", "antiquant_scale"),
}


@pytest.mark.parametrize(
    ("name", "chosen"),
    [(name, chosen) for name, names in MAPPED.items() for chosen in subsets(names)],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
def test_vmap_over_any_subset_is_the_loop(name: str, chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The subset decides how axes are folded into the batch, and nothing about the decode loop: here that is the dense
    one, operation by operation, which compiles nothing. The tests below fold in every way around the real one.
    """
    monkeypatch.setattr(dispatch, "run", lambda operands, implementation: attend_dense(operands))
    call = call_of(CASES[name])
    stacked = stack(call, chosen, 3)
    with jax.disable_jit():
        assert_same(jax.vmap(lambda arrays: run(call, **arrays))(stacked), loop(call, stacked, 3))


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("contiguous", ("query",)),
        ("contiguous", ("key", "atten_mask")),
        ("contiguous", ("value", "pse_shift")),
        ("contiguous", ("key", "value")),
        ("paged", ("block_table",)),
        ("paged", ("key", "block_table")),
        ("contiguous", ("kv_padding_size",)),
        ("contiguous", ("scale_value", "kv_padding_size", "actual_seq_lengths")),
        ("paged", ("atten_mask",)),
        ("paged", ("pse_shift", "query")),
        ("paged", ("actual_seq_lengths", "scale_value")),
        ("int8", ("quant_scale2", "quant_offset2", "antiquant_offset")),
        ("paged_int8", ("query", "value", "antiquant_offset")),
        ("paged_int8", ("key", "block_table", "antiquant_scale")),
    ],
)
def test_vmap_over_the_other_arguments(name: str, chosen: tuple[str, ...]) -> None:
    call = call_of(CASES[name])
    stacked = stack(call, chosen, 2)
    assert_same(jax.vmap(lambda arrays: run(call, **arrays))(stacked), loop(call, stacked, 2))


@each_case
def test_vmap_over_everything(case: Case) -> None:
    call = call_of(case)
    stacked = stack(call, tuple(arrays_in(call)), 2)
    assert_same(jax.vmap(jax.jit(lambda arrays: run(call, **arrays)))(stacked), loop(call, stacked, 2))


@pytest.mark.parametrize("mapped", [("key", "value"), ("key", "block_table")], ids="+".join)
def test_vmap_never_leads_into_the_blocks_of_another_example(mapped: tuple[str, ...]) -> None:
    """A traced block id out of range is clamped to the example's own blocks."""
    call = call_of(CASES["paged"])
    call["block_table"] = np.array([[0, 99], [-1, 2**31 - 1]], np.int32)
    stacked = stack(call, mapped, 3)
    tables = {"block_table": stacked.pop("block_table", np.stack([call["block_table"]] * 3))}
    clamped = {"block_table": np.clip(tables["block_table"], 0, len(call["key"]) - 1)}
    actual = jax.jit(jax.vmap(lambda arrays: run(call, **arrays)))(stacked | tables)
    assert_same(actual, loop(call, stacked | clamped, 3))
    if "block_table" not in mapped:
        shared = jax.jit(
            jax.vmap(lambda arrays, table: run(call | dict(block_table=table), **arrays), in_axes=(0, None))
        )
        assert_same(shared(stacked, call["block_table"]), loop(call, stacked | clamped, 3))


def test_vmap_along_any_axis() -> None:
    call = call_of(CASES["paged"])
    names = ("query", "key", "block_table", "pse_shift", "actual_seq_lengths")
    for axis in (1, 2, 4):
        stacked = stack(call, names, 3, axis)
        in_axes = ({name: min(axis, np.ndim(call[name])) for name in names},)
        out, lse = jax.jit(jax.vmap(lambda arrays: run(call, **arrays), in_axes=in_axes, out_axes=(-1, 1)))(stacked)
        expected_out, expected_lse = loop(call, stacked, 3, axis)
        assert_same(out, np.moveaxis(expected_out, 0, -1))
        assert_same(lse, np.moveaxis(expected_lse, 0, 1))


@pytest.mark.parametrize(
    ("name", "outer", "inner"),
    [
        ("contiguous", ("query",), ("query", "actual_seq_lengths")),
        ("contiguous", ("key", "atten_mask"), ("value", "pse_shift")),
        ("contiguous", ("atten_mask", "value"), ("atten_mask", "query")),
        ("paged", ("block_table",), ("query", "value")),
        ("paged", ("value", "pse_shift"), ("key",)),
        ("paged", ("key", "query"), ("block_table", "actual_seq_lengths")),
        ("paged_int8", ("antiquant_scale",), ("key", "value")),
    ],
)
def test_nested_vmap(name: str, outer: tuple[str, ...], inner: tuple[str, ...]) -> None:
    call = call_of(CASES[name])
    inner_stack = stack(call, inner, 2)
    both = {n: np.stack([inner_stack[n], np.roll(inner_stack[n], 1, axis=-1)]) for n in outer if n in inner}
    only_outer = stack(call, tuple(n for n in outer if n not in inner), 2)
    only_inner = {n: x for n, x in inner_stack.items() if n not in outer}

    @jax.jit
    def nested(both: Call, only_outer: Call, only_inner: Call) -> Any:
        def one(both: Call, only_outer: Call, only_inner: Call) -> Any:
            return run(call, **both, **only_outer, **only_inner)

        return jax.vmap(jax.vmap(one, in_axes=(0, None, 0)), in_axes=(0, 0, None))(both, only_outer, only_inner)

    expected = [
        loop(call | {n: x[i] for n, x in only_outer.items()}, {n: x[i] for n, x in both.items()} | only_inner, 2)
        for i in range(2)
    ]
    assert_same(nested(both, only_outer, only_inner), jax.tree.map(lambda *xs: np.stack(xs), *expected))


def test_vmap_over_sequences_is_the_batch() -> None:
    """A function written for one sequence, mapped, is the batched call."""
    call = call_of(Case(**SMALL, mask="2d", bias="batch", lengths=(20, 7)))
    names = ("query", "key", "value", "atten_mask", "pse_shift", "actual_seq_lengths")
    one = {n: x[:, None] for n, x in arrays_in(call).items() if n in names}
    out, lse = jax.vmap(lambda arrays: run(call, **arrays))(one)
    assert_same((out[:, 0], lse[:, 0]), run(call))


@pytest.mark.parametrize("name", ["contiguous", "paged", "int8"])
@pytest.mark.parametrize(
    "mapped", [("query",), ("key",), ("value",), ("query", "actual_seq_lengths"), ("key", "value")], ids="+".join
)
def test_vmap_does_not_copy_what_is_not_mapped(
    name: str, mapped: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One loop, on the caches as they are: size x pages where mapped, the same pages for all where not."""
    calls = []
    module = importlib.import_module("jax_ifa.attend")  # jax_ifa.attend is the function in it
    fold = module.fold_into_batch
    monkeypatch.setattr(module, "fold_into_batch", lambda *args: (calls.append(fold(*args)), calls[-1])[1])
    call = call_of(CASES[name])
    size = 5
    stacked = stack(call, mapped, size)
    jaxpr = jax.make_jaxpr(jax.vmap(lambda arrays: run(call, **arrays)))(stacked)
    (folded,) = calls
    pages = call["key"].shape[0]
    assert folded.query.shape[0] == size * 2
    assert folded.kv.key.shape[0] == (size * pages if "key" in mapped else pages)
    assert folded.kv.value.shape[0] == (size * pages if "value" in mapped else pages)
    for rows, full in ((folded.mask, call.get("atten_mask")), (folded.bias, call.get("pse_shift"))):
        assert (rows is None) == (full is None)
        assert rows is None or rows.shape[0] == full.shape[0]
    assert jaxpr.out_avals[0].shape == (size, *call["query"].shape)


@pytest.mark.parametrize("block", [0, 16], ids=["contiguous", "paged"])
def test_vmap_needs_no_memory_for_an_unmapped_cache(block: int) -> None:
    heads, head_dim, capacity, size = 2, 64, 65536, 8
    shape = (capacity // block, heads, block, head_dim) if block else (1, heads, capacity, head_dim)
    cache = jax.ShapeDtypeStruct(shape, jnp.float32)
    queries = jax.ShapeDtypeStruct((size, 1, heads, 1, head_dim), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    table = jax.ShapeDtypeStruct((1, capacity // block), jnp.int32) if block else None

    def mapped(queries: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, table: Any) -> Any:
        arguments = dict(num_heads=heads, input_layout="BNSD", actual_seq_lengths=lengths)
        arguments |= dict(block_table=table, block_size=block)
        return jax.vmap(lambda query: incre_flash_attention(query, key, value, **arguments))(queries)

    memory = jax.jit(mapped).lower(queries, cache, cache, lengths, table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * np.prod(shape) * 4


# --- control flow ---


def test_scan_decodes_token_by_token() -> None:
    """A decode loop under scan, with the cache as its carry, gives what the finished cache gives for every prefix."""
    call = call_of(Case(**SMALL, lengths=(1, 1)))
    steps = 6
    queries = np.random.default_rng(1).normal(size=(steps, *call["query"].shape)).astype(np.float32)

    def step(carry: Any, query: jax.Array) -> Any:
        key, value, length = carry
        new_key = jax.lax.dynamic_slice_in_dim(call["key"], length, 1, axis=2)
        new_value = jax.lax.dynamic_slice_in_dim(call["value"], length, 1, axis=2)
        key = jax.lax.dynamic_update_slice_in_dim(key, new_key, length, axis=2)
        value = jax.lax.dynamic_update_slice_in_dim(value, new_value, length, axis=2)
        length = length + 1
        return (key, value, length), run(call, query=query, key=key, value=value, actual_seq_lengths=length[None])

    empty = jnp.full(call["key"].shape, jnp.nan)  # what is not written yet is not read
    _, (outs, lses) = jax.jit(lambda queries: jax.lax.scan(step, (empty, empty, jnp.int32(0)), queries))(queries)
    for t in range(steps):
        assert_same((outs[t], lses[t]), run(call, query=queries[t], actual_seq_lengths=[t + 1]))


def test_while_loop_with_a_growing_length() -> None:
    call = call_of(Case(**SMALL, block=16, lengths=(1, 1)))

    @jax.jit
    def total(limit: jax.Array) -> jax.Array:
        def body(state: Any) -> Any:
            t, lengths, summed = state
            out, _ = run(call, actual_seq_lengths=lengths)
            return t + 1, lengths + jnp.array([1, 3], jnp.int32), summed + out

        start = (jnp.int32(0), jnp.zeros(2, jnp.int32), jnp.zeros(call["query"].shape))
        return jax.lax.while_loop(lambda state: state[0] < limit, body, start)[2]

    expected = sum(np.asarray(run(call, actual_seq_lengths=[t, 3 * t])[0]) for t in range(8))
    assert_same(total(8), expected, 1e-5)


def test_cond_and_map() -> None:
    call = call_of(CASES["int8"])
    stacked = stack(call, ("query", "actual_seq_lengths"), 3)
    one = jax.jit(lambda arrays: run(call, **arrays))
    assert_same(jax.lax.map(one, stacked), loop(call, stacked, 3))
    branch = jax.jit(lambda flag: jax.lax.cond(flag, lambda: run(call), lambda: run(call, actual_seq_lengths=[0, 0])))
    assert_same(branch(True), run(call))
    assert_same(branch(False), run(call, actual_seq_lengths=[0, 0]))


# --- grad ---

DIFFERENTIABLE = ("query", "key", "value", "pse_shift", "antiquant_scale", "antiquant_offset", "scale_value")

GRADIENT_CASES = {
    "plain": Case(batch=2, heads=2, kv_heads=1, head_dim=16, capacity=6, lengths=None),
    "features": Case(
        batch=2, heads=4, kv_heads=2, head_dim=16, capacity=9, lengths=(6, 4), padding=2, mask="2d", bias="batch"
    ),
    "shared_bias": Case(batch=3, heads=2, kv_heads=2, head_dim=16, capacity=5, lengths=(5, 1, 0), bias="shared"),
    "fully_masked": Case(batch=2, heads=2, kv_heads=1, head_dim=16, capacity=5, mask="2d:full", bias="batch"),
    "bsh": Case(batch=2, heads=2, kv_heads=2, head_dim=8, capacity=5, layout="BSH"),
    "paged": Case(batch=2, heads=4, kv_heads=2, head_dim=16, capacity=20, block=16, mask="2d", bias="shared"),
    "int8": Case(batch=2, heads=4, kv_heads=2, head_dim=16, capacity=6, int8=True, offset=True, layout="BSND"),
    "int8_per_tensor": Case(
        batch=2, heads=2, kv_heads=1, head_dim=16, capacity=6, int8=True, offset=True, antiquant="tensor", mask="2d"
    ),
    "paged_int8": Case(batch=2, heads=2, kv_heads=1, head_dim=8, capacity=40, block=32, int8=True, lengths=(33, 0)),
}


def gradient_call(case: Case) -> Call:
    (query, key, value), kwargs = case.inputs()
    call = dict(query=query, key=key, value=value) | kwargs
    if call.get("block_table") is not None:
        call["block_table"][1, 0] = call["block_table"][0, 0]  # shared by the sequences: its gradients add up
    return call


def differentiable_in(call: Call) -> Call:
    found = {name: call[name] for name in DIFFERENTIABLE if call.get(name) is not None}
    found["scale_value"] = np.float32(found["scale_value"])
    return {name: x for name, x in found.items() if np.asarray(x).dtype != np.int8}


def weighted(out: Any, lse: Any, xp: Any) -> Any:
    """A scalar that every output and the LSE of every row that has one take part in, each with its own weight."""
    n, m = out.size, lse.size
    some = xp.where(lse > -1e11, lse, xp.zeros_like(lse))  # not of empty or fully masked rows
    return xp.sum(out.reshape(n) * xp.cos(xp.arange(n, dtype=out.dtype))) + xp.sum(
        some.reshape(m) * xp.sin(1 + xp.arange(m, dtype=lse.dtype))
    )


def loss(call: Call) -> Callable[[Call], jax.Array]:
    return lambda floats: weighted(*run(call, **floats), jnp)


def reference_loss(call: Call, changes: Call) -> float:
    rest = call | changes
    args = tuple(rest.pop(name) for name in ("query", "key", "value"))
    out, lse = run_reference(args, rest)
    return float(weighted(out, lse, np))


@pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_gradients_are_those_of_the_oracle(case: Case) -> None:
    """Directional derivatives of every float argument against central differences of the float64 oracle."""
    call = gradient_call(case)
    floats = differentiable_in(call)
    gradients = jax.jit(jax.grad(loss(call)))(floats)
    rng = np.random.default_rng(7)
    step = 1e-5
    for name, x in floats.items():
        assert gradients[name].shape == np.shape(x)
        assert gradients[name].dtype == jnp.float32
        assert np.isfinite(gradients[name]).all()
        x = np.asarray(x, np.float64)
        for _ in range(2):
            direction = rng.normal(size=x.shape)
            size = step * max(np.abs(x).max(), 1e-3)
            up, down = (reference_loss(call, {name: x + sign * size * direction}) for sign in (1, -1))
            expected = (up - down) / (2 * size)
            actual = float(np.sum(np.asarray(gradients[name], np.float64) * direction))
            scale = np.sqrt(np.sum(np.asarray(gradients[name], np.float64) ** 2))
            np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5 + 2e-4 * scale, err_msg=name)


def test_gradients_by_plain_softmax() -> None:
    """Every number of the gradient, not a projection: against autodiff of attention written in three lines."""
    call = gradient_call(GRADIENT_CASES["plain"])
    floats = {name: call[name] for name in ("query", "key", "value")}

    def plain(floats: Call) -> jax.Array:
        scores = (
            jnp.einsum("bnqd,bksd->bnqs", floats["query"], floats["key"], precision="highest") * call["scale_value"]
        )
        out = jnp.einsum("bnqs,bksd->bnqd", jax.nn.softmax(scores), floats["value"], precision="highest")
        return weighted(out, jax.nn.logsumexp(scores, axis=-1), jnp)

    assert_same(jax.jit(jax.grad(loss(call)))(floats), jax.jit(jax.grad(plain))(floats), 2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_have_the_dtype_of_their_argument(dtype: str) -> None:
    call = call_of(Case(**SMALL, dtype=dtype, bias="batch", lengths=(20, 7)))
    names = ("query", "key", "value", "pse_shift")

    def total(floats: Call) -> jax.Array:
        return run(call, **floats)[0].astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total))
    gradients = gradient({name: call[name] for name in names})
    exact = gradient({name: call[name].astype(np.float32) for name in names})
    for name in names:
        assert gradients[name].dtype == call[name].dtype
        np.testing.assert_allclose(gradients[name].astype(np.float32), exact[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("block", [0, 16], ids=["contiguous", "paged"])
def test_poison_outside_the_window_has_no_gradient(block: int) -> None:
    # A mask drops NaN as well, so one of the two goes without it.
    call = call_of(Case(**SMALL, block=block, bias="batch", mask="2d" if block else None, lengths=(20, 0)))
    floats = {name: call[name] for name in ("query", "key", "value", "pse_shift")}
    clean = jax.jit(jax.grad(loss(call)))(floats)

    used = np.zeros(call["key"].shape, bool)  # (pages, K, P, D)
    if block:
        first, second = call["block_table"][0, :2]
        used[first], used[second, :, :4] = True, True
    else:
        used[0, :, :20] = True
    seen = np.zeros(call["pse_shift"].shape, bool)
    seen[0, ..., :20] = True
    dirty = dict(
        query=floats["query"],
        key=np.where(used, floats["key"], np.float32(np.nan)),
        value=np.where(used, floats["value"], np.float32(np.nan)),
        pse_shift=np.where(seen, floats["pse_shift"], np.float32(np.nan)),
    )
    gradients = jax.jit(jax.grad(loss(call)))(dirty)
    jax.tree.map(np.testing.assert_array_equal, gradients, clean)
    for name, where in (("key", used), ("value", used), ("pse_shift", seen)):
        assert np.all(np.asarray(gradients[name])[~where] == 0)
        assert np.any(np.asarray(gradients[name])[where] != 0)
    assert np.all(np.asarray(gradients["query"][1]) == 0)  # the sequence of length 0


def test_poison_under_the_mask_has_no_gradient() -> None:
    call = call_of(Case(**SMALL, bias="batch", mask="2d", lengths=(20, 32)))
    floats = {name: call[name] for name in ("query", "key", "value", "pse_shift")}
    clean = jax.jit(jax.grad(loss(call)))(floats)
    hidden = call["atten_mask"]
    dirty = dict(
        query=floats["query"],
        key=np.where(hidden[:, None, :, None], np.float32(np.nan), floats["key"]),
        value=np.where(hidden[:, None, :, None], np.float32(np.nan), floats["value"]),
        pse_shift=np.where(hidden[:, None, None], np.float32(np.nan), floats["pse_shift"]),
    )
    jax.tree.map(np.testing.assert_array_equal, jax.jit(jax.grad(loss(call)))(dirty), clean)


def test_gradient_of_fully_masked_rows() -> None:
    """The output is the mean of the visible values whatever the scores are, so only the values have a gradient."""
    call = call_of(Case(**SMALL, bias="batch", lengths=(20, 5))) | dict(atten_mask=np.ones((2, 32), bool))
    floats = {name: call[name] for name in ("query", "key", "value", "pse_shift")}
    gradients = jax.grad(lambda floats: run(call, **floats)[0].sum())(floats)
    for name in ("query", "key", "pse_shift"):
        assert np.all(np.asarray(gradients[name]) == 0)
    expected = np.zeros(call["value"].shape, np.float32)
    expected[0, :, :20], expected[1, :, :5] = 2 / 20, 2 / 5  # two query heads share each value
    np.testing.assert_allclose(gradients["value"], expected, rtol=1e-6)


def test_gradient_of_the_lse_is_the_softmax() -> None:
    call = call_of(Case(**SMALL, bias="batch", lengths=(20, 0)))
    gradient = jax.grad(lambda bias: run(call, pse_shift=bias)[1][0].sum())(call["pse_shift"])
    scores = np.einsum("nd,nsd->ns", call["query"][0, :, 0], np.repeat(call["key"][0], 2, axis=0)) * 0.25
    scores = (scores + call["pse_shift"][0, :, 0])[:, :20]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(gradient[0, :, 0, :20], weights / weights.sum(-1, keepdims=True), rtol=2e-5, atol=1e-7)
    assert np.all(np.asarray(gradient[0, ..., 20:]) == 0)
    assert np.all(np.asarray(gradient[1]) == 0)


def test_shared_blocks_add_up_their_gradients() -> None:
    call = call_of(Case(**SMALL, block=16, lengths=(32, 32)))
    table = call["block_table"] = np.array([[3, 1], [3, 3]], np.int32)
    gradients = jax.grad(loss(call))({name: call[name] for name in ("key", "value")})

    gathered = {name: np.moveaxis(call[name][table], 1, 2).reshape(2, 2, 32, 16) for name in ("key", "value")}
    plain = {name: x for name, x in call.items() if name not in ("block_table", "block_size")}
    parts = jax.grad(loss(plain))(gathered)
    for name in ("key", "value"):
        expected = np.zeros(call[name].shape)
        for b, m in itertools.product(range(2), range(2)):
            expected[table[b, m]] += np.asarray(parts[name])[b, :, 16 * m : 16 * (m + 1)]
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-5, atol=1e-6)


def test_vmap_of_grad_and_grad_of_vmap() -> None:
    call = call_of(CASES["paged"])
    names = ("query", "key", "pse_shift")
    for mapped in (("query",), ("key",), ("query", "pse_shift", "key")):
        stacked = stack(call, mapped, 2)
        fixed = {name: call[name] for name in names if name not in mapped}

        def one(stacked: Call, fixed: Call) -> jax.Array:
            return loss(call)(stacked | fixed)

        per_example = jax.jit(jax.vmap(jax.grad(one, argnums=(0, 1)), in_axes=(0, None)))(stacked, fixed)
        gradient = jax.jit(jax.grad(one, argnums=(0, 1)))
        results = [gradient({n: x[i] for n, x in stacked.items()}, fixed) for i in range(2)]
        expected = jax.tree.map(lambda *xs: np.stack(xs), *results)
        assert_same(per_example, expected, 2e-6)

        def everything(stacked: Call, fixed: Call) -> jax.Array:
            return jax.vmap(one, in_axes=(0, None))(stacked, fixed).sum()

        of_stacked, of_fixed = jax.jit(jax.grad(everything, argnums=(0, 1)))(stacked, fixed)
        assert_same(of_stacked, expected[0], 2e-6)
        assert_same(of_fixed, jax.tree.map(lambda x: x.sum(0), expected[1]), 5e-6)


@each_case
def test_checkpoint(case: Case) -> None:
    call = call_of(case)
    call.pop("quant_scale2", None), call.pop("quant_offset2", None)
    floats = differentiable_in(call)
    gradients = jax.jit(jax.grad(jax.checkpoint(loss(call))))(floats)
    assert_same(gradients, jax.jit(jax.grad(loss(call)))(floats))
    assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(gradients))


def test_vjp_of_a_decode_scan() -> None:
    """Gradients flow through a scan of decode steps into what was written to the cache."""
    call = call_of(Case(**SMALL | dict(capacity=4), lengths=(1, 1)))

    def total(key: jax.Array, unroll: bool) -> jax.Array:
        def step(summed: jax.Array, length: jax.Array) -> Any:
            out, lse = run(call, key=key, actual_seq_lengths=length[None])
            return summed + weighted(out, lse, jnp), None

        lengths = jnp.arange(1, 5, dtype=jnp.int32)
        if unroll:
            return sum(step(jnp.float32(0), length)[0] for length in lengths)
        return jax.lax.scan(step, jnp.float32(0), lengths)[0]

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    assert_same(gradient(call["key"], False), gradient(call["key"], True), 1e-5)


def test_forward_mode_is_refused() -> None:
    call = call_of(Case(**SMALL, lengths=(3, 4)))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda query: run(call, query=query)[0], (call["query"],), (call["query"],))


# --- export ---


@each_case
def test_export_for_every_platform(case: Case) -> None:
    """Lowered on this machine for three platforms, saved, loaded, and called on this one."""
    call = call_of(case)
    step = jax.jit(lambda arrays: run(call, **arrays))
    exported = jax.export.export(step, platforms=["cpu", "cuda", "tpu"])(arrays_in(call))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    loaded = jax.export.deserialize(exported.serialize())
    assert_same(loaded.call(arrays_in(call)), run(call))


# --- the same call in other words ---


def test_layouts_agree() -> None:
    base = call_of(Case(**SMALL, mask="2d", bias="batch", lengths=(20, 7), padding=3))
    query, key, value = (base[name] for name in ("query", "key", "value"))
    out, lse = run(base)

    def token_major(x: np.ndarray) -> np.ndarray:
        return np.swapaxes(x, 1, 2)

    def flat(x: np.ndarray) -> np.ndarray:
        return token_major(x).reshape(2, x.shape[2], -1)

    for layout, change in (("BSND", token_major), ("BSH", flat)):
        other = run(base, query=change(query), key=change(key), value=change(value), input_layout=layout)
        np.testing.assert_allclose(other[0], change(np.asarray(out)), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(other[1], lse, rtol=1e-6, atol=1e-6)


def test_kinds_of_input_agree() -> None:
    call = call_of(CASES["contiguous"])
    expected = run(call)
    for kind in (jnp.asarray, np.asarray):
        changed = {name: kind(x) for name, x in arrays_in(call).items()}
        jax.tree.map(np.testing.assert_array_equal, run(call, **changed), expected)
    lists = {name: call[name].tolist() for name in ("query", "key", "value", "pse_shift", "atten_mask")}
    for kind in (list, tuple, np.array, jnp.array, lambda x: [jnp.int32(i) for i in x]):
        changed = dict(actual_seq_lengths=kind([20, 7]), scale_value=0.25)
        jax.tree.map(np.testing.assert_array_equal, run(call, **changed), expected)
        jax.tree.map(np.testing.assert_array_equal, run(call, **changed, **lists), expected)
    traced = jax.jit(lambda a, b: run(call, actual_seq_lengths=[a, b]))(20, 7)
    assert_same(traced, expected)
    one = run(call, actual_seq_lengths=(7,))
    jax.tree.map(np.testing.assert_array_equal, one, run(call, actual_seq_lengths=[7, 7]))


def test_return_lse_only_adds_the_lse() -> None:
    call = call_of(CASES["paged"])
    rest = dict(call)
    args = tuple(rest.pop(name) for name in ("query", "key", "value"))
    out = incre_flash_attention(*args, **rest)
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, run(call)[0])


def test_implementations_by_name_agree() -> None:
    call = call_of(CASES["paged_int8"])
    for name in IMPLEMENTATIONS_HERE:
        assert_same(run(call, implementation=name), run(call), 2e-6)


def test_an_implementation_that_cannot_says_why() -> None:
    """By name an error with the reason, by default another implementation."""
    call = call_of(Case(dtype="float16"))
    with pytest.raises(NotImplementedError, match=r"implementation='mosaic_tpu' cannot do this call: .*(float16|JAX)"):
        run(call, implementation="mosaic_tpu")


def test_the_name_that_people_port_from() -> None:
    assert jax_ifa.npu_incre_flash_attention is jax_ifa.incre_flash_attention
