"""Logits and greedy tokens are llama.cpp's, on SmolLM2 and on a tiny model of another shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama.caches import CacheOptions
from llama.decoding import Decoder
from llama.generation import generate
from llama.gguf_file import GGUFFile, load_model
from llama.tokenizer import Tokenizer
from llamacpp_data import read_json, read_references
from tiny_gguf import write_tiny_gguf

from numba_kernels.blocks import BlockMatrix

TOLERANCE = 1e-3  # both sides sum float32 products, in different orders; the logits reach 30
NEW_TOKENS = 64


def run(model, prompts, cache, new_tokens, capacity, **options):
    decoder = Decoder(model, prompts, capacity=capacity, cache=cache, keep_prompt_logits=True, **options)
    result = generate(decoder, new_tokens, keep_logits=True)
    logits = [np.stack([*a, *b]) for a, b in zip(decoder.prompt_logits, result.logits, strict=True)]
    return result.token_ids, logits


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("name", read_json("prompts.json"))
def test_each_prompt_alone(smollm2, references, name, kind):
    reference = references[name]
    token_ids, logits = run(smollm2, [reference.prompt_ids], CacheOptions(kind), NEW_TOKENS, capacity=512)
    assert reference.difference(logits[0]) <= TOLERANCE
    assert token_ids[0] == reference.token_ids.tolist()
    assert logits[0].argmax(-1).tolist() == reference.best.tolist()


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_prompts_of_different_lengths_as_one_batch(smollm2, references, kind):
    chosen = [references[name] for name in ("short", "chat", "code")]
    prompts = [reference.prompt_ids for reference in chosen]
    token_ids, logits = run(smollm2, prompts, CacheOptions(kind, block_size=16), 24, capacity=128)
    for reference, ids, rows in zip(chosen, token_ids, logits, strict=True):
        assert reference.difference(rows) <= TOLERANCE
        assert ids == reference.token_ids[:24].tolist()


def test_the_reference_covers_prompts_of_up_to_400_tokens(references):
    lengths = sorted(len(reference.prompt_ids) for reference in references.values())
    assert len(lengths) >= 4
    assert 350 <= lengths[-1] <= 400
    assert all(len(reference.token_ids) == NEW_TOKENS for reference in references.values())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return GGUFFile(write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_model_with_its_own_output_matrix_head_width_and_frequencies(tiny, kind):
    reference = read_references("tiny_logits.npz")["text"]
    token_ids, logits = run(load_model(tiny), [reference.prompt_ids], CacheOptions(kind), 16, capacity=64)
    assert reference.difference(logits[0], stride=1) <= 1e-4  # the logits reach 20
    assert token_ids[0] == reference.token_ids.tolist()


def test_a_model_in_blocks_is_that_of_its_float32_weights(tmp_path):
    """Blocks of both kinds, of a kind that is dequantised, and matrices that are joined of two kinds."""
    kinds = {f"blk.0.attn_{name}.weight": "Q4_1" for name in ("q", "k", "v", "output")}
    kinds |= {"blk.1.attn_q.weight": "Q4_1", "blk.1.attn_k.weight": "Q8_0", "blk.0.ffn_gate.weight": "Q5_0"}
    kinds |= {"token_embd.weight": "Q4_1", "output.weight": "Q8_0"}
    file = GGUFFile(write_tiny_gguf(tmp_path / "blocks.gguf", quantise=kinds))
    model, dense = load_model(file), load_model(file, dense=True)
    assert isinstance(model.blocks[0].attention.qkv.weight.get_value(), BlockMatrix)
    assert isinstance(model.head.output.weight.get_value(), BlockMatrix)
    assert not isinstance(model.blocks[1].attention.qkv.weight.get_value(), BlockMatrix)
    for held, name in ((dense.embedding, "token_embd"), (dense.head.output, "output")):
        np.testing.assert_array_equal(held.weight.get_value(), file.tensor(f"{name}.weight"))
    prompt = list(range(10, 50))
    (ids, logits), (dense_ids, dense_logits) = (
        run(each, [prompt], CacheOptions(), 4, capacity=64) for each in (model, dense)
    )
    assert ids == dense_ids
    np.testing.assert_allclose(logits[0], dense_logits[0], atol=1e-4)


def test_the_tiny_models_text_is_the_references(tiny):
    reference = read_references("tiny_logits.npz")["text"]
    assert Tokenizer(tiny.metadata).encode("in the beginning, a café 42") == reference.prompt_ids.tolist()


def test_the_comparison_sees_a_wrong_rotary_layout(tiny, monkeypatch):
    """Pairing entry i with i + D/2 still writes fluent text; the logits must give it away."""

    def half_split(x, rotation):
        cos, sin = rotation
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    monkeypatch.setattr("llama.model.rotate", half_split)
    reference = read_references("tiny_logits.npz")["text"]
    jax.clear_caches()  # or programs compiled with the right layout would be run
    try:
        _, logits = run(load_model(tiny), [reference.prompt_ids], CacheOptions(), 16, capacity=64)
    finally:
        jax.clear_caches()
    assert reference.difference(logits[0], stride=1) > 1
