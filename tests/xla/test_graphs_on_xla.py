"""The compressor's graphs through XLA on the CPU: the compiler front end that Neuron's SDK traces with.

Runs in an environment of its own: `make test-xla` (requirements/xla-cpu-test.txt). No Neuron compiler, no device.
"""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.accelerators import AcceleratedCompressor, Bucket
from core.accelerators.base import Tensors
from core.accelerators.graph import CompressorGraph, example_batch, graph_tensors, longest_row
from core.model import Model
from core.pipeline import prepare, rows_of
from core.rows import collate_rows
from tests.tiny_pipeline import PASSAGES, QUERY, tiny_model

os.environ.setdefault("PJRT_DEVICE", "CPU")
torch_xla = pytest.importorskip("torch_xla", reason="torch_xla lives in an environment of its own: make test-xla")
metrics = pytest.importorskip("torch_xla.debug.metrics")


class XlaGraph:
    """A graph on XLA's device: lazily traced at every call, compiled when its shapes are new."""

    def __init__(self, graph: CompressorGraph) -> None:
        tokenizer = graph.compressor.tokenizer
        self._graph = copy.deepcopy(graph, {id(tokenizer): tokenizer}).to(torch_xla.device())

    @torch.no_grad()
    def record(self, *inputs: Tensor) -> tuple[list[Tensor], Tensors]:
        """Inputs on the device, and outputs that are not computed yet."""
        moved = [each.to(torch_xla.device()) for each in inputs]
        torch_xla.sync()
        return moved, self._graph(*moved)

    @torch.inference_mode(False)  # lazy tensors cannot be made in it
    def __call__(self, *inputs: Tensor) -> Tensors:
        _, outputs = self.record(*(each.clone() for each in inputs))
        torch_xla.sync()
        return tuple(each.cpu() for each in outputs)

    def replace_weights(self, state: Any) -> None:
        """As the protocol has it."""
        self._graph.load_state_dict(state)

    def save(self, path: Path) -> None:
        raise NotImplementedError


def compiles() -> int:
    data = metrics.metric_data("CompileTime")
    return 0 if data is None else int(data[0])


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
    read, _ = torch_xla._XLAC._get_tensors_xla_device_data_node(list(outputs))
    missing = [
        name
        for name, each in zip(graph.inputs, inputs, strict=True)
        if torch_xla._XLAC._xla_get_tensor_id(each) not in read
    ]
    assert not missing
    hlo = torch_xla._XLAC._get_xla_tensors_hlo(list(outputs))
    assert "ENTRY" in hlo
    assert not re.search(r"\[[^\]]*<=", hlo)  # XLA's notation of a size that depends on values


def test_same_numbers_one_compile_a_bucket_and_no_operator_on_the_host(model: Model) -> None:
    graph = CompressorGraph(model.compressor)
    longest = longest_row(model.compressor)
    buckets = [Bucket(1, longest), Bucket(4, longest)]
    run = XlaGraph(graph)
    accelerated = AcceleratedCompressor(model.compressor, dict.fromkeys(buckets, run))
    torch_xla.sync()
    metrics.clear_all()
    for bucket in buckets:  # warm-up
        accelerated.run(bucket, inputs_for(model, bucket))
    assert compiles() == len(buckets)
    rows = rows_of(model, prepare(model, QUERY, PASSAGES))
    output = accelerated(rows, model.generator.embed)
    assert compiles() == len(buckets)
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []
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
    tokenizer = model.compressor.tokenizer
    with torch.no_grad():
        other = copy.deepcopy(graph, {id(tokenizer): tokenizer})
        for parameter in other.parameters():
            parameter.data = parameter.data.clone()
        other.load_state_dict(state)
        for value, expected in zip(changed, other(*inputs), strict=True):
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
