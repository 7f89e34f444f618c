"""`label --logits`, then `train` with loss.kl: the teacher's distribution is learned, another's is refused."""

from pathlib import Path

import pytest

from tests.tiny_training import make_rows, read_metrics, settings, write_run
from training.__main__ import main
from training.data_format import write_rows


@pytest.fixture(scope="module")
def labelled(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows that a tiny teacher answered, and its logits."""
    folder = tmp_path_factory.mktemp("labelled")
    write_rows(folder / "rows.jsonl", make_rows(8))
    arguments = ["--teacher", str(tiny_teacher), "--logits", str(folder / "logits"), "--top-k", "8"]
    more = ["--max-new-tokens", "12", "--device", "cpu", "--out", str(folder / "labelled.jsonl")]
    assert main(["label", "--data", str(folder / "rows.jsonl"), *arguments, *more]) == 0
    return folder


def test_the_students_divergence_from_the_teacher_shrinks(labelled: Path, tiny_llama: Path, tmp_path: Path) -> None:
    data = {"logits": str(labelled / "logits"), "train": str(labelled / "labelled.jsonl")}
    loss = {"answer": 0.5, "kl": 1.0, "relevance": 0.0}
    loop = {"epochs": 12, "micro_batch_tokens": 2000, "eval_every": 24}
    optimizer = {"compressor_lr": 3e-3, "generator_lr": 3e-3}
    config = write_run(tmp_path, settings(tiny_llama, data=data, loss=loss, loop=loop, optimizer=optimizer))
    assert main(["train", str(config), "--out", str(tmp_path / "out")]) == 0
    lines = read_metrics(tmp_path / "out")
    assert lines[0]["loss"] == pytest.approx(0.5 * lines[0]["loss_answer"] + lines[0]["loss_kl"], rel=1e-4)
    assert sum(line["loss_kl"] for line in lines[-4:]) < 0.9 * sum(line["loss_kl"] for line in lines[:4])


def test_logits_of_another_tokenizer_or_other_rows_are_refused(
    labelled: Path, tiny_llama: Path, tiny_bert: Path, tiny_qwen2: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = {"logits": str(labelled / "logits")}
    config = write_run(tmp_path, settings(tiny_llama, data=data, loss={"kl": 1.0}), make_rows(4))
    vocabulary = tmp_path / "other"
    vocabulary.mkdir()
    for path in tiny_llama.iterdir():
        text = path.read_bytes()
        # The same model with two tokens of its vocabulary renamed.
        (vocabulary / path.name).write_bytes(text.replace(b"<|endoftext|>", b"<|endOFtext|>"))
    assert main(["train", str(config), "--out", str(tmp_path / "a"), f"model.generator.base_model={vocabulary}"]) == 1
    assert "the teacher has another tokenizer" in capsys.readouterr().err
    strangers = (tmp_path / "train.jsonl").read_text().replace('"id": "r', '"id": "s')
    (tmp_path / "train.jsonl").write_text(strangers)
    assert main(["train", str(config), "--out", str(tmp_path / "b")]) == 1
    assert "none of the rows" in capsys.readouterr().err
