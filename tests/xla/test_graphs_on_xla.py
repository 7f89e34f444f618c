"""The compressor's graphs through XLA on the CPU: the compiler front end that Neuron's SDK traces with.

Runs in an environment of its own: `make test-xla` (requirements/xla-cpu-test.txt). No Neuron compiler, no device.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.accelerators import AcceleratedCompressor, Bucket
from core.accelerators.graph import CompressorGraph, example_batch, graph_tensors, longest_row
from core.model import Model
from core.pipeline import prepare, rows_of
from core.rows import collate_rows
from tests.tiny_pipeline import PASSAGES, QUERY, tiny_model
from tests.xla.xla_graph import (
    XlaGraph,
    compiles,
    copied,
    dynamic_shapes,
    forget_metrics,
    hlo_of,
    host_operators,
    unread,
)

MODELS = [(kind, readout) for kind in ("llama", "bert", "modernbert") for readout in ("memory", "pooled", "pointer")]


@pytest.fixture(params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest, tiny_llama: Path, tiny_bert: Path, tiny_modernbert: Path) -> Model:
    kind, readout = request.param
    return tiny_model(
        tiny_llama, {"llama": None, "bert": tiny_bert, "modernbert": tiny_modernbert}[kind], readout=readout
    )


def inputs_for(model: Model, bucket: Bucket) -> tuple[Tensor, ...]:
    graph = CompressorGraph(model.compressor)
    return graph_tensors(example_batch(model.compressor, bucket), graph.inputs, model.generator.embed)


def test_every_input_is_in_the_hlo_and_no_shape_is_dynamic(model: Model) -> None:
    """The attention mask too: a mask of ones is dropped by some kernels, and the graph would attend to padding."""
    graph = CompressorGraph(model.compressor)
    inputs, outputs = XlaGraph(graph).record(*inputs_for(model, Bucket(4, longest_row(model.compressor))))
    assert [graph.inputs[index] for index in unread(inputs, outputs)] == []
    assert dynamic_shapes(hlo_of(outputs)) == []


def test_same_numbers_one_compile_a_bucket_and_no_operator_on_the_host(model: Model) -> None:
    graph = CompressorGraph(model.compressor)
    longest = longest_row(model.compressor)
    buckets = [Bucket(1, longest), Bucket(4, longest)]
    run = XlaGraph(graph)
    accelerated = AcceleratedCompressor(model.compressor, dict.fromkeys(buckets, run))
    forget_metrics()
    for bucket in buckets:  # warm-up
        accelerated.run(bucket, inputs_for(model, bucket))
    assert compiles() == len(buckets)
    rows = rows_of(model, prepare(model, QUERY, PASSAGES))
    output = accelerated(rows, model.generator.embed)
    assert compiles() == len(buckets)
    assert host_operators() == []
    with torch.no_grad():
        batch = collate_rows(rows, model.compressor.row_format, model.config.compressor.max_memory_tokens)
        expected = model.compressor(batch, model.generator.embed)
    torch.testing.assert_close(output.scores, expected.scores, atol=1e-5, rtol=1e-5)
    for i, row in enumerate(rows):
        memory = slice(0, row.memory_tokens)
        torch.testing.assert_close(output.memory[i, memory], expected.memory[i, memory], atol=1e-5, rtol=1e-5)


def test_a_swap_of_weights_compiles_nothing(tiny_llama: Path) -> None:
    model = tiny_model(tiny_llama)
    graph = CompressorGraph(model.compressor)
    inputs = inputs_for(model, Bucket(4, longest_row(model.compressor)))
    run = XlaGraph(graph)
    run(*inputs)
    before = compiles()
    state = {name: value * 1.1 for name, value in graph.state_dict().items()}
    run.replace_weights(state)
    changed = run(*inputs)
    assert compiles() == before
    with torch.no_grad():
        other = copied(graph)
        other.load_state_dict(state)
        for value, expected in zip(changed, other(*inputs), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
