"""Ways to run the compressor and the generator on static shapes, behind one protocol.

`eager` is the reference; `jit` and `neuron` compile.
"""

from collections.abc import Callable, Mapping

from core.accelerators.base import Accelerator, Compiled, CompileSpec
from core.accelerators.buckets import Bucket, GeneratorBuckets, default_buckets, default_prefill, parse_buckets
from core.accelerators.eager import EagerAccelerator
from core.accelerators.generator_passes import GeneratorGraphs, compile_generator
from core.accelerators.jit import JitAccelerator
from core.accelerators.neuron import NeuronAccelerator
from core.accelerators.rows import AcceleratedCompressor, compile_compressor

ACCELERATORS: Mapping[str, Callable[[], Accelerator]] = {
    "eager": EagerAccelerator,
    "jit": JitAccelerator,
    "neuron": NeuronAccelerator,
}

__all__ = [
    "ACCELERATORS",
    "AcceleratedCompressor",
    "Accelerator",
    "Bucket",
    "CompileSpec",
    "Compiled",
    "EagerAccelerator",
    "GeneratorBuckets",
    "GeneratorGraphs",
    "JitAccelerator",
    "NeuronAccelerator",
    "compile_compressor",
    "compile_generator",
    "default_buckets",
    "default_prefill",
    "parse_buckets",
]
