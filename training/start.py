"""What a run begins from: another run's `best/` or `last/`, or an exported checkpoint, whose settings must be its own.

Of the same shapes weights fit any settings, so what config.json says there is compared with the run's. Rates, budgets
and allocation may differ.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from core.config import CompressorConfig, Config
from core.errors import CheckpointError, ConfigError
from core.manifest import MANIFEST, Manifest, parse_json, read_bounded
from core.model import Model
from training.adapters import load_adapter

GENERATOR, ENCODER = "model.generator.base_model", "model.compressor.base_model"
DROPPED = (
    "note: the generator's adapter in {folder} is not part of this run, which has no model.generator.lora, nor of what "
    "is exported from it; start_adapter={folder} in a later stage takes it up"
)


def start_from(model: Model, folder: Path, *, adapter: bool = True, say: bool = True) -> None:
    """Begin from the weights of another run's `best/` or `last/`, or of an exported checkpoint.

    `adapter`: a generator adapter is taken too, where the folder has one; where the run has none, `say` prints that.
    Raises ConfigError for weights of other settings, CheckpointError where shapes differ, and for a merged checkpoint,
    whose adapter is no longer apart.
    """
    if (folder / "generator").exists():
        raise CheckpointError(f"start: {folder} has its adapter merged into the generator; begin from one that has not")
    config = _read_config(folder)
    own, theirs = (_compressor_settings(each.compressor) for each in (model.config, config))
    _check_same("start", folder, theirs, own)
    _check_bases(model, folder, config, "start", [GENERATOR, ENCODER])
    try:
        weights = {name: value.float() for name, value in load_file(folder / "compressor.safetensors").items()}
        if "slots" in weights:
            weights["slots"] = _fit_slots(weights["slots"], model.compressor.slots)
        model.compressor.load_state_dict(weights, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"start: {folder} does not fit model.compressor: {error}") from None
    file = adapter_file(folder)
    if not adapter or file is None:
        return
    if model.config.generator.lora is not None:
        _load_adapter(model, file, config, "start")
    elif say:
        tqdm.write(DROPPED.format(folder=folder))


def start_adapter_from(model: Model, folder: Path) -> None:
    """Begin from the generator's adapter of a run's `best/` or `last/`, or of a checkpoint; its compressor may be any.

    Raises ConfigError for an adapter of other settings, CheckpointError where there is none.
    """
    if model.config.generator.lora is None:
        raise CheckpointError("start_adapter: model.generator.lora is not given, so there is no adapter to set")
    file = adapter_file(folder)
    if file is None:
        raise CheckpointError(f"start_adapter: {folder} has no adapter")
    config = _read_config(folder)
    _check_bases(model, folder, config, "start_adapter", [GENERATOR])
    _load_adapter(model, file, config, "start_adapter")


def _fit_slots(slots: Tensor, own: Tensor) -> Tensor:
    """`slots` (l + 1, width), [RR] last, as many as `own` has: other rates or chunks need more or fewer than were kept.

    Slots stand by number from the first on at every rate; those that `slots` lacks stay as they are in `own`.
    """
    fitted = own.detach().clone()
    shared = min(len(slots), len(own)) - 1
    fitted[:shared], fitted[-1] = slots[:shared], slots[-1]
    return fitted


def adapter_file(folder: Path) -> Path | None:
    """Where a run's folder, or a checkpoint, keeps its adapter."""
    files = (folder / name for name in ("adapter.safetensors", "generator.safetensors"))
    return next((file for file in files if file.exists()), None)


def base_hashes(model: Model) -> dict[str, str]:
    """sha256 of the weights that `model` was built from, by the dotted keys of their names."""
    encoder = {} if model.encoder_base is None else {ENCODER: model.encoder_base.sha256}
    return {GENERATOR: model.base.sha256} | encoder


def _load_adapter(model: Model, file: Path, config: Config, key: str) -> None:
    """Set the adapter from `file`, beside which `config` stands. Raises ConfigError and CheckpointError."""
    own, theirs = model.config.generator.lora, config.generator.lora
    if theirs is None or own is None:
        raise CheckpointError(f"{key}: {file.parent} has an adapter, but its config.json has no generator.lora")
    names = [f"model.generator.lora.{name}" for name in ("r", "alpha")]
    _check_same(
        key,
        file.parent,
        dict(zip(names, (theirs.r, theirs.alpha), strict=True)),
        dict(zip(names, (own.r, own.alpha), strict=True)),
    )
    try:
        load_adapter(model.generator.model, load_file(file), f"{key} {file.parent}")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{key}: {file} cannot be read: {error}") from None


def _read_config(folder: Path) -> Config:
    """What the weights in `folder` are. Raises CheckpointError."""
    try:
        return parse_json(Config, read_bounded(folder / "config.json"), "config.json")
    except CheckpointError as error:
        raise CheckpointError(f"{folder}, {error.message}: it says what the weights beside it are") from None


def _compressor_settings(config: CompressorConfig) -> dict[str, Any]:
    """What the weights of a compressor mean, by dotted keys: they are of no use with other values."""
    names = ["kind", "readout", "order"]
    if config.kind == "n_layers":
        names.append("n_layers")
    if config.readout == "pointer":
        names += ["pointer_window", "pointer_lead"]
    return {f"model.compressor.{name}": getattr(config, name) for name in names}


def _check_bases(model: Model, folder: Path, config: Config, key: str, names: list[str]) -> None:
    """Raises ConfigError for other base models: by their sha256, or by name where `folder` has noted none."""
    noted, own = _noted_hashes(folder), base_hashes(model)
    for name in names:
        part = "generator" if name == GENERATOR else "compressor"
        theirs, ours = (getattr(each, part).base_model for each in (config, model.config))
        if noted.get(name, own.get(name)) != own.get(name) or (name not in noted and theirs != ours):
            raise ConfigError(
                f"{key} {folder}: is of another {name}, {theirs} (sha256 {noted.get(name, 'not noted')[:12]}), than "
                f"this run, {ours} ({own.get(name, 'none')[:12]}); give that of {key}, or begin from another folder"
            )


def _noted_hashes(folder: Path) -> dict[str, str]:
    """As `base_hashes`, of what the weights in `folder` were made from; none where an older version noted none."""
    if (folder / MANIFEST).is_file():
        manifest = parse_json(Manifest, read_bounded(folder / MANIFEST), MANIFEST)
        encoder = {} if manifest.encoder is None else {ENCODER: manifest.encoder.sha256}
        return {GENERATOR: manifest.generator.sha256} | encoder
    if not (folder / "summary.json").is_file():
        return {}
    try:
        noted: dict[str, str] = json.loads(read_bounded(folder / "summary.json")).get("base_models", {})
    except (ValueError, AttributeError):
        raise CheckpointError(f"{folder}: summary.json is not an object in JSON") from None
    return noted


def _check_same(key: str, folder: Path, theirs: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises ConfigError that names the settings which differ."""
    names = sorted(name for name in theirs.keys() & own.keys() if theirs[name] != own[name])
    if names:
        values = "; ".join(f"{name} is {theirs[name]}, here {own[name]}" for name in names)
        raise ConfigError(
            f"{key} {folder}: was trained with other settings ({values}); give its values, or leave {key} out"
        )
