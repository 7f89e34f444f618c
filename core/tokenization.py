"""Text to tokens with character spans, safe to call from several threads. Knows nothing about chunks or prompts."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.base_models import first_line
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
    # transformers raises whatever a malformed file makes it stumble over.
    except Exception as error:
        raise BaseModelError(f"{folder.name}: no usable tokenizer: {first_line(error, folder)}") from None
    if not tokenizer.is_fast:
        raise BaseModelError(f"{folder.name}: the tokenizer has no fast version, so character spans are not known")
    backend = tokenizer.backend_tokenizer
    # Set once, here: changing them per call is not thread-safe, and sentence encoders ship with both switched on.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # control tokens spelled out in a text stay text
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokens of `text` alone: nothing added, nothing cut, and control tokens spelled out in it stay plain text."""
    backend = tokenizer.backend_tokenizer
    if not backend.encode_special_tokens:  # a chat template's own words were tokenised last
        backend.encode_special_tokens = True
    encoding = backend.encode(text, add_special_tokens=False)
    return Tokens(encoding.ids, encoding.offsets)


def keep_apart(tokenizer: PreTrainedTokenizerBase, control_ids: Iterable[int]) -> None:
    """Let control tokens stay text where a caller spells them out, also those that the tokenizer calls ordinary.

    Some do that with tokens of their chat template (`special: false`), which `encode` would find in any text.
    """
    added = tokenizer.added_tokens_decoder
    ordinary = (added[token] for token in sorted(set(control_ids) & added.keys()) if not added[token].special)
    tokenizer.backend_tokenizer.add_special_tokens(
        [
            AddedToken(token.content, special=True, normalized=token.normalized)
            for token in ordinary
            if token.content.strip()
        ]
    )


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids this tokenizer puts before any text (a BOS token, or none)."""
    ids = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
    return [token for token in ids if token != tokenizer.eos_token_id or token == tokenizer.bos_token_id]


def pair_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """The ids this tokenizer puts before, between and after a pair of texts (`[CLS] A [SEP] B [SEP]`, or none)."""
    encoding = tokenizer.backend_tokenizer.encode("a", "b", add_special_tokens=True)
    texts = encoding.sequence_ids  # 0 and 1 at the texts' own tokens, None at those added
    first, second = texts.index(0), texts.index(1)
    first_end, second_end = len(texts) - texts[::-1].index(0), len(texts) - texts[::-1].index(1)
    return encoding.ids[:first], encoding.ids[first_end:second], encoding.ids[second_end:]
