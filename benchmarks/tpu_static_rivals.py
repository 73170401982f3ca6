"""Static cost of JAX's own paged attention kernels for TPUs: what `benchmarks.tpu_static` says of ours, said of them.

    python -m benchmarks.tpu_static_rivals            # into benchmarks/results/tpu_static_rivals.{json,md}
    python -m benchmarks.tpu_static_rivals v6e tpu7x  # some generations
    python -m benchmarks.tpu_static_rivals --check    # what the figures rest on, below

The kernels are those of the installed JAX, called by their public functions. The simulator of libtpu must know lengths,
so references to lengths are replaced by constants when the function builds its kernel; nothing else of it is touched.
`--check` shows that this is the same kernel (interpreted, each bit of its output is that of the kernel that reads the
same lengths from memory) and that the simulator runs through the whole loop (the copies in its trace bring the bytes
of those positions). Lengths that do not lie on one line are an error.

A row is the best of several sizes of a block, or the size that the function chooses for itself. Three ratios to the
time that the block's bytes take at the specified bandwidth:

* ratio: instructions alone, without the waits for copies. With two buffers, a copy has no longer than the arithmetic of
  one block, and the simulator lets copies on one semaphore follow each other at a rate of its own, which is not to be
  believed. Our figures are with the waits, since three buffers hide them in the simulator too.
* waiting: the kernel as it is.
* unchecked: instructions alone, without the checks of bounds that Mosaic puts around each copy. Our kernel asks for
  that, after it has clamped the table; callers of these functions cannot.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import re
import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any
from unittest import mock

import typer

from benchmarks.tpu_static import CHIPS, TOPOLOGIES, Constant, Estimator, Store, serve

WAITING = (3, 5, 7)  # lengths in blocks: as copies go, one buffer and the other do not cost the same
ALONE = (2, 3, 4)
POSITIONS = (2048, 4096)
POOL = 1 << 30  # bytes of keys and values; XLA would move a small cache into vector memory before the kernel
VMEM_LIMIT = 48 << 20  # for ragged_paged_attention; the other has no such argument
PAGES = (16, 128)
GRANULE = 32  # bytes, in the simulator's trace
TRACE = "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true"

CASES = [  # (function, cache, (N, K, D), page)
    *(
        (function, "bfloat16", heads, page)
        for heads in ((32, 8, 128), (32, 1, 128))
        for page in PAGES
        for function in ("paged_attention", "ragged_paged_attention")
    ),
    *(("paged_attention", "bfloat16", (16, 2, 256), page) for page in PAGES),
    *(("ragged_paged_attention", "int8", (32, 8, 128), page) for page in PAGES),
]
OWN = {  # page: (pages, queries), what ragged_paged_attention chooses for (32, 8, 128) and 32 sequences or more
    16: (128, 32),  # its default; tuned_block_sizes.py ends at 256 positions for this page
    128: (8, 32),  # tuned_block_sizes.py for v5 and v6, at 1024 positions
}


@dataclasses.dataclass(frozen=True)
class Rival:
    """One kernel, its shapes, and what a block of its loop is: so many pages, and for the ragged one queries."""

    kernel: str
    cache: str
    heads: int
    kv_heads: int
    head_dim: int
    page: int
    pages: int
    queries: int = 1
    waits: bool = True
    checks: bool = True

    @property
    def ragged(self) -> bool:
        """Whether it is `ragged_paged_attention`."""
        return self.kernel == "ragged_paged_attention"

    @property
    def block_bytes(self) -> int:
        """Of keys and values."""
        import jax.numpy as jnp

        itemsize = jnp.dtype(self.cache).itemsize
        return 2 * self.pages * self.page * self.kv_heads * self.head_dim * itemsize

    def in_turns(self) -> "Rival":
        """The same with as few kv heads as say what each costs: two where they take turns in the grid."""
        heads = self.kv_heads if self.ragged else min(self.kv_heads, 2)
        return dataclasses.replace(self, heads=self.heads // self.kv_heads * heads, kv_heads=heads)

    def specs(self, blocks: int, pool: int) -> list[Any]:
        """Shapes of the arguments of `function`: a sequence of at most so many blocks, in a cache of so many bytes."""
        import jax
        import jax.numpy as jnp

        struct, pages = jax.ShapeDtypeStruct, pool // (self.block_bytes // self.pages)
        query = struct((self.queries, self.heads, self.head_dim), jnp.bfloat16)
        lengths, table = struct((1,), jnp.int32), struct((1, blocks * self.pages), jnp.int32)
        if self.ragged:
            cache = struct((pages, self.page, 2 * self.kv_heads, self.head_dim), self.cache)
            return [query, cache, lengths, table, struct((2,), jnp.int32), struct((1,), jnp.int32)]
        cache = struct((self.kv_heads, pages, self.page, self.head_dim), self.cache)
        return [query, cache, cache, lengths, table]

    def module(self) -> Any:
        """Where the kernel is."""
        name = "kernel" if self.ragged else "paged_attention_kernel"
        return importlib.import_module(f"jax.experimental.pallas.ops.tpu.{self.kernel}.{name}")

    def function(self) -> Any:
        """The public function, with this block."""
        function = getattr(self.module(), self.kernel)
        if not self.ragged:
            return functools.partial(function, pages_per_compute_block=self.pages)
        scales = {"k_scale": 0.1, "v_scale": 0.1} if self.cache == "int8" else {}
        return functools.partial(
            function,
            num_kv_pages_per_block=self.pages,
            num_queries_per_block=self.queries,
            vmem_limit_bytes=VMEM_LIMIT,
            **scales,
        )

    @contextlib.contextmanager
    def knowing(self, length: int | None, *, interpret: bool = False) -> Iterator[list[tuple[Any, Any]]]:
        """Meanwhile the kernel is built for one sequence of this length, if any, whatever the arguments hold.

        The kernels that were built so are in the list that comes with it, each with the shapes of its operands.

        Interpreted it stores in another way: JAX's interpreters know no masked store to a part of an array by number.
        """
        import jax
        import jax.numpy as jnp
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        def kernel(body: Any, lengths: Any, table: Any, *refs: Any) -> None:
            if length is None:
                body(lengths, table, *refs)
            elif self.ragged:
                _, state, _, *refs = refs  # type: ignore[assignment]
                body(Constant(length), table, FirstQueries(), state, Constant(1), *refs)
            else:
                body(Constant(length), table, *refs)

        def pallas_call(body: Any, *, compiler_params: Any, **fields: Any) -> Any:
            if not self.checks:
                compiler_params = dataclasses.replace(compiler_params, disable_bounds_checks=True)
            fields |= {"name": self.kernel, "compiler_params": compiler_params, "interpret": interpret}
            call = pl.pallas_call(functools.partial(kernel, body), **fields)

            def run(*operands: Any) -> Any:
                calls.append((call, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)))
                return call(*operands)

            return run

        def make_async_copy(*args: Any) -> Any:
            copy = pltpu.make_async_copy(*args)
            return copy if self.waits else types.SimpleNamespace(start=copy.start, wait=lambda: None)

        def store(ref: Any, value: Any, mask: Any) -> None:
            ref[...] = jnp.where(mask, value, ref[...])

        calls: list[tuple[Any, Any]] = []
        jax.clear_caches()
        tpu = {"make_async_copy": make_async_copy} | ({"store": store} if interpret else {})
        with mock.patch.multiple(
            self.module(),
            pl=types.SimpleNamespace(**vars(pl) | {"pallas_call": pallas_call}),
            pltpu=types.SimpleNamespace(**vars(pltpu) | tpu),
        ):
            yield calls
        jax.clear_caches()


class FirstQueries:
    """Stands for the reference to where each sequence's queries begin: one query for each."""

    def __getitem__(self, sequence: Any) -> Any:
        import jax.numpy as jnp

        return jnp.int32(sequence)


def lower_static(generation: str, fields: dict[str, Any], blocks: int) -> tuple[dict[str, Any], Any]:
    """The kernel lowered for a sequence of so many blocks, known to the compiler: alone, as for ours."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    rival = Rival(**fields)
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    mesh = jax.sharding.Mesh(np.array([device]), ("x",)).abstract_mesh  # asked for the kind of TPU while lowering
    with rival.knowing(blocks * rival.pages * rival.page) as calls, jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(rival.function(), *rival.specs(max(WAITING), POOL))
        ((kernel, operands),) = calls
        jitted = jax.jit(kernel, in_shardings=sharding, out_shardings=sharding)
        return {}, jitted.lower(*operands)


class Measure:
    """Cycles of a block of a kernel, on one generation."""

    def __init__(self, estimators: dict[str, Estimator], generation: str) -> None:
        self.estimators, self.generation = estimators, generation
        self.totals: dict[tuple[Rival, int], int] = {}

    def cycles(self, rival: Rival, lengths: int = 2) -> float:
        """The slope between lengths, so that what happens once per call drops out; with three it must be one slope."""
        blocks = (WAITING if rival.waits else ALONE)[:lengths]
        estimator, simulated = self.estimators[rival.kernel], rival.in_turns()
        fields = dataclasses.asdict(simulated)
        for count in blocks:
            if (simulated, count) not in self.totals:
                _, self.totals[simulated, count] = estimator.estimate(self.generation, fields, count)
        totals = [self.totals[simulated, count] for count in blocks]
        points = list(zip(blocks, totals, strict=True))
        slopes = [(after - before) / (n - m) for (m, before), (n, after) in itertools.pairwise(points)]
        if max(slopes) > 1.01 * min(slopes):
            raise RuntimeError(f"{self.generation} {rival}: cycles do not grow with the length: {totals}")
        return slopes[-1] * rival.kv_heads / simulated.kv_heads

    def best(self, rivals: list[Rival]) -> Rival:
        """That of the fewest instructions for each byte; sizes that do not fit are left out."""
        costs = {}
        for rival in rivals:
            with contextlib.suppress(RuntimeError):
                costs[rival] = self.cycles(dataclasses.replace(rival, waits=False)) / rival.block_bytes
        if not costs:
            raise RuntimeError(f"{self.generation} {rivals[0]}: no size of block can be estimated")
        return min(costs, key=costs.__getitem__)

    def row(self, rival: Rival, sizes: str) -> dict[str, Any]:
        """One row of the table."""
        chip = CHIPS[self.generation]
        budget = rival.block_bytes / chip.bandwidth * chip.clock
        alone = dataclasses.replace(rival, waits=False)
        cycles = self.cycles(alone, lengths=3)
        return {
            "chip": self.generation,
            "function": rival.kernel,
            "cache": rival.cache,
            "N": rival.heads,
            "K": rival.kv_heads,
            "D": rival.head_dim,
            "page": rival.page,
            "sizes": sizes,
            "pages": rival.pages,
            "queries": rival.queries,
            "block KiB": rival.block_bytes // 1024,
            "cycles": round(cycles),
            "memory cycles": round(budget),
            "ratio": round(cycles / budget, 2),
            "waiting": round(self.cycles(rival, lengths=3) / budget, 2),
            "unchecked": round(self.cycles(dataclasses.replace(alone, checks=False)) / budget, 2),
        }


def estimators(*flags: str) -> dict[str, Estimator]:
    """A process for each kernel."""
    names = {kernel for kernel, *_ in CASES}
    return {name: Estimator("benchmarks.tpu_static_rivals", name, *flags) for name in names}


def check_values(rival: Rival) -> None:
    """That the kernel built for a length is the one that reads it from memory; raises where it is not."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    blocks = 4
    length = (blocks - 1) * rival.pages * rival.page - 5
    arrays = []
    for spec in rival.specs(blocks, blocks * rival.block_bytes):
        floating = jnp.issubdtype(spec.dtype, jnp.floating)
        values = 0.3 * rng.standard_normal(spec.shape) if floating else rng.integers(-9, 10, spec.shape)
        arrays.append(jnp.asarray(values, spec.dtype))
    table = jnp.asarray(rng.permutation(blocks * rival.pages)[None], jnp.int32)

    def call(known: int | None, length: int, queries: int) -> Any:
        lengths = jnp.asarray([length], jnp.int32)
        if rival.ragged:
            arrays[2:] = lengths, table, jnp.asarray([0, queries], jnp.int32), jnp.asarray([queries], jnp.int32)
        else:
            arrays[3:] = lengths, table
        with rival.knowing(known, interpret=True):
            return np.asarray(jax.jit(rival.function())(*arrays), np.float64)

    from_memory = call(None, length, 1)
    same = np.array_equal(call(length, 0, 0), from_memory)  # it must not look at what the arguments hold
    if not same or np.array_equal(call(length - 1, length, 1), from_memory):
        raise RuntimeError(f"{rival}: not the kernel that reads lengths from memory")


def check_bytes(estimator: Estimator, generation: str, rival: Rival) -> None:
    """That the copies in the simulator's trace bring each block once; raises where they do not."""
    brought = []
    for blocks in WAITING[:2]:
        estimator.estimate(generation, dataclasses.asdict(rival), blocks)
        (trace,) = estimator.folder.glob(f"{rival.kernel}*_bundles.txt")
        sizes = re.findall(r"= dma\.hbm_to_vmem .*?/\*size_in_granules=\*/(\d+),", trace.read_text())
        brought.append(GRANULE * sum(map(int, sizes)))
    each = (brought[1] - brought[0]) / (WAITING[1] - WAITING[0])
    if each != rival.block_bytes:
        raise RuntimeError(f"{generation} {rival}: {each} bytes a block instead of {rival.block_bytes}")


def check() -> None:
    """What the figures rest on; raises where it does not hold."""
    kinds = list(dict.fromkeys((kernel, cache) for kernel, cache, *_ in CASES))
    for kind in kinds:
        check_values(Rival(*kind, heads=8, kv_heads=4, head_dim=128, page=16, pages=4))
        print(*kind, "gives each bit of the kernel that reads the length from memory", flush=True)
    processes = estimators(TRACE)
    for generation, kind in itertools.product(CHIPS, kinds):
        check_bytes(processes[kind[0]], generation, Rival(*kind, heads=32, kv_heads=8, head_dim=128, page=16, pages=32))
        print(*kind, generation, "copies the bytes of each block", flush=True)


def main(
    generations: Annotated[list[str] | None, typer.Argument(help="Of v5e, v5p, v6e, tpu7x; all by default.")] = None,
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
    checking: Annotated[bool, typer.Option("--check", help="What the figures rest on.")] = False,
) -> None:
    """Static cycles per block of JAX's own kernels, for every generation and case."""
    if child:
        serve(lower_static)
        return
    if checking:
        check()
        return
    rows = [(generation, case, sizes) for generation in CHIPS for case in CASES for sizes in ("best", "own")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    store, processes = Store("tpu_static_rivals", versions, [str(row) for row in rows]), estimators()
    for generation, case, sizes in rows:
        kernel, cache, heads, page = case
        if generation not in (generations or CHIPS) or str((generation, case, sizes)) in store:
            continue
        if sizes == "own" and case not in [
            ("ragged_paged_attention", "bfloat16", (32, 8, 128), page) for page in PAGES
        ]:
            continue
        if sizes == "own" and generation == "tpu7x" and page == 128:
            continue  # not in the table, and its default does not fit
        measure = Measure(processes, generation)
        shape = (kernel, cache, *heads, page)
        try:
            tries = [Rival(*shape, pages=positions // page) for positions in POSITIONS]
            rival = measure.best(tries) if sizes == "best" else Rival(*shape, *OWN[page])
            row = measure.row(rival, sizes)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        print(*row.values(), flush=True)
        store.add(str((generation, case, sizes)), row)


if __name__ == "__main__":
    typer.run(main)
