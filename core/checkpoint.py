"""Checkpoint folders, written whole or not at all and read with suspicion.

    config.json             core.config.Config
    compressor.safetensors  all of the compressor's state: backbone, slots, readout, relevance head
    compressor_base/        an encoder's config and tokenizer; absent for n_layers, which has the generator's
    generator.safetensors   the generator's adapter, if it has one; it is merged into the base model at load
    generator/              or else all of a merged generator, as a model folder that other engines can load
    golden.json, .safetensors   an input and what the model made of it
    graphs/                 the compressor for static shapes, if it was exported for an accelerator
    manifest.json           sha256 of every other file, base models, versions, training summary

Knows nothing about how weights are trained, nor about HTTP.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from core.base_models import BaseModel, resolve_base_model
from core.compressors import Compressor
from core.config import Config, dump_config
from core.errors import CheckpointError
from core.generator import Generator, adapter_shapes, load_generator, merge_lora
from core.golden import read_golden, write_golden
from core.golden_check import record_golden, verify_golden
from core.links import followed
from core.manifest import (
    ALLOWED,
    DTYPES,
    dtype_name,
    parse_json,
    read_bounded,
    read_manifest,
    version_name,
    write_manifest,
)
from core.model import Model, build_compressor, place
from core.pretrained import check_causal_size, read_config
from core.prompts import PromptTemplate
from core.tensor_files import check_tensors, read_header, read_into, read_tensors, shapes_of, write_tensors

COMPRESSOR, ENCODER, ADAPTER, MERGED = "compressor.safetensors", "compressor_base", "generator.safetensors", "generator"


def check_new(folder: Path) -> None:
    """Raises CheckpointError where something stands at `folder`."""
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder}: exists already, and checkpoints are never changed")


def save_checkpoint(
    model: Model,
    folder: Path,
    *,
    adapter: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    merge: bool = False,
    add: Callable[[Model, Path], None] | None = None,
) -> None:
    """Write `model` to the new folder `folder`; it appears whole, or not at all.

    adapter   the generator's LoRA tensors in peft's naming, if `model.config.generator.lora` is given: the generator
              is written as `model.base` and this difference; `model.generator`'s own weights are not looked at
    training  a summary for people, of JSON values
    dtype     float32 or bfloat16, of the compressor's tensors and the adapter's
    merge     write all of the generator with the adapter merged in, in `dtype`, instead of the adapter
    add       writes further files of a checkpoint to the folder it is given, from the model as a load would give it

    The golden example is recorded in float32 on the CPU from the written files, so the base model is loaded again.
    Raises CheckpointError: the folder exists, the disk is full, adapter and config do not belong together.
    """
    check_new(folder)
    if (model.config.generator.lora is None) != (adapter is None):
        raise CheckpointError("generator.lora: an adapter's tensors and its settings go together; one is missing")
    dtype_name(dtype)  # refused before anything is written
    with _staging(folder) as staging:
        write_tensors(staging / COMPRESSOR, model.compressor.state_dict(), dtype)
        if model.config.compressor.kind == "encoder":
            _write_model_folder(staging / ENCODER, model.compressor.backbone.config, model.compressor.tokenizer)
        config, base = model.config, model.base
        if adapter is not None:
            write_tensors(staging / ADAPTER, adapter, dtype)
        if merge or config.generator.merged:
            _merge(staging, config, base, dtype)
            config = replace(config, generator=replace(config.generator, lora=None, merged=True))
            base = replace(base, path=staging / MERGED)
        (staging / "config.json").write_text(dump_config(config), encoding="utf-8")
        saved = _assemble(staging, config, base, model.encoder_base, dtype, torch.device("cpu"), torch.float32)
        write_golden(staging, record_golden(saved))
        if add is not None:
            add(saved, staging)
        write_manifest(staging, dtype=dtype, base=base, encoder=model.encoder_base, training=training or {})


def load_checkpoint(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base_model: str | None = None,
    verify: bool = True,
) -> Model:
    """Load a checkpoint after checking every file's sha256.

    `Model.name` is `<folder>@<first 12 digits of the manifest's sha256>`.

    base_model  another place to find the generator's base model; its sha256 must be the one in the manifest.
                A checkpoint with a merged generator needs no base model.
    verify      also run the golden example (seconds), and refuse a model that does not repeat it

    Raises CheckpointError that says which file, key or tensor is missing, unknown, altered, unsafe or does not fit,
    and BaseModelError where there is no base model of that name.
    """
    folder = followed(folder)  # the folder itself may be a link, such as `current`; nothing in it may
    manifest, digest = read_manifest(folder)
    config = parse_json(Config, read_bounded(folder / "config.json"), "config.json")
    recorded = manifest.generator
    if config.generator.merged:
        base = BaseModel(recorded.name, folder / MERGED, recorded.sha256)
    else:
        found = resolve_base_model(base_model or config.generator.base_model)
        if found.sha256 != recorded.sha256:
            raise CheckpointError(
                f"generator base model: the sha256 of {found.name} is {found.sha256[:16]}..., but the checkpoint was "
                f"made with {recorded.name}, {recorded.sha256[:16]}..."
            )
        base = replace(found, name=recorded.name)
    source = manifest.encoder
    encoder = None if source is None else BaseModel(source.name, folder / ENCODER, source.sha256)
    model = _assemble(folder, config, base, encoder, DTYPES[manifest.dtype], torch.device(device), dtype)
    model.name = version_name(folder, digest)
    model.golden = read_golden(folder, model.generator.hidden_size)
    if verify:
        verify_golden(model, model.golden)
    return model


def read_adapter(folder: Path, generator: Generator, config: Config, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The generator's adapter in `folder`, stored as `dtype`, or None where `config` has none. Raises CheckpointError.

    `generator` says which tensors there must be.
    """
    path, lora = folder / ADAPTER, config.generator.lora
    if path.exists() != (lora is not None):
        raise CheckpointError(f"{ADAPTER}: must be there if, and only if, config.json has generator.lora")
    if lora is None:
        return None
    return dict(read_tensors(path, adapter_shapes(generator.model, lora), dtype))


def _assemble(
    folder: Path,
    config: Config,
    base: BaseModel,
    encoder: BaseModel | None,
    stored: torch.dtype,
    device: torch.device,
    dtype: torch.dtype,
) -> Model:
    """The model in `folder`, whose tensors are `stored`, on `device` as `dtype`. Trusts that hashes were checked."""
    for name, expected in ((MERGED, config.generator.merged), (ENCODER, config.compressor.kind == "encoder")):
        if (folder / name).exists() != expected:
            raise CheckpointError(
                f"{name}/: is {'missing' if expected else 'there'}, which config.json does not expect"
            )
    if config.generator.merged:
        check_causal_size(folder / MERGED)
    generator = load_generator(base, device=device, dtype=dtype)
    adapter = read_adapter(folder, generator, config, stored)
    if adapter is not None and config.generator.lora is not None:
        merge_lora(generator.model, adapter, config.generator.lora)
    compressor = _load_compressor(folder, config, generator, stored)
    place(compressor, device, dtype)
    template = PromptTemplate(generator.tokenizer, config.prompt)
    return Model(config, generator, compressor, template, base, encoder)


def _load_compressor(folder: Path, config: Config, generator: Generator, stored: torch.dtype) -> Compressor:
    """The compressor in float32 on the CPU."""
    encoder = folder / ENCODER if config.compressor.kind == "encoder" else None
    tensors = len(read_header(folder / COMPRESSOR))
    try:
        if encoder is not None:
            read_config(encoder, tensors)
        # First without memory: a config may ask for any size, but the file's tensors are of the size they are.
        with torch.device("meta"):
            shapes = shapes_of(build_compressor(config, generator, encoder))
    # transformers raises whatever a malformed config makes it stumble over.
    except Exception as error:
        raise CheckpointError(f"the compressor that config.json describes cannot be built: {error}") from error
    check_tensors(folder / COMPRESSOR, shapes, stored)
    compressor = build_compressor(config, generator, encoder)
    read_into(compressor, folder / COMPRESSOR, stored)
    return compressor


def _merge(staging: Path, config: Config, base: BaseModel, dtype: torch.dtype) -> None:
    """Replace the adapter in `staging` by a model folder of the whole generator."""
    generator = load_generator(base)
    adapter = read_adapter(staging, generator, config, dtype)
    if adapter is not None and config.generator.lora is not None:
        merge_lora(generator.model, adapter, config.generator.lora)
        (staging / ADAPTER).unlink()
    # One file: the manifest bounds its size, and no index has to be trusted.
    generator.to(dtype).model.save_pretrained(staging / MERGED, max_shard_size="1TB")
    (staging / MERGED / "model.safetensors").chmod(0o644)  # as `write_tensors` does, and why it does
    _write_model_folder(staging / MERGED, generator.model.config, generator.tokenizer)


def _write_model_folder(folder: Path, config: Any, tokenizer: Any) -> None:
    """A model's config and fast tokenizer, in the files that a checkpoint may hold."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        # tokenizer.json says all; some tokenizers also write what they were converted from, or further templates.
        if file.is_dir():
            shutil.rmtree(file)
        elif f"{folder.name}/{file.name}" not in ALLOWED:
            file.unlink()


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that becomes it at the end of the block, or is removed if the block fails."""
    staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        _flush(staging)
        staging.rename(folder)  # atomic; fails where someone has made `folder` in the meantime
        _flush(folder.parent, files=False)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _flush(folder: Path, *, files: bool = True) -> None:
    """Have `folder`, and the files under it, on the disk: a rename must not outlive what it names."""
    for path in [folder, *(folder.rglob("*") if files else ())]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
