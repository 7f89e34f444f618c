"""Both compressors: own weights, slots, segments, limits, and what depends on what."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ElectraConfig, GPT2Config, MistralConfig, PretrainedConfig, Qwen2Config, RobertaConfig

from core.compressors import Compressor, EncoderCompressor, NLayersCompressor
from core.compressors.n_layers import first_layers_config
from core.config import CompressorConfig, Config, GeneratorConfig
from core.errors import BaseModelError, ConfigError
from core.model import Model, build_model
from core.passages import Passage
from core.pipeline import prepare, rows_of
from core.rows import RowBatch, collate_rows
from core.tokenization import load_tokenizer
from tests.tiny_pipeline import PASSAGES, QUERY, embedding_table, tiny_model


def batch_for(model: Model, query: str = QUERY, passages: tuple[Passage, ...] = PASSAGES) -> RowBatch:
    rows = rows_of(model, prepare(model, query, passages))
    return collate_rows(rows, model.compressor.row_format, model.config.compressor.max_memory_tokens)


def test_the_compressors_weights_are_its_own(tiny_llama: Path) -> None:
    settings = CompressorConfig(n_layers=2, chunk_tokens=32, rates=(8,))
    model = build_model(Config(compressor=settings, generator=GeneratorConfig(base_model=str(tiny_llama))))
    batch = batch_for(model)
    with torch.no_grad():
        before = model.compressor(batch, model.generator.embed)
        for weight in model.generator.parameters():
            weight.zero_()
        after = model.compressor(batch, model.generator.embed)
    assert torch.equal(before.memory, after.memory)
    assert torch.equal(before.scores, after.scores)


def test_a_seed_decides_slots_and_heads(tiny_llama: Path) -> None:
    config = Config(
        compressor=CompressorConfig(n_layers=1, readout="pointer"),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    first, same, other = (build_model(config, seed=seed).compressor.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert {"slots", "relevance.weight", "readout.query.weight"} <= differing
    assert not any(name.startswith("backbone.") for name in differing)


def test_building_leaves_the_callers_random_numbers_alone(tiny_llama: Path, tiny_bert: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    config = CompressorConfig(kind="encoder", base_model=str(tiny_bert))
    build_model(Config(compressor=config, generator=GeneratorConfig(base_model=str(tiny_llama))))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_slots_start_among_the_backbones_embeddings(tiny_llama: Path, tiny_bert: Path, kind: str) -> None:
    compressor = tiny_model(tiny_llama, tiny_bert if kind == "encoder" else None).compressor
    table = embedding_table(compressor.backbone).detach()
    centre = table[compressor.tokenizer.mask_token_id] if kind == "encoder" else table.mean(0)
    spread = (compressor.slots.detach() - centre).std() / table.std()
    assert 0.4 < spread < 0.6
    assert compressor.slots.shape == (compressor.config.max_memory_tokens + 1, table.shape[1])


@pytest.mark.parametrize("readout", ["memory", "pooled", "pointer"])
@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_every_weight_learns(tiny_llama: Path, tiny_bert: Path, kind: str, readout: str) -> None:
    model = tiny_model(tiny_llama, tiny_bert if kind == "encoder" else None, readout=readout)
    batch = batch_for(model)
    output = model.compressor(batch, model.generator.embed)
    kept = output.memory[batch.memory_mask]
    loss = (kept * torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))).sum() + output.scores.sum()
    names = dict(model.compressor.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
    silent = {name for name, gradient in gradients.items() if not gradient.any()}
    # A softmax does not see what is added to all of its logits.
    assert silent <= {"readout.key.bias"}
    slots = gradients["slots"]
    used = int(batch.memory_mask.sum(1).max())
    assert slots[:used].any(1).all() or readout == "pooled"
    assert slots[-1].any()


def test_more_layers_than_there_are_is_refused(tiny_llama: Path) -> None:
    config = Config(compressor=CompressorConfig(n_layers=5), generator=GeneratorConfig(base_model=str(tiny_llama)))
    with pytest.raises(ConfigError, match=r"n_layers: 5 is over the generator's 4 layers"):
        build_model(config)


def test_rows_longer_than_the_encoder_reads_are_refused(tiny_llama: Path, tiny_bert: Path) -> None:
    config = CompressorConfig(kind="encoder", base_model=str(tiny_bert), chunk_tokens=480, query_tokens=64)
    with pytest.raises(ConfigError, match="512 positions"):
        build_model(Config(compressor=config, generator=GeneratorConfig(base_model=str(tiny_llama))))


def test_rows_longer_than_the_generator_reads_are_refused(tiny_llama: Path) -> None:
    config = CompressorConfig(n_layers=2, chunk_tokens=2**31 - 1, rates=(1,))
    with pytest.raises(ConfigError, match=r"rows of up to \d{10} tokens are over the generator's 8192 positions"):
        build_model(Config(compressor=config, generator=GeneratorConfig(base_model=str(tiny_llama))))


def test_the_longest_row_fits_the_encoder(tiny_llama: Path, tiny_bert: Path) -> None:
    # 3 special tokens + 64 of the query + 416 of the chunk + 28 slots + [RR] = 512, all that this BERT has.
    model = tiny_model(tiny_llama, tiny_bert, chunk_tokens=416, query_tokens=64, rates=(15,))
    batch = batch_for(model, "the " * 64, (Passage(" the" * 416),))
    assert batch.ids.shape[1] == 512
    assert model.compressor(batch, model.generator.embed).scores.isfinite().all()


@pytest.mark.parametrize("encoder_config", ["roberta", "electra"])
def test_encoders_of_other_shapes(tiny_llama: Path, tiny_bert: Path, encoder_config: str) -> None:
    tokenizer = load_tokenizer(tiny_bert)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config: PretrainedConfig
    if encoder_config == "roberta":  # one token type; positions are counted from behind the padding id
        config = RobertaConfig(type_vocab_size=1, max_position_embeddings=130, pad_token_id=1, **sizes)
    else:  # embeddings narrower than the layers
        config = ElectraConfig(embedding_size=24, max_position_embeddings=128, **sizes)
    model = tiny_model(tiny_llama, tiny_bert, chunk_tokens=80, query_tokens=23, rates=(4,))  # rows of up to 127
    compressor = EncoderCompressor(model.config.compressor, config, tokenizer, 64).eval()
    compressor.initialise_slots(torch.Generator().manual_seed(0))
    batch = batch_for(model, "the " * 23, (Passage(" the" * 80), Passage("Bread.")))
    output = compressor(batch, model.generator.embed)
    assert output.memory.shape == (2, 20, 64)
    assert output.memory.isfinite().all()
    too_long = CompressorConfig(kind="encoder", base_model="tiny", chunk_tokens=80, query_tokens=25, rates=(4,))
    with pytest.raises(ConfigError, match="128 positions"):
        EncoderCompressor(too_long, config, tokenizer, 64)


def test_token_types_tell_query_from_chunk(tiny_llama: Path, tiny_bert: Path) -> None:
    model = tiny_model(tiny_llama, tiny_bert)
    batch = batch_for(model)
    with torch.no_grad():
        hidden = model.compressor.hidden(batch)
        batch.segments.zero_()
        assert not torch.allclose(model.compressor.hidden(batch), hidden, atol=1e-3)


@pytest.mark.parametrize("readout", ["memory", "pooled", "pointer"])
@pytest.mark.parametrize("order", ["query_first", "document_first"])
@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_memory_and_score_depend_on_the_query(
    tiny_llama: Path, tiny_bert: Path, kind: str, order: str, readout: str
) -> None:
    model = tiny_model(tiny_llama, tiny_bert if kind == "encoder" else None, order=order, readout=readout)
    with torch.no_grad():
        one = model.compressor(batch_for(model), model.generator.embed)
        other = model.compressor(batch_for(model, "Who was born in Warsaw?"), model.generator.embed)
    assert not torch.allclose(one.scores, other.scores, atol=1e-4)
    by_query = not torch.allclose(one.memory, other.memory, atol=1e-4)
    # A causal compressor that reads the document first cannot pool anything that has seen the query.
    assert by_query == (not (kind == "n_layers" and order == "document_first" and readout == "pooled"))


def test_document_first_reads_the_chunk_before_the_query(tiny_qwen3: Path) -> None:
    """What will allow a chunk's keys and values to be cached across queries."""
    model = tiny_model(tiny_qwen3, order="document_first")
    batches = [batch_for(model, query) for query in (QUERY, "Who was born in Warsaw, and in which year?")]
    with torch.no_grad():
        first, second = (model.compressor.hidden(batch) for batch in batches)
    for row, length in enumerate(batches[0].generator_mask.sum(1).tolist()):
        end = int(batches[0].chunk_positions[row, length - 1]) + 1
        torch.testing.assert_close(first[row, :end], second[row, :end], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (MistralConfig(num_hidden_layers=6, sliding_window=8), None),
        (
            Qwen2Config(num_hidden_layers=6, use_sliding_window=True, sliding_window=8, max_window_layers=2),
            ["full_attention", "full_attention", "sliding_attention"],
        ),
    ],
)
def test_first_layers_keep_their_kind_of_attention(config: PretrainedConfig, kinds: list[str] | None) -> None:
    cut = first_layers_config(config, 3)
    assert cut.num_hidden_layers == 3
    assert cut.sliding_window == 8
    assert getattr(cut, "layer_types", None) == kinds
    assert config.num_hidden_layers == 6


def test_other_decoders_are_refused(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(ConfigError, match="gpt2"):
        NLayersCompressor(CompressorConfig(n_layers=1), GPT2Config(n_embd=32, n_head=2, n_layer=2), tokenizer, 32)


def test_scores_are_exact_in_low_precision(tiny_llama: Path) -> None:
    config = Config(
        compressor=CompressorConfig(n_layers=2, chunk_tokens=32, rates=(8,)),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    model = build_model(config, dtype=torch.bfloat16)
    compressor: Compressor = model.compressor
    batch = batch_for(model)
    with torch.no_grad():
        output = compressor(batch, model.generator.embed)
    assert output.memory.dtype == torch.bfloat16
    assert output.scores.dtype == torch.float32
    assert not torch.equal(output.scores, output.scores.bfloat16().float())


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_encoder_that_cannot_be_read_is_named(tiny_llama: Path, tiny_bert: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "spoilt")
    (folder / file).write_bytes(b'{"a": ')
    config = Config(
        compressor=CompressorConfig(kind="encoder", base_model=str(folder)),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    with pytest.raises(BaseModelError, match="spoilt"):
        build_model(config)
