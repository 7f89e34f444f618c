"""`export`: a run's best weights, or another checkpoint, as a checkpoint that the service loads.

What was written is loaded as the service would, and must repeat its golden example, or it is taken away again.
"""

import argparse
import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint import check_new, load_checkpoint, read_adapter, save_checkpoint
from core.config import Config
from core.errors import CheckpointError
from core.generator import adapter_shapes
from core.manifest import DTYPES, MANIFEST, parse_json, read_bounded, read_manifest
from core.model import Model, build_model
from core.tensor_files import read_into, read_tensors
from training.graphs import add_graph_arguments, check_graph_arguments, graph_writer, verify_export

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  # the best state of a run, half the size
  python -m training export runs/smollm2 checkpoints/v1 --dtype bfloat16
  # the state a run stopped at
  python -m training export runs/smollm2/last checkpoints/v1-last
  # with all of the generator in it, for engines that take no adapter beside prompt embeddings
  python -m training export checkpoints/v1 checkpoints/v1-merged --merge
  # compiled for AWS Inferentia2, where the Neuron SDK is installed; then SCALEDOWN_ACCELERATOR=neuron
  python -m training export checkpoints/v1 checkpoints/v1-neuron --target neuron --dtype bfloat16
  # the generator too, eight answers at one time, 1024 positions each: prompt and answer
  python -m training export checkpoints/v1 checkpoints/v1-neuron --target neuron --dtype bfloat16 --generator 8x1024
  # a newer checkpoint of the same shapes, with the graphs of that one: nothing is compiled
  python -m training export runs/next checkpoints/v2-neuron --target neuron --dtype bfloat16 \\
      --graphs-from checkpoints/v1-neuron
"""


@dataclasses.dataclass(frozen=True)
class Source:
    """What is exported: a model, its generator's adapter, and the summary of its training."""

    model: Model
    adapter: Mapping[str, Tensor] | None
    training: Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "source", type=Path, help="a run's folder (its best/ is taken), its best/ or last/, or a checkpoint"
    )
    parser.add_argument(
        "out", type=Path, help="the checkpoint's folder, which must not exist yet; its name is the version"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="how the weights are stored")
    parser.add_argument("--merge", action="store_true", help="write the generator whole, its adapter merged in")
    parser.add_argument("--base-model", help="where the generator's base model is now, if not where it was")
    add_graph_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Read, save, and load as the service would. Raises ScaledownError for what the user can mend."""
    check_new(args.out)  # `save_checkpoint` would say so too, but after the source has been read
    check_graph_arguments(args)
    dtype = DTYPES[args.dtype]
    add = graph_writer(args, dtype)
    source = read_source(args.source, args.base_model)
    save_checkpoint(
        source.model, args.out, adapter=source.adapter, training=source.training, dtype=dtype, merge=args.merge, add=add
    )
    try:
        # In float32, as it was recorded, and in bfloat16, as it may be served: what a load would refuse shows here.
        for served in dict.fromkeys([torch.float32, dtype]):
            name = load_checkpoint(args.out, dtype=served, base_model=args.base_model).name
        verify_export(args, dtype)
    except BaseException:  # also where it is stopped: what stays has been verified
        shutil.rmtree(args.out)
        raise
    log.info("%s: loads, and repeats its golden example", name)


def read_source(folder: Path, base_model: str | None = None) -> Source:
    """Read a checkpoint, or a run's folder. Raises CheckpointError where it is neither, or not whole."""
    if (folder / MANIFEST).is_file():
        return _read_checkpoint(folder, base_model)
    state = folder / "best" if (folder / "best").is_dir() else folder
    if not (state / "compressor.safetensors").is_file():
        stopped = (folder / "last" / "compressor.safetensors").is_file()
        hint = f"; the state this run stopped at is {folder / 'last'}" if stopped else ""
        raise CheckpointError(f"{folder}: holds neither a checkpoint ({MANIFEST}) nor a run's weights (best/){hint}")
    return _read_run(state, base_model)


def _read_checkpoint(folder: Path, base_model: str | None) -> Source:
    model = load_checkpoint(folder, base_model=base_model)
    manifest, _ = read_manifest(folder)
    adapter = read_adapter(folder, model.generator, model.config, DTYPES[manifest.dtype])
    return Source(model, adapter, manifest.training)


def _read_run(folder: Path, base_model: str | None) -> Source:
    """A run's `best/` or `last/`: float32 tensors, and the generator as its base model with an adapter beside."""
    config = parse_json(Config, read_bounded(folder / "config.json"), "config.json")
    path = folder / "adapter.safetensors"
    if not path.is_file():  # a run that left the generator alone
        config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, lora=None))
    if base_model is not None:
        config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, base_model=base_model))
    model = build_model(config)
    read_into(model.compressor, folder / "compressor.safetensors", torch.float32)
    adapter, lora = None, config.generator.lora
    if path.is_file():
        if lora is None:
            raise CheckpointError(f"{folder}: has an adapter, but config.json has no generator.lora")
        adapter = dict(read_tensors(path, adapter_shapes(model.generator.model, lora), torch.float32))
    try:
        training = json.loads(read_bounded(folder / "summary.json"))
    except ValueError:
        raise CheckpointError(f"{folder}: summary.json is not JSON") from None
    if not isinstance(training, dict):
        raise CheckpointError(f"{folder}: summary.json is not an object")
    return Source(model, adapter, training)
