"""What every rerank dialect needs of compressed passages: indices and scores, best first. Knows no HTTP."""

from dataclasses import dataclass

from core.compressed import CompressedPassage
from core.pipeline import rerank
from service.jobs import Compressed


@dataclass(frozen=True, slots=True)
class Ranked:
    """A passage by its index in the request. `score` is calibrated to 0..1, or raw where that was asked for."""

    index: int
    score: float


def ranked(compressed: Compressed, top_n: int | None = None, *, raw: bool = False) -> list[Ranked]:
    """The best `top_n` passages (None: all), most relevant first; equals keep the caller's order."""
    passages = compressed.passages
    return [Ranked(index, _score(passages[index], raw)) for index in rerank(passages)[:top_n]]


def _score(passage: CompressedPassage, raw: bool) -> float:
    return passage.score if raw else passage.relevance or 0.0
