"""From raw files to rows: the command as a user runs it, and that nothing leaks."""

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from training.__main__ import main
from training.answer_match import words
from training.data_format import Row, RowPassage, read_rows
from training.prepare import parse_source
from training.row_statistics import describe

CITIES = ["Paris", "Rome", "Oslo", "Bern", "Prague", "Vienna", "Lisbon", "Madrid", "Dublin", "Athens"]


def raw_example(index: int) -> dict[str, Any]:
    """Question `index`; two questions share a passage."""
    city = CITIES[index // 2]
    question = f"Which city has the river number {city.lower()}?" if index % 2 else f"What is city {index // 2} called?"
    text = f"City {index // 2} is called {city} and has the river number {index // 2}."
    return {"id": str(index), "question": question, "answers": [city], "positives": [{"title": "", "text": text}]}


def write_raw(path: Path, examples: Sequence[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(example) + "\n" for example in examples)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "cities.jsonl.gz", [raw_example(index) for index in range(20)])


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.jsonl"
    texts = [f"Some city has river number {n} in it." for n in range(10)] + ["Paris is a city with a river."]
    path.write_text("".join(json.dumps({"title": f"T{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def test_rows_have_their_positives_and_hard_negatives_without_answers(tmp_path: Path, raw: Path, wiki: Path) -> None:
    out = tmp_path / "out" / "train.jsonl.gz"
    arguments = ["prepare", "--source", str(raw), "--collection", str(wiki), "--passages", "4", "--out", str(out)]
    assert main(arguments) == 0
    rows, report = read_rows(out)
    assert len(rows) == 20
    assert report.counts == {}
    for row in rows:
        assert row.id.startswith("cities/")
        assert sorted(passage.relevance or 0.0 for passage in row.passages) == [0, 0, 0, 1]
        for passage in row.passages:
            assert (row.answers[0] in passage.text) == (passage.relevance == 1)
    places = {[passage.relevance for passage in row.passages].index(1.0) for row in rows}
    assert len(places) > 1, "the positive always stands at the same place"


@pytest.mark.parametrize(("title", "pattern", "titled"), [("", "T", False), ("City", "T", True), ("City", "", False)])
def test_a_title_does_not_tell_which_passage_is_relevant(
    tmp_path: Path, wiki: Path, title: str, pattern: str, titled: bool
) -> None:
    wiki.write_text(re.sub(r'"T\d+"', f'"{pattern}"', wiki.read_text()))
    examples = [raw_example(index) for index in range(6)]
    for example in examples:
        example["positives"][0]["title"] = title
    raw = write_raw(tmp_path / "titles.jsonl.gz", examples)
    source, out = ["--source", str(raw), "--collection", str(wiki)], tmp_path / "train.jsonl"
    assert main(["prepare", *source, "--passages", "4", "--random-negatives", "2", "--out", str(out)]) == 0
    assert {bool(passage.title) for row in read_rows(out)[0] for passage in row.passages} == {titled}
    config = tmp_path / "keep.yaml"
    config.write_text("sources: []\nassembly: {match_titles: false}\n")
    assert main(["prepare", "--config", str(config), *source, "--passages", "4", "--out", str(out)]) == 0
    assert any(passage.title for row in read_rows(out)[0] for passage in row.passages)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_order(tmp_path: Path, raw: Path) -> None:
    contents = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = tmp_path / f"{name}.jsonl"
        assert main(["prepare", "--source", str(raw), "--passages", "3", "--seed", seed, "--out", str(out)]) == 0
        contents.append(out.read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert sorted(json.loads(line)["id"] for line in contents[0].splitlines()) == sorted(
        json.loads(line)["id"] for line in contents[2].splitlines()
    )


def prepare_sides(tmp_path: Path, *arguments: str) -> tuple[list[Row], list[Row]]:
    """Train and dev by the command; no question is on both sides, nor is a passage that answers on one."""
    train, dev = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    options = ["--passages", "3", "--dev-share", "0.4", "--out", str(train), "--dev-out", str(dev)]
    assert main(["prepare", *arguments, *options]) == 0
    sides = read_rows(train)[0], read_rows(dev)[0]
    questions = [{words(row.query) for row in rows} for rows in sides]
    assert not questions[0] & questions[1]
    passages = [[passage for row in rows for passage in row.passages] for rows in sides]
    for one, other in (passages, passages[::-1]):
        positives = {words(passage.text) for passage in one if passage.relevance == 1}
        assert not positives & {words(passage.text) for passage in other}
    return sides


def test_dev_shares_no_question_and_no_passage_that_answers_with_train(tmp_path: Path, raw: Path, wiki: Path) -> None:
    train, dev = prepare_sides(tmp_path, "--source", str(raw), "--collection", str(wiki))
    assert len(train) + len(dev) == 20
    assert dev


def test_a_question_with_several_positives_stays_on_one_side(tmp_path: Path) -> None:
    examples = [raw_example(index) for index in range(20)]
    again = [
        example
        | {
            "id": f"again {example['id']}",
            "question": example["question"].upper(),
            "positives": [f"{example['answers'][0]} in other words, {number}."],
        }
        for number, example in enumerate(examples)
    ]
    raw = write_raw(tmp_path / "twice.jsonl.gz", examples + again)
    train, dev = prepare_sides(tmp_path, "--source", str(raw))
    assert len(train) + len(dev) == 40
    assert dev


def test_positives_that_are_found_in_a_collection_are_split_as_given_ones(tmp_path: Path) -> None:
    examples = [raw_example(index) | {"positives": None} for index in range(20)]
    raw = write_raw(tmp_path / "open.jsonl.gz", examples)
    collection = write_raw(
        tmp_path / "found.jsonl.gz", [{"text": f"City {n} is called {city}."} for n, city in enumerate(CITIES)]
    )
    train, dev = prepare_sides(tmp_path, "--source", str(raw), "--collection", str(collection))
    assert len(train) + len(dev) == 20
    assert dev


def test_passages_are_told_apart_by_words_and_unjudged_ones_count(tmp_path: Path) -> None:
    examples = [raw_example(index) for index in range(20)]
    for example in examples:
        text = example["positives"][0]["text"]
        examples[(int(example["id"]) + 7) % 20]["negatives"] = [text.upper()]
        examples[(int(example["id"]) + 3) % 20]["passages"] = [text.replace(".", "!")]
    train, dev = prepare_sides(tmp_path, "--source", str(write_raw(tmp_path / "words.jsonl.gz", examples)))
    assert len(train) + len(dev) == 20
    assert dev


@pytest.mark.parametrize("label", [{"relevance": 0.9}, {"relevance": 0.2, "gold": True}])
def test_a_passage_that_answers_one_question_is_a_negative_of_another(tmp_path: Path, label: dict[str, Any]) -> None:
    examples = [raw_example(index) for index in range(0, 20, 2)]
    for example in examples:
        example["passages"] = [{"text": example.pop("positives")[0]["text"], **label}]
    out = tmp_path / "train.jsonl"
    raw = write_raw(tmp_path / "judged.jsonl.gz", examples)
    assert main(["prepare", "--source", str(raw), "--passages", "4", "--out", str(out)]) == 0
    for row in read_rows(out)[0]:
        assert {p.relevance for p in row.passages if row.answers[0] in p.text} == {label["relevance"]}
        assert {p.relevance for p in row.passages if row.answers[0] not in p.text} == {0.0}
        assert all(passage.relevant == (row.answers[0] in passage.text) for passage in row.passages)


def test_nothing_shares_a_passage_or_question_with_what_is_held_out(tmp_path: Path, raw: Path) -> None:
    held_out = write_raw(tmp_path / "test.jsonl.gz", [raw_example(4)])
    out = tmp_path / "train.jsonl"
    assert main(["prepare", "--source", str(raw), "--held-out", str(held_out), "--out", str(out)]) == 0
    rows, _ = read_rows(out)
    text = raw_example(4)["positives"][0]["text"]
    assert len(rows) == 18  # the example itself and the one that shares its passage are gone
    assert all(passage.text != text for row in rows for passage in row.passages)


def test_what_is_held_out_needs_no_answer(tmp_path: Path, raw: Path) -> None:
    asked = [raw_example(4) | {"answers": None}, {"id": "alone", "question": raw_example(9)["question"]}]
    out = tmp_path / "train.jsonl"
    held_out = write_raw(tmp_path / "test.jsonl.gz", asked)
    assert main(["prepare", "--source", str(raw), "--held-out", str(held_out), "--out", str(out)]) == 0
    assert {int(row.id.removeprefix("cities/")) for row in read_rows(out)[0]} == {*range(20)} - {4, 5, 9}


def test_what_is_prepared_with_long_passages_is_read_with_them(tmp_path: Path) -> None:
    long = raw_example(0) | {"positives": ["The city is called Paris. " * 1000]}
    raw, out = write_raw(tmp_path / "long.jsonl.gz", [long]), tmp_path / "train.jsonl"
    assert main(["prepare", "--source", str(raw), "--out", str(out)]) == 1
    assert main(["prepare", "--source", str(raw), "--max-passage-chars", "50000", "--out", str(out)]) == 0
    rows, report = read_rows(out)
    assert (len(rows), report.counts) == (1, {})


def test_a_yaml_file_and_the_command_line_say_the_same(tmp_path: Path, raw: Path) -> None:
    config = tmp_path / "prepare.yaml"
    config.write_text(f"sources:\n  - path: {raw}\n    limit: 5\nassembly:\n  passages: 2\nseed: 3\n")
    by_file, by_flags = tmp_path / "file.jsonl", tmp_path / "flags.jsonl"
    assert main(["prepare", "--config", str(config), "--out", str(by_file)]) == 0
    flags = ["--source", f"{raw},limit=5", "--passages", "2", "--seed", "3"]
    assert main(["prepare", *flags, "--out", str(by_flags)]) == 0
    assert by_file.read_bytes() == by_flags.read_bytes()
    assert len(read_rows(by_file)[0]) == 5


def test_bad_rows_are_reported_by_line_and_skipped_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = raw_example(1) | {"answers": [""]}
    raw = write_raw(tmp_path / "cities.jsonl.gz", [raw_example(0), bad, raw_example(2), raw_example(2)])
    out = tmp_path / "train.jsonl"
    with caplog.at_level("INFO"):
        assert main(["prepare", "--source", str(raw), "--out", str(out)]) == 0
    assert "cities: 2 of 4 rows kept" in caplog.text
    assert "1 x empty (line 2): answers[0] is empty" in caplog.text
    assert "1 x duplicate id (line 4)" in caplog.text
    assert "2 rows; a row has" in caplog.text
    assert main(["prepare", "--source", str(raw), "--refuse", "--out", str(out)]) != 0
    assert "cities, line 2: empty: answers[0] is empty" in capsys.readouterr().err + caplog.text


def test_a_source_without_any_positive_is_warned_of(
    tmp_path: Path, raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = [raw_example(index) | {"positives": None, "passages": ["unjudged"]} for index in range(3)]
    unjudged = write_raw(tmp_path / "unjudged.jsonl.gz", examples)
    sources = ["--source", str(raw), "--source", str(unjudged)]
    assert main(["prepare", *sources, "--out", str(tmp_path / "train.jsonl")]) == 0
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert warning.startswith("source unjudged: none of its 3 rows has a positive passage")
    assert "columns.positives=COLUMN" in warning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--source: give at least one"),
        (["--source", "none.jsonl"], "no such file"),
        (["--source", "squad,limits=3"], "limits: unknown key"),
        (["--source", "squad,limit"], "is not KEY=VALUE"),
        (["--source", "squad", "--source", "squad"], "two have the same name"),
        (["--source", "squad", "--dev-share", "0.5"], "--dev-out"),
    ],
)
def test_wrong_arguments_are_refused_with_a_message(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(["prepare", *arguments, "--out", str(tmp_path / "x.jsonl")]) != 0
    assert message in capsys.readouterr().err + caplog.text


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", "--help"])
    assert "python -m training prepare --source" in capsys.readouterr().out


def test_a_source_on_the_command_line_names_its_columns() -> None:
    assert parse_source("a.csv,columns.query=subject,limit=10,answer_in_passage=true") == {
        "path": "a.csv",
        "columns": {"query": "subject"},
        "limit": 10,
        "answer_in_passage": True,
    }


def test_statistics_say_what_a_set_looks_like() -> None:
    passages = (RowPassage("one two", relevance=1.0), RowPassage("four five six", "three", relevance=0.0))
    rows = [
        Row("1", "who is it", passages, ("two",)),
        Row("2", "what", passages[:1], ("six seven",), teacher_answer="a b c"),
    ]
    found = describe(rows)
    assert (found.rows, found.passages, found.positives, found.full) == (2, 1.5, 1.0, 0.5)
    assert found.passage_words == pytest.approx(8 / 3)
    assert (found.query_words, found.answer_words) == (2.0, 2.0)
    assert (found.answer_in_positive, found.answer_elsewhere) == (0.5, 0.0)
    assert (found.titled_positives, found.titled_others) == (0.0, 1.0)
    with pytest.raises(ValueError, match="no rows"):
        describe([])
