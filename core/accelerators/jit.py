"""TorchScript traces, one for each bucket: what `neuron` does, on any CPU.

Traces are not stored. A TorchScript file holds code, and its structure in pickle's format; tracing takes seconds, so
the graphs are traced again from the checkpoint's safetensors wherever they are used.
"""

import warnings
from pathlib import Path

import torch
from torch import nn

from core.accelerators.base import Compiled, CompileSpec, Tensors
from core.accelerators.eager import EagerGraph
from core.errors import ConfigError


class JitGraph(EagerGraph):
    """A traced module: unlike others it would take other shapes and types without a word, and be wrong."""

    def save(self, path: Path) -> None:
        """Not done, see above. Raises ConfigError."""
        raise ConfigError("jit: traces are made again where they are used, not stored")


class JitAccelerator:
    """Traces with torch.jit.trace."""

    name = "jit"
    suffix: str | None = None

    def versions(self) -> dict[str, str]:
        """Nothing is stored, so nothing has to fit."""
        return {}

    @torch.inference_mode()
    def compile(self, graph: nn.Module, examples: Tensors, spec: CompileSpec) -> Compiled:
        """Trace `graph`; its parameters are shared with the trace."""
        with warnings.catch_warnings():
            # Deprecated in favour of torch.export, which does not make what Neuron's SDK makes.
            warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
            # The tracer reads every property of transformers' modules, also those that are going to be renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # Sizes are compared in Python, and are constants of a bucket; values are not.
            warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean")
            # What the golden vectors check on other inputs, `check_trace` would check on the same ones.
            traced = torch.jit.trace(graph, examples, check_trace=False)
        return JitGraph(traced, examples)

    def load(self, path: Path) -> Compiled:
        """Not done, see above. Raises ConfigError."""
        raise ConfigError("jit: traces are made again where they are used, not stored")
