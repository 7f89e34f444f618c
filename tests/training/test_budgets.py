"""Evaluation under budgets: auto mode answers as the service would, no prompt is over its bound, and it is plotted."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.answer import answer
from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig
from core.errors import InputError
from core.model import Model, build_model
from core.policy import Policy, TokenCosts
from core.sampling import GenerationOptions
from training.__main__ import main
from training.answering import answer_batch
from training.data_format import Row, RowPassage, write_rows
from training.evaluation import Plan, evaluate
from training.questions import to_questions
from training.report import read_summary
from training.results import AnswerRecord, ResultsFile, Setting, read_results

OPTIONS = GenerationOptions(max_new_tokens=4)
WORDS = ("river", "bread", "moon", "whale", "coffee")
ROWS = [
    Row(
        f"q{number}",
        f"When was the {word} found?",
        tuple(
            RowPassage(f"The {each} was found in {1900 + number}. " * (1 + 2 * i), "", None, float(each == word))
            for i, each in enumerate(WORDS)
        ),
        (str(1900 + number),),
    )
    for number, word in enumerate(WORDS[:3])
]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Model:
    config = Config(
        compressor=CompressorConfig(n_layers=2, chunk_tokens=32, query_tokens=64, rates=(4, 8)),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    return build_model(config, seed=3)


@pytest.mark.parametrize("budget", [160, 200, 300, 1000])
def test_a_budget_answers_as_one_request_would(model: Model, budget: int) -> None:
    questions = to_questions(ROWS)
    answers, _ = answer_batch(model, questions, [Setting("auto", None, 5, budget)], OPTIONS)
    free = replace(model, costs=TokenCosts(compressor_s=0.0, prefill_s=1.0))
    for question, record in zip(questions, answers, strict=True):
        policy = Policy("auto", max_prompt_tokens=budget)
        expected = answer(free, question.query, question.passages, policy, options=OPTIONS)
        assert (record.answer, record.prompt_tokens) == (expected.text, expected.prompt_tokens)
        assert record.prompt_tokens <= budget


def test_a_budget_below_the_empty_prompt_is_refused_before_anything_runs(model: Model, tmp_path: Path) -> None:
    results = ResultsFile.open(tmp_path / "results.jsonl", {})
    with pytest.raises(InputError, match="without any passage"):
        evaluate(model, to_questions(ROWS), results, Plan(rates=(4,), budgets=(1000, 5), options=OPTIONS))
    assert results.records == []


def test_the_report_plots_accuracy_against_tokens(model: Model, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "tiny")
    write_rows(tmp_path / "dev.jsonl", ROWS)
    command = ["evaluate", "--checkpoint", str(tmp_path / "tiny"), "--data", str(tmp_path / "dev.jsonl")]
    command += ["--out", str(tmp_path / "out"), "--budgets", "200", "160", "--rates", "4", "8", "--max-new-tokens", "4"]
    assert main([*command, "--resamples", "20", "--cost-questions", "0"]) == 0
    settings = {entry["name"]: entry for entry in read_summary(tmp_path / "out" / "result.json")["settings"]}
    assert list(settings)[-2:] == ["auto within 160, 5 passages", "auto within 200, 5 passages"]
    assert settings["auto within 160, 5 passages"]["prompt_tokens"] <= 160
    plot = (tmp_path / "out" / "plots" / "accuracy-against-prompt-tokens.svg").read_text()
    assert plot.startswith("<?xml")
    assert "Accuracy against prompt tokens" in (tmp_path / "out" / "report.md").read_text()
    records = [r for r in read_results(tmp_path / "out" / "results.jsonl").records if isinstance(r, AnswerRecord)]
    assert {record.setting.budget for record in records} == {None, 160, 200}
