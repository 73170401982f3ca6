"""The command line, run on a tiny model as a user would, and once on the real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from generate import main
from llama.gguf_file import GGUFFile
from llama.tokenizer import Tokenizer
from llamacpp_data import read_references
from tiny_gguf import CONTEXT, HEAD_DIM, HIDDEN, metadata, tensors, write_tiny_gguf

TEXT = "in the beginning, a café 42"
REFERENCE = read_references("tiny_logits.npz")["text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny(folder):
    return write_tiny_gguf(folder / "tiny.gguf")


@pytest.fixture
def run(tiny, capsys):
    """Run the command line and return what it wrote to stdout."""

    def run(*arguments, model=tiny):
        main(["--model", str(model), *map(str, arguments)])
        return capsys.readouterr().out

    return run


def last_object(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_json_and_logits_are_the_references(run, tmp_path):
    arguments = ["--raw", "--prompt", TEXT, "--max-new-tokens", 16, "--ignore-end"]
    out = run(*arguments, "--json", "--logits", tmp_path / "logits.npy")
    answer = last_object(out)
    assert answer["prompt_ids"] == REFERENCE.prompt_ids.tolist()
    assert answer["token_ids"] == REFERENCE.token_ids.tolist()
    assert answer["finish"] == "length"
    assert answer["tokens_per_second"] > 0
    logits = np.load(tmp_path / "logits.npy")
    assert logits.shape == (len(answer["prompt_ids"]) + 16, len(REFERENCE.strided_logits[0]))
    assert REFERENCE.difference(logits, stride=1) <= 1e-4


def test_the_answer_streams_and_a_line_says_how_it_went(run):
    out = run("--raw", "--prompt", TEXT, "--max-new-tokens", 5, "--cache", "paged", "--kv-dtype", "bfloat16", "--json")
    answer = last_object(out)
    whole_characters = answer["text"].rstrip("\ufffd")  # the tiny model may end within one
    assert out.startswith(TEXT + whole_characters + "\n[")
    line = out.splitlines()[-2]
    assert line.startswith(f"[prompt {len(REFERENCE.prompt_ids)} tokens, 5 new tokens at ")
    assert line.endswith("tokens/s, paged bfloat16 cache, implementation default]")


def test_the_chat_template_wraps_the_prompt(run, tiny):
    tokenizer = Tokenizer(GGUFFile(tiny).metadata)
    ids = last_object(run("--prompt", "the", "--json", "--max-new-tokens", 1))["prompt_ids"]
    assert ids == tokenizer.encode("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_several_prompts_are_one_batch_with_the_same_answers(run, tmp_path, cache):
    texts = ["the", TEXT, "a in the"]
    options = ["--raw", "--ignore-end", "--json", "--max-new-tokens", 6, "--cache", cache]
    alone = [last_object(run(*options, "--prompt", text)) for text in texts]
    batch_options = [*options, "--logits", tmp_path / "all.npy"]
    batch = last_object(run(*batch_options, *[x for text in texts for x in ("--prompt", text)]))
    for name in ("prompt_ids", "token_ids", "text", "finish"):
        assert batch[name] == [each[name] for each in alone]
    logits = np.load(tmp_path / "all.npy")
    lengths = [len(each["prompt_ids"]) + 6 for each in alone]
    assert logits.shape[:2] == (3, max(lengths))
    for rows, length in zip(logits, lengths, strict=True):
        assert np.isfinite(rows[:length]).all()
        assert np.isnan(rows[length:]).all()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_narrow_caches_give_nearly_the_same_logits(run, tmp_path, cache, kv_dtype):
    arguments = ["--raw", "--prompt", TEXT, "--max-new-tokens", 1, "--ignore-end", "--logits", tmp_path / "l.npy"]
    run(*arguments, "--cache", cache, "--kv-dtype", kv_dtype)
    narrow = np.load(tmp_path / "l.npy")[-1]
    run(*arguments)
    exact = np.load(tmp_path / "l.npy")[-1]
    assert 0 < np.abs(narrow - exact).max() < 0.05 * np.abs(exact).max()


def test_it_stops_at_the_end_token(run, folder):
    """The third token of the reference is made the end."""
    end = int(REFERENCE.token_ids[2])
    model = write_tiny_gguf(folder / "end.gguf", change_metadata={"tokenizer.ggml.eos_token_id": end})
    answer = last_object(run("--raw", "--prompt", TEXT, "--json", model=model))
    assert answer["finish"] == "end"
    assert answer["token_ids"] == REFERENCE.token_ids[:3].tolist()


def test_it_stops_when_the_cache_is_full_and_says_so(run):
    capacity = len(REFERENCE.prompt_ids) + 4
    out = run("--raw", "--prompt", TEXT, "--ignore-end", "--capacity", capacity, "--json")
    assert f"[stopped: the cache is full at {capacity} tokens" in out
    assert last_object(out)["finish"] == "capacity"
    assert last_object(out)["token_ids"] == REFERENCE.token_ids[:4].tolist()


def test_it_stops_at_the_models_context(run):
    answer = last_object(run("--raw", "--prompt", TEXT, "--ignore-end", "--max-new-tokens", CONTEXT, "--json"))
    assert answer["finish"] == "capacity"
    assert len(answer["prompt_ids"]) + len(answer["token_ids"]) == CONTEXT


def test_draws_follow_the_seed_and_top_1_is_greedy(run):
    options = ["--raw", "--prompt", TEXT, "--ignore-end", "--json", "--max-new-tokens", 12, "--temperature", 1.5]
    first, again, other = (last_object(run(*options, "--seed", seed))["token_ids"] for seed in (1, 1, 2))
    assert first == again != other
    assert last_object(run(*options, "--top-k", 1))["token_ids"] == REFERENCE.token_ids[:12].tolist()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "a prompt is empty"),
        (["--prompt", "the " * CONTEXT], f"more than the capacity of {CONTEXT}"),
        (["--prompt", "the the", "--capacity", 1], "more than the capacity of 1"),
        (["--prompt", "the", "--capacity", 10_000], f"capacity must be 1 to {CONTEXT}"),
        (["--max-new-tokens", 0], "expected at least 1, got 0"),
        (["--temperature", -1], "temperature must be finite and at least 0, got -1.0"),
        (["--top-k", -1], "top_k must be at least 0, got -1"),
        (["--logits", "logits.txt"], "--logits must name a .npy file in an existing folder"),
        (["--logits", "missing/logits.npy"], "--logits must name a .npy file in an existing folder"),
        (["--kv-dtype", "float8"], "invalid choice: 'float8'"),
        (["--cache", "round"], "invalid choice: 'round'"),
        (["--model", "missing.gguf"], "no such model file: missing.gguf"),
    ],
)
def test_options_that_cannot_be_followed(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run("--raw", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def llama(**keys) -> dict:
    return {"change_metadata": {f"llama.{key.replace('__', '.')}": value for key, value in keys.items()}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "qwen2"}, "expected a model of the architecture 'llama'"),
        (llama(rope__scaling__type="linear"), "the model needs llama.rope.scaling.type = 'linear'"),
        (llama(rope__scaling__factor=2.0), "the model needs llama.rope.scaling.factor = 2.0"),
        (llama(expert_count=8), "the model needs llama.expert_count = 8"),
        (llama(attention__sliding_window=64), "the model needs llama.attention.sliding_window = 64"),
        (llama(rope__dimension_count=8), f"llama.rope.dimension_count must equal the head dimension {HEAD_DIM}"),
        (llama(attention__value_length=8), f"llama.attention.value_length must equal the head dimension {HEAD_DIM}"),
        (llama(attention__head_count_kv=3), "query heads must be a multiple of key/value heads"),
        (llama(attention__head_count=[4, 4]), "differs from layer to layer"),
        (llama(block_count=None), "lacks the required key 'llama.block_count'"),
        (llama(block_count=3), "the model lacks tensors: blk.2.attn_k.weight"),
        (llama(feed_forward_length=64), "must have shape"),
        ({"change_tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, "not supported: blk.0.attn_q.bias"),
        ({"change_tensors": {"output_norm.weight": None}}, "the model lacks tensors: output_norm.weight"),
        ({"change_metadata": {"tokenizer.chat_template": None}}, "the model has no chat template: use --raw"),
        ({"change_metadata": {"split.count": 2}}, "split over several files"),
    ],
)
def test_models_that_need_more_are_refused(run, capsys, tmp_path, changes, message):
    model = write_tiny_gguf(tmp_path / "other.gguf", **changes)
    with pytest.raises(SystemExit) as caught:
        run("--prompt", "the", model=model)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, but long enough to look at" * 100])
def test_files_that_are_not_gguf_are_refused(run, capsys, tmp_path, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        run("--prompt", "the", model=path)
    assert "cannot be read as a GGUF file" in capsys.readouterr().err


def test_keys_that_say_a_feature_is_not_used_are_accepted(run, tmp_path):
    changes = llama(rope__scaling__type="none", expert_count=0)
    model = write_tiny_gguf(tmp_path / "plain.gguf", **changes)
    answer = last_object(run("--raw", "--prompt", TEXT, "--max-new-tokens", 2, "--json", model=model))
    assert answer["token_ids"] == REFERENCE.token_ids[:2].tolist()


def test_tied_embeddings(run, tmp_path):
    """Without output.weight the embedding serves as the output matrix."""
    embedding = tensors(len(metadata()["tokenizer.ggml.tokens"]))["token_embd.weight"]
    arguments = ["--raw", "--prompt", TEXT, "--max-new-tokens", 2, "--ignore-end", "--logits", tmp_path / "l.npy"]
    logits = []
    for name, output in (("tied", None), ("copied", embedding)):
        run(*arguments, model=write_tiny_gguf(tmp_path / f"{name}.gguf", change_tensors={"output.weight": output}))
        logits.append(np.load(tmp_path / "l.npy"))
    np.testing.assert_allclose(*logits, atol=1e-5 * HIDDEN)


def test_the_script_on_the_real_model(smollm2_file, prompts, references):
    script = Path(__file__).resolve().parents[2] / "examples" / "generate.py"
    arguments = ["--model", smollm2_file.path, "--raw", "--prompt", prompts["short"], "--max-new-tokens", "8", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # whichever way jax_ifa is found here
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    answer = last_object(done.stdout)
    assert answer["prompt_ids"] == references["short"].prompt_ids.tolist()
    assert answer["token_ids"] == references["short"].token_ids[:8].tolist()
    assert done.stdout.startswith(prompts["short"] + answer["text"])
