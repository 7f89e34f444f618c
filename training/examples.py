"""Raw question-answering examples before they become rows. Knows no files and no public sets."""

from dataclasses import dataclass, replace
from typing import Any

from training.answer_match import answer_words, contains, words
from training.data_format import ReadPolicy, RowError, RowPassage, parse_answers, parse_list, parse_passage, parse_string


@dataclass(frozen=True, slots=True)
class Example:
    """A question with what is known about it.

    positives    passages that answer it; empty where only the answer is known (open-domain sets)
    negatives    passages that do not, in the order given
    """

    id: str
    query: str
    answers: tuple[str, ...]
    positives: tuple[RowPassage, ...] = ()
    negatives: tuple[RowPassage, ...] = ()
    teacher_answer: str | None = None


def parse_example(values: dict[str, Any], policy: ReadPolicy) -> Example:
    """An example from plain JSON in one of two forms. Raises RowError.

    `{"id", "question", "answers", "positives", "negatives"}`, or a row of the data format, whose passages
    with relevance of at least 0.5 are positives.
    """
    if values.get("id") is None or not str(values["id"]):
        raise RowError("missing field", "id is missing")
    query = parse_string(values, "query" if values.get("question") is None else "question")
    teacher = parse_string(values, "teacher_answer", optional=True) or None
    answers = parse_answers(values, needed=policy.need_answer and teacher is None)
    positives, negatives = [], []
    if "passages" in values:
        for index, item in enumerate(parse_list(values, "passages")):
            passage = parse_passage(item, f"passages[{index}]", policy.max_passage_chars)
            is_positive = passage.relevance is not None and passage.relevance >= 0.5
            (positives if is_positive else negatives).append(passage)
    else:
        for name, kept in (("positives", positives), ("negatives", negatives)):
            for index, item in enumerate(parse_list(values, name) if values.get(name) is not None else []):
                kept.append(parse_passage(item, f"{name}[{index}]", policy.max_passage_chars))
    return Example(str(values["id"]), query, answers, tuple(positives), tuple(negatives), teacher)


def keep_found_answers(example: Example) -> Example | None:
    """`example` with only those answers that stand in a positive passage; None where none does."""
    texts = [words(passage.content) for passage in example.positives]
    found = tuple(answer for answer in example.answers if any(contains(text, answer_words([answer])) for text in texts))
    return replace(example, answers=found) if found else None
