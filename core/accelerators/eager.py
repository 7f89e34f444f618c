"""The reference: a graph run as it stands, on the same padded shapes as the others. Nothing is compiled."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core.accelerators.base import Compiled, CompileSpec, Tensors
from core.errors import ConfigError


class EagerGraph:
    """A module, held to the shapes and types it was made for."""

    def __init__(self, graph: nn.Module, examples: Tensors) -> None:
        self._graph = graph
        self._expected = [(example.shape, example.dtype) for example in examples]

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Tensors:
        """Run it. Raises ValueError for inputs of another shape or type."""
        if [(each.shape, each.dtype) for each in inputs] != self._expected:
            raise ValueError("the inputs do not have the shapes and types of this bucket")
        return tuple(self._graph(*inputs))

    def replace_weights(self, state: Mapping[str, Tensor]) -> None:
        """Copy them into the module."""
        copy_weights(self._graph, state)

    def save(self, path: Path) -> None:
        """There is nothing to write. Raises ConfigError."""
        raise ConfigError("eager: has no compiled graphs")


@torch.no_grad()
def copy_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `module`. Raises ValueError unless it has all of its parameters, and nothing else.

    Not load_state_dict: a trace also lists buffers that the module it was made of keeps to itself.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    missing = dict(module.named_parameters()).keys() - state.keys()
    if missing or state.keys() - own.keys():
        raise ValueError("these are not the weights of this graph")
    for name, value in state.items():
        own[name].copy_(value)


class EagerAccelerator:
    """Runs modules in PyTorch, operation by operation."""

    name = "eager"
    suffix: str | None = None

    def versions(self) -> dict[str, str]:
        """Nothing is stored, so nothing has to fit."""
        return {}

    def compile(self, graph: nn.Module, examples: Tensors, spec: CompileSpec) -> Compiled:
        """The module itself."""
        return EagerGraph(graph, examples)

    def load(self, path: Path) -> Compiled:
        """There is nothing to read. Raises ConfigError."""
        raise ConfigError("eager: has no compiled graphs")
