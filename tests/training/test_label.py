"""Labelling with real tiny models: answers, logits, relevance; killed anywhere, nothing is lost or doubled."""

import errno
import json
import os
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertForSequenceClassification

from core.base_models import resolve_base_model
from core.config import PromptConfig
from core.errors import BaseModelError
from core.generator import Generator, load_generator
from core.prompts import Block, PromptTemplate
from core.tokenization import encode
from training.__main__ import main
from training.chat_endpoint import ChatEndpoint, EndpointError, complete_chats
from training.cross_encoder import CrossEncoder
from training.data_format import Row, RowPassage, read_rows, write_rows
from training.data_quality import DataError, ReadPolicy
from training.journal import Journal
from training.label import LabelConfig, label_rows
from training.teacher_logits import TeacherLogits, TokenTargets, shard_path, tokenizer_fingerprint, write_shard
from training.teachers import EndpointTeacher, LocalTeacher, TeacherAnswer

ENDPOINT = ChatEndpoint("http://teacher/v1", "big-model", "secret", concurrency=3, tries=3)


def row(index: int, **changes: Any) -> Row:
    passages = (
        RowPassage(f"The river number {index} rises in the Alps.", "Rivers", relevance=1.0),
        RowPassage("Bread is made of flour.", relevance=0.0),
    )
    values: dict[str, Any] = {"passages": passages, "answers": ("the Alps",)} | changes
    return Row(f"r{index}", f"Where does river {index} rise?", **values)


ROWS = [row(index) for index in range(7)]


@pytest.fixture(scope="module")
def generator(tiny_llama: Path) -> Generator:
    return load_generator(resolve_base_model(str(tiny_llama)))


@pytest.fixture(scope="module")
def reranker(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reranker(tiny_bert, tmp_path_factory.mktemp("reranker"), labels=1)


def build_reranker(bert: Path, folder: Path, labels: int) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(bert, num_labels=labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


class CountingTeacher:
    """A local teacher that notes what it is asked, and fails when it has been asked `lives` times."""

    def __init__(self, generator: Generator, top_k: int = 0, lives: int = 1000) -> None:
        self._teacher = LocalTeacher(generator, PromptConfig(), max_new_tokens=6, top_k=top_k)
        self._lives = lives
        self.asked: list[str] = []

    def answer(self, rows: Sequence[Row]) -> list[TeacherAnswer]:
        if self._lives == 0:
            raise KeyboardInterrupt
        self._lives -= 1
        self.asked += [row.id for row in rows]
        return self._teacher.answer(rows)


def text_prompt(generator: Generator, row: Row, system: str = PromptConfig().system) -> torch.Tensor:
    """The generator's own prompt of a row with every passage as text, (T,) int64."""
    template = PromptTemplate(generator.tokenizer, PromptConfig(system=system))
    blocks = [Block(text_ids=encode(generator.tokenizer, passage.content).ids) for passage in row.passages]
    return template.build(row.query, blocks).ids


def label(folder: Path, teacher: CountingTeacher, *, logits: bool = True, block: int = 2) -> list[Row]:
    with Journal(folder / "journal", {"teacher": "tiny"}) as journal:
        return label_rows(
            ROWS,
            LabelConfig(teacher="tiny"),
            teacher,
            None,
            journal,
            block=block,
            logits=folder / "logits" if logits else None,
            tokenizer="t",
        )


def test_a_local_teacher_reads_the_passages_as_text_and_answers_greedily(
    generator: Generator, tiny_llama: Path
) -> None:
    teacher = LocalTeacher(generator, PromptConfig(system="Be brief."), max_new_tokens=8)
    together = teacher.answer(ROWS[:3])
    assert [teacher.answer([row])[0] for row in ROWS[:3]] == together
    user = (
        "Background:\n[1] Rivers\nThe river number 0 rises in the Alps.\n[2] Bread is made of flour.\n"
        "Question: Where does river 0 rise?"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
    shown = generator.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = text_prompt(generator, ROWS[0], system="Be brief.")
    assert generator.tokenizer.decode(prompt_ids) == shown
    ids = prompt_ids.unsqueeze(0)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)  # its own types refuse `generate`
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=list(generator.eos_ids))
    text = str(generator.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True))
    assert together[0].text == text.rstrip("\ufffd").strip()  # a character cut in two at the end is left out


def test_stored_logits_are_the_teachers_own(generator: Generator, tiny_llama: Path, tmp_path: Path) -> None:
    labelled = label(tmp_path, CountingTeacher(generator, top_k=5))
    stored = TeacherLogits(tmp_path / "logits")
    assert len(stored) == len(ROWS)
    assert "r0" in stored
    targets = stored["r3"]
    assert labelled[3].teacher_answer
    assert str(generator.tokenizer.decode(targets.answer_ids[:-1])).strip() == labelled[3].teacher_answer
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)  # its own types refuse `generate`
    prompt_ids = text_prompt(generator, ROWS[3])
    with torch.inference_mode():
        logits = model(torch.cat([prompt_ids, targets.answer_ids[:-1]])[None]).logits[0, len(prompt_ids) - 1 :]
    top = logits.log_softmax(-1).topk(5)
    assert torch.equal(targets.top_ids, top.indices)
    torch.testing.assert_close(targets.top_logprobs, top.values, atol=5e-3, rtol=0)  # float16 on disk


@pytest.mark.parametrize("lives", [0, 1, 2, 3])
def test_work_that_was_stopped_goes_on_where_it_was(generator: Generator, tmp_path: Path, lives: int) -> None:
    whole = label(tmp_path / "whole", CountingTeacher(generator, top_k=3))
    killed = CountingTeacher(generator, top_k=3, lives=lives)
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path / "parts", killed)
    heir = CountingTeacher(generator, top_k=3)
    assert label(tmp_path / "parts", heir, block=3) == whole
    assert sorted(killed.asked + heir.asked) == sorted(row.id for row in ROWS)
    assert_same_logits(tmp_path / "whole" / "logits", tmp_path / "parts" / "logits")


def assert_same_logits(first: Path, second: Path) -> None:
    """The same targets for every row, each row in one shard only."""
    a, b = TeacherLogits(first), TeacherLogits(second)
    rows_on_disk = []
    for path in second.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            rows_on_disk += json.loads(file.metadata()["rows"])
    assert sorted(rows_on_disk) == sorted(row.id for row in ROWS)
    for row in ROWS:
        assert torch.equal(a[row.id].answer_ids, b[row.id].answer_ids)
        assert torch.equal(a[row.id].top_ids, b[row.id].top_ids)
        torch.testing.assert_close(a[row.id].top_logprobs, b[row.id].top_logprobs, atol=2e-3, rtol=0)


def test_a_journal_torn_at_any_byte_gives_the_same_rows(generator: Generator, tmp_path: Path) -> None:
    whole = label(tmp_path / "whole", CountingTeacher(generator), logits=False)
    journal = (tmp_path / "whole" / "journal").read_bytes()
    for length in range(0, len(journal), 211):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "journal").write_bytes(journal[:length])
        assert label(folder, CountingTeacher(generator), logits=False) == whole
        assert (folder / "journal").read_bytes() == journal


def test_a_kill_between_shard_and_journal_makes_that_block_again(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = label(tmp_path / "whole", CountingTeacher(generator, top_k=3))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            label(tmp_path / "parts", CountingTeacher(generator, top_k=3))
    assert label(tmp_path / "parts", CountingTeacher(generator, top_k=3), block=3) == whole
    assert_same_logits(tmp_path / "whole" / "logits", tmp_path / "parts" / "logits")


def test_a_full_disk_is_told_and_work_goes_on_once_there_is_room(
    chat_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, ROWS)
    arguments = ["label", "--data", str(data), "--endpoint", chat_server, "--teacher", "any", "--out", str(out)]

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(arguments) == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert not out.exists()
    assert main(arguments) == 0
    assert [row.id for row in read_rows(out)[0]] == [row.id for row in ROWS]


def test_the_command_labels_scores_and_leaves_no_journal(
    tiny_llama: Path, reranker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, logits = tmp_path / "rows.jsonl.gz", tmp_path / "labelled.jsonl", tmp_path / "logits"
    write_rows(data, ROWS)
    arguments = ["label", "--data", str(data), "--teacher", str(tiny_llama), "--max-new-tokens", "4", "--device", "cpu"]
    arguments += ["--reranker", str(reranker), "--score", "probability", "--logits", str(logits), "--top-k", "2"]
    assert main([*arguments, "--out", str(out)]) == 0
    rows, _ = read_rows(out)
    assert [row.id for row in rows] == [row.id for row in ROWS]
    assert all(row.teacher_answer for row in rows)
    assert all(0 < (passage.relevance or 0) < 1 for row in rows for passage in row.passages)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert TeacherLogits(logits).tokenizer == tokenizer_fingerprint(tokenizer.get_vocab())
    assert not out.with_name("labelled.jsonl.journal").exists()
    assert main([*arguments, "--out", str(out)]) == 1
    assert "already exists and is complete" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "other.jsonl")]) == 1
    assert "already holds logits of another run" in capsys.readouterr().err


def test_other_settings_never_go_on_from_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, ROWS)
    with Journal(out.with_name("labelled.jsonl.journal"), {"teacher": "another"}) as journal:
        journal.add(ROWS[:1])
    assert main(["label", "--data", str(data), "--teacher", "x", "--endpoint", "http://x/v1", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "was begun with other settings" in error
    assert "teacher" in error
    assert not out.exists()


def test_after_a_wrong_teacher_the_right_one_begins(tiny_llama: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, ROWS)
    arguments = ["label", "--data", str(data), "--max-new-tokens", "2", "--out", str(out)]
    assert main([*arguments, "--teacher", str(tmp_path / "mistyped")]) == 1
    assert main([*arguments, "--teacher", str(tiny_llama)]) == 0
    assert out.exists()


def test_without_a_teacher_gold_answers_stay_and_relevance_is_scored(reranker: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, [*ROWS[:2], row(8, answers=())])
    assert main(["label", "--data", str(data), "--reranker", str(reranker), "--device", "cpu", "--out", str(out)]) == 0
    rows, _ = read_rows(out)
    assert [(row.id, row.target) for row in rows] == [("r0", "the Alps"), ("r1", "the Alps")]
    scores = CrossEncoder(str(reranker)).scores([(row.query, p.content) for row in ROWS[:2] for p in row.passages])
    assert [p.relevance for row in rows for p in row.passages] == pytest.approx(scores, abs=1e-5)


def test_a_teachers_answer_is_kept_unless_it_is_to_be_made_again(generator: Generator, tmp_path: Path) -> None:
    teacher = CountingTeacher(generator)
    rows = [row(0, teacher_answer="kept"), row(1)]
    with Journal(tmp_path / "journal", {}) as journal:
        first, second = label_rows(rows, LabelConfig(teacher="t"), teacher, None, journal)
    assert first.teacher_answer == "kept"
    assert second.teacher_answer not in (None, "")
    assert teacher.asked == ["r1"]
    with Journal(tmp_path / "again", {}) as journal:
        relabelled = label_rows(rows, LabelConfig(teacher="t", relabel=True), teacher, None, journal)
    assert relabelled[0].teacher_answer != "kept"


def test_a_prompt_without_room_for_an_answer_keeps_its_gold_answer(
    generator: Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "max_tokens", 300)
    rows = [row(0), row(1, passages=(RowPassage("word " * 400),))]
    with Journal(tmp_path / "journal", {}) as journal:
        labelled = label_rows(rows, LabelConfig(teacher="t"), CountingTeacher(generator), None, journal)
    assert labelled[0].teacher_answer
    assert (labelled[1].teacher_answer, labelled[1].target) == (None, "the Alps")
    assert "1 rows: the teacher said nothing" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to label"),
        (["--endpoint", "http://x/v1", "--reranker", "r"], "also name the model"),
        (["--endpoint", "http://x/v1", "--teacher", "t", "--logits", "l"], "use a local teacher"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["label", *arguments, "--data", "rows.jsonl", "--out", str(tmp_path / "out.jsonl")]) == 1
    assert message in capsys.readouterr().err


def test_a_cross_encoder_scores_each_pair_by_itself(reranker: Path, tiny_bert: Path, tmp_path: Path) -> None:
    pairs = [("where", "the sea"), ("where does it rise", "in the Alps " * 30), ("who", "Marie Curie")]
    scores = CrossEncoder(str(reranker), batch=2).scores(pairs)
    for pair, score in zip(pairs, scores, strict=True):
        assert CrossEncoder(str(reranker)).scores([pair]) == pytest.approx([score], abs=1e-5)
    two = build_reranker(tiny_bert, tmp_path / "two", labels=2)
    model = BertForSequenceClassification.from_pretrained(two).eval()
    with torch.inference_mode():
        logits = model(**AutoTokenizer.from_pretrained(two)(*pairs[0], return_tensors="pt")).logits[0]
    assert CrossEncoder(str(two)).scores(pairs[:1]) == pytest.approx([float(logits[1] - logits[0])], abs=1e-5)
    with pytest.raises(BaseModelError, match="3 labels"):
        CrossEncoder(str(build_reranker(tiny_bert, tmp_path / "three", labels=3)))


def replying(*statuses: int, headers: dict[str, str] | None = None) -> tuple[httpx.MockTransport, list[dict[str, Any]]]:
    """An endpoint that answers with these statuses, then well; it repeats the last line of the question."""
    left, bodies, lock = list(statuses), [], threading.Lock()

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        with lock:
            bodies.append(body)
            status = left.pop(0) if left else 200
        if status != 200:
            return httpx.Response(status, headers=headers)
        assert request.headers["authorization"] == "Bearer secret"
        content = body["messages"][-1]["content"].splitlines()[-1]
        return httpx.Response(200, json={"choices": [{"message": {"content": f" {content}\n"}}]})

    return httpx.MockTransport(handle), bodies


def test_an_endpoint_is_asked_greedily_with_the_generators_words_and_answers_in_order() -> None:
    transport, bodies = replying()
    teacher = EndpointTeacher(ENDPOINT, PromptConfig(system="Be brief."), 9, transport=transport)
    assert [answer.text for answer in teacher.answer(ROWS)] == [f"Question: {row.query}" for row in ROWS]
    first = next(body for body in bodies if ROWS[0].query in body["messages"][1]["content"])
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("big-model", 0, 9)
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert first["messages"][1]["content"] == (
        "Background:\n[1] Rivers\nThe river number 0 rises in the Alps.\n[2] Bread is made of flour.\n"
        "Question: Where does river 0 rise?"
    )


def test_a_busy_endpoint_is_asked_again_after_the_wait_it_asks_for() -> None:
    transport, bodies = replying(429, 503, headers={"retry-after": "7"})
    waits: list[float] = []
    chat = [{"role": "user", "content": "hello"}]
    assert complete_chats(ENDPOINT, [chat], 5, transport=transport, sleep=waits.append) == [" hello\n"]
    assert (waits, len(bodies)) == ([7.0, 7.0], 3)


@pytest.mark.parametrize(
    ("statuses", "message", "requests"),
    [((503, 503, 503), "HTTP 503", 3), ((401,), "HTTP 401", 1)],
)
def test_an_endpoint_that_refuses_is_given_up(statuses: tuple[int, ...], message: str, requests: int) -> None:
    transport, bodies = replying(*statuses)
    with pytest.raises(EndpointError, match=message):
        complete_chats(ENDPOINT, [[{"role": "user", "content": "x"}]], 5, transport=transport, sleep=lambda _: None)
    assert len(bodies) == requests


def test_an_endpoint_out_of_reach_or_of_another_form_is_given_up() -> None:
    def unreachable(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route", request=request)

    chats = [[{"role": "user", "content": "x"}]]
    for handler, message in (
        (unreachable, "cannot be reached"),
        (lambda _: httpx.Response(200, text="<html>"), "does not reply in the form"),
    ):
        with pytest.raises(EndpointError, match=message):
            complete_chats(ENDPOINT, chats, 5, transport=httpx.MockTransport(handler), sleep=lambda _: None)


class ChatHandler(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint whose model always says the same."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        reply = json.dumps({"choices": [{"message": {"content": "from the Alps"}}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def chat_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_the_command_labels_through_an_endpoint(chat_server: str, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "labelled.jsonl"
    write_rows(data, ROWS)
    arguments = ["--data", str(data), "--endpoint", chat_server, "--teacher", "any", "--out", str(out)]
    assert main(["label", *arguments]) == 0
    assert [row.teacher_answer for row in read_rows(out)[0]] == ["from the Alps"] * len(ROWS)


def test_damaged_or_mixed_shards_are_refused(tmp_path: Path) -> None:
    targets = TokenTargets(torch.tensor([1, 2]), torch.tensor([[1], [2]]), torch.zeros(2, 1))
    with pytest.raises(DataError, match="no teacher logits"):
        TeacherLogits(tmp_path)
    write_shard(shard_path(tmp_path, 0), ["a"], [targets], "one")
    assert torch.equal(TeacherLogits(tmp_path)["a"].answer_ids, targets.answer_ids)
    write_shard(shard_path(tmp_path, 1), ["b"], [targets], "two")
    with pytest.raises(DataError, match="different tokenizers"):
        TeacherLogits(tmp_path)
    shard_path(tmp_path, 1).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a shard"):
        TeacherLogits(tmp_path)


def test_rows_without_any_answer_are_read_for_labelling(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [row(0, answers=())])
    rows, _ = read_rows(tmp_path / "rows.jsonl", ReadPolicy(need_answer=False))
    assert rows == [row(0, answers=())]
