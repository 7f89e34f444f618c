"""The compressor on static shapes gives what it gives without them, whatever is padded, and its mask matters."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.accelerators import (
    ACCELERATORS,
    AcceleratedCompressor,
    Accelerator,
    Bucket,
    EagerAccelerator,
    JitAccelerator,
    NeuronAccelerator,
    compile_compressor,
    parse_buckets,
)
from core.accelerators.base import CompileSpec
from core.accelerators.graph import CompressorGraph, example_batch, graph_tensors, longest_row
from core.compressors import CompressorOutput
from core.config import CompressorConfig, Config, GeneratorConfig
from core.costs import measure_token_costs
from core.errors import ConfigError
from core.model import Model, build_model
from core.pipeline import prepare, rows_of
from core.rows import ChunkRow, collate_rows
from tests.neuron_double import NeuronDouble
from tests.tiny_pipeline import PASSAGES, QUERY, tiny_model

ATOL, RTOL = 2e-5, 1e-5


def rows_for(model: Model) -> list[ChunkRow]:
    return rows_of(model, prepare(model, QUERY, PASSAGES))


@torch.inference_mode()
def today(model: Model, rows: Sequence[ChunkRow]) -> CompressorOutput:
    """The compressor as it runs without an accelerator."""
    batch = collate_rows(rows, model.compressor.row_format, model.config.compressor.max_memory_tokens)
    output: CompressorOutput = model.compressor(batch, model.generator.embed)
    return output


def assert_same(output: CompressorOutput, expected: CompressorOutput, rows: Sequence[ChunkRow]) -> None:
    torch.testing.assert_close(output.scores, expected.scores, atol=ATOL, rtol=RTOL)
    assert (output.weights is None) == (expected.weights is None)
    for i, row in enumerate(rows):
        memory, tokens = slice(0, row.memory_tokens), slice(0, len(row.chunk.generator_ids))
        torch.testing.assert_close(output.memory[i, memory], expected.memory[i, memory], atol=ATOL, rtol=RTOL)
        if output.weights is not None and expected.weights is not None:
            torch.testing.assert_close(output.weights[i, memory, tokens], expected.weights[i, memory, tokens])


def compiled(model: Model, accelerator: Accelerator, buckets: str | None = None) -> AcceleratedCompressor:
    """Compiled for `buckets`, or for one row and for four of the longest there can be."""
    longest = longest_row(model.compressor)
    table = parse_buckets(buckets or f"1x{longest},4x{longest}")
    spec = CompileSpec("inf2") if accelerator.name == "neuron" else None
    return compile_compressor(model.compressor, model.generator.embed, accelerator, table, spec)


@pytest.mark.parametrize("readout", ["memory", "pooled", "pointer"])
@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_static_shapes_change_no_result(tiny_llama: Path, tiny_bert: Path, kind: str, readout: str) -> None:
    model = tiny_model(tiny_llama, tiny_bert if kind == "encoder" else None, readout=readout)
    rows = rows_for(model)
    accelerated = compiled(model, EagerAccelerator())
    assert_same(accelerated(rows, model.generator.embed), today(model, rows), rows)
    assert list(accelerated.passes.values()) == [len(rows) % 4, len(rows) // 4]


def test_token_costs_are_those_of_the_graphs_that_serve(tiny_llama: Path, tiny_bert: Path) -> None:
    model = tiny_model(tiny_llama, tiny_bert)
    accelerated = model.accelerated = compiled(model, EagerAccelerator())
    costs = measure_token_costs(model, repeats=2)
    assert list(accelerated.passes.values()) == [6, 0]
    assert costs.compressor_s > 0 < costs.prefill_s


def test_windows_of_attention_are_kept(tiny_llama: Path, tiny_modernbert: Path, tiny_mistral: Path) -> None:
    """ModernBERT's local layers see 16 positions to either side, here of rows of up to 60; a Mistral may have one."""
    for model in (tiny_model(tiny_llama, tiny_modernbert), tiny_model(tiny_mistral)):
        config = model.compressor.backbone.config
        if config.model_type == "mistral":
            config.sliding_window = 12
        rows = rows_for(model)
        expected = today(model, rows)
        try:
            assert_same(compiled(model, EagerAccelerator())(rows, model.generator.embed), expected, rows)
        finally:
            if config.model_type == "mistral":
                config.sliding_window = None


@pytest.mark.parametrize("name", ["jit", "neuron"])
@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_compiled_graphs_give_the_same(tiny_llama: Path, tiny_bert: Path, kind: str, name: str) -> None:
    model = tiny_model(tiny_llama, tiny_bert if kind == "encoder" else None, readout="pointer")
    accelerator = JitAccelerator() if name == "jit" else NeuronAccelerator(sdk=NeuronDouble())
    accelerated = compiled(model, accelerator)
    accelerated.replace_weights(CompressorGraph(model.compressor).state_dict())
    rows = rows_for(model)
    assert_same(accelerated(rows, model.generator.embed), today(model, rows), rows)
    assert_same(accelerated(rows[:1], model.generator.embed), today(model, rows[:1]), rows[:1])


def test_padding_to_any_bucket_gives_the_same(tiny_llama: Path) -> None:
    model = tiny_model(tiny_llama, readout="pointer")
    row = min(rows_for(model), key=model.compressor.row_format.length)
    exact, longest = model.compressor.row_format.length(row), longest_row(model.compressor)
    expected = today(model, [row])
    accelerated = compiled(model, EagerAccelerator(), f"1x{exact},1x{exact + 1},3x{longest},5x{longest + 9}")
    for bucket in accelerated.buckets:
        alone = compiled(model, EagerAccelerator(), f"{bucket},1x{longest}" if bucket.length < longest else f"{bucket}")
        assert_same(alone([row], model.generator.embed), expected, [row])
        assert alone.passes[bucket] == 1


@pytest.mark.parametrize("name", ["eager", "jit"])
@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_what_stands_at_padding_does_not_matter_and_the_mask_does(
    tiny_llama: Path, tiny_bert: Path, kind: str, name: str
) -> None:
    model = tiny_model(tiny_llama, tiny_bert if kind == "encoder" else None)
    accelerated = compiled(model, ACCELERATORS[name]())
    inputs = CompressorGraph(model.compressor).inputs
    bucket = Bucket(4, longest_row(model.compressor))
    batch = example_batch(model.compressor, bucket)
    given = dict(zip(inputs, graph_tensors(batch, inputs, model.generator.embed), strict=True))

    def run(**changed: Tensor) -> tuple[Tensor, ...]:
        return accelerated.run(bucket, [(given | changed)[name] for name in inputs])

    noise = torch.where(given["mask"], given["ids"], 77)
    for value, expected in zip(run(ids=noise), run(), strict=True):
        torch.testing.assert_close(value, expected, atol=ATOL, rtol=RTOL)
    shorter = given["mask"].clone()
    shorter[:, 2] = False  # a position that everything sees
    assert not torch.allclose(run(mask=shorter)[0], run()[0], atol=1e-3)


def test_every_input_matters(tiny_llama: Path, tiny_bert: Path) -> None:
    """Nothing is handed to a graph that it does not read: a compiler would drop it, and the graph fit nothing."""
    for kind in (None, tiny_bert):
        for readout in ("memory", "pooled", "pointer"):
            model = tiny_model(tiny_llama, kind, readout=readout)
            graph = CompressorGraph(model.compressor)
            bucket = Bucket(2, longest_row(model.compressor))
            tensors = graph_tensors(example_batch(model.compressor, bucket), graph.inputs, model.generator.embed)
            with torch.inference_mode():
                expected = graph(*tensors)
                for place, name in enumerate(graph.inputs):
                    changed = list(tensors)
                    changed[place] = _altered(name, tensors[place])
                    outputs = graph(*changed)
                    same = all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
                    assert not same, (kind, readout, name)


def _altered(name: str, value: Tensor) -> Tensor:
    if name == "generator_mask":  # what is left to point at
        return value & (torch.arange(value.shape[1]) < 2)
    if value.dtype == torch.bool:
        return value & (torch.arange(value.shape[1]) > 3)
    if name == "slots":
        return torch.where(value >= 0, 0, value)
    return value * 0.5 if value.is_floating_point() else (value - 1).clamp(min=0)


def test_the_compressor_itself_stays_as_it_is(tiny_llama: Path) -> None:
    model = tiny_model(tiny_llama)
    before = model.compressor.backbone.config._attn_implementation
    graph = CompressorGraph(model.compressor)
    assert model.compressor.backbone.config._attn_implementation == before
    assert graph.compressor.backbone.config._attn_implementation == "eager"
    shared = {parameter.data_ptr() for parameter in model.compressor.parameters()}
    assert {parameter.data_ptr() for parameter in graph.parameters()} == shared


@pytest.mark.parametrize("name", ["eager", "jit", "neuron"])
def test_a_swap_of_weights_compiles_nothing(tiny_llama: Path, name: str) -> None:
    config = Config(
        compressor=CompressorConfig(n_layers=1, chunk_tokens=32, query_tokens=64, rates=(8,)),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
    )
    model, other = build_model(config, seed=1), build_model(config, seed=2)
    double = NeuronDouble()
    accelerator = NeuronAccelerator(sdk=double) if name == "neuron" else ACCELERATORS[name]()
    accelerated = compiled(model, accelerator, f"4x{longest_row(model.compressor)}")
    compiles = len(double.compiled)
    rows = rows_for(model)
    expected = today(other, rows)
    accelerated.replace_weights(CompressorGraph(other.compressor).state_dict())
    assert_same(accelerated(rows, model.generator.embed), expected, rows)
    assert len(double.compiled) == compiles


@pytest.mark.parametrize("accelerator", [EagerAccelerator(), JitAccelerator()], ids=lambda each: each.name)
def test_other_shapes_and_types_are_refused(tiny_llama: Path, accelerator: Accelerator) -> None:
    model = tiny_model(tiny_llama)
    longest = longest_row(model.compressor)
    accelerated = compiled(model, accelerator)
    inputs = CompressorGraph(model.compressor).inputs
    wrong = graph_tensors(example_batch(model.compressor, Bucket(2, longest)), inputs, model.generator.embed)
    with pytest.raises(ValueError, match="shapes and types"):
        accelerated.run(Bucket(1, longest), wrong)
    with pytest.raises(ConfigError):
        accelerator.load(Path("graph"))


def test_a_bucket_too_short_for_any_row_is_refused(tiny_llama: Path) -> None:
    model = tiny_model(tiny_llama)
    with pytest.raises(ConfigError, match="1x6 is too short"):
        compiled(model, EagerAccelerator(), f"1x6,1x{longest_row(model.compressor)}")


def test_real_layers_traced_give_the_same(smollm2: Path) -> None:
    config = Config(
        compressor=CompressorConfig(n_layers=2, readout="pointer", chunk_tokens=32, query_tokens=64, rates=(8,)),
        generator=GeneratorConfig(base_model="smollm2-135m"),
    )
    model = build_model(config, seed=3)
    rows = rows_for(model)
    accelerated = compiled(model, JitAccelerator(), f"4x{longest_row(model.compressor)}")
    assert_same(accelerated(rows, model.generator.embed), today(model, rows), rows)
