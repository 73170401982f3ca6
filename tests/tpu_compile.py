"""Compiles calls of the public function for a TPU that this machine does not have; run in a process of its own.

    python tests/tpu_compile.py TOPOLOGY < cases.json

reads a list of `Call` fields and writes one line of JSON for each: its temporary bytes, or its error. libtpu ends the
process when it meets something it cannot believe, so the caller takes a missing line for a failure.
"""

import dataclasses
import json
import math
import os
import sys
from typing import Any

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a lock file of another process says nothing about this one
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no machine to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: its shapes and features. `block` 0 is a contiguous cache; `flat` is (blocks, P, K*D) pages in BNSD."""

    layout: str = "BNSD"
    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    capacity: int = 4096
    block: int = 0
    flat: bool = False
    cache: str = "bfloat16"
    query: str = "bfloat16"
    mask: bool = False
    bias: bool = False
    padding: bool = False
    precise: bool = False
    lse: bool = True  # asked for
    implementation: str | None = "mosaic_tpu"

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(changed) or "plain"

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.capacity // self.block)

    @property
    def cache_bytes(self) -> int:
        import jax.numpy as jnp

        return 2 * jnp.dtype(self.cache).itemsize * math.prod(self.cache_shape)

    @property
    def cache_shape(self) -> tuple[int, ...]:
        b, k, d, s = self.batch, self.kv_heads, self.head_dim, self.capacity
        if self.block:
            pages = b * self.pages_per_sequence
            head_major = self.layout == "BNSD" and not self.flat
            return (pages, k, self.block, d) if head_major else (pages, self.block, k * d)
        return {"BSH": (b, s, k * d), "BNSD": (b, k, s, d), "BSND": (b, s, k, d)}[self.layout]

    def specs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Shapes of (query, key, value) and of the other arrays."""
        import jax
        import jax.numpy as jnp

        b, n, k, d = self.batch, self.heads, self.kv_heads, self.head_dim
        struct = jax.ShapeDtypeStruct
        query = struct({"BSH": (b, 1, n * d), "BNSD": (b, n, 1, d), "BSND": (b, 1, n, d)}[self.layout], self.query)
        cache = struct(self.cache_shape, self.cache)
        positions = self.pages_per_sequence * self.block if self.block else self.capacity
        arrays = {"actual_seq_lengths": struct((b,), jnp.int32)}
        if self.block:
            arrays["block_table"] = struct((b, self.pages_per_sequence), jnp.int32)
        if self.cache == "int8":
            arrays["antiquant_scale"] = struct((2, k, d), jnp.float32)
        if self.mask:
            arrays["atten_mask"] = struct((b, 1, 1, positions), jnp.bool_)
        if self.bias:
            arrays["pse_shift"] = struct((b, n, 1, positions), self.query)
        if self.padding:
            arrays["kv_padding_size"] = struct((1,), jnp.int32)
        return (query, cache, cache), arrays

    def function(self) -> Any:
        from jax_ifa import incre_flash_attention

        static = dict(
            num_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            input_layout=self.layout,
            block_size=self.block,
            scale_value=self.head_dim**-0.5,
            inner_precise=0 if self.precise else 1,
            implementation=self.implementation,
            return_lse=self.lse,
        )
        return lambda q, k, v, arrays: incre_flash_attention(q, k, v, **arrays, **static)

    def lower(self, topology: str) -> Any:
        """The program for the first device of a topology."""
        import jax
        from jax.experimental import topologies

        device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        (query, key, value), arrays = self.specs()
        jitted = jax.jit(self.function(), in_shardings=sharding, out_shardings=sharding)
        return jitted.lower(query, key, value, arrays)


def main() -> None:
    import time

    for fields in json.load(sys.stdin):
        call = Call(**fields)
        began = time.perf_counter()
        try:
            compiled = call.lower(TOPOLOGIES[sys.argv[1]]).compile()
            result = {
                "temp": compiled.memory_analysis().temp_size_in_bytes,
                "cache": call.cache_bytes,
                "kernel": "tpu_custom_call" in compiled.as_text(),
            }
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(result | {"seconds": round(time.perf_counter() - began, 2)}), flush=True)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main()
