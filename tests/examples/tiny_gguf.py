"""Writes a Llama GGUF file of a few kilobytes, different from SmolLM2 in everything a file may choose.

Grouped heads wider than hidden_size / heads, an output matrix of its own, rescaled rotary frequencies, another rotary
base. With random weights nothing it says makes sense, but its logits are as exact a test as any.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers.pre_tokenizers import ByteLevel

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FEED_FORWARD, LAYERS = 4, 2, 16, 32, 48, 2
CONTEXT = 256
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ t", "Ġt he", "i n", "Ġ a"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def metadata() -> dict[str, Any]:
    """Every key of the file except general.architecture, ready to be changed by a test."""
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
    return {
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 5000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * len(SPECIAL_TOKENS) + [NORMAL] * (len(tokens) - len(SPECIAL_TOKENS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def sentencepiece() -> dict[str, Any]:
    """Changes to `metadata` for a tokenizer of the other kind: pieces with scores, and bytes for all else."""
    special = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    pieces = [*"▁etaoinshrdlué", "▁t", "he", "in", "th", "▁the", "▁a", "er", "▁in", "on", "re", "the"]
    pieces += ["▁there", "▁s", "▁an", "nd", "▁and", "中"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*special, *pieces],
        "tokenizer.ggml.token_type": [*special.values()] + [NORMAL] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * len(special) + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": None,
        "llama.vocab_size": len(special) + len(pieces),
    }


def tensors(vocab_size: int) -> dict[str, np.ndarray]:
    """Every tensor of the file, float32, drawn from a fixed seed."""
    generator = np.random.default_rng(7)

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return generator.normal(0, inputs**-0.5, (outputs, inputs)).astype(np.float32)

    def norm() -> np.ndarray:
        return generator.uniform(0.5, 1.5, HIDDEN).astype(np.float32)

    weights = {
        "token_embd.weight": matrix(vocab_size, HIDDEN),
        "output_norm.weight": norm(),
        "output.weight": 3 * matrix(vocab_size, HIDDEN),
        "rope_freqs.weight": np.linspace(1, 4, HEAD_DIM // 2, dtype=np.float32),
    }
    for layer in range(LAYERS):
        weights |= {
            f"blk.{layer}.attn_norm.weight": norm(),
            f"blk.{layer}.attn_q.weight": 2 * matrix(HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k.weight": 2 * matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm.weight": norm(),
            f"blk.{layer}.ffn_gate.weight": matrix(FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_up.weight": matrix(FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_down.weight": matrix(HIDDEN, FEED_FORWARD),
        }
    return weights


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    change_metadata: Mapping[str, Any] = {},
    change_tensors: Mapping[str, np.ndarray | None] = {},
    quantise: Mapping[str, str] = {},
) -> Path:
    """Write the file; the changes replace or add entries, and None leaves an entry out.

    `quantise` gives the kinds of blocks ("Q4_1", "Q8_0", ...) of tensors that have some.
    """
    fields = {k: v for k, v in (metadata() | dict(change_metadata)).items() if v is not None}
    weights = tensors(len(metadata()["tokenizer.ggml.tokens"])) | dict(change_tensors)
    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, array in weights.items():
        if name in quantise:
            kind = GGMLQuantizationType[quantise[name]]
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        elif array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
