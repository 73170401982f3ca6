"""Reads a Llama model from a GGUF file: sizes, weights and what the tokenizer needs.

A file may carry things this model does not do (rotary scaling, biases, experts, ...). Running it without them would
write plausible nonsense, so a `llama.` key or a tensor that is not known here is an error.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from tqdm import tqdm

from llama.model import Llama, LlamaConfig
from numba_kernels.blocks import LAYOUTS, BlockMatrix

SIZES = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
}
# Keys of features this model lacks, with the one value that says the feature is not used.
UNUSED = {
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1.0,
    "tensor_data_layout": "Meta AI original pth",
}


class UnsupportedModelError(ValueError):
    """The file is not a GGUF file, or not one of a model that these modules compute."""


class GGUFFile:
    """One open file: `metadata`, and tensors by name."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"no such model file: {path}")
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # whatever a parser trips over in bytes that are not GGUF
            raise UnsupportedModelError(f"{path} cannot be read as a GGUF file: {error}") from error
        self.path = path
        self.metadata = Metadata({k: field.contents() for k, field in reader.fields.items()})
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, outermost axis first."""
        return {n: tuple(int(s) for s in t.shape[::-1]) for n, t in self._tensors.items()}

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        tensor = self._tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"{self.path}: tensor {name}: {error}") from error

    def matrix(self, *names: str) -> Array | BlockMatrix:
        """Matrices joined along their outputs, in the blocks of the file where these are of one kind that is known.

        Otherwise float32: (outputs, inputs). Either way the weights are the same numbers.
        """
        tensors = [self._tensors[name] for name in names]
        kinds = {tensor.tensor_type.name.lower() for tensor in tensors}
        if len(kinds) == 1 and kinds <= LAYOUTS.keys():
            return BlockMatrix.from_file(np.concatenate([tensor.data for tensor in tensors]), kinds.pop())
        return jnp.asarray(np.concatenate([self.tensor(name) for name in names]))


class Metadata(dict[str, Any]):
    """The file's keys; a missing one is an error that names it."""

    def __missing__(self, key: str) -> Any:
        raise UnsupportedModelError(f"the file's metadata lacks the required key {key!r}")


def read_config(file: GGUFFile) -> LlamaConfig:
    """The sizes of the model in a file; UnsupportedModelError if it is of another kind."""
    metadata = file.metadata
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise UnsupportedModelError(f"expected a model of the architecture 'llama', {file.path} holds {architecture!r}")
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModelError("the model is split over several files: merge them first")
    check_known_keys(metadata)
    sizes = {name: metadata.get(f"llama.{name}") for name in SIZES}

    def required(name: str) -> Any:
        return metadata[f"llama.{name}"]

    for name, value in sizes.items():
        if isinstance(value, list):
            raise UnsupportedModelError(f"llama.{name} differs from layer to layer: {value}")
    heads = required("attention.head_count")
    kv_heads = sizes["attention.head_count_kv"] or heads
    head_dim = sizes["attention.key_length"] or required("embedding_length") // heads
    for name in ("attention.value_length", "rope.dimension_count"):
        if (sizes[name] or head_dim) != head_dim:
            raise UnsupportedModelError(
                f"llama.{name} must equal the head dimension {head_dim}, the file has {sizes[name]}"
            )
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"query heads must be a multiple of key/value heads, the file has {heads} and {kv_heads}"
        )
    config = LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=required("embedding_length"),
        feed_forward_size=required("feed_forward_length"),
        num_layers=required("block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=required("context_length"),
        rope_base=sizes["rope.freq_base"] or 10000.0,
        rms_eps=required("attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in file.shapes(),
    )
    check_tensors(config, file)
    return config


def check_known_keys(metadata: Metadata) -> None:
    """Refuse every `llama.` key that would change what the model computes."""
    for key, value in metadata.items():
        name = key.removeprefix("llama.")
        if name == key or name in SIZES or (name in UNUSED and value == UNUSED[name]):
            continue
        raise UnsupportedModelError(f"the model needs {key} = {value!r}, which is not supported")


def check_tensors(config: LlamaConfig, file: GGUFFile) -> None:
    """Refuse a file whose tensors are not exactly those of the model."""
    expected, actual = tensor_shapes(config), file.shapes()
    optional = {"rope_freqs.weight"}
    if unknown := sorted(actual.keys() - expected.keys()):
        raise UnsupportedModelError(f"the model has tensors that are not supported: {shorten(unknown)}")
    if missing := sorted(expected.keys() - actual.keys() - optional):
        raise UnsupportedModelError(f"the model lacks tensors: {shorten(missing)}")
    for name, shape in actual.items():
        if shape != expected[name]:
            raise UnsupportedModelError(f"tensor {name} must have shape {expected[name]}, the file has {shape}")


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor the model may have."""
    hidden, forward = config.hidden_size, config.feed_forward_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, hidden),
        "output_norm.weight": (hidden,),
        "rope_freqs.weight": (config.head_dim // 2,),
    }
    if not config.tied_embeddings:
        shapes["output.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (hidden,),
            f"blk.{layer}.attn_q.weight": (queries, hidden),
            f"blk.{layer}.attn_k.weight": (keys, hidden),
            f"blk.{layer}.attn_v.weight": (keys, hidden),
            f"blk.{layer}.attn_output.weight": (hidden, queries),
            f"blk.{layer}.ffn_norm.weight": (hidden,),
            f"blk.{layer}.ffn_gate.weight": (forward, hidden),
            f"blk.{layer}.ffn_up.weight": (forward, hidden),
            f"blk.{layer}.ffn_down.weight": (hidden, forward),
        }
    return shapes


def load_model(file: GGUFFile, *, progress: bool = False, dense: bool = False) -> Llama:
    """The model of a file, its weights on the default device.

    Matrices that read the same input are joined (q, k, v; gate, up), so that a step streams each once.

    Args:
      file: an open one.
      progress: show a bar.
      dense: have all matrices as float32, also those that the file holds in blocks: the same numbers, in up to seven
        times as many bytes.
    """
    config = read_config(file)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    frequencies = config.rope_base ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if "rope_freqs.weight" in file.shapes():
        frequencies = frequencies / file.tensor("rope_freqs.weight")

    def matrix(*names: str) -> dict[str, Any]:
        joined = file.matrix(*(f"{name}.weight" for name in names))
        return {"weight": joined.dense() if dense and isinstance(joined, BlockMatrix) else joined}

    layers = tqdm(range(config.num_layers), "loading weights", disable=not progress, leave=False)
    head = {"norm": scale(file, "output_norm")}
    if not config.tied_embeddings:
        head["output"] = matrix("output")
    weights = {
        "embedding": matrix("token_embd"),
        "rotary": {"frequencies": jnp.asarray(frequencies, jnp.float32)},
        "blocks": {layer: load_block(file, f"blk.{layer}.", matrix) for layer in layers},
        "head": head,
    }
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graphdef, state)


def load_block(file: GGUFFile, prefix: str, matrix: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The weights of one block, nested as its modules are; `matrix` gives those of one Linear, by names."""

    def joined(*names: str) -> dict[str, Any]:
        return matrix(*(prefix + name for name in names))

    return {
        "attention_norm": scale(file, prefix + "attn_norm"),
        "attention": {"qkv": joined("attn_q", "attn_k", "attn_v"), "output": joined("attn_output")},
        "feed_forward_norm": scale(file, prefix + "ffn_norm"),
        "feed_forward": {"gate_up": joined("ffn_gate", "ffn_up"), "down": joined("ffn_down")},
    }


def scale(file: GGUFFile, name: str) -> dict[str, Any]:
    """The scale of one nnx.RMSNorm."""
    return {"scale": jnp.asarray(file.tensor(f"{name}.weight"))}


def shorten(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
