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
    GeneratorBuckets,
    JitAccelerator,
    NeuronAccelerator,
    default_buckets,
    default_prefill,
    parse_buckets,
)
from core.accelerators.artifact import accelerate, write_graphs
from core.accelerators.generator_artifact import accelerate_generator
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
    parser.add_argument(
        "--generator",
        metavar="SLOTSxPOSITIONS",
        help="also graphs of the generator, whole on one core: so many answers at one time, of so many positions with "
        "their prompt, such as 8x1024; several capacities with the same slots, such as 8x512,8x1024",
    )
    parser.add_argument(
        "--prefill",
        metavar="BUCKETS",
        help="shapes of the generator's prompts, such as 1x256,1x1024; the longest as --generator has it; default: "
        "1x128, 1x256 and so on. A device holds the generator's weights once for each graph",
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
    shapes = args.buckets or args.generator or args.prefill
    if args.target == "any" and (shapes or args.graphs_from):
        raise ConfigError("--buckets, --generator, --prefill and --graphs-from are for --target jit or neuron")
    if shapes and args.graphs_from:
        raise ConfigError("--graphs-from: brings its own buckets; leave --buckets, --generator and --prefill out")
    if args.prefill and not args.generator:
        raise ConfigError("--prefill: is of the generator's graphs, and needs --generator")


def graph_writer(args: argparse.Namespace, dtype: torch.dtype) -> Callable[[Model, Path], None] | None:
    """What writes the graphs into a checkpoint that is being saved; None where none are wanted.

    Raises ConfigError at once where this machine cannot compile: not after an hour of saving.
    """
    if args.target == "any":
        return None
    accelerator = _accelerator(args)
    accelerator.versions()
    spec = CompileSpec(args.instance if args.target == "neuron" else "", tuple(args.compiler_arg))
    generator = _generator_buckets(args)

    def write(model: Model, folder: Path) -> None:
        buckets = parse_buckets(args.buckets) if args.buckets else default_buckets(longest_row(model.compressor))
        write_graphs(
            model,
            folder,
            accelerator,
            buckets,
            dtype=dtype,
            name=args.out.name,
            spec=spec,
            reuse=args.graphs_from,
            generator=generator,
        )

    return write


def verify_export(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Start from the graphs as the service would. Raises CheckpointError."""
    if args.target == "jit":
        model = load_checkpoint(args.out, dtype=dtype, base_model=args.base_model, verify=False)
        accelerated = accelerate(model, args.out.resolve(), _accelerator(args))
        log.info("%s: graphs of %d buckets repeat their golden vectors", model.name, len(accelerated.buckets))
        graphs = accelerate_generator(model, args.out.resolve(), _accelerator(args))
        if graphs is not None:
            log.info("%s: %d graphs of the generator repeat theirs", model.name, len(graphs.buckets.names))
    elif args.target == "neuron":
        log.warning("compiled, not run: the service checks the golden vectors when it starts on a NeuronCore")


def _generator_buckets(args: argparse.Namespace) -> GeneratorBuckets | None:
    """Shapes of the generator's graphs, if they are wanted. Raises ConfigError."""
    if not args.generator:
        return None
    decode = parse_buckets(args.generator)
    capacity = max(bucket.length for bucket in decode)
    prefill = parse_buckets(args.prefill) if args.prefill else default_prefill(capacity)
    return GeneratorBuckets(prefill, decode)


def _accelerator(args: argparse.Namespace) -> Accelerator:
    return NeuronAccelerator() if args.target == "neuron" else JitAccelerator()
