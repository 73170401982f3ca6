"""Decoding a batch until each sequence ends."""

import dataclasses
import time
from collections.abc import Callable, Collection

import numpy as np

from llama.decoding import Decoder


@dataclasses.dataclass
class Generation:
    """What a batch of B sequences became.

    Attributes:
      token_ids: the new tokens of each sequence; an end token is the last one.
      finish: why each stopped: "end" (an end token), "length" (as many tokens as asked for), "capacity" (of the cache).
      step_seconds: how long each new token took to come; the first one compiles.
      logits: with `keep_logits`, for each sequence what the model expected after each new token.
    """

    token_ids: list[list[int]]
    finish: list[str]
    step_seconds: list[float]
    logits: list[list[np.ndarray]]

    def tokens_per_second(self) -> float | None:
        """New tokens of all sequences over time, without the first step; None if there is no other."""
        later = sum(max(len(ids) - 1, 0) for ids in self.token_ids)
        return later / sum(self.step_seconds[1:]) if later else None


def generate(
    decoder: Decoder,
    max_new_tokens: int,
    *,
    end_ids: Collection[int] = (),
    keep_logits: bool = False,
    on_token: Callable[[int, int], None] = lambda sequence, token: None,
) -> Generation:
    """Decode until every sequence has ended, calling on_token(sequence, token) for each new token as it comes."""
    batch = len(decoder.lengths)
    result = Generation([[] for _ in range(batch)], ["length"] * batch, [], [[] for _ in range(batch)])
    active = np.ones(batch, bool)
    for _ in range(max_new_tokens):
        for sequence in np.flatnonzero(active & (decoder.lengths >= decoder.capacity)):
            active[sequence], result.finish[sequence] = False, "capacity"
        if not active.any():
            break
        start = time.perf_counter()
        tokens = decoder.step(active)
        result.step_seconds.append(time.perf_counter() - start)
        logits = decoder.logits if keep_logits else None
        for sequence in np.flatnonzero(active):
            token = int(tokens[sequence])
            result.token_ids[sequence].append(token)
            if logits is not None:
                result.logits[sequence].append(logits[sequence])
            if token in end_ids:
                active[sequence], result.finish[sequence] = False, "end"
            on_token(int(sequence), token)
    return result
