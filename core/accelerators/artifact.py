"""The folder `graphs/` of a checkpoint: the compressor's graphs, what they need, and golden vectors for each.

    graphs.json          the bucket table, what the graphs were compiled for and with
    golden.safetensors   for each bucket, inputs and what the eager compressor makes of them in float32
    8x256.neff.pt        a compiled graph (neuron only), without the weights: those are compressor.safetensors

Whatever does not fit is fatal when the service starts: a graph that is wrong must not answer. Knows no compiler.
"""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from core.accelerators.base import Accelerator, Compiled, CompileSpec
from core.accelerators.buckets import Bucket, check_buckets
from core.accelerators.graph import CompressorGraph, example_batch, graph_inputs, graph_tensors, longest_row
from core.accelerators.rows import AcceleratedCompressor
from core.accelerators.vectors import record_vectors, verify_vectors
from core.compressors import Compressor
from core.config import STRICT, dump_config
from core.errors import CheckpointError
from core.manifest import DTYPES, MANIFEST, DTypeName, Manifest, Sha256, dtype_name, parse_json, read_bounded
from core.model import Model, place
from core.tensor_files import write_tensors

log = logging.getLogger(__name__)

FOLDER, RECORD, GOLDEN = "graphs", "graphs.json", "golden.safetensors"
NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GraphsRecord:
    """All of graphs.json.

    checkpoint         the folder's name when it was exported
    compressor_sha256  of the weights that the golden vectors were recorded with
    architecture       what a checkpoint must share to use the same graphs, hashed
    inputs             names of the tensors a graph takes, in order
    versions           what the compiled graphs depend on; empty where none are stored
    """

    format_version: Literal[1] = 1
    accelerator: Literal["jit", "neuron"]
    checkpoint: str
    compressor_sha256: Sha256
    architecture: Sha256
    dtype: DTypeName
    target: str = ""
    compiler_args: tuple[str, ...] = ()
    buckets: tuple[Bucket, ...] = Field(min_length=1, max_length=64)
    inputs: tuple[str, ...]
    versions: dict[str, str]

    @property
    def spec(self) -> CompileSpec:
        """How the graphs were compiled."""
        return CompileSpec(self.target, self.compiler_args)


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
) -> None:
    """Write `graphs/` into the checkpoint `folder` that is being made of `model` (float32, on the CPU).

    dtype   of the graphs: the service has to run in it
    reuse   a checkpoint whose compiled graphs are taken as they are: only weights differ; its buckets and compiler's
            settings are taken too

    Raises ConfigError, and CheckpointError where the graphs of `reuse` are not of this architecture.
    """
    spec = spec or CompileSpec()
    source = None
    if reuse is not None:
        source = _reusable(reuse, model, accelerator, dtype)
        buckets, spec = source.buckets, source.spec
    check_buckets(buckets, longest_row(model.compressor))
    record = GraphsRecord(
        accelerator="neuron" if accelerator.name == "neuron" else "jit",
        checkpoint=name,
        compressor_sha256=_sha256(folder / "compressor.safetensors"),
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
    (graphs / RECORD).write_text(dump_config(record), encoding="utf-8")


def accelerate(model: Model, folder: Path, accelerator: Accelerator) -> AcceleratedCompressor:
    """The graphs in the checkpoint `folder`, with `model`'s weights, once they have repeated their golden vectors.

    `model` is what `load_checkpoint` made of the same folder. Raises CheckpointError for whatever does not fit, and
    ConfigError where this machine cannot run them.
    """
    record = _read_record(folder, model.name)
    _check_record(record, model, accelerator)
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


def _read_record(folder: Path, version: str) -> GraphsRecord:
    """graphs.json, once every file of `graphs/` is found to be as the manifest of `version` says."""
    text = read_bounded(folder / MANIFEST)
    if not version.endswith(f"@{hashlib.sha256(text).hexdigest()[:12]}"):
        raise CheckpointError(f"{folder.name}: was changed while it was loaded")
    files = parse_json(Manifest, text, MANIFEST).files
    if f"{FOLDER}/{RECORD}" not in files:
        raise CheckpointError(
            f"{folder.name}: has no graphs; make them with `python -m training export ... --target jit` (or neuron)"
        )
    for name, record in files.items():
        if name.startswith(f"{FOLDER}/") and _sha256(folder / name) != record.sha256:
            raise CheckpointError(f"{name}: its sha256 is not the one in {MANIFEST}")
    return parse_json(GraphsRecord, read_bounded(folder / FOLDER / RECORD), RECORD)


def _check_record(record: GraphsRecord, model: Model, accelerator: Accelerator) -> None:
    """Raises CheckpointError that names the first thing that does not fit."""
    found = {
        "accelerator": (record.accelerator, accelerator.name),
        "dtype": (DTYPES[record.dtype], model.generator.dtype),
        "device": ("cpu", model.device.type),  # the host's: a graph takes and returns its tensors
        "architecture": (record.architecture, architecture(model.compressor)),
        "inputs": (record.inputs, graph_inputs(model.compressor)),
        "versions": (record.versions, accelerator.versions()),
    }
    for name, (expected, actual) in found.items():
        if expected != actual:
            raise CheckpointError(f"graphs: {name}: were made for {expected}, and this is {actual}")


def read_record(folder: Path) -> GraphsRecord:
    """The record of the graphs in a checkpoint's folder, files checked. Raises CheckpointError."""
    digest = hashlib.sha256(read_bounded(folder / MANIFEST)).hexdigest()
    return _read_record(folder, f"{folder.name}@{digest[:12]}")


def _reusable(folder: Path, model: Model, accelerator: Accelerator, dtype: torch.dtype) -> GraphsRecord:
    """The record of graphs that fit `model` too. Raises CheckpointError."""
    record = read_record(folder)
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


def _sha256(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
