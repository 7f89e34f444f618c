"""A checkpoint folder's list of contents: which files may be there, their sha256, and what made them.

Nothing in the folder is trusted before it is checked here. Does not know what the files say.
"""

import datetime
import hashlib
import importlib.metadata
import json
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from core.base_models import BaseModel
from core.config import STRICT, dump_config, parse_config
from core.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
MAX_TEXT_BYTES = 1 << 20  # of every JSON file that is parsed here: real ones have a few kB
# Larger files that are read whole: the largest public tokenizer.json have some 30 MB. Weights are bounded by shape.
MAX_BYTES = {"tokenizer.json": 1 << 27, "golden.safetensors": 1 << 28}
MODEL_FOLDER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Every file that a checkpoint may hold, but for COMPILED. All are JSON or safetensors; a chat template runs in jinja's
# sandbox.
ALLOWED = frozenset(
    [MANIFEST, "config.json", "compressor.safetensors", "generator.safetensors", "golden.json", "golden.safetensors"]
    + [f"compressor_base/{name}" for name in (*MODEL_FOLDER_FILES, "chat_template.jinja")]
    + [f"generator/{name}" for name in (*MODEL_FOLDER_FILES, "chat_template.jinja", "generation_config.json")]
    + ["generator/model.safetensors", "graphs/graphs.json", "graphs/golden.safetensors", "graphs/generator.safetensors"]
)
# Graphs compiled for Neuron, TorchScript files: code, and never read unless the service is told to run on Neuron.
COMPILED = re.compile(r"graphs/((prefill|decode)-)?\d{1,5}x\d{1,5}\.neff\.pt")
FOLDERS = ("compressor_base", "generator", "graphs")
REQUIRED = frozenset([MANIFEST, "config.json", "compressor.safetensors", "golden.json", "golden.safetensors"])
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DTypeName = Literal["float32", "bfloat16"]
T = TypeVar("T")
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FileRecord:
    """One file of the folder."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BaseRecord:
    """A base model: the name it was found by, and the sha256 that identifies its weights."""

    name: str
    sha256: Sha256


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Manifest:
    """All of manifest.json.

    created     UTC, ISO 8601
    dtype       type of every floating-point tensor of the compressor and the generator's adapter
    generator   the base the generator was made from; the checkpoint loads with no other
    encoder     where an `encoder` compressor's weights came from; not needed again
    files       every other file of the folder, by its path in it
    versions    of the libraries that wrote the checkpoint
    training    what the trainer has to say about how it was made: figures for people, not read by any code
    """

    format_version: Literal[1] = 1
    created: str
    dtype: DTypeName
    generator: BaseRecord
    encoder: BaseRecord | None
    files: dict[str, FileRecord]
    versions: dict[str, str]
    training: dict[str, Any]


def dtype_name(dtype: torch.dtype) -> DTypeName:
    """The manifest's name of `dtype`. Raises CheckpointError for one that checkpoints are not stored in."""
    if dtype == torch.float32:
        return "float32"
    if dtype == torch.bfloat16:
        return "bfloat16"
    raise CheckpointError(f"dtype: a checkpoint is stored as {' or '.join(DTYPES)}, not {dtype}")


def write_manifest(
    folder: Path, *, dtype: torch.dtype, base: BaseModel, encoder: BaseModel | None, training: Mapping[str, Any]
) -> None:
    """List what is in `folder` now: the last file of a checkpoint to be written."""
    files = {
        name: FileRecord(sha256=sha256_of(folder / name), bytes=size) for name, size in sorted(scan(folder).items())
    }
    manifest = Manifest(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        dtype=dtype_name(dtype),
        generator=BaseRecord(name=base.name, sha256=base.sha256),
        encoder=None if encoder is None else BaseRecord(name=encoder.name, sha256=encoder.sha256),
        files=files,
        versions={name: _version(name) for name in ("scaledown", "torch", "transformers", "safetensors")},
        training=dict(training),
    )
    (folder / MANIFEST).write_text(dump_config(manifest), encoding="utf-8")


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of `folder` and its own sha256, once every file is found to be as the manifest says.

    Raises CheckpointError that names the first file that is missing, unexpected, unsafe or altered.
    """
    found = scan(folder)
    if MANIFEST not in found:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing, so this is not a checkpoint, or not a whole one")
    text = read_bounded(folder / MANIFEST)
    manifest = parse_json(Manifest, text, MANIFEST)
    expected = dict(manifest.files)
    for name in sorted((REQUIRED | expected.keys()) - {MANIFEST}):
        if name not in found:
            raise CheckpointError(f"{name}: is missing")
    for name in sorted(found.keys() - {MANIFEST}):
        if name not in expected:
            raise CheckpointError(f"{name}: is not listed in {MANIFEST}")
        if found[name] != expected[name].bytes:
            raise CheckpointError(f"{name}: has {found[name]} bytes, {MANIFEST} says {expected[name].bytes}")
        if sha256_of(folder / name) != expected[name].sha256:
            raise CheckpointError(f"{name}: its sha256 is not the one in {MANIFEST}")
    return manifest, hashlib.sha256(text).hexdigest()


def version_name(folder: Path, digest: str) -> str:
    """What a checkpoint is called: the folder's name and the beginning of its manifest's sha256."""
    return f"{folder.name}@{digest[:12]}"


def read_version(folder: Path) -> str:
    """The name that `core.checkpoint.load_checkpoint` will give to what is in `folder`; only the manifest is read."""
    return version_name(folder, hashlib.sha256(read_bounded(folder / MANIFEST)).hexdigest())


def scan(folder: Path) -> dict[str, int]:
    """Size in bytes of every file in `folder`, by its path there.

    Raises CheckpointError for a file that may not be there, by name, kind or size.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder")
    return dict(_walk(folder, PurePosixPath()))


def _walk(folder: Path, at: PurePosixPath) -> Iterator[tuple[str, int]]:
    for entry in sorted((folder / at).iterdir()):
        name = str(at / entry.name)
        info = entry.lstat()
        if stat.S_ISLNK(info.st_mode):
            raise CheckpointError(f"{name}: is a symbolic link; a checkpoint holds its own files")
        if stat.S_ISDIR(info.st_mode) and name in FOLDERS:
            yield from _walk(folder, at / entry.name)
            continue
        if COMPILED.fullmatch(name) and stat.S_ISREG(info.st_mode):
            yield name, info.st_size
            continue
        if entry.suffix.lower() in PICKLES:
            raise CheckpointError(f"{name}: may hold pickled data, which can run code; only safetensors are read")
        if name not in ALLOWED or not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{name}: is not a file of a checkpoint")
        limit = MAX_BYTES.get(entry.name, info.st_size if entry.suffix == ".safetensors" else MAX_TEXT_BYTES)
        if info.st_size > limit:
            raise CheckpointError(f"{name}: has {info.st_size} bytes, over the limit of {limit}")
        yield name, info.st_size


def read_bounded(path: Path) -> bytes:
    """The bytes of a small file. Raises CheckpointError where it cannot be read or is over MAX_TEXT_BYTES."""
    try:
        with path.open("rb") as source:
            data = source.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_TEXT_BYTES:
        raise CheckpointError(f"{path.name}: is over the limit of {MAX_TEXT_BYTES} bytes")
    return data


def parse_json(kind: type[T], data: bytes, name: str) -> T:
    """The dataclass `kind` from a JSON file's bytes. Raises CheckpointError that names the offending keys."""
    try:
        return parse_config(kind, json.loads(data), name)
    except ConfigError as error:
        raise CheckpointError(error.message) from None
    # A deeply nested file ends in RecursionError; bytes that are no UTF-8, or no JSON, in a ValueError.
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name}: is not JSON") from None


def sha256_of(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a bare checkout that was never installed
        return "unknown"
