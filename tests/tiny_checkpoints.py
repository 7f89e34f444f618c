"""Tiny checkpoints: how they are made, and how they are spoilt on purpose."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config import CompressorConfig, Config, GeneratorConfig, LoraConfig
from core.generator import adapter_shapes
from core.manifest import MANIFEST
from core.model import Model

LORA = LoraConfig(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "down_proj"))


def make_config(generator: Path, encoder: Path | None, lora: LoraConfig | None = None) -> Config:
    """A pointer over an encoder, or the first two layers of the generator."""
    compressor = CompressorConfig(n_layers=2, chunk_tokens=64, rates=(16, 8))
    if encoder is not None:
        compressor = replace(compressor, kind="encoder", base_model=str(encoder), readout="pointer")
    return Config(compressor=compressor, generator=GeneratorConfig(base_model=str(generator), lora=lora))


def random_adapter(model: Model) -> dict[str, Tensor]:
    """Large enough to change the answer."""
    random = torch.Generator().manual_seed(5)
    shapes = adapter_shapes(model.generator.model, LORA)
    return {name: torch.randn(shape, generator=random) * 0.2 for name, shape in shapes.items()}


def sign(folder: Path) -> None:
    """Make the manifest fit what is in the folder, as one would who can write to it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    manifest["files"] = {
        str(path.relative_to(folder)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    save_file(dict(change(load_file(path))), path)
