"""What the compressor's reranking is compared with: BM25 and embedding models. Knows nothing about the compressor."""

from collections.abc import Mapping, Sequence

import torch

from core.base_models import resolve_base_model
from training.dense import DenseEncoder
from training.negatives import BM25Retriever
from training.questions import Question
from training.results import RankingRecord


def rank_bm25(questions: Sequence[Question], counts: Sequence[int]) -> list[RankingRecord]:
    """BM25 of each question over its own passages; word statistics come from all questions' passages together.

    `counts` are the numbers of passages to rank, one record a question and count (see `Question.with_passages`).
    """
    texts = list(dict.fromkeys(passage.content for question in questions for passage in question.passages))
    scores = BM25Retriever(texts).scores([question.query for question in questions])
    number = {text: index for index, text in enumerate(texts)}
    records = []
    for question, row in zip(questions, scores, strict=True):
        # a passage without any of the question's words has no score: 0, which nothing is below
        own = {passage.content: max(0.0, float(row[number[passage.content]])) for passage in question.passages}
        records += _records(question, "bm25", own, counts)
    return records


class EmbeddingRanker:
    """A text embedding model as it comes: mean over the last hidden states, cosine of query and passage."""

    def __init__(self, name: str) -> None:
        """`name` is a base model's name, a folder or a hub id. Raises BaseModelError."""
        self.name = name
        self._encode = DenseEncoder(str(resolve_base_model(name).path))

    @torch.inference_mode()
    def rank(self, question: Question, counts: Sequence[int]) -> list[RankingRecord]:
        """Cosine similarity of the question and each of its passages, one record a count."""
        texts = [passage.content for passage in question.passages]
        vectors = self._encode([question.query, *texts])  # (1 + passages, d), unit length
        scores = dict(zip(texts, (vectors[1:] @ vectors[0]).tolist(), strict=True))
        return _records(question, self.name, scores, counts)


def _records(
    question: Question, ranker: str, scores: Mapping[str, float], counts: Sequence[int]
) -> list[RankingRecord]:
    """Scores depend on the passage's content alone, so every cut of the question takes them from the same table."""
    cuts = [(count, question.with_passages(count)) for count in counts]
    return [
        RankingRecord(question.id, ranker, count, list(cut.gold), [scores[passage.content] for passage in cut.passages])
        for count, cut in cuts
    ]
