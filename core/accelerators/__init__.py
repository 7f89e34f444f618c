"""Ways to run the compressor on static shapes, behind one protocol: `eager` (the reference), `jit`, `neuron`."""

from collections.abc import Callable, Mapping

from core.accelerators.base import Accelerator, Compiled, CompileSpec
from core.accelerators.buckets import Bucket, default_buckets, parse_buckets
from core.accelerators.eager import EagerAccelerator
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
    "JitAccelerator",
    "NeuronAccelerator",
    "compile_compressor",
    "default_buckets",
    "parse_buckets",
]
