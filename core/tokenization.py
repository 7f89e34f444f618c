"""Text to tokens with character spans, safe to call from several threads. Knows nothing about chunks or prompts."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.errors import BaseModelError


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one text and the `(start, end)` character span each one covers in it."""

    ids: list[int]
    spans: list[tuple[int, int]]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer in `folder`. Raises BaseModelError where there is none (spans need a fast one)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"no usable tokenizer in {folder}: {error}") from None
    if not tokenizer.is_fast:
        raise BaseModelError(f"the tokenizer in {folder} has no fast version, so character spans are not known")
    backend = tokenizer.backend_tokenizer
    # Set once, here: changing them per call is not thread-safe, and sentence encoders ship with both switched on.
    backend.no_truncation()
    backend.no_padding()
    return tokenizer  # type: ignore[no-any-return]  # AutoTokenizer is untyped


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokens of `text` alone: nothing added, nothing cut, and control tokens spelled out in it stay plain text."""
    backend = tokenizer.backend_tokenizer
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    encoding = backend.encode(text, add_special_tokens=False)
    return Tokens(encoding.ids, encoding.offsets)


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids this tokenizer puts before any text (a BOS token, or none)."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return [int(token) for token in ids if token != tokenizer.eos_token_id or token == tokenizer.bos_token_id]
