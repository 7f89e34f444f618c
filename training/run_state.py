"""A run on disk: `best/` and `last/`, each whole or not there at all. safetensors and JSON only.

run/config.yaml            the resolved configuration
run/metrics.jsonl          one object a line
run/{best,last}/           compressor.safetensors, adapter.safetensors, config.json, summary.json
run/last/                  also trainable.safetensors, optimizer.safetensors, progress.json: to go on from
"""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from core.config import dump_config
from core.errors import CheckpointError, ConfigError
from core.manifest import MANIFEST, read_version, sha256_of
from core.model import Model
from training.adapters import adapted_names, adapter_state, compressor_state, whole_copy
from training.config import TrainConfig
from training.runtime import Runtime
from training.start import adapter_file, base_hashes

# Of `loop`, what a run may go on with otherwise: how long, what is said and saved of it, how a step fits the memory.
LENGTH = ("epochs", "max_steps", "patience")
REPORTS = ("eval_every", "save_every", "log_every")
MEMORY = ("micro_batch_tokens", "row_batch_tokens", "gradient_checkpointing")


@dataclass
class Progress:
    """Where a run stands: steps done, examples seen, the best dev score and how many evaluations ago it was.

    settings  what it must go on with, as `run_settings` has it
    window    of each step since the last log line, what `summarise` makes that line of
    """

    step: int = 0
    examples: int = 0
    skipped: int = 0
    best_score: float | None = None
    evaluations_since_best: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    window: list[dict[str, float]] = field(default_factory=list)

    def is_over(self, steps: int, patience: int | None) -> bool:
        """Whether all `steps` are done, or so many evaluations were no better that `patience` is used up."""
        return self.step >= steps or (patience is not None and self.evaluations_since_best >= patience)


def run_settings(config: TrainConfig, model: Model, runtime: Runtime) -> dict[str, Any]:
    """All of `config` that a run must keep when it goes on, as JSON; of its data files the sha256, not the place.

    `resolved` has, by their dotted keys, what other names stand for here: the sha256 of weights, and the precision. Not
    how many processes there are: only which values dropout sets to 0 depends on that.
    """
    values = dataclasses.asdict(config) | {"model": dataclasses.asdict(model.config)}
    if config.optimizer.compressor_lora:
        values["optimizer"]["compressor_lora"]["target_modules"] = adapted_names(model.compressor)
    for name in (*LENGTH, *REPORTS, *MEMORY):
        del values["loop"][name]
    for name in ("train", "dev"):
        values["data"][name] = sha256_of(Path(values["data"][name]))
    precision = "bf16" if runtime.computes_in_bfloat16(config.loop.precision) else "fp32"
    values["resolved"] = _begun_from(config) | {
        "model.compressor.base_model": "",
        **base_hashes(model),
        "loop.precision": precision,
    }
    kept: dict[str, Any] = json.loads(json.dumps(values))  # as it reads back: tuples become lists
    return kept


def _begun_from(config: TrainConfig) -> dict[str, list[str]]:
    """sha256 of the files that are read for `start` and for `start_adapter`."""
    files: dict[str, list[Path]] = {"start": [], "start_adapter": []}
    if config.start:
        files["start"].append(Path(config.start) / "compressor.safetensors")
    source = "start_adapter" if config.start_adapter else "start"
    folder = config.start_adapter or config.start
    if folder and config.model.generator.lora is not None and (adapter := adapter_file(Path(folder))):
        files[source].append(adapter)
    return {key: [sha256_of(file) for file in read] for key, read in files.items()}


def changed_settings(noted: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two `run_settings` differ; a name counts by what it stands for, if that was noted."""
    one, other = dict(noted), dict(now)
    stood, stands = one.pop("resolved", None), other.pop("resolved")
    changed = differing(one, other)
    if stood is not None:  # an older version noted names only
        changed = [key for key in changed if key not in stands] + differing(stood, stands)
    return sorted(changed)


def differing(one: Any, other: Any, name: str = "") -> list[str]:
    """The dotted keys in which two trees of settings differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        lists = name.endswith(".target_modules") and isinstance(one, list) and isinstance(other, list)
        same = sorted(one) == sorted(other) if lists else one == other  # the order in which layers are named is none
        return [] if same else [name]
    keys = sorted(one.keys() | other.keys())
    return [at for key in keys for at in differing(one.get(key), other.get(key), f"{name}.{key}" if name else key)]


def write_folder(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]) -> None:
    """Replace `folder` as a whole: a kill or a full disk at any moment leaves the old or the new one complete.

    Raises CheckpointError where it cannot be written.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, state in tensors.items():
            save_file(dict(state), partial / name)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder} cannot be written, what was saved there before is intact: {error}") from None
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process of this machine trains in the run's `folder`, which exists.

    Raises ConfigError where one does already: two that write one `last/` would leave a mixture of both.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends, however it does
        except BlockingIOError:
            raise ConfigError(f"--out {folder}: another process trains there; stop it or give another folder") from None
        except OSError:
            pass  # a file system without locks, as some cluster's are
        yield
    finally:
        os.close(handle)


def recover_folder(folder: Path) -> None:
    """Undo a kill between the two renames of `write_folder`."""
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        old.rename(folder)


def save_weights(
    model: Model,
    config: TrainConfig,
    progress: Progress,
    folder: Path,
    state: Mapping[str, Mapping[str, Tensor]] | None = None,
    write: bool = True,
) -> None:
    """Write `folder` (`best/` or `last/`); `state` holds the groups of tensors to go on from, by file name.

    Not `write`: only take part in gathering sharded weights for the process that writes.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {
        "compressor.safetensors": compressor_state(model.compressor, config.optimizer.compressor_lora)
    }
    adapter = adapter_state(model.generator.model)
    if adapter:
        tensors["adapter.safetensors"] = adapter
    summary = {
        "steps": progress.step,
        "examples": progress.examples,
        "dev": progress.scores,
        "start": _origin(config.start),
        "base_models": base_hashes(model),
    }
    texts = {
        "config.json": dump_config(dataclasses.replace(model.config, trained=True)),
        "summary.json": json.dumps(summary, indent=2) + "\n",
    }
    if state is not None:
        tensors |= state
        texts["progress.json"] = json.dumps(dataclasses.asdict(progress))
    if write:
        write_folder(folder, tensors, texts)


def _origin(start: str) -> str:
    """What a run began from, not where that lies on this machine: a checkpoint's version, or a run and its state."""
    if not start:
        return ""
    folder = Path(start)
    return read_version(folder) if (folder / MANIFEST).is_file() else "/".join(folder.parts[-2:])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """AdamW's moments and step counts as named tensors."""
    return {
        f"{key}/{name}": whole_copy(value)
        for parameter, name in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_run(
    folder: Path, settings: dict[str, Any], optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> Progress:
    """Load `last/` into the trainable parameters and the optimiser.

    Raises ConfigError where it is of other settings than `settings`, CheckpointError where it does not fit.
    """
    try:
        trainable = load_file(folder / "trainable.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be resumed from: {error}") from None
    way_out = f"give a new run folder (start={folder} begins from its weights)"
    if not progress.settings:
        raise CheckpointError(f"{folder} is of an older version, which did not note its settings; {way_out}")
    if changed := changed_settings(progress.settings, settings):
        raise ConfigError(f"{folder} was trained with other settings ({', '.join(changed)}); {way_out}")
    progress.settings = settings  # all is noted from now on where an older version began
    shapes = {name: parameter.shape for parameter, name in names.items()}
    if {name: value.shape for name, value in trainable.items()} != shapes:
        raise CheckpointError(f"{folder} was trained with another base model; {way_out}")
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(placed_like(parameter, trainable[name]))
            if f"step/{name}" in moments:
                # AdamW keeps its step count on the CPU, the moments beside the parameter.
                optimizer.state[parameter] = {"step": moments[f"step/{name}"]} | {
                    key: placed_like(parameter, moments[f"{key}/{name}"]) for key in ("exp_avg", "exp_avg_sq")
                }
    return progress


def placed_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value` on the device of `parameter`, or the shards of it that this process has of a sharded one."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    # Every process has read the whole value, so none needs to be sent any.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
