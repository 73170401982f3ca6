"""The oracle: the operator in plain NumPy float64 loops, as slow as it is plain.

It shares nothing with the implementations but the meaning: it reads one position at a time from the cache as the caller
laid it out. Arguments must be valid; it checks nothing.
"""

from typing import Any

import numpy as np

MASK_VALUE = -1e12


def incre_flash_attention_reference(
    query: Any,
    key: Any,
    value: Any,
    *,
    atten_mask: Any = None,
    pse_shift: Any = None,
    actual_seq_lengths: Any = None,
    antiquant_scale: Any = None,
    antiquant_offset: Any = None,
    block_table: Any = None,
    quant_scale2: Any = None,
    quant_offset2: Any = None,
    kv_padding_size: Any = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """`incre_flash_attention` in float64.

    Returns:
      The output in the query's shape: float64, or, with `quant_scale2`, float64 that is not yet rounded or saturated
      (out * scale + offset), so that a test can tell a tie from an error. And the LSE, (B, N, 1) float64.
    """
    query, key, value = (np.asarray(x) for x in (query, key, value))
    batch = query.shape[0]
    kv_heads = num_key_value_heads or num_heads
    head_dim = query.size // (batch * num_heads)
    paged = block_table is not None
    head_major = input_layout == "BNSD" and key.ndim == 4
    if paged:
        table = np.asarray(block_table)
        capacity = table.shape[1] * block_size
    else:
        capacity = key.shape[2 if head_major else 1]

    def row(cache: np.ndarray, b: int, h: int, t: int) -> np.ndarray:
        """Position t of sequence b in kv head h, as D numbers."""
        if paged:
            b, t = table[b, t // block_size], t % block_size
        if head_major:
            return cache[b, h, t].astype(np.float64)
        if cache.ndim == 4:
            return cache[b, t, h].astype(np.float64)
        return cache[b, t, h * head_dim : (h + 1) * head_dim].astype(np.float64)

    def channels(parameter: Any, which: int, h: int) -> np.ndarray:
        """The antiquantisation parameter of kv head h: `which` is 0 for the key and 1 for the value."""
        parameter = np.asarray(parameter).astype(np.float64)
        if parameter.size == 2:
            return np.full(head_dim, parameter.reshape(2)[which])
        return parameter.reshape(2, kv_heads, head_dim)[which, h]

    def antiquantize(x: np.ndarray, which: int, h: int) -> np.ndarray:
        if antiquant_scale is None:
            return x
        if antiquant_offset is not None:
            x = x + channels(antiquant_offset, which, h)
        return x * channels(antiquant_scale, which, h)

    def window(b: int) -> range:
        lengths = None if actual_seq_lengths is None else np.asarray(actual_seq_lengths).reshape(-1)
        if lengths is None or lengths.size == 0:
            return range(capacity)
        length = int(lengths[b if lengths.size > 1 else 0])
        if kv_padding_size is None or np.size(kv_padding_size) == 0 or paged:
            return range(length)
        padding = max(int(np.asarray(kv_padding_size).reshape(())), 0)
        start, stop = capacity - padding - length, capacity - padding
        return range(start, stop) if start >= 0 and stop >= 0 else range(0)

    out = np.zeros((batch, num_heads, head_dim))
    lse = np.full((batch, num_heads, 1), -np.inf)
    heads = query.reshape(batch, num_heads, head_dim).astype(np.float64)  # one token: every layout has this order
    for b in range(batch):
        for h in range(num_heads):
            g = h // (num_heads // kv_heads)
            scores, values, masked = [], [], []
            for t in window(b):
                k = antiquantize(row(key, b, g, t), 0, g)
                score = float(scale_value) * np.sum(heads[b, h] * k)
                if pse_shift is not None:
                    bias = np.asarray(pse_shift)
                    score = score + float(bias[b if bias.shape[0] > 1 else 0, h, 0, t])
                hidden = atten_mask is not None and np.size(atten_mask) and np.asarray(atten_mask)[b].reshape(-1)[t]
                masked.append(bool(hidden))
                scores.append(MASK_VALUE if hidden else score)
                values.append(antiquantize(row(value, b, g, t), 1, g))
            top = max(scores, default=-np.inf)
            if top == -np.inf:  # no position, or none with any weight
                continue
            weights = np.exp(np.array(scores) - top)
            for weight, v, hidden in zip(weights, values, masked, strict=True):
                if weight > 0 or not hidden:  # a masked position without weight is not there, whatever it holds
                    out[b, h] += weight / weights.sum() * v
            lse[b, h] = top + np.log(weights.sum())

    if quant_scale2 is not None:
        scale = np.asarray(quant_scale2).astype(np.float64)
        out = out * (scale.reshape(()) if scale.size == 1 else scale.reshape(num_heads, head_dim))
        if quant_offset2 is not None:
            offset = np.asarray(quant_offset2).astype(np.float64)
            out = out + (offset.reshape(()) if offset.size == 1 else offset.reshape(num_heads, head_dim))
    return out.reshape(query.shape), lse
