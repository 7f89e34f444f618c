"""`training init`: a checkpoint that serves before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from core.checkpoint import load_checkpoint
from core.decoding import generate
from core.errors import ConfigError
from core.passages import Passage
from core.pipeline import build_prompt, compress, prepare
from core.sampling import GenerationOptions
from training.__main__ import main
from training.init import fresh_config

QUERY = "When was Marie Curie born?"
PASSAGES = [Passage("Marie Curie was born in Warsaw in 1867."), Passage("Bread is made of flour.", title="Bread")]


def test_in_text_mode_it_answers_like_the_base_model(tmp_path: Path, tiny_llama: Path, tiny_bert: Path) -> None:
    flags = ["--compressor", "encoder", "--encoder", str(tiny_bert), "--readout", "pointer"]
    assert main(["init", "--generator", str(tiny_llama), *flags, "--out", str(tmp_path / "fresh")]) == 0
    model = load_checkpoint(tmp_path / "fresh")
    assert not model.config.trained
    assert (model.config.compressor.kind, model.config.compressor.readout) == ("encoder", "pointer")

    request = prepare(model, QUERY, PASSAGES)
    prompt = build_prompt(model, request, compress(model, [request])[0], ["text", "text"])
    answer = generate(model.generator, [prompt], [GenerationOptions(max_new_tokens=8)])[0]

    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = prompt.ids.unsqueeze(0)  # (1, T)
    written = base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=sorted(model.generator.eos_ids),
    )
    assert answer.token_ids == written[0, len(prompt.ids) :].tolist()


def test_a_training_runs_config_gives_its_model_without_an_adapter(
    tmp_path: Path, tiny_qwen2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"model": {"generator": {"base_model": str(tiny_qwen2), "lora": {"r": 4}}, "compressor": {"n_layers": 3}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    arguments = ["init", "--config", str(tmp_path / "run.yaml"), "--n-layers", "2", "compressor.rates=[8, 16]"]
    assert main([*arguments, "--dtype", "bfloat16", "--out", str(tmp_path / "fresh")]) == 0
    config = load_checkpoint(tmp_path / "fresh").config
    assert (config.compressor.n_layers, config.compressor.rates) == (2, (8, 16))
    assert config.generator.lora is None
    assert main([*arguments, "--out", str(tmp_path / "fresh")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_the_seed_decides_the_fresh_weights(tmp_path: Path, tiny_llama: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert (
            main(
                [
                    "init",
                    "--generator",
                    str(tiny_llama),
                    "--n-layers",
                    "1",
                    "--seed",
                    seed,
                    "--out",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
    a, b, c = ((tmp_path / name / "compressor.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compressor.depth=3", "model: compressor.depth: unknown key"),
        ("compressor.n_layers=many", r"compressor\.n_layers"),
        ("compressor", "is written a.b=c"),
        ("compressor.kind=encoder", "needs the name of its encoder"),
    ],
)
def test_settings_are_checked(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fresh_config(None, [override])
