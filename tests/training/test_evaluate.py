"""The evaluation of a tiny random checkpoint from the command line: records, resuming, costs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.answer import answer
from core.checkpoint import load_checkpoint
from core.errors import ConfigError, InputError
from core.model import Model
from core.pipeline import prepare as prepare_request
from core.pipeline import text_prompt_tokens
from core.policy import Policy
from core.sampling import GenerationOptions
from tests.tiny_evaluation import make_checkpoint, make_rows, read_json, run_evaluate
from training.answering import answer_batch
from training.costs import measure_cost
from training.data_format import Row, RowPassage, write_rows
from training.data_quality import DataError
from training.evaluation import Plan, evaluate
from training.questions import Question, to_questions
from training.rankers import EmbeddingRanker, rank_bm25
from training.results import AnswerRecord, CostRecord, RankingRecord, ResultsFile, Setting, read_results

OPTIONS = GenerationOptions(max_new_tokens=4)
TEXT, COMPRESSED = Setting("text", None, 3), Setting("compressed", 4, 3)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", tiny_llama)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_checkpoint(checkpoint, verify=False)


@pytest.fixture
def questions() -> list[Question]:
    return to_questions(make_rows())


def test_with_passages_keeps_gold_and_order(questions: list[Question]) -> None:
    question = questions[3]  # its gold passage is the fourth of five
    cut = question.with_passages(2)
    assert cut.passages == (question.passages[0], question.passages[3])
    assert cut.gold == (False, True)
    assert question.with_passages(9) == question
    assert sum(question.with_passages(0).gold) == 1


def test_questions_need_gold_answers() -> None:
    row = Row("q", "Who?", (RowPassage("text"),), (), teacher_answer="someone")
    with pytest.raises(DataError, match="no gold answer"):
        to_questions([row])


def test_every_mode_answers_as_the_pipeline_does(model: Model, questions: list[Question]) -> None:
    settings = [Setting("hybrid", 4, 3), COMPRESSED]
    answers, rankings = answer_batch(model, questions, settings, OPTIONS)
    texts, nothing = answer_batch(model, questions, [TEXT], OPTIONS)
    assert nothing == []
    assert len(answers) == 8
    for record in [*answers, *texts]:
        question = next(question for question in questions if question.id == record.question).with_passages(3)
        alone = answer(model, question.query, question.passages, record.setting.mode, record.setting.rate, OPTIONS)
        assert record.answer == alone.text
        assert record.prompt_tokens == alone.prompt_tokens
        assert record.completion_tokens == alone.completion_tokens
    request = prepare_request(model, questions[0].query, questions[0].with_passages(3).passages)
    assert texts[0].prompt_tokens == text_prompt_tokens(model, request)
    assert [record.question for record in rankings] == [question.id for question in questions]
    assert set(texts[0].seconds) == {"prepare", "prompt", "prefill", "decode"}
    assert set(answers[0].seconds) == {"prepare", "compress", "prompt", "prefill", "decode"}


def test_settings_of_one_batch_share_their_rate(model: Model, questions: list[Question]) -> None:
    with pytest.raises(ValueError, match="share their rate"):
        answer_batch(model, questions, [COMPRESSED, Setting("compressed", 8, 3)], OPTIONS)
    with pytest.raises(InputError, match="rate"):
        answer_batch(model, questions, [Setting("compressed", 3, 3)], OPTIONS)


def test_operations_are_counted_with_attention(model: Model, questions: list[Question]) -> None:
    text = measure_cost(model, questions[0], TEXT, OPTIONS)
    compressed = measure_cost(model, questions[0], COMPRESSED, OPTIONS)
    assert set(text.flops) == {"prefill", "decode"}
    assert set(compressed.flops) == {"compress", "prefill", "decode"}
    assert compressed.flops["prefill"] < text.flops["prefill"]
    assert text.peak_memory > 1e6
    # One prefill pass by hand: the layers' matrices at every position, attention over all pairs, the head once.
    config = model.generator.model.config
    positions = answer_batch(model, questions[:1], [TEXT], OPTIONS)[0][0].prompt_tokens
    width, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    matrices = 2 * positions * (2 * width * width + 2 * width * kv + 3 * width * inner)
    attention = 2 * 2 * positions * positions * config.num_attention_heads * config.head_dim
    head = 2 * width * config.vocab_size
    expected = config.num_hidden_layers * (matrices + attention) + head
    assert text.flops["prefill"] == pytest.approx(expected, rel=0.01)


def test_two_hops_are_a_setting_of_their_own(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    data, out = tmp_path / "dev.jsonl.gz", tmp_path / "out"
    write_rows(data, make_rows())
    for hops in ("1", "2"):
        arguments = ("--modes", "text", "compressed", "--rates", "4", "--passages", "3", "--hops", hops)
        assert run_evaluate(checkpoint, data, out, *arguments) == 0
    result = read_json(out / "result.json")
    names = [entry["name"] for entry in result["settings"]]
    assert names == [f"{label}, 3 passages" for label in ("text", "compressed x4", "compressed x4, 2 hops")]
    costs = [entry["flops"].get("compress", 0) for entry in result["settings"]]
    assert 0 == costs[0] < costs[1] < costs[2]
    assert "compressor x4, 2 hops" in {entry["ranker"] for entry in result["ranking"]}
    assert {entry["ranker"] for entry in result["no_answer"]} == {"bm25", "compressor x4"}
    question = to_questions(make_rows())[0].with_passages(3)
    recorded = next(
        record
        for record in read_results(out / "results.jsonl").records
        if isinstance(record, AnswerRecord) and record.setting.hops == 2 and record.question == question.id
    )
    alone = answer(model, question.query, question.passages, Policy("compressed", hops=2), 4, OPTIONS)
    assert recorded.answer == alone.text


def test_rankers_score_every_passage(questions: list[Question], tiny_bert: Path) -> None:
    records = rank_bm25(questions, [2, 5]) + EmbeddingRanker(str(tiny_bert)).rank(questions[0], [2, 5])
    assert {(record.ranker, record.passages) for record in records} == {
        ("bm25", 2), ("bm25", 5), (str(tiny_bert), 2), (str(tiny_bert), 5),
    }  # fmt: skip
    for record in records:
        assert len(record.scores) == len(record.gold) == record.passages
    cosines = records[-1].scores
    assert all(-1.001 <= score <= 1.001 for score in cosines)
    first = next(record for record in records if record.passages == 5)
    assert first.scores[first.gold.index(True)] == max(first.scores)  # only the gold passage has the question's words


def test_evaluate_writes_results_and_report(checkpoint: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "dev.jsonl.gz", tmp_path / "out"
    write_rows(data, make_rows())
    assert run_evaluate(checkpoint, data, out, "--passages", "3", "1", "--ranking-passages", "5") == 0
    result = read_json(out / "result.json")
    names = [entry["name"] for entry in result["settings"]]
    assert names == [
        f"{label}, {count}"
        for count in ("1 passage", "3 passages")
        for label in ("text", "hybrid x4", "hybrid x8", "compressed x4", "compressed x8")
    ]
    for entry in result["settings"]:
        assert entry["questions"] == 4
        assert 0 <= entry["f1"]["low"] <= entry["f1"]["value"] <= entry["f1"]["high"] <= 1
        assert entry["flops_questions"] == 1
    by_name = {entry["name"]: entry for entry in result["settings"]}
    text, compressed = by_name["text, 3 passages"], by_name["compressed x8, 3 passages"]
    assert text["prompt_tokens_share"]["value"] == 1
    assert compressed["prompt_tokens_share"]["value"] == pytest.approx(
        compressed["prompt_tokens"] / text["prompt_tokens"]
    )
    assert {(entry["ranker"], entry["passages"]) for entry in result["ranking"]} == {
        ("bm25", 3), ("bm25", 5), ("compressor x4", 3), ("compressor x8", 3), ("compressor x4", 5),
    }  # fmt: skip
    for entry in result["no_answer"]:
        assert 0 <= entry["auc"]["value"] <= 1
        assert 0 <= entry["calibration"]["threshold"] <= 1
    assert (out / "report.html").exists()
    assert (out / "report.md").exists()


def test_text_mode_alone_compresses_nothing(
    model: Model, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be compressed")

    monkeypatch.setattr("training.answering.compress", refuse)
    results = ResultsFile.open(tmp_path / "results.jsonl", {})
    evaluate(model, questions, results, Plan(modes=("text",), rates=(4,), passages=(3,), options=OPTIONS))
    assert sum(isinstance(record, AnswerRecord) for record in results.records) == 4
    with pytest.raises(AssertionError):
        evaluate(model, questions, results, Plan(modes=("text",), rates=(4,), passages=(3,), ranking_passages=5))


def test_a_killed_run_goes_on_and_ends_the_same(
    model: Model, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(rates=(4,), passages=(3,), batch_size=1, cost_questions=1, options=OPTIONS)
    whole = ResultsFile.open(tmp_path / "whole.jsonl", {"run": 1})
    evaluate(model, questions, whole, plan)
    calls = 0

    def killed_at_the_sixth_batch(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return answer_batch(*arguments)

    monkeypatch.setattr("training.evaluation.answer_batch", killed_at_the_sixth_batch)
    path = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, questions, ResultsFile.open(path, {"run": 1}), plan)
    with path.open("a") as file:
        file.write('{"kind": "answer", "question": "q')  # a line that the kill cut short
    resumed = ResultsFile.open(path, {"run": 1})
    answered = sum(isinstance(record, AnswerRecord) for record in resumed.records)
    assert answered == 6  # four batches of text, one of hybrid and compressed
    evaluate(model, questions, resumed, plan)
    assert calls == 6 + 3
    again = read_results(path)
    assert sorted(map(describe, again.records)) == sorted(map(describe, whole.records))
    before = calls
    evaluate(model, questions, again, plan)
    assert calls == before


def describe(record: object) -> str:
    """A record without what differs from run to run: time and memory."""
    match record:
        case AnswerRecord():
            return f"{record.question} {record.setting} {record.answer} {record.f1}"
        case RankingRecord():
            return f"{record.question} {record.ranker} {record.passages} {[round(score, 4) for score in record.scores]}"
        case CostRecord():
            return f"{record.question} {record.setting} {record.flops}"
    return str(record)


def test_results_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    ResultsFile.open(path, {"data": "a", "questions": 4})
    assert not path.exists()  # before the first record there is nothing to go on from
    record = RankingRecord("q", "bm25", 1, [True], [1.0])
    ResultsFile.open(path, {"data": "a", "questions": 4}).append([record])
    assert ResultsFile.open(path, {"data": "a", "questions": 4}).records == [record]
    with pytest.raises(ConfigError, match="questions differ"):
        ResultsFile.open(path, {"data": "a", "questions": 5})
    path.write_text('{"kind": "run"}\n{"kind": "answer"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_results(path)
    with pytest.raises(ConfigError, match="no results"):
        read_results(tmp_path / "absent.jsonl")


def test_a_question_too_long_for_one_mode_is_left_out_in_every_mode(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = tuple(RowPassage("cats and dogs sleep. " * 400, "", None, float(i == 0)) for i in range(2))
    data, out = tmp_path / "dev.jsonl", tmp_path / "out"
    write_rows(data, [*make_rows(2), Row("big", "Where?", long, ("here",))])
    fast = ["--rates", "8", "--cost-questions", "0"]
    assert run_evaluate(checkpoint, data, out, *fast) == 0
    assert "1 of 3 questions are left out" in caplog.text
    result = read_json(out / "result.json")
    assert (result["run"]["questions"], result["run"]["left_out"]) == (3, ["big"])
    assert {entry["questions"] for entry in (*result["settings"], *result["ranking"])} == {2}
    assert "| left out " in (out / "report.md").read_text()

    assert run_evaluate(checkpoint, data, tmp_path / "compressed", "--modes", "compressed", *fast) == 0
    (entry,) = read_json(tmp_path / "compressed" / "result.json")["settings"]
    assert entry["questions"] == 3  # its embeddings do fit
    assert run_evaluate(checkpoint, data, tmp_path / "compressed", *fast) == 0  # text beside what is there already
    assert {entry["questions"] for entry in read_json(tmp_path / "compressed" / "result.json")["settings"]} == {2}

    write_rows(data, [Row("big", "Where?", long, ("here",))])
    assert run_evaluate(checkpoint, data, tmp_path / "nothing", *fast) == 1


def test_a_question_that_the_compressor_does_not_read_whole_is_left_out(checkpoint: Path, tmp_path: Path) -> None:
    rows = make_rows(3)
    rows[1] = replace(rows[1], query="Where did the cats and dogs sleep? " * 40)
    write_rows(tmp_path / "dev.jsonl", rows)
    for modes in (["text"], ["compressed"]):
        out = tmp_path / modes[0]
        assert run_evaluate(checkpoint, tmp_path / "dev.jsonl", out, "--rates", "8", "--modes", *modes) == 0
        result = read_json(out / "result.json")
        assert result["run"]["left_out"] == [rows[1].id]
        assert {entry["questions"] for entry in result["settings"]} == {2}
