"""What a run begins from is what it says it is: weights of other settings are refused, though their shapes fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_training import settings, write_run
from training.__main__ import main

ALIGN = ["model.generator.lora=null", "optimizer.generator_lr=0", "loss.answer=0"]


def train(config: Path, out: Path, *overrides: str) -> int:
    return main(["train", str(config), "--out", str(out), "loop.max_steps=1", *overrides])


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The settings of a run and its best/."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_run(folder, settings(tiny_llama, tiny_bert))
    assert train(config, folder / "out") == 0
    return config, folder / "out/best"


@pytest.fixture(scope="module")
def exported(finished: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "v1"
    assert main(["export", str(finished[1]), str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("model.compressor.pointer_window=2", "4"),
        ("model.compressor.pointer_lead=0", "1"),
        ("model.compressor.order=document_first", "query_first"),
        ("model.compressor.readout=pooled", "pointer"),
        ("model.generator.lora.alpha=800", "4"),
        ("model.generator.lora.r=4", "2"),
        ("model.generator.lora.target_modules=[q_proj]", "down_proj, q_proj"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_weights_of_other_settings_are_refused(
    kind: str,
    override: str,
    kept: str,
    finished: tuple[Path, Path],
    exported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = finished[1] if kind == "run" else exported
    assert train(finished[0], tmp_path / "out", f"start={start}", override) == 1
    said = capsys.readouterr().err
    assert f"start {start}: " in said
    assert override.partition("=")[0] in said
    assert kept in said
    assert not (tmp_path / "out").exists()


def test_what_gives_weights_no_other_meaning_may_differ(
    finished: tuple[Path, Path], exported: Path, tmp_path: Path
) -> None:
    other = ["model.compressor.rates=[4]", "model.generator.lora.dropout=0", "model.compressor.allocation=proportional"]
    assert train(finished[0], tmp_path / "out", f"start={exported}", *other) == 0
    same = "model.generator.lora.target_modules=[down_proj, q_proj]"
    assert train(finished[0], tmp_path / "order", f"start={finished[1]}", same) == 0


@pytest.mark.parametrize("rates", ["[8]", "[8,2]"])
def test_other_rates_keep_the_slots_that_both_have(rates: str, finished: tuple[Path, Path], tmp_path: Path) -> None:
    config, best = finished
    begun = [f"start={best}", f"model.compressor.rates={rates}", "optimizer.compressor_lr=0", "optimizer.heads_lr=0"]
    assert train(config, tmp_path / "out", *begun, "loop.max_steps=1") == 0
    before, after = (load_file(folder / "compressor.safetensors")["slots"] for folder in (best, tmp_path / "out/last"))
    assert len(after) == {"[8]": 5, "[8,2]": 17}[rates]  # a chunk has 32 tokens; one more is [RR]
    shared = min(len(before), len(after)) - 1
    assert torch.equal(after[:shared], before[:shared])
    assert torch.equal(after[-1], before[-1])
    assert after[shared:-1].abs().sum(1).all()  # new ones begin as a fresh compressor's


def test_another_number_of_layers_is_refused_by_name(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, settings(tiny_llama))
    assert train(config, tmp_path / "two") == 0
    assert train(config, tmp_path / "three", f"start={tmp_path}/two/best", "model.compressor.n_layers=3") == 1
    assert "model.compressor.n_layers is 2, here 3" in capsys.readouterr().err


def other_weights(base: Path, to: Path) -> Path:
    """A model of the same shapes."""
    shutil.copytree(base, to)
    weights = load_file(to / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("part", ["generator", "compressor"])
def test_weights_of_another_base_model_are_refused(
    part: str,
    finished: tuple[Path, Path],
    exported: Path,
    tiny_llama: Path,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, best = finished
    base = tiny_llama if part == "generator" else tiny_bert
    moved, other = shutil.copytree(base, tmp_path / "moved"), other_weights(base, tmp_path / "other")
    key = f"model.{part}.base_model"
    old = shutil.copytree(best, tmp_path / "old")  # as versions wrote it that noted no sha256
    (old / "summary.json").write_text("{}")
    for name, start in (("run", best), ("checkpoint", exported)):
        assert train(config, tmp_path / name, f"start={start}", f"{key}={moved}") == 0
        assert train(config, tmp_path / f"{name} of another", f"start={start}", f"{key}={other}") == 1
        assert f"start {start}: is of another {key}, {base}" in capsys.readouterr().err
    assert train(config, tmp_path / "same name", f"start={old}") == 0
    assert train(config, tmp_path / "other name", f"start={old}", f"{key}={moved}") == 1
    assert "(sha256 not noted)" in capsys.readouterr().err


def test_an_adapter_may_come_from_beside_another_compressor_but_not_at_another_scale(
    finished: tuple[Path, Path], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = write_run(tmp_path, settings(tiny_llama))
    assert train(layers, tmp_path / "layers", *ALIGN) == 0
    both = [f"start={tmp_path}/layers/best", f"start_adapter={finished[1]}"]
    assert train(layers, tmp_path / "joint", *both) == 0
    assert train(layers, tmp_path / "scaled", *both, "model.generator.lora.alpha=8") == 1
    said = f"start_adapter {finished[1]}: was trained with other settings (model.generator.lora.alpha is 4, here 8)"
    assert said in capsys.readouterr().err
    assert train(layers, tmp_path / "kind", f"start={finished[1]}") == 1
    assert "model.compressor.kind is encoder, here n_layers" in capsys.readouterr().err


def test_a_stage_without_an_adapter_says_that_it_leaves_that_of_its_start(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, best = finished
    assert train(config, tmp_path / "align", f"start={best}", *ALIGN) == 0
    assert f"note: the generator's adapter in {best} is not part of this run" in capsys.readouterr().out
    assert not (tmp_path / "align/best/adapter.safetensors").exists()
    assert train(config, tmp_path / "again", f"start={tmp_path}/align/best", *ALIGN) == 0
    assert train(config, tmp_path / "joint", f"start={tmp_path}/align/best", f"start_adapter={best}") == 0
    assert "note:" not in capsys.readouterr().out


def test_weights_that_nothing_is_said_of_are_refused(
    finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(finished[1], tmp_path / "bare")
    (bare / "config.json").unlink()
    assert train(finished[0], tmp_path / "out", f"start={bare}") == 1
    assert f"{bare}, config.json: cannot be read" in capsys.readouterr().err
    shutil.copy(finished[1] / "config.json", bare)
    values = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(values | {"generator": values["generator"] | {"lora": None}}))
    assert train(finished[0], tmp_path / "out", f"start={bare}") == 1
    assert "has an adapter, but its config.json has no generator.lora" in capsys.readouterr().err
