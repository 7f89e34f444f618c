"""A double of torch_neuronx (SDK 2.31): it keeps the documented contract and computes on the CPU. No Neuron in it.

What it holds callers to: keywords by keyword; `cpu_backend` only with `--target`; inputs of the traced shapes; weights
that are not in the graph, so that a graph that was loaded computes nothing sensible until `replace_weights`.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FixedShapes(nn.Module):
    """`func`, behind views that only tensors of the examples' sizes can take."""

    def __init__(self, func: nn.Module, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self.func = func
        self.shapes = [tuple(example.shape) for example in examples]

    def forward(self, *inputs: Tensor) -> Any:
        return self.func(*(each.view(shape) for each, shape in zip(inputs, self.shapes, strict=True)))


class NeuronDouble:
    """Stands where the module torch_neuronx stands. `compiled` and `moved` say what was asked of it."""

    __version__ = "2.9.0.2.15.32035"

    def __init__(self) -> None:
        self.compiled: list[list[str]] = []
        self.moved: list[int] = []

    def trace(
        self,
        func: nn.Module,
        example_inputs: tuple[Tensor, ...],
        *_: Any,
        input_output_aliases: Mapping[Any, int] | None = None,
        compiler_workdir: str | None = None,
        compiler_args: str | list[str] | None = None,
        partitioner_config: Any = None,
        inline_weights_to_neff: bool = True,
        cpu_backend: bool = False,
    ) -> torch.jit.ScriptModule:
        assert not _, "keywords by keyword"
        arguments = compiler_args.split() if isinstance(compiler_args, str) else list(compiler_args or [])
        assert not cpu_backend or "--target" in arguments, "cpu_backend needs --target"
        self.compiled.append(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            apart = copy.deepcopy(FixedShapes(func, example_inputs))
            traced = torch.jit.trace(apart, example_inputs, check_trace=False)
        if not inline_weights_to_neff:
            with torch.no_grad():
                for parameter in traced.parameters():
                    parameter.zero_()
        assert isinstance(traced, torch.jit.ScriptModule)
        return traced

    def replace_weights(self, neuron_model: torch.jit.ScriptModule, weights: nn.Module | Mapping[str, Tensor]) -> None:
        state = weights.state_dict() if isinstance(weights, nn.Module) else weights
        found = neuron_model.load_state_dict({f"func.{name}": value for name, value in state.items()}, strict=False)
        assert not found.unexpected_keys
        assert not set(found.missing_keys) & dict(neuron_model.named_parameters()).keys()

    def move_trace_to_device(self, trace: torch.jit.ScriptModule, device_id: int) -> None:
        self.moved.append(device_id)
