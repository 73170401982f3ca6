"""The products of one decode step of SmolLM2-135M for a few rows: XLA's and `row_product`.

    python -m benchmarks.row_product --rows 1 4 8

Its weights are 540 MB as float32, and 96 MB in the blocks of its file. Prints milliseconds, medians of turns that the
contenders take, and for one row the bytes of the weights over them. A sum of 540 MB shows what the memory gives.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tabulate import tabulate

from benchmarks.timing import interleave, machine
from numba_kernels.blocks import BLOCK, LAYOUTS, BlockMatrix
from numba_kernels.product import row_product

HIDDEN, FORWARD, VOCABULARY, LAYERS = 576, 1536, 49152, 30
SHAPES = [(960, HIDDEN), (HIDDEN, HIDDEN), (2 * FORWARD, HIDDEN), (HIDDEN, FORWARD)]  # (outputs, inputs) of a layer
CODES = {"q4_1": (7.5, 4.6), "q8_0": (0, 74)}  # of random bytes: mean and standard deviation
Product = Callable[[Array, Any], Array]


def outputs_first(x: Array, matrix: Array) -> Array:
    """XLA's product with a matrix (outputs, inputs)."""
    return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())))


def in_blocks(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> BlockMatrix:
    """A matrix of random codes, whose products are about as large as what it is multiplied with."""
    outputs, inputs = shape
    layout = LAYOUTS[kind]
    rows = rng.integers(0, 256, (outputs, inputs // BLOCK, layout.size), np.uint8)
    numbers = rows[..., : 2 * layout.numbers].view(np.float16)
    mean, deviation = CODES[kind]
    numbers[..., 0] = scale = 1 / (deviation * inputs**0.5)
    numbers[..., 1:] = -mean * scale
    return BlockMatrix.from_file(rows.reshape(outputs, -1), kind)


def dense_product(x: Array, matrix: BlockMatrix) -> Array:
    """XLA's product with the weights of a matrix in blocks."""
    return outputs_first(x, matrix.dense())


def step(product: Product, head_product: Product) -> Any:
    """All products of a step, each of what the last one gave."""

    @jax.jit
    def run(x: Array, layers: list[list[Any]], head: Any) -> Array:
        for qkv, output, gate_up, down in layers:
            x = x + product(product(x, qkv)[:, :HIDDEN], output)
            x = x + product(product(x, gate_up)[:, :FORWARD], down)
        return head_product(x, head)

    return run


def done(run: Any, *arguments: Any) -> None:
    """Call it, and wait for the result."""
    jax.block_until_ready(run(*arguments))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    layers = [[jnp.asarray(0.02 * rng.standard_normal(s, np.float32)) for s in SHAPES] for _ in range(LAYERS)]
    head = jnp.asarray(0.02 * rng.standard_normal((VOCABULARY, HIDDEN), np.float32))
    turned = [[jnp.asarray(np.ascontiguousarray(np.asarray(w).T)) for w in layer] for layer in layers]
    q4_1 = [[in_blocks(rng, s, "q4_1") for s in SHAPES] for _ in range(LAYERS)]
    q8_0 = in_blocks(rng, (VOCABULARY, HIDDEN), "q8_0")
    everything = jnp.zeros(sum(w.size for w in jax.tree.leaves((layers, head))))
    contenders: dict[str, Any] = {
        "XLA, (inputs, outputs)": (step(jnp.matmul, outputs_first), turned, head),
        "XLA, (outputs, inputs)": (step(outputs_first, outputs_first), layers, head),
        "XLA, in blocks": (step(dense_product, dense_product), q4_1, q8_0),
        "row_product": (step(row_product, row_product), layers, head),
        "row_product, in blocks": (step(row_product, row_product), q4_1, q8_0),
        "sum of as much": (jax.jit(lambda x, everything: everything.sum() + x), everything),
    }
    table = []
    for rows in options.rows:
        x = jnp.asarray(rng.standard_normal((rows, HIDDEN), np.float32))
        for name, (run, *weights) in contenders.items():
            if not jnp.isfinite(run(x, *weights)).all():  # which is multiplied in another way
                raise RuntimeError(f"{name}: expected finite numbers")
        calls = {name: functools.partial(done, run, x, *weights) for name, (run, *weights) in contenders.items()}
        for name, timing in interleave(calls, rounds=options.rounds, seconds_per_turn=0.05).items():
            median = timing.median
            size = sum(x.nbytes for x in jax.tree.leaves(contenders[name][1:]))
            rate = f"{size / median / 1e9:.1f}" if rows == 1 else "-"
            table.append({"rows": rows, "product": name, "ms": f"{1e3 * median:.1f}", "GB/s": rate})
    print(", ".join(f"{key} {value}" for key, value in machine().items()), end="\n\n")
    print(tabulate(table, headers="keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
