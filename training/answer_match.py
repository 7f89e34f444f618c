"""Whether an answer stands in a text, word for word. Knows nothing about passages, rows or files."""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

_WORD = re.compile(r"\w+")
_ACCENT = re.compile("[\u0300-\u036f]+")  # the combining ones of Latin, Greek and Cyrillic


@lru_cache(maxsize=1 << 16)  # the same passages are looked into for one question after the other
def words(text: str) -> str:
    """`text` as lower-case words between single spaces, a space at both ends: accents and punctuation gone.

    The token match of DPR's `has_answer` (Karpukhin et al. 2020, sec. 4.1): "1,116 feet" is found in "1,116 feet."
    and "one" is not found in "someone".
    """
    if not text.isascii():
        text = _ACCENT.sub("", unicodedata.normalize("NFKD", text))
    return f" {' '.join(_WORD.findall(text.lower()))} "


def answer_words(answers: Iterable[str]) -> tuple[str, ...]:
    """`answers` through `words`, for `contains`; those without a word are left out, for they would stand anywhere."""
    return tuple(answer for answer in map(words, answers) if answer.strip())


def contains(text_words: str, answers: Iterable[str]) -> bool:
    """Whether an answer stands in the text: the text went through `words`, the answers through `answer_words`."""
    return any(answer in text_words for answer in answers)
