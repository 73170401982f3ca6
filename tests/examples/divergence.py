"""How far the logits of one cache are from another's, over the same tokens."""

import numpy as np
from llama.caches import CacheOptions
from llama.decoding import Decoder
from llama.model import Llama


def teacher_forced(
    model: Llama, prompt: list[int], tokens: list[int], cache: CacheOptions, calibration: list[int]
) -> np.ndarray:
    """The logits (tokens, vocabulary) after each of the tokens, decoded one by one after the prompt."""
    decoder = Decoder(model, [prompt], capacity=512, cache=cache, calibration=calibration)
    logits = []
    for token in tokens:
        decoder.step(tokens=np.array([token]))
        logits.append(decoder.logits[0])
    return np.stack(logits)


def compare(exact: np.ndarray, approximate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per token: KL(exact || approximate) in nats, and whether both prefer the same next token."""
    exact_log, approximate_log = log_softmax(exact), log_softmax(approximate)
    divergence = (np.exp(exact_log) * (exact_log - approximate_log)).sum(-1)
    return divergence, exact.argmax(-1) == approximate.argmax(-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
