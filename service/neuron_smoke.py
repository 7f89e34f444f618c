"""A first run on Neuron hardware: load a checkpoint's graphs, check them, time them, write a receipt as JSON.

    python -m training export checkpoints/demo checkpoints/demo-neuron --target neuron   # where the SDK is
    python -m service.neuron_smoke checkpoints/demo-neuron --out neuron-receipt.json     # on an inf2 or trn1 instance

`--accelerator jit` runs the same steps on any CPU, for a checkpoint exported with `--target jit`; its receipt says so.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.accelerators import ACCELERATORS, AcceleratedCompressor, Bucket, GeneratorGraphs
from core.accelerators.artifact import GOLDEN, accelerate
from core.accelerators.base import Tensors
from core.accelerators.buckets import decode_name, prefill_name
from core.accelerators.generator_artifact import GOLDEN as GENERATOR_GOLDEN
from core.accelerators.generator_artifact import accelerate_generator
from core.accelerators.generator_graph import GeneratorGraph, decode_example, prefill_example
from core.accelerators.generator_vectors import verify_generator
from core.accelerators.graph import CompressorGraph, example_batch, graph_inputs, graph_tensors
from core.accelerators.record import FOLDER, read_record
from core.accelerators.vectors import verify_vectors
from core.checkpoint import load_checkpoint
from core.errors import ConfigError, ScaledownError
from core.links import followed
from core.manifest import DTYPES
from core.model import Model

PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")  # an EC2 instance's type
PACKAGES = ("torch", "torch-neuronx", "neuronx-cc", "libneuronxla", "transformers", "scaledown")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 where everything held, 1 and the reason where it did not; a receipt is written in either case."""
    args = build_parser().parse_args(arguments)
    receipt: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "accelerator": args.accelerator,
        "ok": False,
        "machine": machine(),
    }
    try:
        receipt |= smoke(followed(args.checkpoint), args.accelerator, args.passes)
        receipt["ok"] = True
    except ScaledownError as error:
        receipt["error"] = error.message
    text = json.dumps(receipt, indent=2) + "\n"
    args.out.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0 if receipt["ok"] else 1


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m service.neuron_smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a folder that was exported with --target neuron")
    parser.add_argument("--out", type=Path, default=Path("neuron-receipt.json"), help="where the receipt goes")
    parser.add_argument("--passes", type=int, default=20, help="timed passes of each bucket")
    parser.add_argument(
        "--accelerator", choices=["neuron", "jit"], default="neuron", help="jit: a try without hardware"
    )
    return parser


def smoke(folder: Path, name: str, passes: int) -> dict[str, Any]:
    """Load, check, swap the weights and check again, time every bucket. Raises ScaledownError."""
    if name == "neuron" and not list(Path("/dev").glob("neuron*")):
        raise ConfigError("there is no /dev/neuron0: this is no Neuron instance, or its driver is not loaded")
    record = read_record(folder)
    model = load_checkpoint(folder, dtype=DTYPES[record.dtype])
    began = time.perf_counter()
    accelerated = accelerate(model, folder, ACCELERATORS[name]())
    loaded = time.perf_counter() - began
    accelerated.replace_weights(CompressorGraph(model.compressor).state_dict())
    errors = verify_vectors(model, accelerated, folder / FOLDER / GOLDEN)
    receipt = {
        "checkpoint": model.name,
        "target": record.target,
        "dtype": record.dtype,
        "load_and_check_seconds": round(loaded, 3),
        "errors": errors,
        "milliseconds": {str(bucket): timed(model, accelerated, bucket, passes) for bucket in accelerated.buckets},
    }
    generator = accelerate_generator(model, folder, ACCELERATORS[name]())
    return receipt if generator is None else receipt | {"generator": smoke_generator(generator, folder, passes)}


def smoke_generator(graphs: GeneratorGraphs, folder: Path, passes: int) -> dict[str, Any]:
    """The same for the generator's graphs. Raises CheckpointError."""
    graphs.replace_weights(GeneratorGraph(graphs.generator).state_dict())
    errors = verify_generator(graphs, folder / FOLDER / GENERATOR_GOLDEN)
    inputs: dict[str, Tensors] = {}
    for bucket in graphs.buckets.prefill:
        inputs[prefill_name(bucket)] = prefill_example(graphs.generator, bucket)
    for bucket in graphs.buckets.decode:
        inputs[decode_name(bucket)] = decode_example(graphs.generator, bucket)
    times = {name: repeated(partial(graphs.run, name, *given), passes) for name, given in inputs.items()}
    return {"errors": errors, "milliseconds": times}


def timed(model: Model, accelerated: AcceleratedCompressor, bucket: Bucket, passes: int) -> Mapping[str, float]:
    """`repeated` for one bucket of the compressor."""
    with torch.inference_mode():
        batch = example_batch(model.compressor, bucket)
        inputs = graph_tensors(batch, graph_inputs(model.compressor), model.generator.embed)
    return repeated(lambda: accelerated.run(bucket, inputs), passes)


def repeated(run: Callable[[], object], passes: int) -> Mapping[str, float]:
    """Median and slowest of `passes` passes in milliseconds, copies to and from the device included."""
    seconds = []
    for _ in range(passes):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {"median": round(1000 * statistics.median(seconds), 3), "slowest": round(1000 * max(seconds), 3)}


def machine() -> dict[str, Any]:
    """What the receipt says of where it was made."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "product": PRODUCT.read_text(encoding="utf-8").strip() if PRODUCT.is_file() else platform.machine(),
        "devices": sorted(str(path) for path in Path("/dev").glob("neuron*")),
        "neuron_ls": _neuron_ls(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _neuron_ls() -> Any:
    """What `neuron-ls` knows; None where it is not there or does not answer."""
    command = shutil.which("neuron-ls")
    if command is None:
        return None
    try:
        done = subprocess.run([command, "--json-output"], capture_output=True, text=True, timeout=30, check=True)
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
