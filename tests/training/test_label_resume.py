"""Labelling that was killed anywhere goes on where it was: nothing is lost or doubled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from core.base_models import resolve_base_model
from core.generator import Generator, load_generator
from tests.tiny_labelling import ROWS, CountingTeacher, label
from training.__main__ import main
from training.data_format import write_rows
from training.data_quality import DataError
from training.journal import Journal
from training.teacher_logits import TeacherLogits, TokenTargets, shard_path, write_shard


@pytest.fixture(scope="module")
def generator(tiny_teacher: Path) -> Generator:
    return load_generator(resolve_base_model(str(tiny_teacher)))


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


def test_a_damaged_line_that_is_not_the_last_ends_the_work(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"teacher": "x"}) as journal:
        for one in ROWS[:3]:
            journal.add([one])
    whole = path.read_bytes()
    for number, damaged in enumerate(whole.splitlines(keepends=True), start=1):
        path.write_bytes(whole.replace(damaged, b"#" + damaged))
        before = path.read_bytes()
        if number == 4:
            with Journal(path, {"teacher": "x"}) as journal:
                assert list(journal.rows) == ["r0", "r1"]
        else:
            with pytest.raises(DataError, match=f"journal, line {number}: not JSON"):
                Journal(path, {"teacher": "x"})
            assert path.read_bytes() == before


def test_notes_stay_with_the_work_that_made_them(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal(path, {"teacher": "x"}) as journal:
        journal.note("weights", [0.1, 1 / 3])
    with Journal(path, {"teacher": "x"}) as journal:
        assert journal.notes == {"weights": [0.1, 1 / 3]}
        assert not journal.rows
    with Journal(path, {"teacher": "y"}) as journal:
        assert journal.notes == {}


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
