"""`export --target jit|neuron`: the part of the export that makes graphs of fixed shapes for an accelerator.

Knows the command line; how graphs are made and checked is core.accelerators.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from core.accelerators import (
    Accelerator,
    CompileSpec,
    JitAccelerator,
    NeuronAccelerator,
    default_buckets,
    parse_buckets,
)
from core.accelerators.artifact import accelerate, write_graphs
from core.accelerators.graph import longest_row
from core.accelerators.neuron import TARGETS
from core.checkpoint import load_checkpoint
from core.errors import ConfigError
from core.model import Model

log = logging.getLogger(__name__)


def add_graph_arguments(parser: argparse.ArgumentParser) -> None:
    """What an export for an accelerator is told."""
    parser.add_argument(
        "--target",
        choices=["any", "jit", "neuron"],
        default="any",
        help="any: runs everywhere; jit, neuron: also graphs of fixed shapes for SCALEDOWN_ACCELERATOR of that name",
    )
    parser.add_argument(
        "--buckets", help="shapes to compile, rows x positions, such as 1x128,1x256,8x256; default: 1 and 8 rows"
    )
    parser.add_argument("--instance", choices=TARGETS, default="inf2", help="neuron: what to compile for")
    parser.add_argument(
        "--compiler-arg", action="append", default=[], help="neuron: one more argument of neuronx-cc; may be repeated"
    )
    parser.add_argument(
        "--graphs-from", type=Path, help="a checkpoint of the same shapes: take its compiled graphs, compile nothing"
    )


def check_graph_arguments(args: argparse.Namespace) -> None:
    """Raises ConfigError where they contradict each other."""
    if args.target == "any" and (args.buckets or args.graphs_from):
        raise ConfigError("--buckets and --graphs-from are for --target jit or neuron")
    if args.buckets and args.graphs_from:
        raise ConfigError("--graphs-from: brings its own buckets; leave --buckets out")


def graph_writer(args: argparse.Namespace, dtype: torch.dtype) -> Callable[[Model, Path], None] | None:
    """What writes the graphs into a checkpoint that is being saved; None where none are wanted.

    Raises ConfigError at once where this machine cannot compile: not after an hour of saving.
    """
    if args.target == "any":
        return None
    accelerator = _accelerator(args)
    accelerator.versions()
    spec = CompileSpec(args.instance if args.target == "neuron" else "", tuple(args.compiler_arg))

    def write(model: Model, folder: Path) -> None:
        buckets = parse_buckets(args.buckets) if args.buckets else default_buckets(longest_row(model.compressor))
        reuse = args.graphs_from
        write_graphs(model, folder, accelerator, buckets, dtype=dtype, name=args.out.name, spec=spec, reuse=reuse)

    return write


def verify_export(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Start from the graphs as the service would. Raises CheckpointError."""
    if args.target == "jit":
        model = load_checkpoint(args.out, dtype=dtype, base_model=args.base_model, verify=False)
        accelerated = accelerate(model, args.out.resolve(), _accelerator(args))
        log.info("%s: graphs of %d buckets repeat their golden vectors", model.name, len(accelerated.buckets))
    elif args.target == "neuron":
        log.warning("compiled, not run: the service checks the golden vectors when it starts on a NeuronCore")


def _accelerator(args: argparse.Namespace) -> Accelerator:
    return NeuronAccelerator() if args.target == "neuron" else JitAccelerator()
