"""Where a command's questions come from: arguments, files of several forms, standard input."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidInputError
from service.cli.questions import Question, parse, read_questions
from service.client import Passage

QUERY = "Who discovered polonium?"
PLAIN = (Passage("Marie Curie did."), Passage("Bread is made of flour.", title="Bread", id="b"))
ROWS: list[Any] = ["Marie Curie did.", {"text": "Bread is made of flour.", "title": "Bread", "id": "b", "relevance": 0}]


class Terminal(io.StringIO):
    """Standard input that nobody has piped anything into."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())


def lines(values: list[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_arguments() -> None:
    assert read_questions(QUERY, ["a", "b"], None) == [Question(QUERY, (Passage("a"), Passage("b")))]


@pytest.mark.parametrize("text", [json.dumps(ROWS), json.dumps(ROWS, indent=2), lines(ROWS), "\n" + lines(ROWS)])
def test_passages_of_a_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "passages").write_text(text)
    assert read_questions(QUERY, [], tmp_path / "passages") == [Question(QUERY, PLAIN)]
    assert read_questions(QUERY, ["first"], tmp_path / "passages") == [Question(QUERY, (Passage("first"), *PLAIN))]


def test_paragraphs_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (None, Path("-")):
        monkeypatch.setattr("sys.stdin", io.StringIO("One\nline.\n\n \nTwo.\n"))
        assert read_questions(QUERY, [], source) == [Question(QUERY, (Passage("One\nline."), Passage("Two.")))]


def test_questions_of_a_file(tmp_path: Path) -> None:
    row = {"id": "q1", "query": QUERY, "passages": ROWS, "answers": ["Marie Curie"]}
    raw = {"question": QUERY, "passages": ROWS}
    (tmp_path / "questions").write_text(lines([row, raw]))
    assert read_questions(None, [], tmp_path / "questions") == [Question(QUERY, PLAIN, "q1"), Question(QUERY, PLAIN)]
    (tmp_path / "one").write_text(json.dumps(row, indent=2))
    assert read_questions(None, [], tmp_path / "one") == [Question(QUERY, PLAIN, "q1")]


@pytest.mark.parametrize(
    ("query", "text", "message"),
    [
        (QUERY, lines([{"query": "other", "passages": ["a"]}]), "query: the input has questions of its own"),
        (None, '["a"]', "query: is missing"),
        (QUERY, "", "passages: are missing"),
        (QUERY, '["a", 3]', "input.1: is neither a text nor an object with `text`"),
        (QUERY, '{"text": "a"}\n{"text": \n', "input: line 2 is no JSON"),
        (None, lines([{"query": "q", "passages": ["a"]}, {"passages": ["a"]}]), "input.1.query: is missing or no text"),
        (None, lines([{"query": "q", "passages": ["a"]}, "a"]), "input.1: is no object with query and passages"),
        (None, lines([{"query": "q", "passages": [{}]}]), "input.0.passages.0: is neither a text nor an object"),
    ],
)
def test_what_is_wrong_is_named(query: str | None, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "input").write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        read_questions(query, [], tmp_path / "input")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="nowhere cannot be read"):
        read_questions(QUERY, [], tmp_path / "nowhere")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidInputError, match="latin is not UTF-8 text"):
        read_questions(QUERY, [], tmp_path / "latin")


@given(st.lists(st.text().map(lambda text: {"text": text}), min_size=1))
def test_one_value_a_line_whatever_it_holds(values: list[dict[str, str]]) -> None:
    assert parse("\n".join(json.dumps(value, ensure_ascii=False) for value in values)) == values
