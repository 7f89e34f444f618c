"""The project's data format: one JSON object a line, and what is done about lines that are not.

    {"id": str, "query": str, "answers": [str, ...], "teacher_answer"?: str,
     "passages": [{"text": str, "title"?: str, "id"?: str, "relevance"?: float, "gold"?: bool}]}

Files that end in .gz are read and written compressed. Does not know where rows come from or what they are for.
"""

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from core.passages import Passage
from training.data_quality import DataError, ReadPolicy, ReadReport, RowError, parse_records

RELEVANT = 0.5  # relevance at or above which a passage counts as relevant, for labels in 0..1


@dataclass(frozen=True, slots=True)
class RowPassage(Passage):
    """A passage of a row.

    relevance  1 gold, 0 negative, or a teacher reranker's score; None: not known
    gold       what was known before a reranker's score took the place of the label; None: `relevance` says it
    """

    relevance: float | None = None
    gold: bool | None = None

    @property
    def judged(self) -> bool:
        """Whether it is known to be relevant or not to be."""
        return self.gold is not None or self.relevance is not None

    @property
    def relevant(self) -> bool:
        """Whether it is known to be relevant."""
        if self.gold is not None:
            return self.gold
        return self.relevance is not None and self.relevance >= RELEVANT


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its passages; `answers[0]` is the gold answer, `teacher_answer` replaces it in training."""

    id: str
    query: str
    passages: tuple[RowPassage, ...]
    answers: tuple[str, ...]
    teacher_answer: str | None = None

    @property
    def target(self) -> str:
        """What the generator learns to say: the teacher's answer if there is one, else the first gold answer."""
        return self.answers[0] if self.teacher_answer is None else self.teacher_answer


def open_writer(path: Path) -> TextIO:
    """Open for UTF-8 text, through gzip when the name ends in .gz; no time stamp in it: equal rows, equal bytes."""
    if path.suffix != ".gz":
        return path.open("w", encoding="utf-8", newline="\n")
    return io.TextIOWrapper(gzip.GzipFile(path, "wb", compresslevel=6, mtime=0), encoding="utf-8", newline="\n")


def check_string(value: Any, label: str) -> str:
    """`value` if it is a string that is not blank and can be written as UTF-8. Raises RowError that names `label`."""
    if not isinstance(value, str):
        raise RowError("wrong type", f"{label} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise RowError("empty", f"{label} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise RowError("wrong type", f"{label} has half of a surrogate pair, which is no text") from None
    return value


def parse_string(values: dict[str, Any], name: str) -> str:
    """The string `values[name]`. Raises RowError."""
    if values.get(name) is None:
        raise RowError("missing field", f"{name} is missing")
    return check_string(values[name], name)


def parse_id(values: dict[str, Any]) -> str:
    """The id, which may also be a number in the file. Raises RowError."""
    value = values.get("id")
    if value is None:
        raise RowError("missing field", "id is missing")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError("wrong type", f"id must be a string, not {type(value).__name__}")
    return check_string(str(value), "id")


def parse_list(values: dict[str, Any], name: str) -> list[Any]:
    """The list `values[name]`. Raises RowError."""
    if values.get(name) is None:
        raise RowError("missing field", f"{name} is missing")
    if not isinstance(values[name], list):
        raise RowError("wrong type", f"{name} must be a list, not {type(values[name]).__name__}")
    return cast(list[Any], values[name])


def parse_passage(values: Any, where: str, max_chars: int | None) -> RowPassage:
    """A passage from plain JSON: an object, or a string that is its text. Raises RowError."""
    if isinstance(values, str):
        values = {"text": values}
    if not isinstance(values, dict):
        raise RowError("wrong type", f"{where} must be an object")
    if values.get("text") is None:
        raise RowError("missing field", f"{where}.text is missing")
    text = check_string(values["text"], f"{where}.text")
    title = check_string(values["title"], f"{where}.title") if values.get("title") else ""
    if max_chars is not None and len(text) + len(title) > max_chars:
        raise RowError(
            "over-long passage", f"{where} has {len(text) + len(title)} characters, the limit is {max_chars}"
        )
    relevance = values.get("relevance")
    if relevance is not None and (isinstance(relevance, bool) or not isinstance(relevance, int | float)):
        raise RowError("wrong type", f"{where}.relevance must be a number")
    if relevance is not None and not math.isfinite(relevance):
        raise RowError("wrong type", f"{where}.relevance must be finite")
    gold = values.get("gold")
    if gold is not None and not isinstance(gold, bool):
        raise RowError("wrong type", f"{where}.gold must be true or false")
    identifier = None if values.get("id") is None else str(values["id"])
    return RowPassage(text, title, identifier, None if relevance is None else float(relevance), gold)


def parse_row(values: dict[str, Any], policy: ReadPolicy) -> Row:
    """A row from plain JSON. Raises RowError."""
    identifier, query = parse_id(values), parse_string(values, "query")
    passages = tuple(
        parse_passage(item, f"passages[{index}]", policy.max_passage_chars)
        for index, item in enumerate(parse_list(values, "passages"))
    )
    if not passages:
        raise RowError("empty", "passages is empty")
    teacher = values.get("teacher_answer")
    answers = parse_answers(values, needed=policy.need_answer and teacher is None)
    return Row(identifier, query, passages, answers, check_string(teacher, "teacher_answer") if teacher else None)


def parse_answers(values: dict[str, Any], *, needed: bool) -> tuple[str, ...]:
    """The strings of `values["answers"]`, none of them empty. Raises RowError."""
    if values.get("answers") is None and not needed:
        return ()
    answers = parse_list(values, "answers")
    for index, answer in enumerate(answers):
        check_string("" if answer is None else answer, f"answers[{index}]")
    if needed and not answers:
        raise RowError("empty", "answers is empty")
    return tuple(answers)


def parse_json_line(line: bytes) -> dict[str, Any]:
    """One line of JSONL as an object. Raises RowError."""
    try:
        values = json.loads(line.decode("utf-8-sig"))  # Windows programs begin a file with a byte order mark
    except (ValueError, RecursionError) as error:
        raise RowError("broken line", f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RowError("broken line", "not a JSON object")
    return values


def number_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """`(line number from 1, line)` of every line that is not blank. Raises DataError where the file cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path.name}: cannot be read: {reason}") from None


def iterate_rows(path: Path, policy: ReadPolicy, report: ReadReport) -> Iterator[Row]:
    """Stream the rows of a file; `report` is filled as they pass. Raises DataError."""
    return parse_records(number_lines(path), lambda line: parse_row(parse_json_line(line), policy), policy, report)


def read_rows(path: Path, policy: ReadPolicy | None = None) -> tuple[list[Row], ReadReport]:
    """All good rows of a file and the report on the others. Raises DataError."""
    report = ReadReport(path.name)
    rows = list(iterate_rows(path, policy or ReadPolicy(), report))
    return rows, report


def row_to_json(row: Row) -> str:
    """`row` as one line of JSON without the line feed; absent values are left out."""
    passages = [
        {"text": passage.text}
        | ({"title": passage.title} if passage.title else {})
        | ({"id": passage.id} if passage.id is not None else {})
        | ({"relevance": passage.relevance} if passage.relevance is not None else {})
        | ({"gold": passage.gold} if passage.gold is not None else {})
        for passage in row.passages
    ]
    values: dict[str, Any] = {"id": row.id, "query": row.query, "passages": passages, "answers": list(row.answers)}
    if row.teacher_answer is not None:
        values["teacher_answer"] = row.teacher_answer
    return json.dumps(values, ensure_ascii=False)


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows to a file that appears under its name only when it is complete; returns how many. Raises DataError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    count = 0
    try:
        with open_writer(partial) as file:
            for row in rows:
                file.write(row_to_json(row) + "\n")
                count += 1
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path.name}: cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return count
