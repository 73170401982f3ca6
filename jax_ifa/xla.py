"""Preliminary streaming loop, batched over all rows."""

import jax
import jax.numpy as jnp
from jax import Array

from jax_ifa.masking import in_window, mask_scores
from jax_ifa.operands import Operands, repeat_rows
from jax_ifa.paging import page_tables
from jax_ifa.dense import attend_dense


def unsupported_reason(operands: Operands) -> str | None:
    return None


def attend(operands: Operands):
    return attend_dense(operands)
