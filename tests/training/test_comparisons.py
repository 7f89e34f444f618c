"""What an evaluation's answers are compared with: this run's text mode, or another run's."""

from pathlib import Path

import pytest

from tests.tiny_evaluation import made_answer, make_checkpoint, make_rows, read_json, run_evaluate
from training.data_format import write_rows
from training.intervals import Bootstrap
from training.results import AnswerRecord, Setting
from training.summary import summarise

BOOTSTRAP = Bootstrap(resamples=20)
TEXT, COMPRESSED = Setting("text", None, 3), Setting("compressed", 4, 3)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", tiny_llama)


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
    assert run_evaluate(checkpoint, data, text, "--modes", "text", *fast) == 0
    more = ["--modes", "compressed", "--rates", "8", "--text-baseline", str(text / "results.jsonl"), *fast]
    assert run_evaluate(checkpoint, data, tmp_path / "kept", *more) == 0
    (entry,) = read_json(tmp_path / "kept" / "result.json")["settings"]
    assert 0 < entry["prompt_tokens_share"]["value"] < 1
    assert entry["flops"] == {}
    assert run_evaluate(checkpoint, other, tmp_path / "refused", *more) == 1
    assert "data_sha256 differ; evaluate both alike" in capsys.readouterr().err
    longer = ["--max-new-tokens", "5", "--dtype", "bfloat16"]
    assert run_evaluate(checkpoint, data, tmp_path / "refused", *more, *longer) == 1
    assert "max_new_tokens, dtype differ" in capsys.readouterr().err
    assert run_evaluate(checkpoint, data, tmp_path / "refused", "--judge-url", "http://judge.test/v1") == 1
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
