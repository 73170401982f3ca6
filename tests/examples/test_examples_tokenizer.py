"""Token ids are llama.cpp's; text comes back whole, also token by token."""

import pytest
from llama.gguf_file import Metadata, UnsupportedModelError
from llama.tokenizer import Tokenizer
from llamacpp_data import read_json
from tiny_gguf import metadata, sentencepiece

STRINGS = read_json("tokenizer_strings.json")
IDS = read_json("tokenizer_ids.json")


def test_there_are_enough_strings():
    assert len(STRINGS) == len(IDS) >= 30


@pytest.mark.parametrize("text, ids", list(zip(STRINGS, IDS, strict=True)), ids=lambda value: repr(value)[:30])
def test_ids_are_those_of_llama_cpp(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids


def test_prompts_are_those_of_llama_cpp(tokenizer, prompts, references):
    for name, text in prompts.items():
        assert tokenizer.encode(text) == references[name].prompt_ids.tolist()


@pytest.mark.parametrize("text", [text for text in STRINGS if "<|" not in text and "\x01" not in text])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", STRINGS)
def test_streaming_says_what_decoding_says_and_never_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.step(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_tokens_streams_at_once(tokenizer):
    ids = tokenizer.encode("\N{ROCKET}")
    stream = tokenizer.stream()
    pieces = [stream.step(token) for token in ids]
    assert len(ids) > 1
    assert pieces == [""] * (len(ids) - 1) + ["\N{ROCKET}"]


def test_chat_template_is_the_files_own(tokenizer, prompts):
    assert tokenizer.chat("Explain in two sentences why the sky is blue.") == prompts["chat"]


def test_end_tokens(tokenizer):
    assert {tokenizer.tokens[index] for index in tokenizer.end_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert tokenizer.bos_id is None


def make(changes):
    return Tokenizer(Metadata({k: v for k, v in (metadata() | changes).items() if v is not None}))


def test_bos_is_added_once_where_the_file_asks_for_it():
    tokenizer = make({"tokenizer.ggml.add_bos_token": True})
    bos = tokenizer.bos_id
    assert tokenizer.encode("the")[0] == bos
    assert tokenizer.encode("<|im_start|>the") == tokenizer.encode("the")


@pytest.mark.parametrize("text, ids", list(zip(STRINGS, read_json("sentencepiece_ids.json"), strict=True)), ids=repr)
def test_pieces_with_scores_give_the_ids_of_llama_cpp(text, ids):
    tokenizer = make(sentencepiece())
    assert tokenizer.encode(text) == [tokenizer.bos_id, *ids]
    assert tokenizer.decode(ids).strip() == text.strip()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer.ggml.model": "bert"}, "expected a tokenizer of the kind 'gpt2' or 'llama', the file has 'bert'"),
        ({"tokenizer.ggml.pre": "deepseek-coder"}, "expected a pre-tokenizer among .*'smollm'.* 'deepseek-coder'"),
        ({"tokenizer.ggml.pre": None}, "the file has 'unnamed'"),
        ({"tokenizer.ggml.merges": None}, "lacks the required key 'tokenizer.ggml.merges'"),
    ],
)
def test_other_tokenizers_are_refused(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        make(changes)


def test_a_model_without_template_has_no_chat():
    with pytest.raises(UnsupportedModelError, match="no chat template: use --raw"):
        make({"tokenizer.chat_template": None}).chat("Hello")
