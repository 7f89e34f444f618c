"""Checkpoint folders on this machine: listed, inspected, verified. Each gives a value for JSON and one for a person."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.json import JSON
from rich.table import Table

from core.checkpoint import load_checkpoint
from core.config import Config
from core.errors import CheckpointError
from core.links import followed
from core.manifest import MANIFEST, Manifest, parse_json, read_bounded, read_manifest
from service.versions import version_of

Shown = tuple[Any, Any]


def list_folders(options: argparse.Namespace) -> Shown:
    """The checkpoints in a folder; their files are not verified. Raises CheckpointError."""
    root: Path = options.root
    if not root.is_dir():
        raise CheckpointError(f"{root}: is no folder")
    found = [_summary(folder) for folder in sorted(root.iterdir()) if (folder / MANIFEST).is_file()]
    table = Table("version", "made", "trained", "generator", "compressor", "MB", box=None, header_style="dim")
    for each in found:
        trained = "yes" if each["trained"] else "no"
        size = f"{each['bytes'] / 1e6:.0f}"
        table.add_row(each["version"], each["created"], trained, each["generator"], each["compressor"], size)
    return found, table


def inspect(options: argparse.Namespace) -> Shown:
    """Manifest and config of a checkpoint; its files are not verified. Raises CheckpointError."""
    manifest, config = _read(options.folder)
    result = {
        "version": version_of(followed(options.folder)),
        "manifest": dataclasses.asdict(manifest),
        "config": dataclasses.asdict(config),
    }
    made = {"training": manifest.training, "versions": manifest.versions}
    table = Table("", "", box=None, show_header=False, pad_edge=False)
    for name, value in _summary(options.folder).items():
        table.add_row(name, str(value))
    return result, Group(table, JSON(json.dumps({"config": result["config"], **made})))


def verify(options: argparse.Namespace) -> Shown:
    """Check the files and, unless told not to, load the model and repeat its golden example. Raises CheckpointError."""
    manifest, _ = read_manifest(followed(options.folder))
    checked = ["sha256"]
    if not options.files_only:
        load_checkpoint(options.folder)
        checked.append("golden example")
    version = version_of(followed(options.folder))
    size = sum(record.bytes for record in manifest.files.values())
    result = {"version": version, "files": len(manifest.files), "bytes": size, "checked": checked}
    return result, f"{version}: {len(manifest.files)} files, {size / 1e6:.0f} MB; right: {', '.join(checked)}"


def _read(folder: Path) -> tuple[Manifest, Config]:
    manifest = parse_json(Manifest, read_bounded(folder / MANIFEST), MANIFEST)
    return manifest, parse_json(Config, read_bounded(folder / "config.json"), "config.json")


def _summary(folder: Path) -> dict[str, Any]:
    manifest, config = _read(folder)
    compressor = config.compressor
    return {
        "version": version_of(followed(folder)),
        "created": manifest.created,
        "trained": config.trained,
        "generator": manifest.generator.name,
        "compressor": compressor.base_model or f"{compressor.n_layers} layers",
        "readout": compressor.readout,
        "rates": list(compressor.rates),
        "dtype": manifest.dtype,
        "bytes": sum(record.bytes for record in manifest.files.values()),
    }
