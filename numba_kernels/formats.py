"""How an element of the cache meets the query: as float32, or several at a time in a narrow dot product.

All products of the kernels are of 32-bit lanes, which hold one float32, a pair of bfloat16, a quad of int8, or a pair
of int16 that are int8 in the cache; `pack` says how many. On one side is the query, with consecutive elements side by
side in a lane, or the softmax weights, with those of positions that are `positions_apart`; on the other, in the same
way, the elements of a key, or those of as many values, interleaved.

A narrow lane holds fewer bits than a float32. So query and weights are split into digits, each a row of its own, whose
products are put together in float32. With three bytes, x = scale * (2**16 * high + 2**8 * middle + low) to within
float32's own precision; with two bfloat16, x = high + low to within 2**-17. A query that is bfloat16 already needs one.
Where 16 bits of the result are all that is kept of it, two bytes do, which hold 16 bits, or one int16, and one bfloat16
for a weight. Weights are not below 0, so signed digits hold one bit less of them: 15, and of three bytes 23.
"""

import dataclasses
from typing import Any

from numba_kernels.machine import Machine

MATRIX_COLUMNS = 16  # of AMX
LEAST_AMX_GROUP = {"bfloat16": 4, "int8": 6}  # query heads: for fewer, products of vectors are faster


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of reading a cache.

    Attributes:
      name: of the format, for messages and caches of compiled code.
      dtype: of the cache.
      pack: elements in a 32-bit lane: 1 converts to float32, 2 multiplies pairs of bfloat16 or int16, 4 quads of int8.
      query_digits: rows that hold one query head.
      weight_digits: rows that hold the weights of one query head.
      tile: positions read at a time, at most.
      amx: products of matrices, not of vectors; see amx.py.
      signed: products of integers are of signed ones; else one side is not, of bytes.
    """

    name: str
    dtype: str
    pack: int
    query_digits: int
    weight_digits: int
    tile: int
    amx: bool = False
    signed: bool = False

    @property
    def per_lane(self) -> int:
        """Elements of a row that are read together for each lane of a vector: bfloat16 is read in pairs.

        Where it is converted, these become two vectors (`Vectors.load_parts`), with no more instructions than one.
        """
        return 2 if self.dtype == "bfloat16" else self.pack

    def strip(self, lanes: int) -> int:
        """Elements of a row that are read together, by a processor with vectors of so many lanes."""
        return lanes * self.per_lane

    @property
    def parts(self) -> int:
        """Vectors that a reading of one row becomes."""
        return self.per_lane // self.pack

    @property
    def query_heads(self) -> int:
        """Query heads whose digits are stored side by side, in `query_lanes` lanes for each lane of a row."""
        return MATRIX_COLUMNS // self.query_digits if self.amx else 1

    @property
    def query_lanes(self) -> int:
        """See `query_heads`."""
        return MATRIX_COLUMNS if self.amx else self.query_digits

    @property
    def interleaved(self) -> bool:
        """Whether `pack` rows of values are interleaved, so that a lane is of one element; else see amx.py."""
        return not self.amx or self.integer

    @property
    def weight_rows(self) -> int:
        """Rows that hold the weights of one query head: of each digit, and of each element of a lane's."""
        return self.weight_digits * (1 if self.interleaved else self.pack)

    @property
    def weight_lanes(self) -> int:
        """Lanes of a row of weights: what a tile's rows of values are read as."""
        return self.tile // self.pack if self.interleaved else self.tile

    @property
    def positions_apart(self) -> int:
        """From one position of a lane of weights to the next: integers are put into lanes without crossing them."""
        return self.weight_lanes if self.integer else 1

    @property
    def least_tile(self) -> int:
        """Positions read at a time where their rows are far apart: half as many, where that is no slower."""
        return self.tile if self.amx or self.integer else self.tile // 2

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[self.dtype]

    @property
    def converted(self) -> bool:
        """Whether elements become float32 when they are read."""
        return self.pack == 1 and self.dtype != "float32"

    @property
    def integer(self) -> bool:
        """Whether the product accumulates in int32."""
        return self.dtype == "int8" and self.pack > 1

    @property
    def words(self) -> bool:
        """Whether int8 becomes int16 when it is read."""
        return self.integer and self.pack == 2

    @property
    def digit_bits(self) -> int:
        """Bits of a digit."""
        return 32 // self.pack

    @property
    def weight_bits(self) -> int:
        """Bits that hold a weight."""
        return self.digit_bits * self.weight_digits

    source = "schedule"  # see `build.Kernel`

    def tiles(self, machine: Machine) -> Any:
        """See `build.Kernel`."""
        from numba_kernels import amx, dots, tiles  # not without need: these import llvmlite

        return tiles.common(self, machine) | (amx.make(self) if self.amx else dots.make(self, machine))


def format_of(dtype: str, precise: bool, machine: Machine, narrow: bool = False, group: int = 1) -> Format:
    """The fastest format of `machine` for caches of this dtype.

    Args:
      dtype: of the cache.
      precise: float32 throughout: the softmax weights are not rounded to the cache's 16-bit dtype.
      machine: to run on.
      narrow: the result has 16 bits, and need not be more precise than that; not together with `precise`.
      group: query heads that share a kv head.
    """
    amx = machine.amx and dtype in LEAST_AMX_GROUP and group >= LEAST_AMX_GROUP[dtype]
    kind = ("matrices" if amx else {"bfloat16": "pairs", "int8": "quads"}.get(dtype, "")) + "_narrow" * narrow
    if dtype == "bfloat16" and (machine.bfloat16_dot or amx) and not precise:
        return Format(f"bfloat16_{kind}", dtype, 2, 1, 1 if narrow else 2, 64, amx)
    if dtype == "int8" and (machine.int8_dot or amx):
        digits = 2 if narrow else 3
        tile = 128 if machine.lanes == 16 and not amx else 64  # there is room in registers when they are weighed
        return Format(f"int8_{kind}", dtype, 4, digits, digits, tile, amx, machine.int8_signed and not amx)
    if dtype == "int8" and machine.int16_dot and narrow:
        return Format("int8_words_narrow", dtype, 2, 1, 1, 64, signed=True)
    return Format(dtype, dtype, 1, 1, 1, 32 if dtype == "float32" else 64)
