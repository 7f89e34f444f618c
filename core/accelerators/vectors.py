"""Golden vectors of graphs: for each bucket, inputs and what the eager compressor makes of them in float32.

A graph that does not repeat them is not the graph of these weights, or runs on something that computes otherwise.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from core.accelerators.buckets import Bucket
from core.accelerators.graph import CompressorGraph, example_batch, graph_inputs, graph_tensors
from core.accelerators.rows import AcceleratedCompressor
from core.errors import CheckpointError
from core.golden_check import TOLERANCE
from core.model import Model
from core.rows import RowBatch
from core.tensor_files import read_tensors

OUTPUTS = ("memory", "scores")
FIRST_ROW = 3  # other rows than those a graph was traced with


@torch.inference_mode()
def record_vectors(model: Model, buckets: Sequence[Bucket]) -> dict[str, Tensor]:
    """Inputs and outputs of every bucket, by `<bucket>.<name>`."""
    graph = CompressorGraph(model.compressor)
    golden: dict[str, Tensor] = {}
    for bucket in buckets:
        batch = example_batch(model.compressor, bucket, first=FIRST_ROW)
        outputs = graph(*graph_tensors(batch, graph.inputs, model.generator.embed))
        golden |= {f"{bucket}.{field.name}": getattr(batch, field.name) for field in fields(batch)}
        golden |= {f"{bucket}.{name}": value for name, value in zip(OUTPUTS, outputs, strict=False)}
    return golden


def verify_vectors(model: Model, accelerated: AcceleratedCompressor, path: Path) -> dict[str, float]:
    """Run every bucket's golden inputs; the error of each output. Raises CheckpointError for one over the tolerance.

    Twice: TorchScript optimises a trace after its first run, and the weights have to be on the device to stay.
    """
    limit = TOLERANCE[model.generator.dtype]
    errors = {}
    for bucket, (batch, expected) in _read_vectors(model, accelerated.buckets, path).items():
        inputs = graph_tensors(batch, graph_inputs(model.compressor), model.generator.embed)
        for _ in range(2):
            for name, value in zip(OUTPUTS, accelerated.run(bucket, inputs), strict=False):
                error = _error(value, expected[name])
                if not error <= limit:  # written so that NaN fails
                    raise CheckpointError(
                        f"graphs: {bucket} is off by {error:.2g} in {name}, over {limit} for {model.generator.dtype}: "
                        "it is not the graph of these weights, or this hardware computes something else"
                    )
                errors[f"{bucket}.{name}"] = error
    return errors


def _read_vectors(
    model: Model, buckets: Sequence[Bucket], path: Path
) -> dict[Bucket, tuple[RowBatch, dict[str, Tensor]]]:
    """What `record_vectors` wrote. Raises CheckpointError where a tensor is missing, or of another shape or type."""
    memory = (model.config.compressor.max_memory_tokens, model.generator.hidden_size)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for bucket in buckets:
        batch = example_batch(model.compressor, bucket)
        for field in fields(batch):
            example: Tensor = getattr(batch, field.name)
            expected[f"{bucket}.{field.name}"] = (tuple(example.shape), example.dtype)
        expected[f"{bucket}.memory"] = ((bucket.rows, *memory), torch.float32)
        expected[f"{bucket}.scores"] = ((bucket.rows,), torch.float32)
    shapes = {name: shape for name, (shape, _) in expected.items()}
    found = dict(read_tensors(path, shapes, {name: dtype for name, (_, dtype) in expected.items()}))
    return {
        bucket: (
            RowBatch(**{field.name: found[f"{bucket}.{field.name}"] for field in fields(RowBatch)}),
            {name: found[f"{bucket}.{name}"] for name in OUTPUTS},
        )
        for bucket in buckets
    }


def _error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to 1 + the norm: scores may be near 0."""
    return float((value.float() - expected).norm() / (1 + expected.norm()))
