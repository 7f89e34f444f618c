"""Two ways to compute the same thing give the same: batches, padding, whole models, prompts, streams."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, MistralConfig, PretrainedConfig, Qwen2Config

from core.compressors import Compressor, NLayersCompressor
from core.compressors.n_layers import first_layers_state
from core.config import CompressorConfig
from core.decoding import generate
from core.model import Model
from core.pipeline import build_prompt, compress, compress_rows, prepare, rows_of
from core.rows import ChunkRow, RowBatch, collate_rows
from core.sampling import GenerationOptions
from core.tokenization import encode, load_tokenizer
from tests.tiny_generators import stream
from tests.tiny_pipeline import PASSAGES, QUERY, embedding_table, tiny_model

DECODERS = ["llama", "mistral", "qwen2", "qwen3"]
COMPRESSORS = ["n_layers", "bert", "modernbert"]
READOUTS = ["memory", "pooled", "pointer"]
ORDERS = ["query_first", "document_first"]


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest) -> dict[str, Path]:
    return {name: request.getfixturevalue(f"tiny_{name}") for name in (*DECODERS, "bert", "modernbert")}


def assert_same(first: Tensor | None, second: Tensor | None) -> None:
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def model_of(
    folders: dict[str, Path], generator: str = "llama", compressor: str = "n_layers", **settings: Any
) -> Model:
    """A tiny model whose rows are ragged in their memory."""
    encoder = None if compressor == "n_layers" else folders[compressor]
    return tiny_model(folders[generator], encoder, allocation="proportional", **settings)


def ragged_rows(model: Model) -> list[ChunkRow]:
    """Rows of two requests at two rates."""
    first, second = prepare(model, QUERY, PASSAGES), prepare(model, "Who won the Nobel Prize twice?", PASSAGES[1:])
    return rows_of(model, first, 4) + rows_of(model, second, 8)


def collate(model: Model, rows: Sequence[ChunkRow], pad_to: int | None = None) -> RowBatch:
    return collate_rows(rows, model.compressor.row_format, model.config.compressor.max_memory_tokens, pad_to)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_padding_changes_nothing(folders: dict[str, Path], compressor: str, readout: str, order: str) -> None:
    model = model_of(folders, compressor=compressor, readout=readout, order=order)
    rows = ragged_rows(model)
    tight = collate(model, rows)
    with torch.inference_mode():
        expected = model.compressor(tight, model.generator.embed)
        for extra in (1, 100):  # 100: over the reach of ModernBERT's local attention
            wide = collate(model, rows, pad_to=tight.ids.shape[1] + extra)
            output = model.compressor(wide, model.generator.embed)
            kept = tight.memory_mask
            assert_same(output.memory[kept], expected.memory[kept])
            assert_same(output.scores, expected.scores)
            if expected.weights is not None:
                assert_same(output.weights, expected.weights)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize(
    ("generator", "compressor"),
    [*((name, "n_layers") for name in DECODERS), *(("llama", name) for name in COMPRESSORS[1:]), ("qwen2", "bert")],
)
def test_batched_is_one_by_one(
    folders: dict[str, Path], generator: str, compressor: str, readout: str, order: str
) -> None:
    model = model_of(folders, generator, compressor, readout=readout, order=order)
    rows = ragged_rows(model)
    for row, batched in zip(rows, compress_rows(model, rows), strict=True):
        (alone,) = compress_rows(model, [row])
        assert batched.memory.shape == (row.memory_tokens, model.generator.hidden_size)
        assert_same(batched.memory, alone.memory)
        assert batched.score == pytest.approx(alone.score, abs=1e-5)
        assert (batched.weights is None) == (alone.weights is None)
        if batched.weights is not None:
            assert batched.weights.shape == (row.memory_tokens, len(row.chunk.generator_ids))
            assert_same(batched.weights, alone.weights)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_the_batch_budget_changes_nothing(folders: dict[str, Path], compressor: str) -> None:
    model = model_of(folders, compressor=compressor)
    requests = [prepare(model, QUERY, PASSAGES), prepare(model, "Bread?", PASSAGES[:2])]
    together = compress(model, requests, max_batch_tokens=100_000)
    for budget in (1, 150):
        for passages, expected in zip(compress(model, requests, max_batch_tokens=budget), together, strict=True):
            assert [passage.index for passage in passages] == [passage.index for passage in expected]
            for passage, other in zip(passages, expected, strict=True):
                assert_same(passage.memory, other.memory)
                assert passage.relevance == pytest.approx(other.relevance, abs=1e-5)


def hidden_with_identity_slots(model: Model, compressor: NLayersCompressor) -> tuple[RowBatch, Tensor, Tensor]:
    """A batch, its hidden states, and its ids with the tokens that the slots are made equal to in their places."""
    rows = ragged_rows(model)
    batch = collate(model, rows)
    table = embedding_table(compressor.backbone)
    tokens = torch.arange(10, 10 + len(compressor.slots))
    compressor.slots.data = table[tokens].detach().clone()
    spelled = torch.where(batch.slots >= 0, tokens[batch.slots.clamp(min=0)], batch.ids)
    with torch.inference_mode():
        return batch, compressor.hidden(batch), spelled


def check_against_base(base: Any, batch: RowBatch, hidden: Tensor, spelled: Tensor) -> None:
    """`hidden` is what the last layer of `base` gives for each row alone, before the final norm."""
    seen: list[Tensor] = []
    hook = base.layers[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        for row in range(len(spelled)):
            length = int(batch.mask[row].sum())
            base(input_ids=spelled[row : row + 1, :length])
            assert_same(hidden[row, :length], seen[-1].reshape(length, -1))
    hook.remove()


@pytest.mark.parametrize("decoder", DECODERS)
def test_all_layers_and_identity_slots_are_the_base_model(folders: dict[str, Path], decoder: str) -> None:
    model = model_of(folders, decoder, n_layers=4)
    compressor = NLayersCompressor(
        model.config.compressor, model.generator.model.config, model.generator.tokenizer, model.generator.hidden_size
    ).eval()
    compressor.load_state_dict(model.compressor.state_dict())
    batch, hidden, spelled = hidden_with_identity_slots(model, compressor)
    base = AutoModel.from_pretrained(folders[decoder], dtype=torch.float32)
    check_against_base(base, batch, hidden, spelled)


@pytest.mark.parametrize(
    "special",
    [
        MistralConfig(sliding_window=8),
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ],
    ids=["mistral-sliding", "qwen2-some-sliding"],
)
def test_sliding_windows_are_the_base_models(folders: dict[str, Path], special: PretrainedConfig) -> None:
    model = model_of(folders, n_layers=2)
    sizes = model.generator.model.config.to_dict()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(special, name, sizes[name])
    special.num_hidden_layers = 2
    special.head_dim = 16
    if getattr(special, "layer_types", None):
        special.layer_types = ["full_attention", "sliding_attention"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModel.from_config(special).eval()
    settings = CompressorConfig(n_layers=2, chunk_tokens=32, query_tokens=64, rates=(4, 8), allocation="proportional")
    compressor = NLayersCompressor(settings, special, load_tokenizer(folders["llama"]), 64).eval()
    compressor.backbone.load_state_dict(first_layers_state(base, 2))
    batch, hidden, spelled = hidden_with_identity_slots(model, compressor)
    assert batch.ids.shape[1] > 4 * 8  # the windows do cut
    check_against_base(base, batch, hidden, spelled)


def test_the_encoder_is_the_encoder(folders: dict[str, Path]) -> None:
    """With slots equal to [MASK], hidden states are those of the encoder for the pair `query [SEP] chunk [MASK]...`."""
    for name in COMPRESSORS[1:]:
        model = model_of(folders, compressor=name)
        batch = collate(model, ragged_rows(model))
        backbone, mask = model.compressor.backbone, model.compressor.tokenizer.mask_token_id
        slots = torch.full_like(model.compressor.slots, 0) + embedding_table(backbone)[mask]
        spelled = batch.ids.masked_fill(batch.slots >= 0, mask)
        base = AutoModel.from_pretrained(folders[name], dtype=torch.float32).eval()
        with torch.inference_mode():
            hidden = torch.func.functional_call(
                _Hidden(model.compressor), {"compressor.slots": slots}, (batch,), strict=False
            )
            for row in range(len(spelled)):
                length = int(batch.mask[row].sum())
                types = {"token_type_ids": batch.segments[row : row + 1, :length]} if name == "bert" else {}
                alone = base(input_ids=spelled[row : row + 1, :length], **types).last_hidden_state[0]
                assert_same(hidden[row, :length], alone)


class _Hidden(torch.nn.Module):
    """`Compressor.hidden` as a module's forward, which is what functional_call can call."""

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        self.compressor = compressor

    def forward(self, batch: RowBatch) -> Any:
        return self.compressor.hidden(batch)


CHATML = ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
FRAMES = {"llama": CHATML, "qwen2": CHATML, "qwen3": CHATML, "mistral": ("<s>[INST] ", "\n\n", " [/INST]")}


@pytest.mark.parametrize("modes", [["compressed"] * 4, ["text"] * 4, ["text", "compressed", "compressed", "text"]])
@pytest.mark.parametrize("generator", DECODERS)
def test_a_spliced_prompt_is_one_built_by_hand(folders: dict[str, Path], generator: str, modes: list[Any]) -> None:
    model = model_of(folders, generator)
    request = prepare(model, QUERY, PASSAGES)
    compressed = compress(model, [request])[0]
    tokenizer = model.generator.tokenizer

    def words(text: str) -> Tensor:
        return model.generator.embed(torch.tensor(encode(tokenizer, text).ids, dtype=torch.int64))

    def control(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return model.generator.embed(torch.tensor(ids, dtype=torch.int64))

    before, between, after = (control(text) for text in FRAMES[generator])
    pieces = [before, words(model.config.prompt.system), between, words("Background:")]
    for index, (passage, mode) in enumerate(zip(compressed, modes, strict=True)):
        pieces.append(words(f"\n[{index + 1}] "))
        pieces.append(passage.memory if mode == "compressed" else words(PASSAGES[index].content))
    by_hand = torch.cat([*pieces, words("\nQuestion: "), words(QUERY), after])

    prompt = build_prompt(model, request, compressed, modes)
    spliced = model.generator.splice(prompt.ids[None], prompt.memory_mask[None], prompt.memory)[0]
    torch.testing.assert_close(spliced, by_hand, atol=0, rtol=0)


@pytest.mark.parametrize("compressor", ["n_layers", "bert"])
@pytest.mark.parametrize("generator", DECODERS)
def test_answers_are_the_same_alone_batched_and_streamed(
    folders: dict[str, Path], generator: str, compressor: str
) -> None:
    model = model_of(folders, generator, compressor)
    requests = [
        prepare(model, QUERY, PASSAGES),
        prepare(model, "Who?", PASSAGES[:2]),
        prepare(model, "a", PASSAGES[2:]),
    ]
    everything = zip(requests, compress(model, requests), strict=True)
    prompts = [build_prompt(model, request, passages, ["compressed"] * 4) for request, passages in everything]
    options = [
        GenerationOptions(max_new_tokens=12),
        GenerationOptions(max_new_tokens=7, temperature=0.8, seed=5),
        GenerationOptions(max_new_tokens=9),
    ]
    together = generate(model.generator, prompts, options)
    for prompt, option, answer in zip(prompts, options, together, strict=True):
        (alone,) = generate(model.generator, [prompt], [option])
        events = list(stream(model.generator, prompt, option))
        assert answer.token_ids
        assert list(alone.token_ids) == list(answer.token_ids)
        assert alone.text == answer.text == "".join(event.text for event in events)
        assert alone.finish_reason == answer.finish_reason == events[-1].finish_reason


def test_rates_share_one_model(folders: dict[str, Path]) -> None:
    """A rate is only a number of slots: the slots both rates have say the same at either, as each reads to its left."""
    model = model_of(folders)
    row = rows_of(model, prepare(model, QUERY, PASSAGES[:1]), 4)[0]
    fewer = replace(row, memory_tokens=row.memory_tokens // 2)
    more, less = compress_rows(model, [row, fewer])
    assert_same(more.memory[: fewer.memory_tokens], less.memory)
