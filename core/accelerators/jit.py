"""TorchScript traces, one for each bucket: what `neuron` does, on any CPU.

Traces are not stored. A TorchScript file holds code, and its structure in pickle's format; tracing takes seconds, so
the graphs are traced again from the checkpoint's safetensors wherever they are used.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core.accelerators.base import Compiled, CompileSpec, Tensors
from core.accelerators.eager import copy_weights
from core.errors import ConfigError


class JitGraph:
    """A traced module, held to the shapes and types of its trace: it would take others without a word, and be wrong."""

    def __init__(self, traced: torch.jit.ScriptModule, examples: Tensors) -> None:
        self._traced = traced
        self._expected = [(example.shape, example.dtype) for example in examples]

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Tensors:
        """Run it. Raises ValueError for inputs of another shape or type."""
        if [(each.shape, each.dtype) for each in inputs] != self._expected:
            raise ValueError("the inputs do not have the shapes and types of this bucket")
        return tuple(self._traced(*inputs))

    def replace_weights(self, state: Mapping[str, Tensor]) -> None:
        """Copy them into the trace's parameters."""
        copy_weights(self._traced, state)

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
