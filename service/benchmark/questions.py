"""Questions and passages of exact lengths in tokens, from built-in text. Knows no models, only a tokenizer.

What an answer costs depends on lengths, not on words; but words are what is tokenised, chunked and pointed at, so the
text is prose, and no two passages or questions are equal.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from core.errors import ConfigError
from core.passages import Passage
from core.tokenization import encode

SUBJECTS = (
    *("the old bridge", "a merchant of Lyon", "the northern railway", "the botanist", "this river", "the council"),
    *("an early telescope", "the copper mine", "her second expedition", "the printing house", "the lighthouse"),
)
VERBS = (
    *("was described in", "replaced the one of", "had been rebuilt by", "supplied the region from", "was sold in"),
    *("reached its largest extent in", "remained without a rival until", "drew visitors after"),
)
REMARKS = (
    *("although few records survive", "as later surveys confirmed", "at a cost that nobody had foreseen"),
    *("with the help of two engineers", "long before the harbour was deepened", "which changed the trade in wool"),
)
FILLERS = (" a", " I", ".", "x", " the", "1")  # a token each in most vocabularies
MAX_REPAIRS = 64


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its passages."""

    query: str
    passages: tuple[Passage, ...]


def make_questions(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    passages: int,
    passage_tokens: int,
    query_tokens: int,
    vary: float = 0.0,
    seed: int = 0,
) -> list[Question]:
    """`count` questions; every passage and query has exactly so many of the tokenizer's tokens. `seed` fixes them.

    vary    share of `passage_tokens` by which a passage is longer or shorter, at most: each length is as likely
    """
    source = random.Random(seed)

    def length() -> int:
        return max(1, round(passage_tokens * source.uniform(1 - vary, 1 + vary))) if vary else passage_tokens

    return [
        Question(
            exact_text(tokenizer, query_tokens, source),
            tuple(Passage(exact_text(tokenizer, length(), source)) for _ in range(passages)),
        )
        for _ in range(count)
    ]


def exact_text(tokenizer: PreTrainedTokenizerBase, tokens: int, source: random.Random) -> str:
    """Prose of exactly `tokens` tokens. Raises ConfigError where the vocabulary does not allow it."""
    sentences = _sentences(source)
    text = next(sentences)
    while len(encode(tokenizer, text).ids) < tokens:
        text += " " + next(sentences)
    keep = tokens
    for _ in range(MAX_REPAIRS):
        cut = text[: encode(tokenizer, text).spans[keep - 1][1]]
        # A cut inside a word can change how the word is split: then fill up, or cut once more.
        missing = tokens - len(encode(tokenizer, cut).ids)
        for filler in FILLERS:
            filled = cut + filler * missing
            if len(encode(tokenizer, filled).ids) == tokens:
                return filled
        keep -= 1
        if keep < 1:
            break
    raise ConfigError(f"no text of exactly {tokens} tokens can be made with this tokenizer")


def _sentences(source: random.Random) -> Iterator[str]:
    while True:
        subject, verb, remark = (source.choice(words) for words in (SUBJECTS, VERBS, REMARKS))
        yield f"{subject.capitalize()} {verb} {source.randint(1400, 1990)}, {remark}."
