"""`training export`: what the service gets is what the trainer had."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.answer import answer
from core.checkpoint import load_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig, LoraConfig, dump_config
from core.generator import adapter_shapes, merge_lora
from core.golden_check import TOLERANCE
from core.model import Model, build_model
from core.passages import Passage
from core.sampling import GenerationOptions
from training.__main__ import main

LORA = LoraConfig(r=2, alpha=4, target_modules=("v_proj", "up_proj"))


def ask(model: Model) -> tuple[str, list[float | None], list[Tensor]]:
    """Everything of an answer that the weights decide."""
    passages = [Passage("Coffee is grown in Brazil."), Passage("Glass is made by melting sand.")]
    options = GenerationOptions(max_new_tokens=6)
    result = answer(model, "Where is coffee grown?", passages, "compressed", options=options)
    return result.text, [p.relevance for p in result.passages], [p.memory for p in result.passages]


def assert_same(one: Model, other: Model) -> None:
    (text, relevance, memory), (other_text, other_relevance, other_memory) = ask(one), ask(other)
    assert (text, relevance) == (other_text, other_relevance)
    assert all(torch.equal(a, b) for a, b in zip(memory, other_memory, strict=True))


@pytest.fixture
def trained(tiny_llama: Path) -> tuple[Model, dict[str, Tensor]]:
    """A model whose compressor has moved away from its base, and an adapter beside its generator."""
    config = Config(
        trained=True,
        compressor=CompressorConfig(n_layers=2, chunk_tokens=64),
        generator=GeneratorConfig(base_model=str(tiny_llama), lora=LORA),
    )
    model = build_model(config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.compressor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.02)
    shapes = adapter_shapes(model.generator.model, LORA)
    return model, {name: torch.randn(shape, generator=random) * 0.2 for name, shape in shapes.items()}


@pytest.fixture
def finished_run(tmp_path: Path, trained: tuple[Model, dict[str, Tensor]]) -> Path:
    """A run's folder as the trainer leaves it."""
    model, adapter = trained
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    save_file(model.compressor.state_dict(), best / "compressor.safetensors")
    save_file(adapter, best / "adapter.safetensors")
    (best / "config.json").write_text(dump_config(model.config))
    (best / "summary.json").write_text(json.dumps({"steps": 12, "dev": {"f1": 0.5}}))
    return tmp_path / "run"


def test_the_service_gets_what_the_trainer_had(
    tmp_path: Path, finished_run: Path, trained: tuple[Model, dict[str, Tensor]]
) -> None:
    model, adapter = trained
    assert main(["export", str(finished_run), str(tmp_path / "v1")]) == 0
    merge_lora(model.generator.model, adapter, LORA)
    loaded = load_checkpoint(tmp_path / "v1")
    assert_same(loaded, model)
    assert loaded.config == model.config
    manifest = json.loads((tmp_path / "v1" / "manifest.json").read_text())
    assert manifest["training"] == {"steps": 12, "dev": {"f1": 0.5}}


def test_a_checkpoint_can_be_exported_again_smaller_or_merged(tmp_path: Path, finished_run: Path) -> None:
    assert main(["export", str(finished_run), str(tmp_path / "v1")]) == 0
    assert main(["export", str(tmp_path / "v1"), str(tmp_path / "copy")]) == 0
    assert main(["export", str(tmp_path / "v1"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert main(["export", str(tmp_path / "v1"), str(tmp_path / "merged"), "--merge"]) == 0
    first = load_checkpoint(tmp_path / "v1")
    assert_same(load_checkpoint(tmp_path / "copy"), first)
    assert_same(load_checkpoint(tmp_path / "merged"), first)
    for name in ("compressor", "generator"):
        half = load_file(tmp_path / "half" / f"{name}.safetensors")
        assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert not (tmp_path / "merged" / "generator.safetensors").exists()
    assert json.loads((tmp_path / "half" / "manifest.json").read_text())["training"]["steps"] == 12


def test_a_run_that_left_the_generator_alone(tmp_path: Path, finished_run: Path) -> None:
    (finished_run / "best" / "adapter.safetensors").unlink()
    assert main(["export", str(finished_run / "best"), str(tmp_path / "v1")]) == 0
    assert load_checkpoint(tmp_path / "v1").config.generator.lora is None
    assert not (tmp_path / "v1" / "generator.safetensors").exists()


def test_the_base_model_may_have_moved(tmp_path: Path, finished_run: Path, tiny_llama: Path) -> None:
    moved = shutil.copytree(tiny_llama, tmp_path / "moved")
    config = json.loads((finished_run / "best" / "config.json").read_text())
    config["generator"]["base_model"] = str(tmp_path / "gone")
    (finished_run / "best" / "config.json").write_text(json.dumps(config))
    assert main(["export", str(finished_run), str(tmp_path / "v1")]) == 1
    assert main(["export", str(finished_run), str(tmp_path / "v1"), "--base-model", str(moved)]) == 0


def test_what_a_load_would_refuse_is_not_left_behind(
    tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 0.0)  # so that rounding is too much
    assert main(["export", str(finished_run), str(tmp_path / "v1"), "--dtype", "bfloat16"]) == 1
    assert "golden example: memory is off" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_was_not_verified_to_the_end_is_not_left_behind(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> Model:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.export.load_checkpoint", stopped)
    assert main(["export", str(finished_run), str(tmp_path / "v1")]) == 130
    assert not (tmp_path / "v1").exists()


def test_what_is_no_run_is_refused_with_a_reason(
    tmp_path: Path,
    finished_run: Path,
    trained: tuple[Model, dict[str, Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["export", *arguments, str(tmp_path / "v1")]) == 1
        assert not (tmp_path / "v1").exists()
        return capsys.readouterr().err

    assert "neither a checkpoint" in refused(str(tmp_path))
    (finished_run / "best").rename(finished_run / "last")
    assert f"the state this run stopped at is {finished_run / 'last'}" in refused(str(finished_run))
    (finished_run / "last").rename(finished_run / "best")
    assert "pip.repos.neuron.amazonaws.com" in refused(str(finished_run), "--target", "neuron")  # no SDK here
    assert "are for --target" in refused(str(finished_run), "--buckets", "8x256")
    assert "are for --target" in refused(str(finished_run), "--generator", "2x64")
    assert "needs --generator" in refused(str(finished_run), "--target", "jit", "--prefill", "1x64")
    shapes = ["--target", "jit", "--generator", "2x64", "--prefill", "1x32"]
    assert "must be of 64 positions" in refused(str(finished_run), *shapes)
    best = finished_run / "best"
    model, adapter = trained
    (best / "config.json").write_text(
        dump_config(replace(model.config, generator=replace(model.config.generator, lora=None)))
    )
    assert "no generator.lora" in refused(str(finished_run))
    (best / "config.json").write_text(dump_config(model.config))
    save_file(dict(list(adapter.items())[1:]), best / "adapter.safetensors")
    assert "adapter.safetensors: lacks 1 tensors" in refused(str(finished_run))
    (best / "adapter.safetensors").unlink()
    (best / "summary.json").write_text("[]")
    assert "summary.json" in refused(str(finished_run))
