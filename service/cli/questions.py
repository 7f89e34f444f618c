"""Questions and passages from arguments, a file or standard input. Knows no service.

JSON, JSON lines or plain text: passages (texts, or objects with `text` and optionally `title` and `id`; in plain text
one a paragraph) for the question on the command line, or whole questions (objects with `query` and `passages`, as in
the training data), each with its own.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InvalidInputError
from service.client.results import Passage


@dataclass(frozen=True)
class Question:
    """A question with its passages; `id` is that of its row, where it has one."""

    query: str
    passages: tuple[Passage, ...]
    id: str | None = None


def read_questions(query: str | None, passages: Sequence[str], source: Path | None) -> list[Question]:
    """The questions that a command is about. Raises InvalidInputError that says what is missing or wrong, and where.

    source   a file, or `-` for standard input; None: standard input if there are no passages and it is no terminal
    """
    if source is None and not passages and not sys.stdin.isatty():
        source = Path("-")
    values = [] if source is None else parse(_text_of(source))
    if values and isinstance(values[0], dict) and "passages" in values[0]:
        if query is not None:
            raise InvalidInputError("query", "the input has questions of its own: give none on the command line")
        return [_question(value, f"input.{index}") for index, value in enumerate(values)]
    if query is None:
        raise InvalidInputError("query", "is missing: give a question, or an input of objects with query and passages")
    read = [_passage(value, f"input.{index}") for index, value in enumerate(values)]
    given = (*map(Passage, passages), *read)
    if not given:
        raise InvalidInputError("passages", "are missing: give them behind the question, by --input or by a pipe")
    return [Question(query, given)]


def parse(text: str) -> list[Any]:
    """The values in a text: of one JSON document, of JSON lines, or its paragraphs."""
    if not text.lstrip().startswith(("[", "{", '"')):
        return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except ValueError:
        return [_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InvalidInputError("input", f"line {number} is no JSON: {error}") from None


def _text_of(source: Path) -> str:
    try:
        return sys.stdin.read() if str(source) == "-" else source.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInputError("input", f"{source} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InvalidInputError("input", f"{source} is not UTF-8 text") from None


def _question(value: Any, where: str) -> Question:
    if not isinstance(value, dict) or not isinstance(value.get("passages"), list):
        raise InvalidInputError(where, "is no object with query and passages, as the first one is")
    query = value.get("query", value.get("question"))
    if not isinstance(query, str):
        raise InvalidInputError(f"{where}.query", "is missing or no text")
    passages = tuple(_passage(each, f"{where}.passages.{index}") for index, each in enumerate(value["passages"]))
    return Question(query, passages, None if value.get("id") is None else str(value["id"]))


def _passage(value: Any, where: str) -> Passage:
    """A passage; what an object holds beside (relevance in the training data, say) is the caller's own."""
    if isinstance(value, str):
        return Passage(value)
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InvalidInputError(where, "is neither a text nor an object with `text`")
    given = {name: str(value[name]) for name in ("id", "embedding_id") if value.get(name) is not None}
    return Passage(value["text"], str(value.get("title") or ""), given.get("id"), None, given.get("embedding_id"))
