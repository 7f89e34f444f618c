"""Scores on dev questions while training: their names, what they cost, and bad questions that do not end a run."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.tiny_training import make_config, make_objective, make_rows, settings, write_run
from training.__main__ import main
from training.data_format import Row, RowPassage, write_rows
from training.dev import evaluate_dev


def test_each_question_is_compressed_once_for_its_losses_and_once_for_all_that_is_served(
    tiny_llama: Path, tiny_bert: Path
) -> None:
    modes = {"compressed": 0.5, "hybrid": 0.3, "text": 0.2}
    config = make_config(tiny_llama, tiny_bert, data={"modes": modes, "passages": 0}, compressor={"chunk_tokens": 64})
    objective, _ = make_objective(config)
    rows = make_rows(5)
    passed: list[int] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        passed.append(inputs[0].ids.shape[0])

    handle = objective.compressor.register_forward_hook(count)
    scores = evaluate_dev(objective, rows, config)
    handle.remove()
    assert sum(passed) == 2 * sum(len(row.passages) for row in rows)  # a chunk a passage
    named = {f"{metric}_{mode}" for metric in ("f1", "em") for mode in modes}
    assert scores.keys() == named | {"gold_first", "loss_answer", "loss_relevance"}
    assert all(0 <= scores[name] <= 1 for name in named | {"gold_first"})


def test_text_alone_is_not_compressed_to_be_served(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, data={"modes": {"text": 1.0}}, loss={"relevance": 0.0})
    objective, _ = make_objective(config)
    passed: list[object] = []
    handle = objective.compressor.register_forward_hook(lambda *given: passed.append(given))
    scores = evaluate_dev(objective, make_rows(2), config)
    handle.remove()
    assert not passed
    assert scores.keys() == {"loss_answer", "f1_text", "em_text"}


def test_answers_may_have_the_tokens_that_targets_have(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tiny_llama, data={"answer_tokens": 3})
    objective, _ = make_objective(config)
    answers: list[str] = []

    def noted(answer: str, reference: str) -> float:
        answers.append(answer)
        return 0.0

    monkeypatch.setattr("training.dev.token_f1", noted)
    evaluate_dev(objective, make_rows(2), config)
    tokenizer = objective.model.generator.tokenizer
    assert [len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers] == [3, 3]


def test_a_question_that_cannot_be_read_is_left_out(tiny_llama: Path) -> None:
    config = make_config(tiny_llama)
    objective, _ = make_objective(config)
    bad = Row("bad", "Where?", (RowPassage(" \n "),), ("here",))
    assert evaluate_dev(objective, [*make_rows(2), bad], config) == evaluate_dev(objective, make_rows(2), config)


def test_a_question_too_long_for_the_generator_ends_no_run(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = {"compressed": 0.5, "text": 0.5}
    config = write_run(tmp_path, settings(tiny_llama, data={"modes": modes, "passages": 0}, loop={"max_steps": 1}))
    long = RowPassage("Cats and dogs sleep. " * 800, relevance=1.0)
    huge = Row("huge", "Where?", (long, long), ("here",))
    write_rows(tmp_path / "dev.jsonl", [*make_rows(2), huge])
    assert main(["train", str(config), "--out", str(tmp_path / "out")]) == 0
    assert "data.dev: 2 of 3 questions can be read" in capsys.readouterr().out
    write_rows(tmp_path / "huge.jsonl", [huge])
    overrides = [f"data.dev={tmp_path / 'huge.jsonl'}"]
    assert main(["train", str(config), "--out", str(tmp_path / "none"), *overrides]) == 1
    assert "data.dev: 0 of 1 questions can be read" in capsys.readouterr().err
