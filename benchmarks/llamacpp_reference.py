"""Regenerates tests/data from llama.cpp. Users and tests do not need it: the results are committed.

    pip install llama-cpp-python gguf tokenizers      # builds llama.cpp; needs a C++ compiler
    python benchmarks/llamacpp_reference.py MODEL.gguf [--full-logits DIRECTORY]

MODEL.gguf is dequantised to a float32 file first, because llama.cpp quantises activations wherever weights are. The
cache is float32 and flash attention is off, so what is left is float32 arithmetic in another order.

Row i of the logits belongs to token i of prompt + continuation: what the model predicts after reading it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "examples"))

from llamacpp_data import DATA
from tiny_gguf import sentencepiece, write_tiny_gguf

NEW_TOKENS = 64
ROWS = 40  # of every prompt's logits, evenly spread, that are kept
TOP = 8  # best tokens kept of each of those rows
STRIDE = 192  # and every so many of the other logits


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--full-logits", type=Path, metavar="DIRECTORY")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exact = write_float32_gguf(options.model, Path(folder) / "float32.gguf")
        model = open_model(exact, context=1024)
        strings = json.loads((DATA / "tokenizer_strings.json").read_text())
        write_json(DATA / "tokenizer_ids.json", [tokenize(model, s) for s in strings])
        prompts = json.loads((DATA / "prompts.json").read_text())
        rows = {name: reference(model, tokenize(model, text)) for name, text in prompts.items()}
        save(DATA / "smollm2_logits.npz", rows, options.full_logits)

        path = write_tiny_gguf(Path(folder) / "pieces.gguf", change_metadata=sentencepiece())
        pieces = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        write_json(DATA / "sentencepiece_ids.json", [tokenize(pieces, s) for s in strings])

        tiny = open_model(write_tiny_gguf(Path(folder) / "tiny.gguf"), context=256)
        rows = {"text": reference(tiny, tokenize(tiny, "in the beginning, a café 42"), new_tokens=16)}
        save(DATA / "tiny_logits.npz", rows, options.full_logits, stride=1)


def open_model(path: Path, context: int, threads: int = 2, logits_all: bool = True) -> llama_cpp.Llama:
    """A model whose every number is float32."""
    float32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=logits_all,
        flash_attn=False,
        type_k=float32,
        type_v=float32,
        verbose=False,
    )


def tokenize(model: llama_cpp.Llama, text: str) -> list[int]:
    """Token ids; names of special tokens become those tokens."""
    return model.tokenize(text.encode(), add_bos=False, special=True)


def reference(model: llama_cpp.Llama, prompt: list[int], new_tokens: int = NEW_TOKENS) -> dict[str, np.ndarray]:
    """The greedy continuation of a prompt (past any end token) and the logits of every row."""
    model.reset()
    model.eval(prompt)
    for _ in range(new_tokens):
        model.eval([int(np.argmax(model.scores[model.n_tokens - 1]))])
    logits = np.array(model.scores[: model.n_tokens])
    ids = np.array(model.input_ids[: model.n_tokens], np.int32)
    return {"prompt_ids": ids[: len(prompt)], "token_ids": ids[len(prompt) :], "logits": logits}


def save(path: Path, results: dict, full_logits: Path | None, stride: int = STRIDE) -> None:
    """Keep of the logits what fits in a repository: some rows, their best tokens, a strided rest."""
    kept: dict[str, Any] = {}
    for name, result in results.items():
        logits = result.pop("logits")
        if full_logits is not None:
            full_logits.mkdir(parents=True, exist_ok=True)
            np.save(full_logits / f"{name}.npy", logits)
        rows = np.unique(np.linspace(0, len(logits) - 1, ROWS).astype(np.int32))
        best = np.argsort(-logits[rows], axis=-1)[:, :TOP].astype(np.int32)
        result |= {
            "best": logits.argmax(-1).astype(np.int32),
            "rows": rows,
            "top_ids": best,
            "top_logits": np.take_along_axis(logits[rows], best, -1),
            "strided_logits": logits[rows, ::stride],
        }
        kept |= {f"{name}/{key}": value for key, value in result.items()}
    np.savez_compressed(path, **kept)


def write_json(path: Path, rows: list) -> None:
    """One row per line, so that a change shows as the lines it changes."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def write_float32_gguf(source: Path, target: Path) -> Path:
    """The same model with every tensor dequantised."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
    for tensor in tqdm(reader.tensors, "dequantise"):
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


if __name__ == "__main__":
    main()
