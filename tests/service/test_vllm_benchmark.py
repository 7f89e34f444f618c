"""`service.benchmark engine --vllm-url`: an HTTP double of vLLM takes part in the comparison."""

import json
from pathlib import Path

import pytest

from core.checkpoint import load_checkpoint
from service.benchmark.__main__ import main
from tests.service.vllm_double import VllmDouble

QUICK = ["--quick", "--passages", "1", "--passage-tokens", "40"]


def test_vllm_stands_beside_our_engine(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = load_checkpoint(root / "first").generator
    with VllmDouble(generator, max_model_len=400).running() as vllm:
        arguments = ["engine", *QUICK, "--checkpoint", str(root / "first"), "--output", str(tmp_path)]
        assert main([*arguments, "--vllm-url", vllm.url]) == 0
    result = json.loads((tmp_path / "engine.json").read_text())
    for case in result["cases"]:
        ours, theirs = case["variants"], {name for name in case["variants"] if name.startswith("vllm ")}
        assert theirs == {"vllm text", "vllm compressed", "vllm hybrid"}
        for name in theirs:
            assert ours[name]["prompt_tokens"] == ours[name.removeprefix("vllm ")]["prompt_tokens"]
            assert set(ours[name]["stages_s"]) >= {"prefill", "decode"}
            assert ours[name]["flops_total"] is None  # not seen from here, and not made up
            assert case["ratios"][name]["over_text"]["answers_per_s"]["median"] > 0
    assert "vllm compressed" in capsys.readouterr().out


def test_other_weights_are_not_measured(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = load_checkpoint(root / "first").generator
    generator.model.get_decoder().layers[0].mlp.down_proj.weight.mul_(-3)
    with VllmDouble(generator).running() as vllm:
        arguments = ["engine", *QUICK, "--checkpoint", str(root / "first"), "--output", str(tmp_path)]
        assert main([*arguments, "--vllm-url", vllm.url]) == 2
    assert "merged export" in capsys.readouterr().err
    assert main(["engine", "--vllm-url", "http://example.com/v1"]) == 2
