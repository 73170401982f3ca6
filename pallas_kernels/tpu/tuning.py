"""Tile sizes and cores per TPU generation. The numbers are data: `tuning.json`."""

import dataclasses
import functools
import json
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What differs between TPU generations.

    Attributes:
      cores: TensorCores that run one program together (2 on the megacore chips).
      slots: tiles in flight: one being read, the others being fetched.
      matrix_width: rows and columns of the matrix unit.
      tile_bytes: keys and values of one tile. Latencies cost the same for any tile: bigger is better until VMEM ends.
      vmem_limit_bytes: what the kernel may allocate in VMEM, with room left for the compiler.
      int8_products: whether the matrix unit multiplies int8 by int8.
      turns_int8: whether int8 that is multiplied as bfloat16 and has to be transposed for it (keys; in columns values)
        is transposed first. By libtpu's schedules that is faster on tpu7x, and slower on v5e and v6e.
    """

    cores: int
    slots: int
    matrix_width: int
    tile_bytes: int
    vmem_limit_bytes: int
    int8_products: bool
    turns_int8: bool


@functools.cache
def _table() -> dict[str, dict]:
    return json.loads(resources.files(__package__).joinpath("tuning.json").read_text())


def tuning_for(device_kind: str | None) -> Tuning:
    """The tuning of a device kind as JAX names it ("TPU v5 lite"), or the default for None and unknown kinds."""
    entries = _table()
    entry = next((e for e in entries.values() if device_kind in e["kinds"]), entries["default"])
    return Tuning(**{field.name: entry[field.name] for field in dataclasses.fields(Tuning)})
