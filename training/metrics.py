"""How good an answer or a ranking is: one number for one question. Knows nothing about models, files or averages.

Answer metrics take a prediction and its references and give the best value over the references.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from training.answer_match import CHARACTER, UNSPACED, WORD, answer_words, contains, words

Scores = Sequence[float] | NDArray[np.float64]

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_FULL_WIDTH = "".join(chr(ord(mark) + 0xFEE0) for mark in string.punctuation)
_PUNCTUATION = str.maketrans("", "", string.punctuation + _FULL_WIDTH + "、。〈〉《》「」『』【】〔〕〜・｡｢｣､･။၊។៕")
_WORD = re.compile(WORD)
_TOKEN = re.compile(rf"{CHARACTER}|[^\s{UNSPACED}]+")
_NUMBER_OR_WORD = re.compile(rf"\d+(?:[.,:]\d+)*|{CHARACTER}|[^\W\d_{UNSPACED}]+")
_CHARACTER = re.compile(CHARACTER)
_FUNCTION_WORD = re.compile(r"an?|and|as|at|by|for|from|in|is|its?|of|on|or|that|the|this|to|was|were|with")
_NUMBER_WORD = re.compile(
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(thir|four|fif|six|seven|eigh|nine)teen|"
    r"(twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|(m|b|tr)illion|second|third|(four|fif|six|seven|"
    r"eigh|nin|ten)th"
)


def normalise_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces (Rajpurkar et al. 2016, sec. 6.1).

    Nor the punctuation of scripts without spaces, which ends no token there.
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def best_over_references(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The highest `metric(prediction, reference)`. Raises ValueError without references."""
    return max(metric(prediction, reference) for reference in references)


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are equal after `normalise_answer`, else 0."""
    return float(normalise_answer(prediction) == normalise_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of normalised tokens, in [0, 1]; where one side has none, equality.

    Tokens stand between spaces; in scripts without spaces each character is one.
    """
    predicted, expected = (_TOKEN.findall(normalise_answer(text)) for text in (prediction, reference))
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def substring_accuracy(prediction: str, reference: str) -> float:
    """1 if the normalised reference stands anywhere in the normalised prediction (OSCAR table 3), else 0."""
    expected = normalise_answer(reference)
    return float(expected in normalise_answer(prediction) if expected else exact_match(prediction, reference))


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of lower-case words, in [0, 1] (Lin 2004, sec. 3, beta 1)."""
    predicted, expected = _WORD.findall(prediction.lower()), _WORD.findall(reference.lower())
    if not predicted or not expected:
        return float(predicted == expected)
    return 2 * _common_subsequence(predicted, expected) / (len(predicted) + len(expected))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, by rows of the usual table."""
    row = [0] * (len(right) + 1)
    for item in left:
        diagonal = 0
        for column, other in enumerate(right, start=1):
            above = row[column]
            row[column] = diagonal + 1 if item == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def _plain_tokens(text: str) -> list[str]:
    """Numbers (thousands' commas dropped) and words as in `answer_match`, accents dropped, case kept."""
    decomposed = unicodedata.normalize("NFKD", text)
    plain = "".join(char for char in decomposed if not unicodedata.combining(char))
    return [token.replace(",", "") for token in _NUMBER_OR_WORD.findall(plain)]


def named_tokens(text: str) -> frozenset[str]:
    """The tokens a paraphrase cannot replace, in lower case: digits, number words, months and names (capitalised).

    Scripts without spaces have no capitals: there it is every character.
    """
    return frozenset(
        token.lower()
        for token in _plain_tokens(text)
        if not _FUNCTION_WORD.fullmatch(token.lower())
        and (
            token[0].isdigit() or token[0].isupper() or _CHARACTER.match(token) or _NUMBER_WORD.fullmatch(token.lower())
        )
    )


def survival(prediction: str, references: Sequence[str], passages: Sequence[str]) -> float | None:
    """1 if every number, date and name of a reference that stands in a passage is in the prediction, else 0.

    None where no reference both stands in a passage (word for word) and holds such a token.
    """
    texts = [words(passage) for passage in passages]
    standing = [each for each in references if any(contains(text, answer_words([each])) for text in texts)]
    wanted = [tokens for tokens in map(named_tokens, standing) if tokens]
    if not wanted:
        return None
    said = {token.lower() for token in _plain_tokens(prediction)}
    return float(any(tokens <= said for tokens in wanted))


def _ranked_gains(scores: Sequence[float], gains: Sequence[float]) -> list[float]:
    """Gains by falling score. Equal scores count as ranked worst first, so that a ranker gains nothing by ties."""
    if len(scores) != len(gains):
        raise ValueError(f"gains: {len(gains)} for {len(scores)} scores")
    if any(math.isnan(score) for score in scores):
        raise ValueError("scores: not a number")
    return [gain for _, gain in sorted(zip(scores, gains, strict=True), key=lambda pair: (-pair[0], pair[1]))]


def ndcg(scores: Sequence[float], gains: Sequence[float], k: int = 10) -> float:
    """Normalised discounted cumulative gain of the first `k`, linear gains >= 0, in [0, 1]; 0 where nothing gains.

    Jarvelin and Kekalainen 2002 with the log2(1 + rank) discount of trec_eval.
    """

    def discounted(values: Sequence[float]) -> float:
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(values[:k], start=1))

    ideal = discounted(sorted(gains, reverse=True))
    return min(1.0, discounted(_ranked_gains(scores, gains)) / ideal) if ideal > 0 else 0.0


def reciprocal_rank(scores: Sequence[float], gains: Sequence[float]) -> float:
    """1 / rank of the first passage with a gain above 0; 0 where there is none."""
    ranked = _ranked_gains(scores, gains)
    return next((1 / rank for rank, gain in enumerate(ranked, start=1) if gain > 0), 0.0)


def gold_first(scores: Sequence[float], gains: Sequence[float]) -> float:
    """1 if the best-scored passage has a gain above 0, else 0."""
    return float(bool(gains) and _ranked_gains(scores, gains)[0] > 0)


def roc_auc(positives: Scores, negatives: Scores) -> float:
    """Probability that a positive scores above a negative, ties half (Mann-Whitney U).

    Raises ValueError where one side is empty.
    """
    above, below = np.asarray(positives, dtype=np.float64), np.sort(np.asarray(negatives, dtype=np.float64))
    if above.size == 0 or below.size == 0:
        raise ValueError("roc_auc needs at least one positive and one negative")
    less = np.searchsorted(below, above, side="left")
    less_or_equal = np.searchsorted(below, above, side="right")
    return float((less + less_or_equal).sum() / (2 * above.size * below.size))
