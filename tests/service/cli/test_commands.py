"""`scaledown answer | rerank | compress` as a shell sees them: output, standard error, exit status."""

import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.cli.__main__ import COMMANDS, main
from service.cli.flags import FLAGS
from service.client import AnswerOptions, Usage
from service.client.calls import CompressOptions, RerankOptions
from service.errors import NotReadyError
from tests.service.calls import PASSAGES, QUERY, answer
from tests.service.conftest import Serve

KEY = "alpha-0123456789abcdef"
LIMIT = ("--max-new-tokens", "8")


@pytest.fixture(autouse=True)
def environment(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEDOWN_URL", str(client.base_url))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(PASSAGES)))


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def timeless(response: dict[str, Any]) -> dict[str, Any]:
    """What is the same every time, of what the client knows."""
    known = {name: response[name] for name in ("answer", "finish_reason", "answerable", "checkpoint")}
    names = {field.name for field in fields(Usage)} - {"cached_chunks"}  # more of them the second time
    return known | {name: response["usage"][name] for name in names}


def test_answer_as_json_is_the_services(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["answer", QUERY, "--json", *LIMIT, "--mode", "hybrid"]) == 0
    shown = capsys.readouterr()
    assert [timeless(row) for row in rows(shown.out)] == [timeless(answer(client, mode="hybrid"))]
    assert shown.err == ""


def test_answer_for_a_person(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    expected = answer(client)
    assert main(["answer", QUERY, *LIMIT]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected["answer"] + "\n"
    for text in ("embeddings", "Bread", f"{expected['usage']['prompt_tokens']} tokens read instead of", "untrained"):
        assert text in shown.err
    assert main(["answer", QUERY, "Bread.", *LIMIT, "--min-relevance", "1"]) == 0
    assert "All passages were left out: the answer comes from none of them." in capsys.readouterr().err


def test_many_questions_are_answered_in_order(
    client: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"id": f"q{number}", "query": f"{QUERY} {number}", "passages": PASSAGES} for number in range(10)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    source = ("--input", str(tmp_path / "questions.jsonl"))
    assert main(["answer", "--json", *source, *LIMIT]) == 0
    answers = rows(capsys.readouterr().out)
    assert [row["id"] for row in answers] == [row["id"] for row in asked]
    assert [row["answer"] for row in answers] == [answer(client, query=row["query"])["answer"] for row in asked]
    assert main(["answer", "--quiet", *source, *LIMIT]) == 0
    assert capsys.readouterr().out == "".join(f"{row['answer']}\n" for row in answers)
    assert main(["rerank", "--json", *source]) == 0
    assert [row["id"] for row in rows(capsys.readouterr().out)] == [row["id"] for row in asked]


def test_an_error_says_which_of_many_questions_it_is_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [{"id": f"q{number}", "query": QUERY, "passages": PASSAGES} for number in range(3)]
    asked[2]["passages"] = []
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    assert main(["rerank", "--json", "--input", str(tmp_path / "questions.jsonl")]) == 2
    shown = capsys.readouterr()
    assert [row["id"] for row in rows(shown.out)] == ["q0", "q1"]
    assert shown.err.startswith("error: input.2: passages: has too few items")


def test_rerank(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    expected = client.post("/rerank", json={"query": QUERY, "passages": PASSAGES, "top_n": 2}).json()["results"]
    assert main(["rerank", QUERY, "--top-n", "2", "--json"]) == 0
    (shown,) = rows(capsys.readouterr().out)
    assert shown["results"] == expected


def test_rerank_for_a_person(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    texts = ["[bold]Bread[/bold] is made of flour.", "Marie Curie discovered polonium."]
    ranked = client.post("/rerank", json={"query": QUERY, "passages": texts}).json()["results"]
    assert main(["rerank", QUERY, *texts]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(texts[each["index"]]) for each in ranked]  # whatever is in a passage, it is no markup
    assert places == sorted(places)
    assert all(f"{each['relevance']:.3f}" in shown for each in ranked)


def test_compress(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    expected = client.post("/compress", json={"query": QUERY, "passages": PASSAGES, "rate": 8}).json()
    assert main(["compress", QUERY, "--rate", "8", "--json"]) == 0
    (shown,) = rows(capsys.readouterr().out)
    assert shown["usage"].items() <= expected["usage"].items()
    assert [each["embeddings"]["shape"] for each in shown["passages"]] == [
        each["embeddings"]["shape"] for each in expected["passages"]
    ]


def test_compress_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", QUERY, "Iron melts at 1538 degrees Celsius."]) == 0
    shown = capsys.readouterr().out
    assert "Iron melts at 1538 degrees Celsius." in shown
    assert "embeddings for" in shown


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["answer", QUERY, "a", "--url", "http://127.0.0.1:9"], 3, "cannot be reached"),
        (["answer", QUERY, "a", "--url", "127.0.0.1:9"], 3, "'127.0.0.1:9' is no address of a service"),
        (["answer", QUERY, " "], 2, "passages.0.text: is empty"),
        (["answer", QUERY, "a", "--temperature", "nan"], 2, "temperature: must be a finite number"),
        (["answer", QUERY, "a", "--rate", "3"], 2, "rate: must be one of 16, 8"),
        (["rerank", "--input", "/nowhere.jsonl"], 2, "input: /nowhere.jsonl cannot be read"),
        (["rerank", QUERY, "a", "--checkpoint", "/nowhere"], 1, "/nowhere: is no folder"),
        (["checkpoints", "list"], 1, "started without SCALEDOWN_ADMIN_KEY"),
        (["checkpoints", "inspect", "/nowhere"], 1, "manifest.json: cannot be read"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_overload_and_keys_have_a_status_of_their_own(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(api_keys=KEY) as client:
        arguments = ["rerank", QUERY, "a", "--url", str(client.base_url)]
        assert main(arguments) == 4
        monkeypatch.setenv("SCALEDOWN_API_KEY", KEY)
        assert main(arguments) == 0
        client.app.state.engine.refuse(NotReadyError("no room"))  # type: ignore[attr-defined]  # see conftest's `serve`
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        assert main(arguments) == 5
    assert "no room" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: scaledown {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["serve", "--max-pasages", "3"], ["train", "unknown"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: scaledown" in capsys.readouterr().err


def test_every_option_of_the_client_has_a_flag() -> None:
    kinds = (AnswerOptions, CompressOptions, RerankOptions)
    assert {name for kind in kinds for name in kind.__annotations__} == set(FLAGS)
