"""The examples' modules, SmolLM2 loaded once, and what llama.cpp says about it."""

import sys
from pathlib import Path

import pytest
from llamacpp_data import Reference, read_json, read_references

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from llama.download import DownloadError, default_model
from llama.gguf_file import GGUFFile, load_model
from llama.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2_file():
    try:
        path = default_model()
    except DownloadError as error:
        pytest.skip(f"the model cannot be fetched here: {error}")
    return GGUFFile(path)


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    return load_model(smollm2_file)


@pytest.fixture(scope="session")
def tokenizer(smollm2_file):
    return Tokenizer(smollm2_file.metadata)


@pytest.fixture(scope="session")
def prompts() -> dict[str, str]:
    return read_json("prompts.json")


@pytest.fixture(scope="session")
def references() -> dict[str, Reference]:
    return read_references("smollm2_logits.npz")
