"""Raw question-answering examples before they become rows. Knows no files and no public sets."""

from dataclasses import dataclass, replace
from typing import Any

from training.answer_match import answer_words, contains, words
from training.data_format import RowPassage, parse_answers, parse_id, parse_list, parse_passage, parse_string
from training.data_quality import ReadPolicy


@dataclass(frozen=True, slots=True)
class Example:
    """A question with what is known about it.

    positives    passages that answer it; empty where only the answer is known (open-domain sets)
    negatives    passages that do not, in the order given
    unjudged     passages retrieved for it of which nobody said whether they answer
    """

    id: str
    query: str
    answers: tuple[str, ...]
    positives: tuple[RowPassage, ...] = ()
    negatives: tuple[RowPassage, ...] = ()
    unjudged: tuple[RowPassage, ...] = ()
    teacher_answer: str | None = None


def parse_example(values: dict[str, Any], policy: ReadPolicy) -> Example:
    """An example from plain JSON: `{"id", "query" or "question", "answers"?, "teacher_answer"?, ...}`.

    Its passages are `positives` and `negatives` (lists of passages), or `passages` as in the data format, judged by
    their `gold` or `relevance`, or both. Raises RowError.
    """
    identifier = parse_id(values)
    query = parse_string(values, "query" if values.get("question") is None else "question")
    teacher = parse_string(values, "teacher_answer") if values.get("teacher_answer") else None
    answers = parse_answers(values, needed=policy.need_answer and teacher is None)
    positives = _parse_passages(values, "positives", policy)
    negatives = _parse_passages(values, "negatives", policy)
    unjudged = []
    for passage in _parse_passages(values, "passages", policy):
        if passage.judged:
            (positives if passage.relevant else negatives).append(passage)
        else:
            unjudged.append(passage)
    return Example(identifier, query, answers, tuple(positives), tuple(negatives), tuple(unjudged), teacher)


def _parse_passages(values: dict[str, Any], name: str, policy: ReadPolicy) -> list[RowPassage]:
    if values.get(name) is None:
        return []
    items = parse_list(values, name)
    return [parse_passage(item, f"{name}[{index}]", policy.max_passage_chars) for index, item in enumerate(items)]


def keep_found_answers(example: Example) -> Example | None:
    """`example` with only those answers that stand in a positive passage; None where none does."""
    texts = [words(passage.content) for passage in example.positives]
    found = tuple(answer for answer in example.answers if any(contains(text, answer_words([answer])) for text in texts))
    return replace(example, answers=found) if found else None
