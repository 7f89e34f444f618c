"""graphs.json, the record of the graphs in a checkpoint: read once its files are found to be what the manifest says."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from core.accelerators.base import Accelerator, CompileSpec
from core.accelerators.buckets import Bucket, GeneratorBuckets
from core.config import STRICT
from core.errors import CheckpointError
from core.manifest import (
    DTYPES,
    MANIFEST,
    DTypeName,
    FileRecord,
    Manifest,
    Sha256,
    parse_json,
    read_bounded,
    read_version,
    sha256_of,
)
from core.model import Model

FOLDER, RECORD = "graphs", "graphs.json"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GeneratorRecord:
    """The generator's part of graphs.json.

    architecture  what a checkpoint must share to use the same graphs, hashed
    """

    architecture: Sha256
    buckets: GeneratorBuckets


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GraphsRecord:
    """All of graphs.json.

    checkpoint         the folder's name when it was exported
    compressor_sha256  of the weights that the golden vectors were recorded with
    architecture       what a checkpoint must share to use the same graphs, hashed
    inputs             names of the tensors a graph of the compressor takes, in order
    versions           what the compiled graphs depend on; empty where none are stored
    generator          its graphs; None: there are none, and it runs as it is
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
    generator: GeneratorRecord | None = None

    @property
    def spec(self) -> CompileSpec:
        """How the graphs were compiled."""
        return CompileSpec(self.target, self.compiler_args)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all graphs, as their files are called where they are stored."""
        return (*map(str, self.buckets), *(self.generator.buckets.names if self.generator else ()))


def stored_dtype(folder: Path) -> torch.dtype:
    """What the graphs in a checkpoint's folder were made in. Raises CheckpointError where it has none.

    Their files are not checked, which takes as long as reading them all: whoever loads them does that.
    """
    _listed_files(folder, read_bounded(folder / MANIFEST))
    return DTYPES[parse_json(GraphsRecord, read_bounded(folder / FOLDER / RECORD), RECORD).dtype]


def read_record(folder: Path, accelerator: Accelerator | None = None) -> GraphsRecord:
    """The record of the graphs in a checkpoint's folder, files checked. Raises CheckpointError."""
    return read_record_of(folder, read_version(folder), accelerator)


def read_record_of(folder: Path, version: str, accelerator: Accelerator | None = None) -> GraphsRecord:
    """graphs.json, once every file of `graphs/` is found to be as the manifest of `version` says.

    accelerator  is to load the graphs: where it stores them, there must be one for each bucket
    """
    text = read_bounded(folder / MANIFEST)
    if not version.endswith(f"@{hashlib.sha256(text).hexdigest()[:12]}"):
        raise CheckpointError(f"{folder.name}: was changed while it was loaded")
    files = _listed_files(folder, text)
    for name, record in files.items():
        if not name.startswith(f"{FOLDER}/"):
            continue
        if not (folder / name).is_file():
            raise CheckpointError(f"{name}: is missing")
        if sha256_of(folder / name) != record.sha256:
            raise CheckpointError(f"{name}: its sha256 is not the one in {MANIFEST}")
    graphs = parse_json(GraphsRecord, read_bounded(folder / FOLDER / RECORD), RECORD)
    if accelerator is not None and accelerator.suffix is not None and accelerator.name == graphs.accelerator:
        for name in graphs.names:
            if f"{FOLDER}/{name}{accelerator.suffix}" not in files:
                raise CheckpointError(f"{FOLDER}/{name}{accelerator.suffix}: is missing")
    return graphs


def _listed_files(folder: Path, manifest: bytes) -> dict[str, FileRecord]:
    """The files of a checkpoint that has graphs. Raises CheckpointError."""
    files = parse_json(Manifest, manifest, MANIFEST).files
    if f"{FOLDER}/{RECORD}" not in files:
        raise CheckpointError(
            f"{folder.name}: has no graphs; make them with `python -m training export ... --target jit` (or neuron)"
        )
    return files


def check_machine(record: GraphsRecord, model: Model, accelerator: Accelerator) -> None:
    """Raises CheckpointError unless `accelerator` can run the graphs here, for a model as it was loaded."""
    refuse_unless(
        accelerator=(record.accelerator, accelerator.name),
        dtype=(DTYPES[record.dtype], model.generator.dtype),
        device=("cpu", model.device.type),  # the host's: a graph takes and returns its tensors
        versions=(record.versions, accelerator.versions()),
    )


def refuse_unless(**found: tuple[Any, Any]) -> None:
    """Raises CheckpointError that names the first that differs: what graphs were made for, and what there is."""
    for name, (expected, actual) in found.items():
        if expected != actual:
            raise CheckpointError(f"graphs: {name}: were made for {expected}, and this is {actual}")
