"""Matrices whose weights are stored as codes of a few bits, in blocks of 32 with a scale, as files of models have them.

q4_1: weight = scale * code + minimum, codes of 4 bits from 0 to 15; 20 bytes a block.
q8_0: weight = scale * code, codes of 8 bits, from -127 to 127 in files that llama.cpp wrote; 34 bytes a block.

Scale and minimum are float16, so that scale * code is exact in float32: the dequantised weight is one number, whoever
computes it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

BLOCK = 32  # weights


class Layout(NamedTuple):
    """The bytes of a block: its codes, and its float16 numbers, which are the scale and then the minimum."""

    codes: int
    numbers: int

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return self.codes + 2 * self.numbers


LAYOUTS = {"q4_1": Layout(BLOCK // 2, 2), "q8_0": Layout(BLOCK, 1)}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class BlockMatrix:
    """A matrix (outputs, inputs) of float32 weights in blocks along its inputs.

    Attributes:
      rows: (outputs, bytes) uint8. A row has the codes of all its blocks, then their scales, then their minima: as in
        a file, but that there each block has all of its own together. A byte of q4_1 holds code i of its block in its
        low half and code i + 16 in its high half.
      kind: "q4_1" or "q8_0".
    """

    rows: Array
    kind: str

    @classmethod
    def from_file(cls, rows: np.ndarray, kind: str) -> "BlockMatrix":
        """Of a matrix as a GGUF file has it: (outputs, bytes) uint8, block by block.

        Raises:
          ValueError: for an unknown kind, or rows that are not whole blocks.
        """
        layout = _layout(kind)
        if rows.ndim != 2 or rows.dtype != np.uint8 or rows.shape[1] % layout.size:
            raise ValueError(_expected(rows, layout))
        blocks = rows.reshape(len(rows), rows.shape[1] // layout.size, layout.size)
        numbers = 2 * layout.numbers
        parts = [blocks[..., numbers:], *(blocks[..., i : i + 2] for i in range(0, numbers, 2))]
        return cls(jnp.asarray(np.concatenate([part.reshape(len(rows), -1) for part in parts], axis=1)), kind)

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs); ValueError for an unknown kind, or rows that are not whole blocks."""
        layout = _layout(self.kind)
        if self.rows.ndim == 0 or self.rows.dtype != jnp.uint8 or self.rows.shape[-1] % layout.size:
            raise ValueError(_expected(self.rows, layout))
        *outer, size = self.rows.shape
        return *outer, size // layout.size * BLOCK

    @property
    def dtype(self) -> np.dtype:
        """Of the weights."""
        return jnp.dtype(jnp.float32)

    def dense(self) -> Array:
        """The weights: (outputs, inputs) float32, exactly."""
        *outer, inputs = self.shape
        layout = LAYOUTS[self.kind]
        blocks = inputs // BLOCK
        codes, *numbers = jnp.split(
            self.rows, [blocks * (layout.codes + 2 * i) for i in range(layout.numbers)], axis=-1
        )
        codes = codes.reshape(*outer, blocks, layout.codes)
        if self.kind == "q4_1":
            codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
        else:
            codes = lax.bitcast_convert_type(codes, jnp.int8)
        halves = [lax.bitcast_convert_type(x.reshape(*outer, blocks, 1, 2), jnp.float16) for x in numbers]
        scale, *minimum = (x.astype(jnp.float32) for x in halves)
        weights = codes.astype(jnp.float32) * scale
        if minimum:
            weights = weights + minimum[0]
        return weights.reshape(*outer, blocks * BLOCK)


def _layout(kind: str) -> Layout:
    if kind not in LAYOUTS:
        raise ValueError(f"expected a kind of block among {', '.join(LAYOUTS)}, got {kind!r}")
    return LAYOUTS[kind]


def _expected(rows: Array | np.ndarray, layout: Layout) -> str:
    return f"expected (outputs, bytes) uint8 in blocks of {layout.size} bytes, got {rows.shape} {rows.dtype}"


def take_rows(matrix: Array | BlockMatrix, ids: Array) -> Array:
    """Rows of a matrix (outputs, inputs), by integer ids (...): (..., inputs), its dtype; NaN where there is none."""
    if isinstance(matrix, BlockMatrix):  # bytes of 255 are what `take` puts where there is no row: float16 NaN
        return BlockMatrix(jnp.take(matrix.rows, ids, axis=0), matrix.kind).dense()
    return jnp.take(matrix, ids, axis=0)
