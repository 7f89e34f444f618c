"""Whether an answer stands in a text, word for word. Knows nothing about passages, rows or files."""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

_ACCENT = re.compile("[\u0300-\u036f]+")  # the combining ones of Latin, Greek and Cyrillic
# Characters of scripts written without spaces, for a set of a pattern: letters and marks, no digits, no punctuation.
UNSPACED = (
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # ideographs
    "\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\U0001b000-\U0001b167"  # rare kana
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf"  # Thai, Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa76\uaa7a-\uaa7f"  # Myanmar
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
)
# Those of them that belong to the character before: vowels, tones, the marks that NFKD takes off kana.
_MARKS = (
    "\u3099\u309a\uff9e\uff9f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u17b4-\u17d3\u17dd"
)
CHARACTER = f"[{UNSPACED}][{_MARKS}]*"  # a word of its own, for nothing says where a word ends
_SPACED = rf"[^\W{UNSPACED}]"
WORD = f"{CHARACTER}|{_SPACED}+"  # as `\w+` where no such script is
LONG_WORD = f"{CHARACTER}|{_SPACED}{{2,}}"  # without single letters and digits
_WORD = re.compile(WORD)
_FIRST, _LAST = re.compile(f"[{UNSPACED}]"), re.compile(rf"[{UNSPACED}]\Z")
SPANLESS = frozenset({"yes", "no"})


@lru_cache(maxsize=1 << 16)  # the same passages are looked into for one question after the other
def words(text: str) -> str:
    """`text` as lower-case words between single spaces, a space at both ends: accents and punctuation gone.

    The token match of DPR's `has_answer` (Karpukhin et al. 2020, sec. 4.1): "1,116 feet" is found in "1,116 feet."
    and "one" is not found in "someone". Of Chinese, Japanese, Thai, Lao, Khmer and Burmese each character is a word.
    """
    if not text.isascii():
        text = _ACCENT.sub("", unicodedata.normalize("NFKD", text))
    return f" {' '.join(_WORD.findall(text.lower()))} "


def answer_words(answers: Iterable[str]) -> tuple[str, ...]:
    """`answers` through `words`, for `contains`; those without a word are left out, for they would stand anywhere."""
    return tuple(answer for answer in map(words, answers) if answer.strip())


def is_span(answer: str) -> bool:
    """Whether a passage with the words of `answer` can be what gives it: yes and no stand in any passage."""
    return words(answer).strip() not in SPANLESS


def span_words(answers: Iterable[str]) -> tuple[str, ...]:
    """`answer_words` of those answers that are spans."""
    return answer_words(filter(is_span, answers))


def contains(text_words: str, answers: Iterable[str]) -> bool:
    """Whether an answer stands in the text: the text went through `words`, the answers through `answer_words`."""
    return any(answer in text_words for answer in answers)


def places_pattern(answers: Iterable[str]) -> re.Pattern[str]:
    """Finds the answers, none of them empty, as whole words in a text as it is; of several at a place the longest."""
    return re.compile("|".join(map(_whole, sorted(answers, key=len, reverse=True))), re.IGNORECASE)


def _whole(answer: str) -> str:
    before = "" if _FIRST.match(answer) else f"(?<!{_SPACED})"
    after = f"(?![{_MARKS}])" if _LAST.search(answer) else f"(?!{_SPACED})"
    return before + re.escape(answer) + after
