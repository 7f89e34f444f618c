"""Settings of a run: YAML, overrides, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from core.errors import ConfigError
from training.config import apply_override, dump_yaml, load_config

LORA = {"model": {"generator": {"lora": {"r": 4}}}}


def write(path: Path, values: Any) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {**LORA, "loop": {"batch_size": 8, "epochs": 3}})
    config = load_config(path, ["loop.batch_size=2", "model.compressor.rates=[8, 4]", "loop.max_steps=null"])
    assert (config.loop.batch_size, config.loop.epochs, config.loop.max_steps) == (2, 3, None)
    assert config.model.compressor.rates == (8, 4)
    assert config.model.generator.lora is not None
    assert config.model.generator.lora.r == 4


@pytest.mark.parametrize(("text", "number"), [("2e-4", 2e-4), ("1E2", 100.0), ("4.0e-5", 4e-5), ("1", 1.0)])
def test_a_number_is_one_however_it_is_written(tmp_path: Path, text: str, number: float) -> None:
    path = write(tmp_path / "run.yaml", LORA)
    assert load_config(path, [f"optimizer.generator_lr={text}"]).optimizer.generator_lr == number
    path.write_text(path.read_text() + f"\nloss: {{relevance: {text}}}\n")
    assert load_config(path).loss.relevance == number


def test_what_is_dumped_reads_back_equal(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", {**LORA, "data": {"modes": {"compressed": 0.7, "text": 0.3}}})
    config = load_config(path, ["optimizer.compressor_lora={r: 2}", "optimizer.betas=[0.9, 0.95]"])
    (tmp_path / "again.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("loop.batchsize=2", "loop.batchsize: unknown key"),
        ("model.compressor.n_layer=2", "model.compressor.n_layer: unknown key"),
        ("nonsense=1", "nonsense: unknown key"),
        ("loop.batch_size=0", "loop.batch_size"),
        ("loop.precision=fp16", "loop.precision"),
        ("data.modes={}", "modes: give at least one"),
        ("data.modes={soft: 1.0}", "data.modes"),
        ("loss.alignment=1.0", "loss.alignment: only a pointer readout"),
        ("loss.kl=1.0", "data.logits: loss.kl needs"),
        ("model.generator.lora=null", "model.generator.lora: the generator is to be trained"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm"),
        ("optimizer.clip_norm='1e-4'", "optimizer.clip_norm: must be a valid number"),
        ("loop.batch_size='8'", "loop.batch_size: must be a valid integer"),
        ("loop.gradient_checkpointing=1", "loop.gradient_checkpointing: must be a valid boolean"),
        ("loop.batch_size", "an override is written a.b=c"),
        ("loop..batch_size=1", "an override is written a.b=c"),
        ("loop.batch_size.x=1", "batch_size is a value"),
        ("loop.batch_size=[1", "not YAML"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, override: str, named: str) -> None:
    path = write(tmp_path / "run.yaml", {**LORA, "loop": {"batch_size": 8}})
    with pytest.raises(ConfigError) as refused:
        load_config(path, [override])
    assert named in refused.value.message


@pytest.mark.parametrize(("text", "named"), [("- 1\n", "must be a mapping"), ("a: [", "not YAML")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "run.yaml")


def test_an_override_makes_the_groups_it_needs() -> None:
    values: dict[str, Any] = {}
    apply_override(values, "a.b.c=[1, x]")
    assert values == {"a": {"b": {"c": [1, "x"]}}}
