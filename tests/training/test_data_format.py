"""Rows to files and back, and what bad lines get."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data_format import Row, RowPassage, parse_json_line, parse_row, read_rows, row_to_json, write_rows
from training.data_quality import DataError, ReadPolicy, RowError

GOOD: dict[str, Any] = {
    "id": "a",
    "query": "Who?",
    "passages": [{"text": "She did.", "title": "T", "relevance": 1}],
    "answers": ["She"],
}
# No lone surrogates: they are no text in UTF-8. Visible first, so that nothing is blank.
texts = st.text(st.characters(codec="utf-8"), max_size=20).map(lambda text: f"x{text}")
passages = st.builds(
    RowPassage,
    text=texts,
    title=st.one_of(st.just(""), texts),
    id=st.none() | texts,
    relevance=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    gold=st.none() | st.booleans(),
)
rows = st.builds(
    Row,
    id=texts,
    query=texts,
    passages=st.lists(passages, min_size=1, max_size=3).map(tuple),
    answers=st.lists(texts, min_size=1, max_size=3).map(tuple),
    teacher_answer=st.none() | texts,
)


def write_lines(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


@given(rows)
def test_a_row_survives_the_way_through_json(row: Row) -> None:
    line = row_to_json(row)
    assert "\n" not in line
    assert parse_row(parse_json_line(line.encode()), ReadPolicy()) == row


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_files_are_read_as_they_were_written_and_equal_rows_give_equal_bytes(tmp_path: Path, name: str) -> None:
    written = [Row(str(i), "q", (RowPassage(f"text {i}", relevance=0.0),), ("é\u2028",)) for i in range(3)]
    path = tmp_path / name
    assert write_rows(path, written) == 3
    first = path.read_bytes()
    write_rows(path, written)
    assert path.read_bytes() == first
    assert (first[:2] == b"\x1f\x8b") == name.endswith(".gz")
    assert read_rows(path)[0] == written


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"query": None}, "missing field", "query is missing"),
        ({"passages": None}, "missing field", "passages is missing"),
        ({"id": None}, "missing field", "id is missing"),
        ({"passages": []}, "empty", "passages is empty"),
        ({"answers": []}, "empty", "answers is empty"),
        ({"answers": ["ok", "  "]}, "empty", r"answers\[1\] is empty"),
        ({"answers": "She"}, "wrong type", "answers must be a list"),
        ({"answers": [3]}, "wrong type", r"answers\[0\] must be a string"),
        ({"query": 5}, "wrong type", "query must be a string"),
        ({"passages": [{"title": "no text"}]}, "missing field", r"passages\[0\].text is missing"),
        ({"passages": [{"text": "x", "relevance": "high"}]}, "wrong type", "relevance must be a number"),
        ({"passages": [{"text": "x", "relevance": float("nan")}]}, "wrong type", "relevance must be finite"),
        ({"passages": [{"text": "x", "gold": 1}]}, "wrong type", "gold must be true or false"),
        ({"passages": [{"text": "x" * 101}]}, "over-long passage", "101 characters, the limit is 100"),
        ({"answers": [None]}, "empty", r"answers\[0\] is empty"),
        ({"query": "half \ud800"}, "wrong type", "half of a surrogate pair"),
        ({"passages": [7]}, "wrong type", r"passages\[0\] must be an object"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(change: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        parse_row(GOOD | change, ReadPolicy(max_passage_chars=100))
    assert caught.value.kind == kind


def test_gold_is_asked_before_relevance_and_may_be_absent() -> None:
    scored = [{"text": "x", "relevance": 0.2, "gold": True}, {"text": "y", "relevance": 3.0, "gold": False}]
    of_before = [{"text": "x", "relevance": 0.2}, {"text": "y", "relevance": 3.0}, {"text": "z"}]
    row = parse_row(GOOD | {"passages": [*scored, *of_before]}, ReadPolicy())
    assert [passage.relevant for passage in row.passages] == [True, False, False, True, False]
    assert [passage.judged for passage in row.passages] == [True, True, True, True, False]
    assert '"gold"' not in row_to_json(parse_row(GOOD | {"passages": of_before}, ReadPolicy()))


def test_bad_lines_are_counted_with_their_numbers_and_skipped(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        GOOD,
        "{broken",
        "",
        GOOD,
        GOOD | {"id": "b", "answers": [""]},
        "[1]",
        GOOD | {"id": "c"},
    )
    kept, report = read_rows(path)
    assert [row.id for row in kept] == ["a", "c"]
    assert (report.read, report.kept) == (6, 2)
    assert report.lines == {"broken line": [2, 6], "duplicate id": [4], "empty": [5]}
    assert "2 x broken line (line 2, 6)" in str(report)
    assert "already stands in line 1" in str(report)


def test_a_line_that_is_not_utf_8_is_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "\xff"}\n' + json.dumps(GOOD).encode() + b"\n")
    kept, report = read_rows(path)
    assert [row.id for row in kept] == ["a"]
    assert report.lines == {"broken line": [1]}


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n", encoding="utf-8-sig")
    kept, report = read_rows(path)
    assert ([row.id for row in kept], report.lines) == (["a"], {})


def test_refusing_names_the_file_the_line_and_the_field(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", GOOD, GOOD | {"id": "b", "query": ""})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: empty: query is empty"):
        read_rows(path, ReadPolicy(on_problem="refuse"))


def test_a_teachers_answer_stands_in_for_a_gold_one() -> None:
    values = {key: value for key, value in GOOD.items() if key != "answers"} | {"teacher_answer": "Her"}
    row = parse_row(values, ReadPolicy())
    assert (row.answers, row.target) == ((), "Her")
    with pytest.raises(RowError, match="answers is missing"):
        parse_row(values | {"teacher_answer": None}, ReadPolicy())


def test_a_file_cut_short_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be read"):
        read_rows(path)


def test_writing_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [parse_row(GOOD, ReadPolicy())])
    before = path.read_bytes()

    def failing() -> Any:
        yield parse_row(GOOD, ReadPolicy())
        raise OSError("No space left on device")

    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be written: No space"):
        write_rows(path, failing())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
