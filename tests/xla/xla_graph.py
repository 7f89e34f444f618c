"""Any of our graphs on XLA's device, what its compiler is given, and how often it compiles.

An import of this module skips the module that imports it where torch_xla is not installed.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.accelerators.base import Compiled, CompileSpec, Tensors

os.environ.setdefault("PJRT_DEVICE", "CPU")
torch_xla = pytest.importorskip("torch_xla", reason="torch_xla lives in an environment of its own: make test-xla")
metrics = pytest.importorskip("torch_xla.debug.metrics")


class XlaGraph:
    """A graph on XLA's device: lazily traced at every call, compiled when its shapes are new."""

    def __init__(self, graph: nn.Module) -> None:
        self._graph = copied(graph).to(torch_xla.device())

    @torch.no_grad()
    def record(self, *inputs: Tensor) -> tuple[list[Tensor], Tensors]:
        """Inputs on the device, and outputs that are not computed yet."""
        moved = [each.to(torch_xla.device()) for each in inputs]
        torch_xla.sync()
        return moved, self._graph(*moved)

    @torch.inference_mode(False)  # lazy tensors cannot be made in it
    def __call__(self, *inputs: Tensor) -> Tensors:
        _, outputs = self.record(*(each.clone() for each in inputs))
        torch_xla.sync()
        return tuple(each.cpu() for each in outputs)

    def replace_weights(self, state: Mapping[str, Tensor]) -> None:
        """As the protocol has it."""
        self._graph.load_state_dict(state)

    def save(self, path: Path) -> None:
        raise NotImplementedError


class XlaAccelerator:
    """XLA as an `Accelerator`. A graph is compiled by its first call, not before."""

    name = "xla"
    suffix: str | None = None

    def versions(self) -> dict[str, str]:
        return {}

    def compile(self, graph: nn.Module, examples: Tensors, spec: CompileSpec) -> Compiled:
        return XlaGraph(graph)

    def load(self, path: Path) -> Compiled:
        raise NotImplementedError


def copied(graph: nn.Module) -> nn.Module:
    """`graph` with weights of its own; tokenizers in it stay shared."""
    tokenizers = [module.tokenizer for module in graph.modules() if hasattr(module, "tokenizer")]
    return copy.deepcopy(graph, {id(each): each for each in tokenizers})


def forget_metrics() -> None:
    """Count from here on; what is still to be computed is not counted."""
    torch_xla.sync()
    metrics.clear_all()


def compiles() -> int:
    """How often something was compiled."""
    data = metrics.metric_data("CompileTime")
    return 0 if data is None else int(data[0])


def host_operators() -> list[str]:
    """Operators that XLA does not know, and that ran on the host, in the middle of a graph."""
    return [name for name in metrics.counter_names() if name.startswith("aten::")]


def unread(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[int]:
    """Which of the inputs that `XlaGraph.record` gave the compiled graph of `outputs` would not read."""
    read, _ = torch_xla._XLAC._get_tensors_xla_device_data_node(list(outputs))
    return [index for index, each in enumerate(inputs) if torch_xla._XLAC._xla_get_tensor_id(each) not in read]


def hlo_of(outputs: Sequence[Tensor]) -> str:
    """What the compiler is given for `outputs` of `XlaGraph.record`."""
    hlo: str = torch_xla._XLAC._get_xla_tensors_hlo(list(outputs))
    assert "ENTRY" in hlo
    return hlo


def dynamic_shapes(hlo: str) -> list[str]:
    """Shapes in XLA's notation of a size that depends on values."""
    return re.findall(r"\[[^\]]*<=[^\]]*\]", hlo)
