"""The folder `graphs/` of a checkpoint: the compressor's graphs, what they need, and golden vectors for each.

    graphs.json          the bucket table, what the graphs were compiled for and with
    golden.safetensors   for each bucket, inputs and what the eager compressor makes of them in float32
    8x256.neff.pt        a compiled graph (neuron only), without the weights: those are compressor.safetensors

The generator's, where there are any, stand beside them: `generator_artifact.py`.

Whatever does not fit is fatal when the service starts: a graph that is wrong must not answer. Knows no compiler.
"""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from core.accelerators.base import Accelerator, Compiled, CompileSpec
from core.accelerators.buckets import Bucket, GeneratorBuckets, check_buckets
from core.accelerators.generator_artifact import write_generator
from core.accelerators.graph import (
    NOT_COMPUTED,
    CompressorGraph,
    example_batch,
    graph_inputs,
    graph_tensors,
    longest_row,
)
from core.accelerators.record import (
    FOLDER,
    RECORD,
    GraphsRecord,
    check_machine,
    read_record,
    read_record_of,
    refuse_unless,
)
from core.accelerators.rows import AcceleratedCompressor
from core.accelerators.vectors import record_vectors, verify_vectors
from core.compressors import Compressor
from core.config import dump_config
from core.errors import CheckpointError
from core.manifest import DTYPES, dtype_name, sha256_of
from core.model import Model, place
from core.tensor_files import write_tensors

log = logging.getLogger(__name__)

GOLDEN = "golden.safetensors"


def write_graphs(
    model: Model,
    folder: Path,
    accelerator: Accelerator,
    buckets: Sequence[Bucket],
    *,
    dtype: torch.dtype,
    name: str,
    spec: CompileSpec | None = None,
    reuse: Path | None = None,
    generator: GeneratorBuckets | None = None,
) -> None:
    """Write `graphs/` into the checkpoint `folder` that is being made of `model` (float32, on the CPU).

    dtype       of the graphs: the service has to run in it
    reuse       a checkpoint whose compiled graphs are taken as they are: only weights differ; its buckets, the
                generator's too, and compiler's settings are taken
    generator   also graphs of the generator

    Raises ConfigError, and CheckpointError where the graphs of `reuse` are not of this architecture.
    """
    spec = spec or CompileSpec()
    source = None
    if reuse is not None:
        source = _reusable(reuse, model, accelerator, dtype)
        buckets, spec = source.buckets, source.spec
        generator = source.generator.buckets if source.generator else None
    check_buckets(buckets, longest_row(model.compressor))
    record = GraphsRecord(
        accelerator="neuron" if accelerator.name == "neuron" else "jit",
        checkpoint=name,
        compressor_sha256=sha256_of(folder / "compressor.safetensors"),
        architecture=architecture(model.compressor),
        dtype=dtype_name(dtype),
        target=spec.target,
        compiler_args=spec.compiler_args,
        buckets=tuple(buckets),
        inputs=graph_inputs(model.compressor),
        versions=accelerator.versions(),
    )
    graphs = folder / FOLDER
    graphs.mkdir()
    write_tensors(graphs / GOLDEN, record_vectors(model, record.buckets), torch.float32)
    names = [f"{bucket}{accelerator.suffix}" for bucket in record.buckets if accelerator.suffix is not None]
    if reuse is not None:
        for each in names:
            shutil.copyfile(reuse / FOLDER / each, graphs / each)
    elif names:
        _compile(model, record, accelerator, graphs)
    if generator is not None:
        known = source.generator if source else None
        part = write_generator(model.generator, graphs, accelerator, generator, dtype, spec, reuse, known)
        record = replace(record, generator=part)
    (graphs / RECORD).write_text(dump_config(record), encoding="utf-8")


def accelerate(model: Model, folder: Path, accelerator: Accelerator) -> AcceleratedCompressor:
    """The graphs in the checkpoint `folder`, with `model`'s weights, once they have repeated their golden vectors.

    `model` is what `load_checkpoint` made of the same folder. Raises CheckpointError for whatever does not fit, and
    ConfigError where this machine cannot run them.
    """
    record = read_record_of(folder, model.name, accelerator)
    check_machine(record, model, accelerator)
    refuse_unless(
        architecture=(record.architecture, architecture(model.compressor)),
        inputs=(record.inputs, graph_inputs(model.compressor)),
    )
    graph = CompressorGraph(model.compressor)
    graphs: dict[Bucket, Compiled] = {}
    for bucket in record.buckets:
        if accelerator.suffix is None:
            examples = graph_tensors(example_batch(model.compressor, bucket), graph.inputs, model.generator.embed)
            graphs[bucket] = accelerator.compile(graph, examples, record.spec)
        else:
            graphs[bucket] = accelerator.load(folder / FOLDER / f"{bucket}{accelerator.suffix}")
            graphs[bucket].replace_weights(graph.state_dict())
    accelerated = AcceleratedCompressor(model.compressor, graphs)
    verify_vectors(model, accelerated, folder / FOLDER / GOLDEN)
    return accelerated


def architecture(compressor: Compressor) -> str:
    """sha256 of everything that a graph depends on but its weights' values."""
    config = compressor.config
    backbone = {key: value for key, value in compressor.backbone.config.to_dict().items() if key not in NOT_COMPUTED}
    facts = {
        "readout": [config.readout, config.pointer_window, config.pointer_lead],
        "sizes": [config.chunk_tokens, config.max_memory_tokens],
        "causal": compressor.causal,
        "backbone": backbone,
        "weights": {name: list(value.shape) for name, value in compressor.state_dict().items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _reusable(folder: Path, model: Model, accelerator: Accelerator, dtype: torch.dtype) -> GraphsRecord:
    """The record of graphs that fit `model` too. Raises CheckpointError."""
    record = read_record(folder, accelerator)
    same = {
        "accelerator": record.accelerator == accelerator.name,
        "dtype": DTYPES[record.dtype] == dtype,
        "architecture": record.architecture == architecture(model.compressor),
        "versions": record.versions == accelerator.versions(),
    }
    for name, fits in same.items():
        if not fits:
            raise CheckpointError(f"graphs: those of {folder.name} have another {name}; compile new ones")
    return record


def _compile(model: Model, record: GraphsRecord, accelerator: Accelerator, folder: Path) -> None:
    """Compile and save every bucket's graph."""
    dtype = DTYPES[record.dtype]
    compressor = model.compressor
    if dtype != torch.float32:
        compressor = copy.deepcopy(compressor, {id(compressor.tokenizer): compressor.tokenizer})
        place(compressor, torch.device("cpu"), dtype)
    graph = CompressorGraph(compressor)
    for bucket in record.buckets:
        batch = example_batch(compressor, bucket)
        examples = graph_tensors(batch, graph.inputs, lambda ids: model.generator.embed(ids).to(dtype))
        log.info("compiling bucket %s", bucket)
        accelerator.compile(graph, examples, record.spec).save(folder / f"{bucket}{accelerator.suffix}")
