"""Answers a question with a language model that decodes through jax_ifa, streaming the answer as it comes.

    python examples/generate.py --prompt "Name three primary colours." --cache paged --kv-dtype int8

Without --model it fetches SmolLM2-135M-Instruct (98 MB, once).
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from llama.caches import CacheOptions
from llama.calibration import calibration_ids
from llama.decoding import Decoder, check_prompts
from llama.download import DownloadError, default_model
from llama.generation import Generation, generate
from llama.gguf_file import GGUFFile, UnsupportedModelError, load_model
from llama.model import Llama
from llama.prefill import bucket
from llama.sampling import Sampling
from llama.tokenizer import Tokenizer
from tqdm import tqdm

from jax_ifa.dispatch import implementation_names

DEFAULT_PROMPT = "What are three tips for better sleep?"
CACHE_FOLDER = Path(__file__).resolve().parents[1] / ".cache"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = command_line()
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (UnsupportedModelError, DownloadError, UsageError, FileNotFoundError, NotImplementedError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\n")


class UsageError(ValueError):
    """Options that cannot be followed."""


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--prompt", action="append", help="a question; give several to decode them as one batch")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="at most this many per prompt (%(default)s)")
    add("--cache", choices=("contiguous", "paged"), default="contiguous", help="the kind of KV cache (%(default)s)")
    add("--kv-dtype", choices=("float32", "bfloat16", "float16", "int8"), default="float32", help="what it stores")
    add("--model", type=Path, metavar="FILE", help="a Llama model in GGUF format, instead of SmolLM2-135M-Instruct")
    add("--raw", action="store_true", help="continue the prompt as it is, without the model's chat template")
    add(
        "--json", action="store_true", help="print one JSON object as the last line; lists of lists for several prompts"
    )
    add("--logits", type=Path, metavar="FILE.npy", help="save the logits after every token: (tokens, vocabulary), for "
        "several prompts (prompts, most tokens, vocabulary) filled up with NaN")  # fmt: skip
    add("--capacity", type=positive, metavar="N", help="tokens that the cache holds per prompt, old and new")
    add("--temperature", type=float, default=0.0, help="draw tokens instead of taking the best one")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K best tokens")
    add("--seed", type=int, default=0, help="of the draws")
    add("--ignore-end", action="store_true", help="go on past the end of the answer")
    add("--implementation", choices=implementation_names(), help="of the attention; the fastest one by default")
    return parser


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def run(options: argparse.Namespace) -> None:
    """Load the model, answer, report."""
    try:
        sampling = Sampling(options.temperature, options.top_k, options.seed)
    except ValueError as error:
        raise UsageError(error) from error
    if options.logits is not None and (options.logits.suffix != ".npy" or not options.logits.parent.is_dir()):
        raise UsageError(f"--logits must name a .npy file in an existing folder, got {options.logits}")
    model, tokenizer = load(options.model)
    texts = options.prompt or [DEFAULT_PROMPT]
    prompts = [tokenizer.encode(text if options.raw else tokenizer.chat(text)) for text in texts]
    longest = max(len(prompt) for prompt in prompts)
    limit = model.config.context_length
    capacity = options.capacity or min(bucket(longest + options.max_new_tokens), limit)
    try:
        check_prompts(prompts, capacity, limit)
    except ValueError as error:
        raise UsageError(error) from error

    with phase(f"reading {sum(map(len, prompts))} prompt tokens"):
        decoder = Decoder(
            model,
            prompts,
            capacity=capacity,
            cache=CacheOptions(options.cache, options.kv_dtype),
            sampling=sampling,
            implementation=options.implementation,
            keep_prompt_logits=options.logits is not None,
            calibration=calibration_ids(tokenizer),
        )
    printer = Printer(tokenizer, texts, prompts, options)
    result = generate(
        decoder,
        options.max_new_tokens,
        end_ids=() if options.ignore_end else tokenizer.end_ids,
        keep_logits=options.logits is not None,
        on_token=printer.token,
    )
    printer.finish(result, capacity)
    if options.logits is not None:
        save_logits(options.logits, decoder, result)
    if options.json:
        print(json.dumps(report(options, tokenizer, prompts, result)))


def load(path: Path | None) -> tuple[Llama, Tokenizer]:
    """A model and its tokenizer; None stands for the default model."""
    path = default_model() if path is None else path
    with phase(f"opening {path.name}"):
        file = GGUFFile(path)
    model = load_model(file, progress=True)
    return model, Tokenizer(file.metadata)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Say on stderr what is going on, and how long it took."""
    print(f"{name} ... ", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)


class Printer:
    """Writes the answer: one prompt's token by token, several prompts' when all are done."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str], prompts: list[list[int]], options: argparse.Namespace):
        self._tokenizer, self._texts, self._prompts, self._options = tokenizer, texts, prompts, options
        self._streams = len(prompts) == 1
        self._stream = tokenizer.stream()
        self._starting = contextlib.ExitStack()
        self._starting.enter_context(phase("compiling the decode step"))
        self._bar = tqdm(desc="decoding", unit=" tokens", disable=self._streams, leave=False)
        self._begin = texts[0] if self._streams and options.raw else ""

    def token(self, sequence: int, token: int) -> None:
        """Called for every new token, as it comes."""
        self._starting.close()
        if self._streams:
            print(self._begin, end="")
            self._begin = ""
            print(self._stream.step(token), end="", flush=True)
        self._bar.update()

    def finish(self, result: Generation, capacity: int) -> None:
        """Called at the end."""
        self._starting.close()
        self._bar.close()
        if self._streams:
            print()
        else:
            for text, ids in zip(self._texts, result.token_ids, strict=True):
                answer = self._tokenizer.decode(ids)
                print(f"{text}{answer}\n" if self._options.raw else f"> {text}\n{answer}\n")
        options = self._options
        if "capacity" in result.finish:
            print(f"[stopped: the cache is full at {capacity} tokens; --capacity or a shorter prompt gives more room]")
        rate = result.tokens_per_second()
        print(
            f"[prompt {' + '.join(str(len(prompt)) for prompt in self._prompts)} tokens, "
            f"{sum(map(len, result.token_ids))} new tokens at {'-' if rate is None else f'{rate:.1f}'} tokens/s, "
            f"{options.cache} {options.kv_dtype} cache, implementation {options.implementation or 'default'}]"
        )


def save_logits(path: Path, decoder: Decoder, result: Generation) -> None:
    """Row i of a prompt holds the logits after its token i, of the prompt and then of the answer."""
    each = [np.stack([*old, *new]) for old, new in zip(decoder.prompt_logits, result.logits, strict=True)]
    rows = np.full((len(each), max(map(len, each)), each[0].shape[1]), np.nan, np.float32)
    for row, logits in zip(rows, each, strict=True):
        row[: len(logits)] = logits
    np.save(path, rows if len(rows) > 1 else rows[0])


def report(
    options: argparse.Namespace, tokenizer: Tokenizer, prompts: list[list[int]], result: Generation
) -> dict[str, object]:
    """The JSON object: one prompt's values, or lists of them for several prompts."""
    each: dict[str, list] = {
        "prompt_ids": prompts,
        "token_ids": result.token_ids,
        "text": [tokenizer.decode(ids) for ids in result.token_ids],
        "finish": result.finish,
    }
    return {
        **{name: values[0] if len(prompts) == 1 else values for name, values in each.items()},
        "tokens_per_second": result.tokens_per_second(),
        "cache": options.cache,
        "kv_dtype": options.kv_dtype,
        "implementation": options.implementation or "default",
    }


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 means float32 on accelerators too
    jax.config.update("jax_compilation_cache_dir", str(CACHE_FOLDER / "xla"))  # a second start finds programs compiled
    main()
