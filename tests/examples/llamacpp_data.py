"""What llama.cpp says about SmolLM2, written by benchmarks/llamacpp_reference.py."""

import json
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "data"
STRIDE = 192  # of the strided logits; see benchmarks/llamacpp_reference.py


def read_json(name: str):
    return json.loads((DATA / name).read_text())


def read_references(name: str) -> dict[str, "Reference"]:
    """The prompts of a file of logits, by name."""
    with np.load(DATA / name) as data:
        arrays = dict(data)
    prompts = {key.split("/")[0] for key in arrays}
    return {p: Reference({k: v for k, v in arrays.items() if k.startswith(f"{p}/")}, p) for p in prompts}


class Reference:
    """llama.cpp's logits and greedy tokens for one prompt; see `save` in benchmarks/llamacpp_reference.py."""

    def __init__(self, data, name: str):
        self._data, self._name = data, name

    def __getattr__(self, field: str) -> np.ndarray:
        return self._data[f"{self._name}/{field}"]

    def difference(self, logits: np.ndarray, stride: int = STRIDE) -> float:
        """The largest difference to (tokens, vocabulary) logits, over all that the reference keeps of them."""
        kept = self.rows < len(logits)
        rows = logits[self.rows[kept]]
        best = np.abs(np.take_along_axis(rows, self.top_ids[kept], axis=-1) - self.top_logits[kept])
        return float(max(best.max(), np.abs(rows[:, ::stride] - self.strided_logits[kept]).max()))
