"""`init`: a fresh, untrained checkpoint, so that the service runs before anything is trained.

In `text` mode it answers like the base model. Does not know how a model is trained.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.checkpoint import load_checkpoint, save_checkpoint
from core.config import Config, parse_config
from core.manifest import DTYPES
from core.model import build_model
from training.arguments import MAX_SEED, check_out_folder, whole
from training.config import apply_override, load_config

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  # first 8 layers of the demo's base model as the compressor
  python -m training init --out checkpoints/fresh
  # a small encoder whose embeddings point at the passage's words
  python -m training init --compressor encoder --encoder minilm-l6 --readout pointer --out checkpoints/minilm
  # what a training run would begin with, but for one setting
  python -m training init --config training/configs/smollm2-cpu.yaml compressor.rates=[8,16] --out checkpoints/fresh
"""
# Short forms of the settings most often chosen: flag -> key of the model's config.
FLAGS = {
    "generator": "generator.base_model",
    "compressor": "compressor.kind",
    "encoder": "compressor.base_model",
    "n_layers": "compressor.n_layers",
    "readout": "compressor.readout",
    "order": "compressor.order",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "overrides", nargs="*", default=[], help="settings of the model, as a.b=c (compressor.chunk_tokens=256)"
    )
    parser.add_argument(
        "--config", type=Path, help="YAML of a training run, whose `model` is taken; flags go before it"
    )
    parser.add_argument("--generator", help="base model: a folder, hub id or demo model (default: smollm2-135m)")
    parser.add_argument("--compressor", choices=["n_layers", "encoder"], help="default: n_layers")
    parser.add_argument("--encoder", help="the encoder compressor's base model")
    parser.add_argument("--n-layers", type=whole(1), help="layers the n_layers compressor copies (default: 8)")
    parser.add_argument("--readout", choices=["memory", "pooled", "pointer"], help="default: memory")
    parser.add_argument("--order", choices=["query_first", "document_first"], help="default: query_first")
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="of the slots and heads")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="how the weights are stored")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder, which must not exist yet")


def run(args: argparse.Namespace) -> None:
    """Build, save and load once as the service would. Raises ScaledownError for what the user can mend."""
    check_out_folder(args.out, "--out", new=True)
    flags = [
        f"{key}={json.dumps(getattr(args, flag))}" for flag, key in FLAGS.items() if getattr(args, flag) is not None
    ]
    config = fresh_config(args.config, [*flags, *args.overrides])
    save_checkpoint(build_model(config, seed=args.seed), args.out, dtype=DTYPES[args.dtype])
    log.info("%s: untrained, loads and repeats its golden example", load_checkpoint(args.out).name)


def fresh_config(path: Path | None, overrides: Sequence[str]) -> Config:
    """The model of a training run's YAML, or the default one, with `a.b=c` overrides and no adapter yet.

    Raises ConfigError.
    """
    values: dict[str, Any] = {} if path is None else dataclasses.asdict(load_config(path).model)
    for override in overrides:
        apply_override(values, override)
    config = parse_config(Config, values, "model")
    # A fresh adapter changes nothing (its B is 0), so none is stored; the training run brings its own settings.
    generator = dataclasses.replace(config.generator, lora=None)
    return dataclasses.replace(config, trained=False, generator=generator)
