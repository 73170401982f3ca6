"""Tokens per second of a whole model, SmolLM2-135M, beside llama.cpp on the same weights and threads.

    python -m benchmarks.decode_model --context 128 1024 4096 8192 --name NAME

Our model computes in float32, with its weights as the file has them, in blocks of 4 and 8 bits, or dequantised to
float32, which are the same numbers. llama.cpp computes in float32 with a dequantised file; with the file itself it
rounds what the weights are multiplied with to 8 bits. Needs llama-cpp-python in the same environment for llama.cpp's
rows, and leaves them out without it. For each context, every contender holds a prompt almost that long and they take
turns decoding. With --fill, our caches hold zeros instead of the prompt: what they hold does not matter to the speed,
and reading 8192 tokens once per cache takes minutes. Results go to results/decode-NAME.json and .md; contexts that are
not measured again stay.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.timing import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from llama.caches import CacheOptions
from llama.calibration import calibration_ids
from llama.decoding import Decoder
from llama.download import default_model
from llama.gguf_file import GGUFFile, load_model
from llama.model import Llama
from llama.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5
TOKENS_PER_TURN = 8
READING = "prompt read in s, compiling included"
CACHES = [CacheOptions(), CacheOptions(dtype="bfloat16"), CacheOptions(dtype="int8")]
Step = Callable[[], object]
"""Decodes one token, and returns when it is there; the work for the next one may go on."""


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024, 4096, 8192])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of llama.cpp")
    parser.add_argument("--fill", action="store_true", help="do not read the prompts of our rows")
    parser.add_argument("--name", default="cpu")
    options = parser.parse_args()
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "passive":  # llama.cpp's threads would sleep between layers
        parser.error(
            f"OMP_WAIT_POLICY must not be passive, which slows llama.cpp down: expected it unset, got {policy!r}"
        )
    path = default_model()
    file = GGUFFile(path)
    models = {"weights of the file": load_model(file), "float32 weights": load_model(file, dense=True)}
    calibration = calibration_ids(Tokenizer(file.metadata))
    ids = np.resize(calibration, max(options.context)).tolist()
    with llama_cpp_weights(path) as exact:
        for context in options.context:
            prompt = ids[: context - (ROUNDS + 1) * (TOKENS_PER_TURN + 1)]
            makers: dict[str, Callable[[], Step]] = {
                f"jax_ifa, {weights}, {cache.dtype} cache": partial(
                    ours, model, prompt, context, cache, calibration, fill=options.fill
                )
                for weights, model in models.items()
                for cache in CACHES
            }
            if exact is not None:
                for weights, its_file in {"the file, 8-bit activations": path, "float32 weights": exact}.items():
                    makers[f"llama.cpp, {weights}, float32 cache"] = partial(
                        llama_cpp_step, its_file, prompt, context, options.threads
                    )
            rows = measure(makers, len(prompt), context)
            for row in rows if options.fill else []:
                row[READING] = None if row["contender"].startswith("jax_ifa") else row[READING]
            write(f"decode-{options.name}", context, rows)


def measure(makers: dict[str, Callable[[], Step]], prompt: int, context: int) -> list[dict[str, Any]]:
    """A row for each contender: all hold their prompts, then they take turns."""
    steps, reading = {}, {}
    for name, make in tqdm(makers.items(), f"context {context}: reading {prompt} tokens", leave=False):
        start = time.perf_counter()
        steps[name] = make()
        reading[name] = time.perf_counter() - start
        steps[name]()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(ROUNDS), f"context {context}: decoding", leave=False):
        for name, step in steps.items():
            step()  # this turn's caches and threads, not the last contender's
            start = time.perf_counter()
            for _ in range(TOKENS_PER_TURN):  # ours returns a token while the step that reads it goes on
                step()
            seconds[name].append((time.perf_counter() - start) / TOKENS_PER_TURN)
    return [
        {
            "context": context,
            "contender": name,
            "tokens/s (median)": 1 / float(np.median(taken)),
            "tokens/s (best)": 1 / min(taken),
            READING: reading[name],
        }
        for name, taken in seconds.items()
    ]


def ours(
    model: Llama, prompt: list[int], capacity: int, cache: CacheOptions, calibration: list[int], fill: bool
) -> Step:
    """A contender of this repository."""
    begin = prompt[:16] if fill else prompt
    decoder = Decoder(model, [begin], capacity=capacity, cache=cache, calibration=calibration)
    if fill:
        decoder._grow(np.array([len(prompt) - len(begin)]))
        decoder.lengths = np.array([len(prompt)])
        decoder._state = dataclasses.replace(decoder._state, lengths=jnp.asarray(decoder.lengths, jnp.int32))
    return decoder.step


@contextmanager
def llama_cpp_weights(model: Path) -> Iterator[Path | None]:
    """The model dequantised to a float32 GGUF file, or None where llama.cpp is missing."""
    if importlib.util.find_spec("llama_cpp") is None:
        print("llama-cpp-python is not installed: its rows are left out", file=sys.stderr)
        yield None
        return
    from benchmarks.llamacpp_reference import write_float32_gguf

    with tempfile.TemporaryDirectory() as folder:
        yield write_float32_gguf(model, Path(folder) / "float32.gguf")


def llama_cpp_step(model: Path, prompt: list[int], context: int, threads: int) -> Step:
    """A contender of llama.cpp: a float32 cache, no flash attention."""
    from benchmarks.llamacpp_reference import open_model

    llama = open_model(model, context, threads, logits_all=False)
    llama.eval(prompt)
    return lambda: llama.eval(prompt[:1])  # which token it is does not matter to its speed


def write(name: str, context: int, rows: list[dict[str, Any]]) -> None:
    """Merge the rows of one context into the results."""
    stored, page = RESULTS / f"{name}.json", RESULTS / f"{name}.md"
    others = json.loads(stored.read_text())["rows"] if stored.exists() else []
    rows = sorted([row for row in others if row["context"] != context] + rows, key=lambda row: row["context"])
    RESULTS.mkdir(exist_ok=True)
    stored.write_text(json.dumps({"about": machine(), "rows": rows}, indent=1))
    formats = {
        "tokens/s (median)": "{:.1f}",
        "tokens/s (best)": "{:.1f}",
        READING: "{:.1f}",
    }
    cells = [
        {key: "-" if value is None else formats.get(key, "{}").format(value) for key, value in row.items()}
        for row in rows
    ]
    table = tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    page.write_text(f"{about}\n\n{table}\n")
    print(table)


if __name__ == "__main__":
    main()
