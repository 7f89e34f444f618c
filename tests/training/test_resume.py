"""What a run goes on from, and with which settings; whatever stops it, what is on disk is whole."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError
from tests.tiny_training import losses, make_config, make_rows, read_metrics, settings, stop_in, write_run
from training.__main__ import main
from training.config import load_config
from training.data_format import write_rows
from training.metrics_log import MetricsLog
from training.run_state import Progress, alone_in, recover_folder, save_weights, write_folder
from training.runtime import AccelerateRuntime
from training.trainee import build_trainee


def train(config: Path, out: Path, *overrides: str) -> int:
    return main(["train", str(config), "--out", str(out), *overrides])


@pytest.fixture(scope="module")
def short_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of three steps, and its settings."""
    folder = tmp_path_factory.mktemp("short")
    config = write_run(folder, settings(tiny_llama))
    assert train(config, folder / "out") == 0
    return config, folder / "out"


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.train_embeddings": "false"},
        {"model.compressor.rates": "[8,2]"},
        {"data.modes.text": "0.5", "loop.seed": "9", "optimizer.compressor_lr": "0.5"},
        {"data.train": "other.jsonl"},
        {"data.dev": "other.jsonl"},
    ],
)
def test_other_settings_do_not_resume(
    short_run: tuple[Path, Path],
    changes: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = short_run
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "other.jsonl", make_rows(8)[::-1])
    before = (out / "config.yaml").read_bytes()
    values = [f"{key}={value}" for key, value in changes.items()]
    assert train(config, out, "loop.epochs=20", "data.modes.compressed=1.0", *values) == 1
    assert f"was trained with other settings ({', '.join(sorted(changes))})" in capsys.readouterr().err
    assert (out / "config.yaml").read_bytes() == before
    assert list(losses(out)) == [1, 2, 3]


def test_a_run_can_be_made_longer_and_its_data_moved(tiny_llama: Path, tmp_path: Path) -> None:
    config, out = write_run(tmp_path, settings(tiny_llama)), tmp_path / "out"
    assert train(config, out) == 0
    moved = (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    changes = ["loop.epochs=2", "loop.log_every=2", "loop.save_every=4", "loop.eval_every=3", "loop.patience=9"]
    assert train(config, out, f"data.train={moved}", *changes) == 0
    assert list(losses(out)) == [1, 2, 3, 4, 6]
    assert load_config(out / "config.yaml").loop.epochs == 2


def test_two_processes_do_not_train_in_one_folder(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_run(tmp_path, settings(tiny_llama, loop={"max_steps": 1})), tmp_path / "out"
    assert train(config, out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "config.yaml"}
    with alone_in(out):  # as a run that goes on does
        assert train(config, out, "loop.max_steps=2") == 1
        assert f"--out {out}: another process trains there" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before
    assert train(config, out, "loop.max_steps=2") == 0
    assert list(losses(out)) == [1, 2]


@pytest.fixture
def started_run(short_run: tuple[Path, Path], tiny_llama: Path, tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """The settings of a run of one step that began from copies of another's weights; its folder; what it began with."""
    start, adapter = tmp_path / "start", tmp_path / "adapter"
    for folder in (start, adapter):
        shutil.copytree(short_run[1] / "best", folder)
    config, out = write_run(tmp_path, settings(tiny_llama)), tmp_path / "out"
    begun = [f"start={start}", f"start_adapter={adapter}"]
    assert train(config, out, *begun, "loop.max_steps=1") == 0
    return config, out, begun


def add_to_weights(file: Path) -> None:
    save_file({name: value + 0.5 for name, value in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("file", "key"),
    [("start/compressor.safetensors", "start"), ("adapter/adapter.safetensors", "start_adapter")],
)
def test_a_run_does_not_go_on_with_other_frozen_weights_under_the_same_name(
    started_run: tuple[Path, Path, list[str]], file: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out, begun = started_run
    add_to_weights(config.parent / file)
    assert train(config, out, *begun, "loop.max_steps=2") == 1
    assert f"was trained with other settings ({key});" in capsys.readouterr().err
    assert train(config, out, *begun, "loop.max_steps=2", "loop.precision=bf16") == 1
    assert f"was trained with other settings (loop.precision, {key});" in capsys.readouterr().err


def test_a_run_goes_on_where_the_weights_it_began_from_have_moved(
    started_run: tuple[Path, Path, list[str]], tiny_llama: Path, tmp_path: Path
) -> None:
    config, out, _ = started_run
    add_to_weights(tmp_path / "start/adapter.safetensors")  # which is not read: the adapter comes from elsewhere
    start, adapter = (tmp_path / name for name in ("start", "adapter"))
    moved = [f"start={start.rename(tmp_path / 'a')}", f"start_adapter={adapter.rename(tmp_path / 'b')}"]
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    moved += [f"model.generator.base_model={base}", "loop.max_steps=2"]
    assert train(config, out, *moved) == 0
    assert list(losses(out)) == [1, 2]


def test_a_run_that_noted_names_only_goes_on_and_notes_the_rest(
    started_run: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out, begun = started_run
    progress = json.loads((out / "last/progress.json").read_text())
    del progress["settings"]["resolved"], progress["window"]
    (out / "last/progress.json").write_text(json.dumps(progress))
    assert train(config, out, *begun[:1], "loop.max_steps=2") == 1
    assert "was trained with other settings (start_adapter);" in capsys.readouterr().err
    assert train(config, out, *begun, "loop.max_steps=2") == 0
    add_to_weights(config.parent / "start/compressor.safetensors")
    assert train(config, out, *begun, "loop.max_steps=3") == 1
    assert "was trained with other settings (start);" in capsys.readouterr().err


def test_the_log_is_as_if_nothing_had_stopped_the_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path, settings(tiny_llama, loop={"epochs": 3, "log_every": 4}))
    assert train(config, tmp_path / "whole") == 0
    for step in (1, 5):  # between two lines
        with monkeypatch.context() as patch:
            stop_in(patch, step)
            assert train(config, tmp_path / "parts") == 130
    assert train(config, tmp_path / "parts") == 0
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for line in (*whole, *parts):
        del line["tokens_per_s"]
    assert [line["step"] for line in whole] == [4, 8, 9]
    assert parts == whole


def test_a_run_of_a_version_without_settings_is_not_resumed(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_run(tmp_path, settings(tiny_llama, loop={"max_steps": 1})), tmp_path / "out"
    assert train(config, out) == 0
    progress = json.loads((out / "last/progress.json").read_text())
    del progress["settings"]
    (out / "last/progress.json").write_text(json.dumps(progress))
    assert train(config, out, "loop.max_steps=2") == 1
    assert "is of an older version" in capsys.readouterr().err


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow over `size` bytes: what a full disk looks like to the writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_what_was_saved_before(tiny_llama: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama)
    model, _, _ = build_trainee(config, AccelerateRuntime())
    last = tmp_path / "last"
    save_weights(model, config, Progress(step=1), last)
    before = folder_bytes(last)
    with file_limit(50_000), pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(model, config, Progress(step=2), last)
    assert folder_bytes(last) == before
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    save_weights(model, config, replace(Progress(), step=2), last)
    assert json.loads((last / "summary.json").read_text())["steps"] == 2


def test_a_kill_between_the_renames_is_undone(tmp_path: Path) -> None:
    write_folder(tmp_path / "last", {"a.safetensors": {"x": torch.ones(1)}}, {"b.json": "1"})
    (tmp_path / "last").rename(tmp_path / ".last.old")
    recover_folder(tmp_path / "last")
    assert (tmp_path / "last" / "b.json").read_text() == "1"
    (tmp_path / ".last.partial").mkdir()  # a kill while the next was written
    write_folder(tmp_path / "last", {"a.safetensors": {"x": torch.ones(1)}}, {"b.json": "2"})
    assert (tmp_path / "last" / "b.json").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_metrics_after_the_last_save_are_taken_back(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "split": "train", "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "spl'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with MetricsLog(tmp_path, enabled=True, step=2) as log:
        log.write(3, "train", {"loss": 0.5})
    assert losses(tmp_path) == {1: 1.0, 2: 1.0, 3: 0.5}
