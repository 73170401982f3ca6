"""Tile sizes per device and shape class. The numbers are data: `tuning.json`."""

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is tuned, for one device and shape class.

    Attributes:
      tile: T, a multiple of 64.
      stages: tiles that shared memory holds, where it has room.
      blocks_per_multiprocessor: thread blocks that a multiprocessor is to run at once, where it has room.
      multiprocessors: of the device.
      alone: share of a multiprocessor's bandwidth that one thread block on it reaches.
      max_splits: most thread blocks that share a window.
      overhead_tiles: what a thread block costs beside its tiles, in tiles.
      merge_tiles: what each split adds to the merge, in tiles.
    """

    tile: int
    stages: int
    blocks_per_multiprocessor: int
    multiprocessors: int
    alone: float
    max_splits: int
    overhead_tiles: float
    merge_tiles: float


def shape_class(*, dtype: jnp.dtype, head_dim: int, group: int) -> str:
    """The name of the class that a shape is tuned in: "16-bit, D<=128, G<=8"."""
    bits = dtype.itemsize * 8
    dim = next(limit for limit in (64, 128, 192, 256, 512) if head_dim <= limit)
    heads = next(limit for limit in (8, 16, 32, 64) if group <= limit)
    return f"{bits}-bit, D<={dim}, G<={heads}"


@functools.cache
def table() -> dict[str, Any]:
    """`tuning.json`."""
    return json.loads(resources.files(__package__).joinpath("tuning.json").read_text())


def tuning_for(device_kind: str | None, *, dtype: jnp.dtype, head_dim: int, group: int) -> Tuning:
    """The tuning of a device kind as JAX names it ("NVIDIA H200"), or the default's for None and unknown kinds."""
    devices = table()
    device = next((d for d in devices.values() if device_kind in d["kinds"]), devices["default"])
    name = shape_class(dtype=dtype, head_dim=head_dim, group=group)
    merged = device["device"] | devices["default"]["classes"].get(name, {}) | device["classes"].get(name, {})
    return Tuning(**merged)
