"""FSDP: weights, gradients and optimiser state of the layers split over processes. The loop does not know it.

By torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv 2304.11277), a transformer layer a unit; embeddings, slots,
norms and heads stay whole on every process. Tested with two processes on CPU (gloo); not run on GPUs here.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from core.errors import ConfigError
from core.model import Model
from training.batches import TrainExample
from training.runtime import AccelerateRuntime

# Weights live on the accelerator, and every process loads them all and keeps its share.
SETTINGS = {"version": "2", "offload_params": "false", "cpu_ram_efficient_loading": "false"}


class Stack:
    """One sharded backbone, and the part of the model that it belongs to."""

    def __init__(self, part: nn.Module, module: nn.Module, reshard: bool) -> None:
        self.part = part
        self.module = module
        self.layers = shard_layers(module, reshard)
        self.width = int(module.config.hidden_size)  # type: ignore[union-attr, arg-type]  # a transformers model

    def idle_pass(self) -> None:
        """A pass over one position, for its collectives only."""
        weight = next(self.module.parameters())
        inputs = torch.zeros(1, 1, self.width, device=weight.device, dtype=weight.dtype)
        self.module(inputs_embeds=inputs, attention_mask=torch.ones(1, 1, dtype=torch.int64, device=weight.device))


class ShardedRuntime(AccelerateRuntime):
    """Processes that `accelerate launch` set up with FSDP.

    The collectives of sharded layers run where the layers are called, so within a micro-batch every process must call
    the compressor's and then the generator's equally often, forward and backward. A process with less to do makes up
    for it with idle passes; every pass is tied to the loss with weight 0, so that its backward runs wherever the
    others' does.
    """

    sharded = True

    def __init__(self) -> None:
        """Raises ConfigError for settings of accelerate that are not handled here."""
        for name, wanted in SETTINGS.items():
            if os.environ.get(f"FSDP_{name.upper()}", wanted) != wanted:
                raise ConfigError(f"fsdp_config.fsdp_{name}: only {wanted} is supported here")
        super().__init__()
        self._reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
        self._stacks: list[Stack] = []  # in the order in which a micro-batch calls them
        self._ties: list[Tensor] = []
        self._finished = 0  # stacks that no process calls again in this micro-batch
        self._idle = False

    def shard(self, model: Model) -> None:
        """Split the layers of compressor and generator. Parameters are other objects afterwards."""
        parts = ((model.compressor, model.compressor.backbone), (model.generator, model.generator.model.base_model))
        self._stacks = [Stack(part, backbone, self._reshard) for part, backbone in parts]
        for place, stack in enumerate(self._stacks):
            stack.module.register_forward_pre_hook(self._before(place), prepend=True, with_kwargs=True)
            stack.module.register_forward_hook(self._after)

    def even(self, pieces: list[list[TrainExample]]) -> list[list[TrainExample]]:
        """`pieces`, and empty ones up to the number that the process with most has."""
        return pieces + [[] for _ in range(self._most(len(pieces)) - len(pieces))]

    def ties(self) -> list[Tensor]:
        """Zeros that hold the backward of every pass of this micro-batch, idle ones made here too."""
        self._finish(len(self._stacks))
        ties, self._ties, self._finished = self._ties, [], 0
        return ties

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, all weights are whole: processes may run what they like, and decoding gathers nothing a token."""
        layers = [layer for stack in self._stacks for layer in stack.layers]
        for layer in layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(self._reshard)
                layer.reshard()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Those of whole parameters; sharded ones are summed in the backward pass.

        Where no process's loss reached a part, its gradients are zeros of the ties alone: they become absent, as with
        one process, or AdamW would count a step and decay the weights.
        """
        squares = {str(place): sum_of_squares(stack.part.parameters()) for place, stack in enumerate(self._stacks)}
        for place, total in self.sum_counts(squares).items():
            if total == 0:
                self._stacks[int(place)].part.zero_grad(set_to_none=True)
        super().sum_gradients(parameter for parameter in parameters if not isinstance(parameter, DTensor))

    def clip_gradients(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """As with whole gradients: the norm is over all shards."""
        owners = [parameter for parameter in parameters if parameter.grad is not None]
        shards = [parameter for parameter in owners if isinstance(parameter, DTensor)]
        whole = [parameter for parameter in owners if not isinstance(parameter, DTensor)]
        inside = self.sum_counts({"squares": sum_of_squares(shards)})["squares"]
        norm = math.sqrt(inside + sum_of_squares(whole))
        if norm > most:
            for parameter in owners:
                local_gradient(parameter).mul_(most / norm)
        return norm

    def _before(self, place: int) -> Any:
        def hook(module: nn.Module, args: object, kwargs: dict[str, Any]) -> tuple[object, dict[str, Any]] | None:
            if not torch.is_grad_enabled():
                return None
            if not self._idle:
                self._finish(place)
                self._most(1)  # the others' answer to this is a pass, their own or an idle one
            inputs = kwargs["inputs_embeds"]
            # The first layer's gradients are reduced when its inputs' are known; of frozen inputs, not in turn.
            return args, kwargs if inputs.requires_grad else kwargs | {"inputs_embeds": inputs.requires_grad_()}

        return hook

    def _after(self, module: nn.Module, args: object, output: Any) -> None:
        if torch.is_grad_enabled():
            self._ties.append(output.last_hidden_state.float().sum() * 0)

    def _finish(self, places: int) -> None:
        """This process has made its own passes of the first `places` stacks: idle ones until no other makes any."""
        for stack in self._stacks[self._finished : places]:
            while self._most(0):
                self._idle = True
                stack.idle_pass()
                self._idle = False
        self._finished = max(self._finished, places)

    def _most(self, count: int) -> int:
        """The largest `count` of all processes."""
        most = torch.tensor(count, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)


def shard_layers(backbone: nn.Module, reshard: bool) -> list[FSDPModule]:
    """Split every transformer layer of `backbone` over the processes. Raises ConfigError where it has none."""
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"FSDP: {type(backbone).__name__} has no layers that can be sharded; use DDP")
    sharded = []
    for layer in layers:
        module = fully_shard(layer, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)  # the loss is divided by counts over all processes: a sum is wanted
        module.set_force_sum_reduction_for_comms(True)
        sharded.append(module)
    # The backbone itself holds no shard: it lets its layers share their streams and fetch each other early.
    fully_shard(backbone, ignored_params={p for p in backbone.parameters() if not isinstance(p, DTensor)})
    return sharded


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a gradient."""
    gradient = parameter.grad
    assert gradient is not None  # asked of those that have one
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def sum_of_squares(parameters: Iterable[nn.Parameter]) -> float:
    """Of what this process holds of their gradients; those without one count nothing."""
    return sum(float(local_gradient(p).float().square().sum()) for p in parameters if p.grad is not None)
