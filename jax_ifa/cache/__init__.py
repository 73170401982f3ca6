"""Key/value caches for decode loops: contiguous and paged storage, int8 calibration, and a host-side block allocator.

The caches are pytrees that hold the storage of one layer. What all layers share, the lengths and the block table, stays
in the caller's hands. See `ContiguousCache`, `PagedCache`, `BlockAllocator` and `calibrate_antiquant`.
"""

from jax_ifa.cache.allocator import BlockAllocator as BlockAllocator
from jax_ifa.cache.allocator import Fork as Fork
from jax_ifa.cache.allocator import OutOfBlocks as OutOfBlocks
from jax_ifa.cache.calibration import calibrate_antiquant as calibrate_antiquant
from jax_ifa.cache.calibration import quantize_kv as quantize_kv
from jax_ifa.cache.contiguous import ContiguousCache as ContiguousCache
from jax_ifa.cache.paged import PagedCache as PagedCache
