"""What the compressor's reranking is compared with: BM25 and embedding models. Knows nothing about the compressor."""

from collections.abc import Mapping, Sequence

from training.dense import best_cosines, load_dense
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
    """A text embedding model as it comes: cosine of query and passage, of a long one the best of its windows."""

    def __init__(self, name: str, device: str | None = None) -> None:
        """`name` is a demo model's name, a folder or a hub id. Raises BaseModelError."""
        self.name = name
        self._encode = load_dense(name, device)

    def rank(self, question: Question, counts: Sequence[int]) -> list[RankingRecord]:
        """Cosine similarity of the question and each of its passages, one record a count."""
        contents = list(dict.fromkeys(passage.content for passage in question.passages))
        scores = dict(zip(contents, best_cosines(self._encode, question.query, contents), strict=True))
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
