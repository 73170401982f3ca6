"""What a step compiles to, and what narrow caches change."""

import dataclasses

import jax
import numpy as np
import pytest
from llama.caches import CacheOptions
from llama.decoding import Decoder
from llama.gguf_file import GGUFFile, load_model
from llama.prefill import attend_causal, bucket, read_layer
from tiny_gguf import write_tiny_gguf

PROMPTS = [[5, 9, 30, 7], [8, 8, 31], list(range(20, 40))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(GGUFFile(write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")))


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_one_program_serves_every_step(tiny, kind):
    """Lengths, the block table and which sequences are active change; nothing is compiled again."""
    decoder = Decoder(tiny, PROMPTS, capacity=80, cache=CacheOptions(kind, block_size=16))
    decoder.step()
    programs = decoder._step._cache_size()
    for step in range(40):
        decoder.step(active=np.array([True, step < 20, step % 2 == 0]))
    assert decoder.lengths.tolist() == [45, 24, 41]
    assert decoder._step._cache_size() == programs


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_a_step_writes_into_the_donated_caches(tiny, kind, kv_dtype):
    """All of the caches is reused for the outputs, and what else is allocated is small beside it."""
    tiny.config = dataclasses.replace(tiny.config, context_length=8192)
    decoder = Decoder(tiny, PROMPTS, capacity=8192, cache=CacheOptions(kind, kv_dtype))
    state = decoder._state
    table = decoder._table
    tokens, active = np.zeros(3, np.int32), np.ones(3, bool)
    compiled = decoder._step.lower(decoder._weights, state.caches, state.lengths, tokens, active, table).compile()
    memory = compiled.memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 10
    before = state.caches[0].key
    decoder.step()
    assert before.is_deleted()


def test_prompts_of_one_bucket_share_their_programs(tiny):
    sizes = []
    for length in (17, 20, 24):
        Decoder(tiny, [list(range(length))], capacity=96)
        sizes.append(read_layer._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 65, 97, 8192)] == [16, 16, 24, 24, 32, 48, 64, 96, 128, 8192]
    assert all(n <= bucket(n) <= max(16, 1.5 * n) for n in range(1, 5000))


def test_sequences_that_stopped_keep_their_length_and_the_others_their_answers(tiny):
    alone = Decoder(tiny, PROMPTS[:1], capacity=64)
    batch = Decoder(tiny, PROMPTS, capacity=64)
    for _ in range(10):
        expected = alone.step()
        assert batch.step(active=np.array([True, False, False]))[0] == expected[0]
        np.testing.assert_allclose(batch.logits[0], alone.logits[0], atol=1e-4)
    assert batch.lengths.tolist() == [14, 3, 20]


def aligned(values):
    """A NumPy array such that JAX on a CPU may read it in place."""
    values = np.asarray(values)
    room = np.empty(values.nbytes + 64, np.uint8)
    begin = -room.ctypes.data % 64
    array = room[begin : begin + values.nbytes].view(values.dtype)
    array[:] = values
    return array


def test_the_caller_may_change_its_arrays_after_a_step(tiny):
    decoder, other = Decoder(tiny, PROMPTS, capacity=64), Decoder(tiny, PROMPTS, capacity=64)
    for i in range(8):
        active, tokens = aligned([True, True, i % 2 == 0]), aligned(np.array([5, 6, 7 + i], np.int32))
        read = decoder.step(active, tokens)
        active[:], tokens[:] = False, 0
        assert read.tolist() == [5, 6, 7 + i]
        other.step(np.array([True, True, i % 2 == 0]), np.array([5, 6, 7 + i]))
        assert np.isfinite(other.logits).all()  # waits for the step
    np.testing.assert_array_equal(np.asarray(decoder._state.lengths), decoder.lengths)
    np.testing.assert_array_equal(decoder.logits, other.logits)


def test_a_step_past_the_capacity_is_refused(tiny):
    decoder = Decoder(tiny, PROMPTS, capacity=20)
    with pytest.raises(ValueError, match="1 of the sequences already hold 20 tokens, the capacity"):
        decoder.step()
    decoder.step(active=np.array([True, True, False]))


def test_decoding_token_by_token_equals_reading_at_once(tiny):
    prompt = list(range(10, 60))
    whole = Decoder(tiny, [prompt], capacity=64, keep_prompt_logits=True).prompt_logits[0]
    decoder = Decoder(tiny, [prompt[:20]], capacity=64)
    for position, token in enumerate(prompt[20:], 20):
        decoder.step(tokens=np.array([token]))
        np.testing.assert_allclose(decoder.logits[0], whole[position], atol=1e-4)


@pytest.mark.parametrize("length", [7, 256, 300, 1000])
def test_tiles_of_causal_attention(length):
    """Tiled, and grouped heads not repeated: the same as jax.nn's on whole arrays."""
    generator = np.random.default_rng(length)
    query = generator.normal(size=(2, 6, length, 16)).astype(np.float32)
    key, value = generator.normal(size=(2, 2, 3, length, 16)).astype(np.float32)
    out, _ = jax.jit(attend_causal)(query, key, value)
    swapped = [array.swapaxes(1, 2) for array in (query, key, value)]
    expected = jax.nn.dot_product_attention(*swapped, is_causal=True).swapaxes(1, 2)
    np.testing.assert_allclose(out, expected, atol=2e-5)
