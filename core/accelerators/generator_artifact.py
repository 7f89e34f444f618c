"""The generator's part of the folder `graphs/` of a checkpoint.

    generator.safetensors        golden vectors: what the generator, as it is, made of a prompt for each bucket
    prefill-1x256.neff.pt        a compiled graph (neuron only) that reads a prompt
    decode-8x1024.neff.pt        a compiled graph (neuron only) that writes a token in each of 8 slots

The weights are those of the generator that the checkpoint loads. Whatever does not fit is fatal. Knows no compiler.
"""

import copy
import logging
import shutil
from pathlib import Path

import torch

from core.accelerators.base import Accelerator, Compiled, CompileSpec
from core.accelerators.buckets import GeneratorBuckets, check_generator_buckets
from core.accelerators.generator_graph import GeneratorGraph, generator_architecture
from core.accelerators.generator_passes import GeneratorGraphs, compile_graphs
from core.accelerators.generator_vectors import record_generator, verify_generator
from core.accelerators.record import FOLDER, GeneratorRecord, check_machine, read_record_of, refuse_unless
from core.errors import CheckpointError
from core.generator import Generator
from core.model import Model
from core.tensor_files import write_tensors

log = logging.getLogger(__name__)

GOLDEN = "generator.safetensors"


def write_generator(
    generator: Generator,
    folder: Path,
    accelerator: Accelerator,
    buckets: GeneratorBuckets,
    dtype: torch.dtype,
    spec: CompileSpec,
    reuse: Path | None = None,
    known: GeneratorRecord | None = None,
) -> GeneratorRecord:
    """Write graphs of `generator` (float32, on the CPU) and their golden vectors into `folder`; their record.

    reuse, known   a checkpoint whose compiled graphs are taken as they are, and their record

    Raises ConfigError, and CheckpointError where the graphs of `reuse` are not of this architecture.
    """
    check_generator_buckets(buckets, generator.max_tokens)
    record = GeneratorRecord(architecture=generator_architecture(generator), buckets=buckets)
    if known is not None and known.architecture != record.architecture:
        raise CheckpointError("graphs: those of the other checkpoint are of another generator; compile new ones")
    write_tensors(folder / GOLDEN, record_generator(generator, buckets), torch.float32)
    if accelerator.suffix is None:
        return record
    if reuse is not None:
        for name in buckets.names:
            shutil.copyfile(reuse / FOLDER / f"{name}{accelerator.suffix}", folder / f"{name}{accelerator.suffix}")
        return record
    for name, graph in compile_graphs(_in_dtype(generator, dtype), accelerator, buckets, spec):
        log.info("compiled graph %s", name)
        graph.save(folder / f"{name}{accelerator.suffix}")
    return record


def accelerate_generator(model: Model, folder: Path, accelerator: Accelerator) -> GeneratorGraphs | None:
    """The generator's graphs in the checkpoint `folder`, with `model`'s weights, once they have repeated their golden
    vectors; None where the checkpoint has none.

    `model` is what `load_checkpoint` made of the same folder. Raises CheckpointError for whatever does not fit, and
    ConfigError where this machine cannot run them.
    """
    record = read_record_of(folder, model.name, accelerator)
    if record.generator is None:
        return None
    generator, buckets = model.generator, record.generator.buckets
    check_machine(record, model, accelerator)
    check_generator_buckets(buckets, generator.max_tokens)
    refuse_unless(generator=(record.generator.architecture, generator_architecture(generator)))
    if accelerator.suffix is None:
        compiled = dict(compile_graphs(generator, accelerator, buckets, record.spec))
    else:
        compiled = _load(generator, folder / FOLDER, accelerator, buckets)
    graphs = GeneratorGraphs(generator, buckets, compiled)
    verify_generator(graphs, folder / FOLDER / GOLDEN)
    return graphs


def _load(
    generator: Generator, folder: Path, accelerator: Accelerator, buckets: GeneratorBuckets
) -> dict[str, Compiled]:
    """Stored graphs with the generator's weights, which an accelerator's memory then holds once for each."""
    state = GeneratorGraph(generator).state_dict()
    compiled = {name: accelerator.load(folder / f"{name}{accelerator.suffix}") for name in buckets.names}
    for graph in compiled.values():
        graph.replace_weights(state)
    return compiled


def _in_dtype(generator: Generator, dtype: torch.dtype) -> Generator:
    """A copy with its weights as `dtype`; rotary frequencies are buffers, and stay float32."""
    if dtype == generator.dtype:
        return generator
    model = copy.deepcopy(generator.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return Generator(model, generator.tokenizer)
