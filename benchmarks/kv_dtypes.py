"""What a narrower KV cache costs in quality: KL divergence and top-1 agreement against a float32 cache, on SmolLM2.

    python -m benchmarks.kv_dtypes [--headroom 1 1.25 1.5]

Every cache is fed the same tokens. A row is either a prompt and its 64 greedy tokens, or `long` cut in two: its first
48 tokens as the prompt and the rest as if it had been decoded. int8 scales see the prompt and llama/calibration.txt.
"""

import argparse
import sys
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "examples"))

from divergence import compare, teacher_forced
from llama.caches import CacheOptions
from llama.calibration import calibration_ids
from llama.download import default_model
from llama.gguf_file import GGUFFile, load_model
from llama.tokenizer import Tokenizer
from llamacpp_data import read_references


def main() -> None:
    """Print one row per text and cache."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--headroom", type=float, nargs="+", default=[CacheOptions().headroom])
    headrooms = parser.parse_args().headroom
    file = GGUFFile(default_model())
    model, calibration = load_model(file), calibration_ids(Tokenizer(file.metadata))
    caches = {name: CacheOptions(dtype=name) for name in ("bfloat16", "float16")}
    caches |= {f"int8, headroom {h:g}": CacheOptions(dtype="int8", headroom=h) for h in headrooms}
    rows = []
    for text, (prompt, tokens) in tqdm(texts().items(), "texts", leave=False):
        exact = teacher_forced(model, prompt, tokens, CacheOptions(), calibration)
        for name, cache in caches.items():
            divergence, agree = compare(exact, teacher_forced(model, prompt, tokens, cache, calibration))
            rows.append([text, len(prompt), len(tokens), name, divergence.mean(), divergence.max(), agree.mean()])
    headers = ["text", "prompt", "decoded", "cache", "mean KL", "max KL", "top-1 agreement"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=("", "", "", "", ".1e", ".1e", ".3f")))


def texts() -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and decoded tokens of each text."""
    references = read_references("smollm2_logits.npz")
    result = {name: (r.prompt_ids.tolist(), r.token_ids.tolist()) for name, r in references.items()}
    long = result["long"][0]
    return result | {"long, cut": (long[:48], long[48:])}


if __name__ == "__main__":
    main()
