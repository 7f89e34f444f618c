"""`training calibrate`: what is fitted on an evaluation's scores, and the checkpoint that comes of it."""

from pathlib import Path

import pytest
import torch

from core.accelerators import JitAccelerator
from core.accelerators.artifact import accelerate
from core.answer import answer
from core.checkpoint import load_checkpoint, read_adapter, save_checkpoint
from core.sampling import GenerationOptions
from tests.tiny_evaluation import make_checkpoint, make_rows, read_json, run_evaluate
from training.__main__ import main
from training.data_format import write_rows
from training.questions import to_questions

OPTIONS = GenerationOptions(max_new_tokens=4)


@pytest.fixture(scope="module")
def reverse(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose untrained relevance happens to be lower for the gold passages of `make_rows`."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "reverse", tiny_llama)


@pytest.fixture(scope="module")
def checkpoint(reverse: Path) -> Path:
    """The same with relevance the other way round."""
    model = load_checkpoint(reverse)
    with torch.no_grad():
        for parameter in model.compressor.relevance.parameters():
            parameter.neg_()
    adapter = read_adapter(reverse, model.generator, model.config, torch.float32)
    save_checkpoint(model, reverse.with_name("tiny"), adapter=adapter)
    return reverse.with_name("tiny")


def ranked(checkpoint: Path, folder: Path, *more: str) -> Path:
    """The folder of an evaluation of six questions in compressed mode."""
    write_rows(folder / "dev.jsonl", make_rows(6))
    fast = ["--modes", "compressed", "--cost-questions", "0", *more]
    assert run_evaluate(checkpoint, folder / "dev.jsonl", folder / "out", *fast) == 0
    return folder / "out"


def calibrate(checkpoint: Path, evaluation: Path, out: Path, *more: str) -> int:
    arguments = ["--checkpoint", str(checkpoint), "--results", str(evaluation / "results.jsonl"), "--out", str(out)]
    return main(["calibrate", *arguments, *more])


def test_the_calibrated_checkpoint_answers_alike(checkpoint: Path, tmp_path: Path) -> None:
    out, calibrated = ranked(checkpoint, tmp_path, "--rates", "4", "--passages", "3"), tmp_path / "calibrated"
    assert calibrate(checkpoint, out, calibrated) == 0
    before, after = load_checkpoint(checkpoint), load_checkpoint(calibrated)
    assert after.config.relevance.threshold is not None
    assert after.config.relevance != before.config.relevance
    question = to_questions(make_rows())[0]
    old, new = (answer(each, question.query, question.passages, options=OPTIONS) for each in (before, after))
    assert new.text == old.text
    fitted = read_json(out / "result.json")["no_answer"][-1]["calibration"]
    assert after.config.relevance.scale == pytest.approx(fitted["scale"])
    assert after.config.relevance.threshold == pytest.approx(fitted["threshold"])
    assert calibrate(calibrated, out, tmp_path / "again") == 1  # the results are of the other one


def test_what_was_ranked_is_listed_where_it_is_not_clear_which(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ranked(checkpoint, tmp_path, "--passages", "2", "3")
    for unclear in ([], ["--passages", "5"], ["--rate", "16"]):
        assert calibrate(checkpoint, out, tmp_path / "calibrated", *unclear) == 1
        listed = "--rate 4 --passages 2; --rate 4 --passages 3; --rate 8 --passages 2; --rate 8 --passages 3"
        assert listed in capsys.readouterr().err
    assert calibrate(checkpoint, out, tmp_path / "calibrated", "--passages", "3") == 0  # the checkpoint's first rate
    assert calibrate(checkpoint, out, tmp_path / "other", "--passages", "3", "--rate", "8") == 0


def test_scores_that_rank_in_reverse_are_no_probability(
    reverse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ranked(reverse, tmp_path, "--rates", "4", "--passages", "4")
    assert calibrate(reverse, out, tmp_path / "calibrated") == 1
    assert "gold passages score no higher than others" in capsys.readouterr().err
    assert not (tmp_path / "calibrated").exists()


def test_graphs_come_along(checkpoint: Path, tmp_path: Path) -> None:
    traced, calibrated = tmp_path / "traced", tmp_path / "calibrated"
    assert main(["export", str(checkpoint), str(traced), "--target", "jit", "--buckets", "1x128"]) == 0
    out = ranked(traced, tmp_path, "--rates", "4")
    assert calibrate(traced, out, calibrated) == 0
    accelerate(load_checkpoint(calibrated), calibrated, JitAccelerator())  # it repeats the graphs' golden vectors
