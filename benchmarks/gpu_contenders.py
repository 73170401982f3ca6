"""Decode attention on a GPU as each library's own users would call it, on the same numbers.

A contender is a chain of steps: the output of one is the query of the next, and each step reads another copy of the
cache, so that none finds its cache in L2 and nothing can be computed once for all.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ifa import incre_flash_attention

L2_BYTES = 50 * 2**20
MOST_STEPS = 128
Run = Callable[[int], float]
"""Seconds that so many steps take on the device, as far as a contender can tell."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decode step: B sequences of S visible positions, N query and K kv heads of D; `block` 0 is contiguous."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int = 0
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        form = f"paged {self.block}" if self.block else "contiguous"
        return f"B={self.batch} S={self.length} N={self.heads} K={self.kv_heads} D={self.head_dim} {form} {self.dtype}"

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one step."""
        size = jnp.dtype(self.dtype).itemsize
        return 2 * self.batch * self.length * self.kv_heads * self.head_dim * size

    @property
    def copies(self) -> int:
        """Copies of the cache that steps take turns at: four times L2 in all, or a cache for every step of a chain."""
        return min(MOST_STEPS, math.ceil(4 * L2_BYTES / self.cache_bytes))

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Of keys, and of values: head-major."""
        if self.block:
            return (self.batch * self.length // self.block, self.kv_heads, self.block, self.head_dim)
        return (self.batch, self.kv_heads, self.length, self.head_dim)


def random(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Standard normal numbers, or any int8."""
    key = jax.random.key(seed)
    if dtype == "int8":
        return jax.random.randint(key, shape, -128, 128, jnp.int8)
    return jax.random.normal(key, shape, jnp.dtype(dtype))


def chain(step: Callable[[Any, Any], Any], query: jax.Array, caches: list[Any]) -> Run:
    """`step(query, cache) -> query` over and over, as one compiled program for each number of steps."""
    import time

    programs: dict[int, Any] = {}

    def run(steps: int) -> float:
        if steps not in programs:

            def program(query: jax.Array, caches: list[Any]) -> jax.Array:
                for i in range(steps):
                    query = step(query, caches[i % len(caches)])
                return query

            programs[steps] = jax.jit(program)
            programs[steps](query, caches).block_until_ready()
        began = time.perf_counter()
        programs[steps](query, caches).block_until_ready()
        return time.perf_counter() - began

    return run


def ours(shape: Shape, implementation: str | None) -> Run:
    """`incre_flash_attention` with traced lengths."""
    arrays: dict[str, Any] = {"actual_seq_lengths": jnp.full(shape.batch, shape.length, jnp.int32)}
    if shape.block:
        blocks = shape.cache_shape[0]
        table = np.random.default_rng(0).permutation(blocks).reshape(shape.batch, -1)
        arrays["block_table"] = jnp.asarray(table, jnp.int32)
    if shape.dtype == "int8":
        arrays["antiquant_scale"] = jnp.full((2, shape.kv_heads, shape.head_dim), 0.01, jnp.float32)

    def step(query: jax.Array, cache: Any) -> jax.Array:
        key, value, arrays = cache
        return incre_flash_attention(
            query,
            key,
            value,
            num_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            input_layout="BNSD",
            block_size=shape.block,
            scale_value=shape.head_dim**-0.5,
            implementation=implementation,
            **arrays,
        )

    query = random(0, (shape.batch, shape.heads, 1, shape.head_dim), "bfloat16")
    caches = [
        (*(random(2 * i + j + 1, shape.cache_shape, shape.dtype) for j in range(2)), arrays)
        for i in range(shape.copies)
    ]
    return chain(step, query, caches)


def jax_nn(shape: Shape, implementation: str) -> Run:
    """`jax.nn.dot_product_attention` with key/value lengths, in its own layout."""
    lengths = jnp.full(shape.batch, shape.length, jnp.int32)

    def step(query: jax.Array, cache: Any) -> jax.Array:
        key, value, lengths = cache
        attend: Any = jax.nn.dot_product_attention  # whose annotations want to know the implementation
        return attend(query, key, value, key_value_seq_lengths=lengths, implementation=implementation)

    query = random(0, (shape.batch, 1, shape.heads, shape.head_dim), shape.dtype)
    cache_shape = (shape.batch, shape.length, shape.kv_heads, shape.head_dim)
    caches = [
        (*(random(2 * i + j + 1, cache_shape, shape.dtype) for j in range(2)), lengths) for i in range(shape.copies)
    ]
    return chain(step, query, caches)


def pallas_decode(shape: Shape) -> Run:
    """`decode_attention.gqa` of `jax.experimental.pallas.ops.gpu`."""
    from jax.experimental.pallas.ops.gpu import decode_attention

    def step(query: jax.Array, cache: Any) -> jax.Array:
        return decode_attention.gqa(query, *cache)

    query = random(0, (shape.batch, shape.heads, shape.head_dim), shape.dtype)
    cache_shape = (shape.batch, shape.length, shape.kv_heads, shape.head_dim)
    caches = [tuple(random(2 * i + j + 1, cache_shape, shape.dtype) for j in range(2)) for i in range(shape.copies)]
    return chain(step, query, caches)


def pallas_paged(shape: Shape) -> Run:
    """`paged_attention` of `jax.experimental.pallas.ops.gpu`."""
    from jax.experimental.pallas.ops.gpu import paged_attention

    blocks = shape.batch * shape.length // shape.block
    table = jnp.asarray(np.random.default_rng(0).permutation(blocks).reshape(shape.batch, -1), jnp.int32)
    lengths = jnp.full(shape.batch, shape.length, jnp.int32)

    def step(query: jax.Array, cache: Any) -> jax.Array:
        key, value, table, lengths = cache
        return paged_attention.paged_attention(query, key, value, table, lengths)

    query = random(0, (shape.batch, shape.heads, shape.head_dim), shape.dtype)
    cache_shape = (shape.kv_heads, blocks, shape.block, shape.head_dim)
    caches = [
        (*(random(2 * i + j + 1, cache_shape, shape.dtype) for j in range(2)), table, lengths)
        for i in range(shape.copies)
    ]
    return chain(step, query, caches)


def torch_sdpa(shape: Shape, backend: str | None) -> Run:
    """`torch.nn.functional.scaled_dot_product_attention` with `enable_gqa=True`, by a backend or torch's choice."""
    import torch

    attend: Any = torch.nn.functional.scaled_dot_product_attention
    kernel = torch.nn.attention
    backends = [getattr(kernel.SDPBackend, backend)] if backend else list(kernel.SDPBackend.__members__.values())

    def step(query: Any, cache: Any) -> Any:
        with kernel.sdpa_kernel([one for one in backends if one.name not in ("ERROR", "OVERRIDEABLE")]):
            return attend(query, *cache, enable_gqa=True)

    cache_shape = (shape.batch, shape.kv_heads, shape.length, shape.head_dim)
    caches = [tuple(torch_random(cache_shape, shape) for _ in range(2)) for _ in range(shape.copies)]
    return torch_chain(step, torch_random((shape.batch, shape.heads, 1, shape.head_dim), shape), caches)


def flash_attention(shape: Shape) -> Run:
    """`flash_attn_with_kvcache` of the FlashAttention package, version 3 if it is there."""
    import torch

    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        from flash_attn import flash_attn_with_kvcache

    lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32, device="cuda")
    more: dict[str, Any] = {"cache_seqlens": lengths}
    cache_shape = (shape.batch, shape.length, shape.kv_heads, shape.head_dim)
    if shape.block:
        blocks = shape.batch * shape.length // shape.block
        table = torch.randperm(blocks, device="cuda").reshape(shape.batch, -1).to(torch.int32)
        name = "page_table" if flash_attn_with_kvcache.__module__.startswith("flash_attn_interface") else "block_table"
        more[name] = table
        cache_shape = (blocks, shape.block, shape.kv_heads, shape.head_dim)

    def step(query: Any, cache: Any) -> Any:
        return flash_attn_with_kvcache(query, *cache, **more)

    caches = [tuple(torch_random(cache_shape, shape) for _ in range(2)) for _ in range(shape.copies)]
    return torch_chain(step, torch_random((shape.batch, 1, shape.heads, shape.head_dim), shape), caches)


def flashinfer(shape: Shape) -> Run:
    """`BatchDecodeWithPagedKVCacheWrapper` of FlashInfer, planned once as its users do, in its own NHD layout."""
    import flashinfer
    import torch

    block = shape.block or 16
    pages = shape.length // block
    blocks = shape.batch * pages
    each = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda")
    indices = torch.randperm(blocks, device="cuda").to(torch.int32)
    last = torch.full((shape.batch,), block, dtype=torch.int32, device="cuda")
    workspace = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=shape.heads > shape.kv_heads,
        paged_kv_indptr_buffer=each * pages,
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last,
    )
    kind = getattr(torch, shape.dtype)
    heads = (shape.heads, shape.kv_heads, shape.head_dim, block)
    wrapper.plan(each * pages, indices, last, *heads, q_data_type=kind, kv_data_type=kind)
    cache_shape = (blocks, block, shape.kv_heads, shape.head_dim)
    caches = [tuple(torch_random(cache_shape, shape) for _ in range(2)) for _ in range(shape.copies)]
    return torch_chain(wrapper.run, torch_random((shape.batch, shape.heads, shape.head_dim), shape), caches)


def tokamax(shape: Shape) -> Run:
    """`tokamax.dot_product_attention`, in its own layout and by its own choice of implementation."""
    import tokamax

    def step(query: jax.Array, cache: Any) -> jax.Array:
        return tokamax.dot_product_attention(query, *cache)

    query = random(0, (shape.batch, 1, shape.heads, shape.head_dim), shape.dtype)
    cache_shape = (shape.batch, shape.length, shape.kv_heads, shape.head_dim)
    caches = [tuple(random(2 * i + j + 1, cache_shape, shape.dtype) for j in range(2)) for i in range(shape.copies)]
    return chain(step, query, caches)


def torch_random(size: tuple[int, ...], shape: Shape) -> Any:
    """Standard normal numbers of the shape's dtype on the GPU."""
    import torch

    return torch.randn(size, dtype=getattr(torch, shape.dtype), device="cuda")


def torch_chain(step: Callable[[Any, Any], Any], query: Any, caches: list[Any]) -> Run:
    """As `chain`, with torch: one CUDA graph for each number of steps, timed by events on the device."""
    import torch

    graphs: dict[int, Any] = {}

    def steps_of(steps: int) -> Any:
        out = query
        for i in range(steps):
            out = step(out, caches[i % len(caches)])
        return out

    def run(steps: int) -> float:
        with torch.inference_mode():
            if steps not in graphs:
                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    steps_of(2)
                torch.cuda.synchronize()
                graphs[steps] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[steps]):
                    steps_of(steps)
                graphs[steps].replay()
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            graphs[steps].replay()
            ended.record()
            torch.cuda.synchronize()
            return began.elapsed_time(ended) / 1e3

    return run


def copy(megabytes: int) -> Run:
    """A copy of so many megabytes per step: the bandwidth of reading and writing that JAX reaches."""
    numbers = jnp.ones(megabytes * 2**20 // 4, jnp.float32)

    def step(query: jax.Array, cache: Any) -> jax.Array:
        del cache
        return jax.lax.optimization_barrier(query + 1.0)

    return chain(step, numbers, [()])


def nothing() -> Run:
    """A kernel per step that does next to nothing: what a launch takes."""

    def step(query: jax.Array, cache: Any) -> jax.Array:
        del cache
        return jax.lax.optimization_barrier(query + 1.0)

    return chain(step, jnp.ones(8, jnp.float32), [()])


def contenders(shape: Shape, implementation: str | None = None) -> dict[str, Callable[[], Run]]:
    """Ours and those rivals that know this form of the cache."""
    found: dict[str, Callable[[], Run]] = {
        "jax_ifa": lambda: ours(shape, implementation),
        "jax_ifa xla": lambda: ours(shape, "xla"),
    }
    if shape.dtype == "int8":
        return found  # none of them reads an int8 cache
    either = {"FlashAttention": lambda: flash_attention(shape), "FlashInfer": lambda: flashinfer(shape)}
    if shape.block:
        return found | {"pallas paged_attention": lambda: pallas_paged(shape)} | either
    return (
        found
        | {
            "jax.nn xla": lambda: jax_nn(shape, "xla"),
            "jax.nn cudnn": lambda: jax_nn(shape, "cudnn"),
            "pallas decode_attention": lambda: pallas_decode(shape),
            "torch SDPA": lambda: torch_sdpa(shape, None),
            "torch SDPA flash": lambda: torch_sdpa(shape, "FLASH_ATTENTION"),
            "torch SDPA cudnn": lambda: torch_sdpa(shape, "CUDNN_ATTENTION"),
            "tokamax": lambda: tokamax(shape),
        }
        | either
    )
