"""Local files in every form, and the public sets' columns as their cards document them."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from core.config import parse_config
from core.errors import ConfigError
from training.data_format import RowPassage
from training.data_quality import DataError, ReadPolicy, ReadReport
from training.examples import Example
from training.public_sets import PUBLIC_SETS
from training.sources import SourceConfig, read_collection, read_examples, read_records

SKIP, REFUSE = ReadPolicy(), ReadPolicy(on_problem="refuse")
TICKETS = [
    {"ticket": "7", "subject": "How hot?", "reply": "230 degrees", "article": "Bake at 230 degrees.", "head": "Bread"},
    {
        "ticket": "8",
        "subject": "How long?",
        "reply": '["40 minutes", "2/3 hour"]',
        "article": "Bake 40 minutes.",
        "head": "",
    },
    {"ticket": "9", "subject": "", "reply": "x", "article": "y", "head": ""},
]
COLUMNS = {"id": "ticket", "query": "subject", "answers": "reply", "text": "article", "title": "head"}


def write_tickets(path: Path) -> None:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(TICKETS).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(TICKETS))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, TICKETS)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(TICKETS[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(TICKETS)


def read_public(name: str, records: list[dict[str, Any]], features: Any = None) -> tuple[list[Example], ReadReport]:
    """The records as `datasets` would hand them out."""
    return read_records(SourceConfig(path=name), datasets.Dataset.from_list(records, features=features), SKIP)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_flat_tables_are_read_with_their_columns_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tickets.{suffix}"
    write_tickets(path)
    examples, report = read_examples(SourceConfig(path=str(path), columns=COLUMNS), SKIP)
    assert examples == [
        Example("7", "How hot?", ("230 degrees",), (RowPassage("Bake at 230 degrees.", "Bread"),)),
        Example("8", "How long?", ("40 minutes", "2/3 hour"), (RowPassage("Bake 40 minutes."),)),
    ]
    assert report.counts == {"empty": 1}
    assert report.lines["empty"] == [4 if suffix in ("csv", "tsv") else 3]


def test_positives_and_negatives_files_and_dpr_columns(tmp_path: Path) -> None:
    path = tmp_path / "dpr.json"
    path.write_text(
        json.dumps(
            [
                {
                    "question": "Who?",
                    "answers": ["Curie"],
                    "positive_ctxs": [{"title": "Radium", "text": "Curie found it.", "score": 1000}],
                    "hard_negative_ctxs": [{"title": "Radon", "text": "Another did.", "score": 3}],
                }
            ]
        )
    )
    columns = {"positives": "positive_ctxs", "negatives": "hard_negative_ctxs"}
    (example,), _ = read_examples(SourceConfig(path=str(path), columns=columns), REFUSE)
    assert (example.id, example.query) == ("1", "Who?")
    assert example.positives == (RowPassage("Curie found it.", "Radium"),)
    assert example.negatives == (RowPassage("Another did.", "Radon"),)


def test_rows_of_the_data_format_are_examples_judged_by_relevance(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    passages = [{"text": "a", "relevance": 0.9}, {"text": "b", "relevance": 0.1}, {"text": "c"}]
    path.write_text(json.dumps({"id": 1, "query": "q", "passages": passages, "teacher_answer": "t"}))
    (example,), _ = read_examples(SourceConfig(path=str(path)), REFUSE)
    assert example == Example(
        "1", "q", (), (RowPassage("a", relevance=0.9),), (RowPassage("b", relevance=0.1),), (RowPassage("c"),), "t"
    )


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.json", "x.jsonl", "x.jsonl.gz"])
def test_a_file_without_ids_and_with_a_byte_order_mark_is_read(tmp_path: Path, name: str) -> None:
    records = [{"query": f"q{number}", "answers": "a"} for number in range(2)]
    if name.startswith("x.json"):
        text = json.dumps(records) if name == "x.json" else "\n".join(map(json.dumps, records))
    else:
        text = "\n".join(
            ("\t" if name == "x.tsv" else ",").join(line) for line in [records[0], *map(dict.values, records)]
        )
    content = text.encode("utf-8-sig")
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    examples, _ = read_examples(SourceConfig(path=str(path)), REFUSE)
    first = 2 if name in ("x.csv", "x.tsv") else 1  # the line of a table
    assert [(e.id, e.query) for e in examples] == [(str(first), "q0"), (str(first + 1), "q1")]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_a_misspelt_column_is_refused_with_those_that_are_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tickets.{suffix}"
    write_tickets(path)
    expected = "columns.query=Subject: no such column; there are ticket, subject, reply, article, head"
    for policy, kind in ((SKIP, ConfigError), (REFUSE, DataError)):
        with pytest.raises(kind, match=re.escape(expected)):
            read_examples(SourceConfig(path=str(path), columns=COLUMNS | {"query": "Subject"}), policy)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"query": "subject"}, ("mapped?", ("own",), ("passage",))),
        ({"positives": "article"}, ("own?", ("mapped",), ("passage",))),
        ({"text": "article"}, ("own?", ("mapped",), ())),
    ],
)
def test_a_mapped_column_wins_over_other_names_of_its_field(
    tmp_path: Path, columns: dict[str, str], expected: tuple[str, tuple[str, ...], tuple[str, ...]]
) -> None:
    path = tmp_path / "x.json"
    record = {"question": "own?", "subject": "mapped?", "answers": "a", "article": "mapped"}
    path.write_text(json.dumps([record | {"positives": "own", "passages": "passage", "text": "text"}]))
    (example,), _ = read_examples(SourceConfig(path=str(path), columns=columns), REFUSE)
    assert (example.query, *(tuple(p.text for p in some) for some in (example.positives, example.unjudged))) == expected


def test_a_field_that_the_file_does_not_have_is_said_with_the_columns_that_may_be_it(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "q", "answer": "a", "contexts": ["c"]}\n')
    expected = (
        "answers is missing and may have another name: columns.answers=answer; there are question, answer, contexts"
    )
    _, report = read_examples(SourceConfig(path=str(path)), SKIP)
    assert report.examples == {"missing field": expected}
    with pytest.raises(DataError, match=expected):
        read_examples(SourceConfig(path=str(path)), REFUSE)
    path.write_text('{"reply": "a"}\n')
    with pytest.raises(DataError, match=r"query is missing .* columns.query=COLUMN; there are reply"):
        read_examples(SourceConfig(path=str(path)), REFUSE)


def test_a_long_cell_makes_its_row_bad_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f"query,answers,text\nq,a,short\nq,a,{'long ' * 40_000}\nr,a,short\n")
    examples, report = read_examples(SourceConfig(path=str(path)), ReadPolicy(max_passage_chars=20_000))
    assert [example.query for example in examples] == ["q", "r"]
    assert report.lines == {"over-long passage": [3]}


def test_a_column_may_be_missing_from_some_records(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"q": "one", "answers": ["a"]}\n{"q": "two", "answers": ["b"], "teacher": "c"}\n')
    examples, _ = read_examples(
        SourceConfig(path=str(path), columns={"query": "q", "teacher_answer": "teacher"}), REFUSE
    )
    assert [e.teacher_answer for e in examples] == [None, "c"]


def test_a_collection_reports_its_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "wiki.jsonl"
    path.write_text('{"title": "T", "text": "one"}\n{"title": "no text"}\n{"text": "three"}\n')
    passages, report = read_collection(path, SKIP)
    assert passages == [RowPassage("one", "T"), RowPassage("three")]
    assert report.lines == {"missing field": [2]}
    with pytest.raises(DataError, match=r"wiki\.jsonl, line 2"):
        read_collection(path, REFUSE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "x.jsonl", "limits": 3}, "limits: unknown key"),
        ({"path": "x.jsonl", "columns": {"question": "q"}}, "question is none of"),
        ({"path": "x.jsonl", "limit": 0}, "limit"),
    ],
)
def test_a_source_with_unknown_keys_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(SourceConfig, values, "test")


@pytest.mark.parametrize(("path", "message"), [("no-set", "not a public set"), ("none.jsonl", "no such file")])
def test_a_path_that_is_nothing_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_examples(SourceConfig(path=path), SKIP)


def test_a_damaged_table_is_refused_with_its_name(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.json", "x.csv.gz"):
        (tmp_path / name).write_bytes(b"PAR1 nothing of this is a table")
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            read_examples(SourceConfig(path=str(tmp_path / name)), SKIP)


def test_squad() -> None:
    record = {
        "id": "5733be28",
        "title": "University_of_Notre_Dame",
        "context": "The Grotto is a replica.",
        "question": "What is the Grotto?",
        "answers": {"text": ["a replica", "a replica"], "answer_start": [14, 14]},
    }
    unanswerable = record | {"id": "2", "answers": {"text": [], "answer_start": []}}
    examples, report = read_public("squad", [record, unanswerable])
    gold = RowPassage("The Grotto is a replica.", "University of Notre Dame")
    assert examples == [Example("5733be28", "What is the Grotto?", ("a replica",), (gold,))]
    assert report.lines == {"empty": [2]}


def test_nq_open_has_no_passages_and_gets_ids() -> None:
    examples, _ = read_public("nq_open", [{"question": "when?", "answer": ["1969", "July 1969"]}])
    assert examples == [Example("1", "when?", ("1969", "July 1969"))]


def test_natural_questions() -> None:
    tokens = ["<P>", "Paris", "is", "the", "capital", ".", "</P>", "<P>", "Lyon", "is", "not", ".", "</P>"]
    record = {
        "id": "797803103760793766",
        "document": {
            "title": "France",
            "url": "u",
            "html": "",
            "tokens": {"token": tokens, "is_html": [token.startswith("<") for token in tokens]},
        },
        "question": {"text": "what is the capital", "tokens": ["what"]},
        "long_answer_candidates": {"start_token": [0, 7], "end_token": [7, 13], "top_level": [True, True]},
        "annotations": {
            "id": ["1"],
            "long_answer": [{"candidate_index": 0, "start_token": 0, "end_token": 7, "start_byte": 0, "end_byte": 9}],
            "short_answers": [{"start_token": [1], "end_token": [2], "text": ["Paris"]}],
            "yes_no_answer": [-1],
        },
    }
    (example,), _ = read_public("natural_questions", [record])
    assert example.query == "what is the capital"
    assert example.answers == ("Paris",)
    assert example.positives == (RowPassage("Paris is the capital .", "France"),)
    assert example.negatives == (RowPassage("Lyon is not .", "France"),)


def test_hotpot_qa() -> None:
    record = {
        "id": "5a8b",
        "question": "Who?",
        "answer": "Curie",
        "type": "bridge",
        "level": "easy",
        "supporting_facts": {"title": ["A", "C"], "sent_id": [0, 1]},
        "context": {"title": ["A", "B", "C"], "sentences": [["One.", " Two."], ["Three."], ["Four."]]},
    }
    (example,), _ = read_public("hotpot_qa", [record])
    assert example.positives == (RowPassage("One. Two.", "A", relevance=1.0), RowPassage("Four.", "C", relevance=1.0))
    assert example.negatives == (RowPassage("Three.", "B", relevance=0.0),)


def test_ms_marco_without_an_answer_is_counted() -> None:
    passages = {"is_selected": [0, 1], "passage_text": ["No.", "Yes."], "url": ["a", "b"]}
    base = {"passages": passages, "query": "really", "query_type": "ENTITY", "wellFormedAnswers": []}
    records = [
        base | {"query_id": 3, "answers": ["yes"]},
        base | {"query_id": 4, "answers": ["No Answer Present."]},
    ]
    (example,), report = read_public("ms_marco", records)
    assert (example.id, example.answers) == ("3", ("yes",))
    assert example.positives == (RowPassage("Yes.", relevance=1.0),)
    assert example.negatives == (RowPassage("No.", relevance=0.0),)
    assert report.lines == {"empty": [2]}


def test_trivia_qa_is_cut_into_windows_and_those_with_an_answer_are_positives() -> None:
    page = " ".join(["filler"] * 100 + ["Warsaw"] + ["more"] * 99)
    record = {
        "question": "Where was she born?",
        "question_id": "tc_1",
        "answer": {"value": "Warsaw", "aliases": ["Warszawa", "Warsaw"], "normalized_value": "warsaw"},
        "entity_pages": {"title": ["Curie"], "wiki_context": [page], "filename": ["f"], "doc_source": ["s"]},
        "search_results": {"title": ["Other"], "search_context": ["nothing here"], "rank": [1]},
    }
    (example,), _ = read_public("trivia_qa", [record])
    assert example.answers == ("Warsaw", "Warszawa")
    assert [passage.text.split()[0] for passage in example.positives] == ["Warsaw"]
    assert [(p.title, len(p.text.split())) for p in example.negatives] == [("Curie", 100), ("Other", 2)]


def test_pisco_brings_unjudged_passages_and_the_teachers_answer() -> None:
    record = {"query": "q", "docs": ["first", "second"], "mistral_label": "The teacher's words."}
    (example,), _ = read_public("maxoul/pisco_finetuning_data", [record])
    assert example.teacher_answer == "The teacher's words."
    assert example.unjudged == (RowPassage("first"), RowPassage("second"))


@pytest.mark.parametrize("name", sorted(PUBLIC_SETS))
def test_columns_that_are_not_as_documented_are_counted_not_raised(name: str) -> None:
    examples, report = read_public(name, [{"unexpected": 1}])
    assert examples == []
    assert report.lines == {"missing field": [1]}


def test_a_set_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"squad \(train\): cannot be loaded from the hub"):
        read_examples(SourceConfig(path="squad"), SKIP)
