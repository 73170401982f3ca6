"""Text to token ids and back, from the vocabulary in a GGUF file's metadata."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llama.gguf_file import Metadata, UnsupportedModelError

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
END_TOKENS = {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>"}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Encodes with or without the chat template, decodes whole or token by token.

    Attributes:
      end_ids: tokens that end an answer.
      bos_id: the token that begins every text, or None if the model wants none.
    """

    def __init__(self, metadata: Metadata):
        self.tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        self._backend = build_backend(metadata)
        self._template = metadata.get("tokenizer.chat_template")
        usual = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", usual)
        self.bos_id: int | None = metadata["tokenizer.ggml.bos_token_id"] if adds_bos else None
        self.end_ids = end_ids(metadata, self.tokens)
        self._special = {
            f"{name}_token": self.tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
            for name in ("bos", "eos")
            if f"tokenizer.ggml.{name}_token_id" in metadata
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; names of special tokens in it, such as <|im_start|>, become those tokens."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._backend.decode(list(ids))

    def stream(self, prompt_ids: Sequence[int] = ()) -> "TextStream":
        """A decoder of one token after another."""
        return TextStream(self._backend, prompt_ids)

    def chat(self, question: str) -> str:
        """A question wrapped in the model's own chat template, ready for the answer."""
        if self._template is None:
            raise UnsupportedModelError("the model has no chat template: use --raw to continue plain text")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_template_error
        messages = [{"role": "user", "content": question}]
        return environment.from_string(self._template).render(
            messages=messages, add_generation_prompt=True, **self._special
        )


class TextStream:
    """Text of one token after another; a character that spans tokens comes out with its last one."""

    def __init__(self, backend: tokenizers.Tokenizer, prompt_ids: Sequence[int]):
        self._backend = backend
        self._stream = decoders.DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)

    def step(self, token: int) -> str:
        """The text that this token completes, "" if none yet."""
        return self._stream.step(self._backend, token) or ""


def build_backend(metadata: Metadata) -> tokenizers.Tokenizer:
    """The tokenizer that the file describes; UnsupportedModelError for kinds other than these two."""
    kinds = {"gpt2": byte_level_bpe, "llama": sentencepiece_bpe}
    kind = metadata["tokenizer.ggml.model"]
    if kind not in kinds:
        raise UnsupportedModelError(f"expected a tokenizer of the kind 'gpt2' or 'llama', the file has {kind!r}")
    backend = kinds[kind](metadata)
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True):
        if kind == CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend


def byte_level_bpe(metadata: Metadata) -> tokenizers.Tokenizer:
    """The kind of SmolLM2 and Llama 3: merges of bytes, in words cut by the pre-tokenizer that the file names."""
    pre = metadata.get("tokenizer.ggml.pre", "unnamed")
    if pre not in PRE_TOKENIZERS:
        names = ", ".join(map(repr, PRE_TOKENIZERS))
        raise UnsupportedModelError(f"expected a pre-tokenizer among {names}, the file has {pre!r}")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    model = models.BPE(vocabulary(metadata), merges, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_bpe(metadata: Metadata) -> tokenizers.Tokenizer:
    """The kind of Llama 1 and 2: merges of characters, best score first; what is left unknown falls back to bytes.

    The file lists scores of pieces and no merges: a piece can come of any two pieces that it is made of.
    """
    ids, scores = vocabulary(metadata), metadata["tokenizer.ggml.scores"]
    ranked = sorted(
        (-scores[index], index, piece[:cut], piece[cut:])
        for piece, index in ids.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    )
    unknown = metadata["tokenizer.ggml.tokens"][metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(ids, [(a, b) for *_, a, b in ranked], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = [normalizers.Prepend("\u2581")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def vocabulary(metadata: Metadata) -> dict[str, int]:
    """Ids by token."""
    return {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}


PRE_TOKENIZERS: Mapping[str, list[Any]] = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
"""How text is cut before BPE, by the name that a file gives (`tokenizer.ggml.pre`)."""


def end_ids(metadata: Metadata, tokens: Iterable[str]) -> frozenset[int]:
    """The file's own end tokens, and those it has under the usual names."""
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    usual = (index for index, token in enumerate(tokens) if token in END_TOKENS)
    return frozenset(index for index in (*named, *usual) if index is not None)


def raise_template_error(message: str) -> None:
    """What templates call for conversations they cannot render."""
    raise jinja2.TemplateError(message)
