"""Incremental (decode) attention for JAX, with the meaning of `torch_npu.npu_incre_flash_attention`.

`incre_flash_attention` is the operator. What it is made of is public too: transforms of layouts, paging, masks and
int8, the decode loop on canonical operands (`attend`), and the merge of partial results. `jax_ifa.cache` holds KV
caches.
"""

from jax_ifa import cache as cache
from jax_ifa import compat as _compat  # refuses a JAX that is too old  # noqa: F401
from jax_ifa.api import incre_flash_attention as incre_flash_attention
from jax_ifa.attend import attend as attend
from jax_ifa.layout import join_output as join_output
from jax_ifa.layout import split_query as split_query
from jax_ifa.layout import view_kv as view_kv
from jax_ifa.masking import MASK_VALUE as MASK_VALUE
from jax_ifa.masking import bias_rows as bias_rows
from jax_ifa.masking import in_window as in_window
from jax_ifa.masking import mask_rows as mask_rows
from jax_ifa.masking import mask_scores as mask_scores
from jax_ifa.masking import visible_window as visible_window
from jax_ifa.merge import merge as merge
from jax_ifa.merge import merge_all as merge_all
from jax_ifa.operands import KVView as KVView
from jax_ifa.operands import Operands as Operands
from jax_ifa.paging import gather_pages as gather_pages
from jax_ifa.quantization import antiquantize as antiquantize
from jax_ifa.quantization import antiquantize_output as antiquantize_output
from jax_ifa.quantization import fold_key_scale as fold_key_scale
from jax_ifa.quantization import key_offset_score as key_offset_score
from jax_ifa.quantization import quantize_output as quantize_output
from jax_ifa.quantization import split_antiquant as split_antiquant

npu_incre_flash_attention = incre_flash_attention
"""The same function, under the name that people port from."""

__version__ = "0.1.0"
