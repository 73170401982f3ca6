"""A text that shows an int8 cache what keys and values to expect: chat, code, prose, numbers, several languages."""

from pathlib import Path

from llama.tokenizer import Tokenizer


def calibration_ids(tokenizer: Tokenizer) -> list[int]:
    """The token ids of calibration.txt, for `Decoder`."""
    return tokenizer.encode(Path(__file__).with_suffix(".txt").read_text())
