"""Adapters while training compute what peft's own forward computes, with its gradients, in less memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd import gradcheck
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Phi3Config, PretrainedConfig, Qwen3MoeConfig

from core.checkpoint import load_checkpoint
from core.config import LoraConfig
from tests.tiny_training import settings, write_run
from training.__main__ import main
from training.adapters import adapted_linear, add_lora

WANTED = LoraConfig(r=2, alpha=4, dropout=0.0, target_modules=("first", "second"))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(x).relu())
        return hidden


def adapted_layers(module: nn.Module) -> Iterator[LoraLinear]:
    return (layer for layer in module.modules() if isinstance(layer, LoraLinear))


def run(own_forward: bool, dtype: torch.dtype, bf16: bool) -> list[Tensor]:
    """The output and all gradients, through our forward or peft's."""
    torch.manual_seed(0)
    module = TwoLayers().to(dtype)
    parameters = add_lora(module, WANTED, seed=0)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)
    if not own_forward:
        for layer in adapted_layers(module):
            del layer.forward
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output = module(x)
    output.float().pow(2).sum().backward()
    gradients = [tensor.grad for tensor in (x, *parameters)]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    return [output.detach().float(), *[gradient for gradient in gradients if gradient is not None]]


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_output_and_gradients_are_those_of_peft(dtype: torch.dtype, bf16: bool) -> None:
    for ours, pefts in zip(run(True, dtype, bf16), run(False, dtype, bf16), strict=True):
        scale = float(pefts.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours / scale, pefts / scale, rtol=0, atol=0.05 if bf16 else 1e-5)


def test_gradients_are_the_derivative() -> None:
    torch.manual_seed(0)
    x, down, up = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (2, 4), (3, 2)))
    weight = torch.randn(3, 4, dtype=torch.float64)
    assert gradcheck(lambda x, down, up: adapted_linear(x, weight, down, up, 0.7), (x, down, up))


def test_with_dropout_pefts_own_forward_runs() -> None:
    module = TwoLayers()
    add_lora(module, LoraConfig(r=2, alpha=4, dropout=0.5, target_modules=("first", "second")), seed=0)
    for layer in adapted_layers(module):
        assert "forward" not in vars(layer)
        nn.init.ones_(layer.get_parameter("lora_B.default.weight"))
    x = torch.ones(1, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
}
MOE = Qwen3MoeConfig(
    **SIZES | {"head_dim": 16}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1]
)
PHI3 = Phi3Config(**SIZES)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=2048)


def write_run_of(
    architecture: PretrainedConfig, llama: Path, folder: Path, lora: dict[str, Any], encoder: Path | None = None
) -> Path:
    """A run whose generator is a random model of this architecture with the tokenizer of `llama`."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    architecture.vocab_size = len(tokenizer)
    architecture.bos_token_id = architecture.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    values = settings(folder / "base", encoder, loop={"max_steps": 1})
    values["model"]["generator"]["lora"] = {"r": 2, "alpha": 4} | lora
    return write_run(folder, values)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("architecture", "adapted"),
    [
        (MOE, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (PHI3, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    ],
    ids=["moe", "phi3"],
)
def test_what_is_trained_of_any_architecture_is_exported_and_served(
    architecture: PretrainedConfig, adapted: set[str], dropout: float, tiny_llama: Path, tmp_path: Path
) -> None:
    config = write_run_of(architecture, tiny_llama, tmp_path, {"dropout": dropout})
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 0
    adapter = load_file(tmp_path / "run/best/adapter.safetensors")
    assert {name.split(".")[-3] for name in adapter} == adapted
    experts = [name for name in adapter if "experts" in name]  # one tensor a layer, of which no part is a linear layer
    assert not experts
    written = json.loads((tmp_path / "run/best/config.json").read_text())
    assert written["generator"]["lora"]["target_modules"] == sorted(adapted)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "v1")]) == 0
    lora = load_checkpoint(tmp_path / "v1").config.generator.lora
    assert lora is not None
    assert lora.target_modules == tuple(sorted(adapted))


@pytest.mark.parametrize(
    ("architecture", "lora", "message"),
    [
        (
            PHI3,
            {"target_modules": ["o_proj", "q_proj"]},
            "has no linear layer named q_proj; it has down_proj, gate_up_proj",
        ),
        (MOE, {"target_modules": ["q_proj", "gate_up_proj"]}, "no linear layer named gate_up_proj; it has"),
        (GPT2, {"target_modules": ["c_attn"]}, "has no linear layer named c_attn; it has lm_head"),
        (GPT2, {}, "no linear layer to adapt"),
        (PHI3, {"target_modules": []}, "no linear layer to adapt"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named_before_the_first_step(
    architecture: PretrainedConfig,
    lora: dict[str, Any],
    message: str,
    tiny_llama: Path,
    tiny_bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_run_of(architecture, tiny_llama, tmp_path, lora, tiny_bert)
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "model.generator.lora.target_modules: " in said
    assert message in said
    assert not (tmp_path / "run").exists()


def test_a_run_that_named_the_default_layers_goes_on(tiny_llama: Path, tmp_path: Path) -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    values = settings(tiny_llama, loop={"max_steps": 1})
    values["model"]["generator"]["lora"] = {"r": 2, "alpha": 4}
    config, out = write_run(tmp_path, values), str(tmp_path / "out")
    assert main(["train", str(config), "--out", out, f"model.generator.lora.target_modules={names}"]) == 0
    assert main(["train", str(config), "--out", out, "loop.max_steps=2"]) == 0
