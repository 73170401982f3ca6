"""What Numba code calls by name and finds when the whole is linked: the steps on tiles, and the numbers of a format.

So Numba's code is the same for every format and processor. All take and return int64.
"""

from typing import Any

from numba import types

NAMES: list[str] = []
"""The names of all functions that `linked` made."""


def linked(name: str, arguments: int = 0) -> Any:
    """A function that Numba code calls and `tiles.module_of` defines."""
    NAMES.append(name)
    return types.ExternalFunction(name, types.int64(*[types.int64] * arguments))


# The steps; see tiles.py and dots.py, and amx.py for the last two.
series = linked("series", 4)
split = linked("split", 6)
scores = linked("scores", 10)
weigh = linked("weigh", 8)
values = linked("values", 10)
merge = linked("merge", 6)
divide = linked("divide", 4)
configure = linked("configure", 2)
reset = linked("reset", 1)

# Of the processor, and of the format as it reads with it; see `tiles.numbers`.
lanes = linked("lanes")
strip = linked("strip")
pack = linked("pack")
itemsize = linked("itemsize")
tile = linked("tile")
least_tile = linked("least_tile")
query_digits = linked("query_digits")
query_heads = linked("query_heads")
query_lanes = linked("query_lanes")
weight_rows = linked("weight_rows")
weight_lanes = linked("weight_lanes")
amx = linked("amx")
piece = linked("piece", 1)
group = linked("group", 1)
