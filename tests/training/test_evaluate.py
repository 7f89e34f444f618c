"""The evaluation of a tiny random checkpoint from the command line: records, resuming, costs, calibration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.answer import answer
from core.checkpoint import load_checkpoint, save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig, LoraConfig
from core.errors import ConfigError, InputError
from core.generator import adapter_shapes
from core.model import Model, build_model
from core.passages import Passage
from core.pipeline import prepare as prepare_request
from core.pipeline import text_prompt_tokens
from core.sampling import GenerationOptions
from training.__main__ import main
from training.answering import answer_batch
from training.costs import measure_cost
from training.data_format import Row, RowPassage, write_rows
from training.data_quality import DataError
from training.evaluation import Plan, evaluate, judge_answers
from training.intervals import Bootstrap
from training.questions import Question, to_questions
from training.rankers import EmbeddingRanker, rank_bm25
from training.results import AnswerRecord, CostRecord, RankingRecord, ResultsFile, Setting, read_results
from training.summary import summarise

TOPICS = ["river Rhine", "Marie Curie", "bread", "moon", "computer", "whale", "coffee", "glass"]
OPTIONS = GenerationOptions(max_new_tokens=4)
BOOTSTRAP = Bootstrap(resamples=20)
TEXT, COMPRESSED = Setting("text", None, 3), Setting("compressed", 4, 3)


def make_rows(count: int = 4) -> list[Row]:
    """Questions with one gold passage, in a place that changes, and four others."""
    rows = []
    for number in range(count):
        passages = [
            RowPassage(f"This is about {topic}: it was seen {1900 + index} times. " * (1 + index % 3), topic, None, 0.0)
            for index, topic in enumerate(TOPICS[:4])
        ]
        gold = RowPassage(f"The {TOPICS[4 + number % 4]} was found in {1960 + number}.", "", None, 1.0)
        passages.insert(number % 5, gold)
        rows.append(
            Row(f"q{number}", f"When was the {TOPICS[4 + number % 4]} found?", tuple(passages), (f"{1960 + number}",))
        )
    return rows


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained n_layers compressor on a tiny Llama with a LoRA of random weights."""
    lora = LoraConfig(r=2, alpha=4, target_modules=("q_proj",))
    config = Config(
        compressor=CompressorConfig(n_layers=2, chunk_tokens=32, query_tokens=16, rates=(4, 8)),
        generator=GeneratorConfig(base_model=str(tiny_llama), lora=lora),
    )
    model = build_model(config)
    source = torch.Generator().manual_seed(0)
    adapter = {
        name: 0.1 * torch.randn(shape, generator=source)
        for name, shape in adapter_shapes(model.generator.model, lora).items()
    }
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_checkpoint(model, folder, adapter=adapter)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_checkpoint(checkpoint, verify=False)


@pytest.fixture
def questions() -> list[Question]:
    return to_questions(make_rows())


def run_command(checkpoint: Path, data: Path, out: Path, *more: str) -> int:
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--max-new-tokens", "4"]
    return main(["evaluate", *arguments, "--resamples", "20", "--batch-size", "2", "--cost-questions", "1", *more])


def read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


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
    assert run_command(checkpoint, data, out, "--passages", "3", "1", "--ranking-passages", "5") == 0
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
    def refuse(*_: Any) -> Any:
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


def test_judgements_are_kept_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("q", "When?", ("1960",), (Passage("In 1960."),), (True,))
    results = ResultsFile.open(tmp_path / "results.jsonl", {})
    results.append([made_answer("q", TEXT, "1960", 1.0), made_answer("q", COMPRESSED, "1961", 0.0)])
    asked: list[str] = []

    def judge_double(_endpoint: object, cases: list[Any]) -> Any:
        """Stands in for a judge model: right is what a reference says."""
        asked.extend(case.answer for case in cases)
        yield [float(case.answer in case.references) for case in cases]

    monkeypatch.setattr("training.evaluation.judge", judge_double)
    for _ in range(2):
        judge_answers(None, [question], results)  # type: ignore[arg-type]  # the double asks no endpoint
    assert asked == ["1960", "1961"]
    settings = summarise({}, read_results(results.path).records, BOOTSTRAP)["settings"]
    assert [entry["judge"]["value"] for entry in settings] == [1.0, 0.0]


def test_retention_is_against_the_baseline_where_one_is_given() -> None:
    own = [made_answer(f"q{i}", setting, "x", f1) for i in range(4) for setting, f1 in ((TEXT, 0.5), (COMPRESSED, 0.4))]
    other = [made_answer(f"q{i}", TEXT, "x", 0.8) for i in range(4)]
    alone = {entry["mode"]: entry for entry in summarise({}, own, BOOTSTRAP)["settings"]}
    against = {entry["mode"]: entry for entry in summarise({}, own, BOOTSTRAP, other)["settings"]}
    assert alone["compressed"]["retention"]["f1"]["value"] == pytest.approx(0.8)
    assert alone["text"]["retention"]["f1"]["value"] == 1
    assert against["compressed"]["retention"]["f1"]["value"] == pytest.approx(0.5)
    assert against["text"]["retention"]["f1"]["value"] == pytest.approx(0.625)


def test_text_baseline_must_be_of_the_same_questions(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other, text = tmp_path / "dev.jsonl", tmp_path / "other.jsonl", tmp_path / "text"
    write_rows(data, make_rows(2))
    write_rows(other, make_rows(3))
    fast = ["--cost-questions", "0", "--passages", "2"]
    assert run_command(checkpoint, data, text, "--modes", "text", *fast) == 0
    more = ["--modes", "compressed", "--rates", "8", "--text-baseline", str(text / "results.jsonl"), *fast]
    assert run_command(checkpoint, data, tmp_path / "kept", *more) == 0
    (entry,) = read_json(tmp_path / "kept" / "result.json")["settings"]
    assert 0 < entry["prompt_tokens_share"]["value"] < 1
    assert entry["flops"] == {}
    assert run_command(checkpoint, other, tmp_path / "refused", *more) == 1
    assert "measured on other data" in capsys.readouterr().err
    assert run_command(checkpoint, data, tmp_path / "refused", "--judge-url", "http://judge.test/v1") == 1
    assert "go together" in capsys.readouterr().err


def test_survival_where_text_is_right_leaves_out_the_other_questions() -> None:
    def pair(number: int, text_right: float, survived: float | None) -> list[AnswerRecord]:
        return [
            made_answer(f"q{number}", TEXT, "x", 1.0, substring=text_right, survival=text_right),
            made_answer(f"q{number}", COMPRESSED, "x", 1.0, survival=survived),
        ]

    records = [*pair(0, 1.0, 1.0), *pair(1, 1.0, 0.0), *pair(2, 0.0, 0.0), *pair(3, 1.0, 1.0), *pair(4, 1.0, None)]
    entries = {entry["mode"]: entry for entry in summarise({}, records, BOOTSTRAP)["settings"]}
    assert entries["compressed"]["survival_where_text_right"]["value"] == pytest.approx(2 / 3)
    assert entries["compressed"]["survival_where_text_right"]["n"] == 3
    assert entries["compressed"]["survival"]["value"] == pytest.approx(2 / 4)


def test_calibrate_writes_a_checkpoint_that_answers_alike(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    data, out, calibrated = tmp_path / "dev.jsonl", tmp_path / "out", tmp_path / "calibrated"
    write_rows(data, make_rows(6))
    assert run_command(checkpoint, data, out, "--modes", "compressed", "--rates", "4", "--passages", "4") == 0
    arguments = ["--checkpoint", str(checkpoint), "--results", str(out / "results.jsonl"), "--out", str(calibrated)]
    assert main(["calibrate", *arguments, "--passages", "3"]) == 1  # nothing was ranked with 3 passages
    assert main(["calibrate", *arguments, "--passages", "4"]) == 0
    after = load_checkpoint(calibrated)
    assert after.config.relevance.threshold is not None
    assert after.config.relevance != model.config.relevance
    row = make_rows()[0]
    question = to_questions([row])[0]
    old, new = (answer(each, question.query, question.passages, options=OPTIONS) for each in (model, after))
    assert new.text == old.text
    calibration = read_json(out / "result.json")["no_answer"][-1]["calibration"]
    assert after.config.relevance.scale == pytest.approx(calibration["scale"])
    assert main(["calibrate", *arguments[:-1], str(tmp_path / "again"), "--checkpoint", str(calibrated)]) == 1


def made_answer(
    question: str, setting: Setting, text: str, f1: float, *, substring: float = 0.0, survival: float | None = None
) -> AnswerRecord:
    """A record with the figures that a test is about."""
    return AnswerRecord(question, setting, text, f1, f1, substring, f1, survival, 10, 2, {"decode": 0.1})
