"""Packed layers: what ordinary ones compute, counted the same, alone, in a generator and in each compressor."""

from pathlib import Path

import pytest
import torch
from torch import nn

from core.base_models import BaseModel
from core.config import CompressorConfig, Config, GeneratorConfig
from core.costs import flop_stages
from core.generator import load_generator
from core.model import build_model
from core.packed_linear import PackedLinear, can_pack, pack_model, pack_network
from core.pipeline import compress, prepare
from tests.tiny_pipeline import PASSAGES, QUERY

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
    pack_network(packed.model, packed.model.get_output_embeddings())
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


@needs_bf16
@pytest.mark.parametrize("kind", ["n_layers", "bert", "modernbert"])
def test_a_packed_compressor_computes_the_same(
    kind: str, tiny_llama: Path, tiny_bert: Path, tiny_modernbert: Path
) -> None:
    encoder = {"bert": tiny_bert, "modernbert": tiny_modernbert}.get(kind)
    chosen = {"kind": "encoder", "base_model": str(encoder)} if encoder else {"n_layers": 2}
    compressor = CompressorConfig(chunk_tokens=32, query_tokens=64, rates=(4,), **chosen)
    config = Config(compressor=compressor, generator=GeneratorConfig(base_model=str(tiny_llama)))
    model = build_model(config, dtype=BF16, seed=7)
    request = prepare(model, QUERY, PASSAGES)
    before = compress(model, [request])[0]
    pack_model(model)
    assert not any(isinstance(module, nn.Linear) for module in model.compressor.backbone.modules())
    after = compress(model, [request])[0]
    for plain, packed in zip(before, after, strict=True):
        scale = float(plain.memory.float().abs().max())
        assert torch.allclose(plain.memory, packed.memory, atol=0.05 * scale)
        assert plain.score == pytest.approx(packed.score, abs=0.02)
