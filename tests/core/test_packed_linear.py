"""Packed layers: what ordinary ones compute, counted the same, alone and in a generator."""

from pathlib import Path

import pytest
import torch
from torch import nn

from core.base_models import BaseModel
from core.costs import flop_stages
from core.generator import load_generator
from core.packed_linear import PackedLinear, can_pack, pack_generator

BF16 = torch.bfloat16
CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(not can_pack(CPU, BF16), reason="this CPU does not multiply bfloat16")


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("cuda"), BF16)


@needs_bf16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (2, 7, 24), (3, 1, 24)])
def test_a_packed_layer_computes_the_same(shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(24, 40, bias=bias).to(BF16)
    packed = PackedLinear(linear, rows=8)
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(BF16)
    with torch.inference_mode():
        for each in (inputs, inputs.transpose(0, -2)):
            assert torch.allclose(packed(each), linear(each), atol=0.02)
    assert packed.weight.nbytes == linear.weight.nbytes


@needs_bf16
def test_a_packed_generator_computes_the_same_at_the_same_count(tiny_llama: Path) -> None:
    plain, packed = (load_generator(BaseModel("tiny", tiny_llama, "0"), dtype=BF16) for _ in range(2))
    pack_generator(packed)
    assert not any(isinstance(module, nn.Linear) for module in packed.model.modules())
    assert packed.dtype == BF16
    weights = [sum(parameter.nbytes for parameter in each.parameters()) for each in (plain, packed)]
    tied = packed.model.get_output_embeddings().weight.nbytes if plain.model.config.tie_word_embeddings else 0
    assert weights[1] == weights[0] + tied
    logits, counts = [], []
    for each in (plain, packed):
        with torch.inference_mode(), flop_stages() as stages:
            stages.enter("all")
            logits.append(each.model(torch.arange(20, 60).view(2, 20)).logits)
        counts.append(stages.values["all"])
    assert torch.allclose(logits[0], logits[1], atol=0.05)
    assert logits[0].std() > 0.05
    assert counts[0] == counts[1] > 0
