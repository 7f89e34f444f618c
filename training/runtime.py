"""Where a run runs: device, precision and the other processes. The loop asks this and never which hardware it is on.

Processes come from `accelerate launch` (CPU with gloo, CUDA with NCCL). FSDP is `training/sharding.py`, Trainium is
`training/trainium.py`; `training/hardware.py` chooses.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn

from core.compute_dtype import best_dtype
from core.model import Model
from training.batches import TrainExample
from training.config import Precision

M = TypeVar("M", bound=nn.Module)


class Runtime(Protocol):
    """What the loop needs of its hardware; what has a body here is what most need.

    sharded  whether a process holds only a part of the weights: then all of them must take part in saving
    """

    device: torch.device
    rank: int
    world: int
    sharded: bool = False

    def shard(self, model: Model) -> None:
        """Split the weights over processes, once adapters are in place and before anything refers to parameters."""
        return

    def even(self, pieces: list[list[TrainExample]]) -> list[list[TrainExample]]:
        """The micro-batches of a step, with empty ones where every process must have equally many."""
        return pieces

    def ties(self) -> list[Tensor]:
        """Zeros to add to the loss of a micro-batch, where passes must be made that its loss does not need."""
        return []

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, every process holds all weights."""
        return nullcontext()

    def clip_gradients(self, parameters: Iterable[nn.Parameter], most: float) -> float:
        """Scale gradients to a norm of at most `most`; returns the norm before."""
        return float(nn.utils.clip_grad_norm_(list(parameters), most))

    def for_evaluation(self, module: M) -> M:
        """What the dev set is evaluated with: the module itself, or a copy where it cannot be."""
        return module

    def computes_in_bfloat16(self, precision: Precision) -> bool:
        """What `loop.precision` means here: `auto` is bfloat16 where the hardware computes in it."""
        return precision == "bf16" or (precision == "auto" and best_dtype(self.device) == torch.bfloat16)

    def autocast(self, precision: Precision, device: torch.device | None = None) -> AbstractContextManager[object]:
        """Lower precision for a forward pass on `device`, else on this one's; master weights stay float32."""
        enabled = self.computes_in_bfloat16(precision)
        return torch.autocast((device or self.device).type, dtype=torch.bfloat16, enabled=enabled)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes."""

    def sum_counts(self, counts: dict[str, float]) -> dict[str, float]:
        """Sums over all processes; every process must give the same keys."""

    def end_step(self) -> None:
        """Called after each optimiser step, when a lazy device should run what was recorded."""

    def wait(self) -> None:
        """Return once every process is here."""


class AccelerateRuntime(Runtime):
    """CPU or CUDA, one process or many, as `accelerate launch` set them up."""

    def __init__(self) -> None:
        # Without an accelerator it must be told, or every process takes itself for the only one.
        self._state = PartialState(cpu=not torch.accelerator.is_available())
        self.device = self._state.device
        self.rank = self._state.process_index
        self.world = self._state.num_processes

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """One all-reduce of all gradients, flattened; one that no process has stays absent, as with one process."""
        if self.world == 1:
            return
        owners = list(parameters)
        present = torch.tensor([float(parameter.grad is not None) for parameter in owners], device=self.device)
        torch.distributed.all_reduce(present)
        owners = [parameter for parameter, count in zip(owners, present.tolist(), strict=True) if count]
        if not owners:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in owners]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for parameter, piece in zip(owners, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = piece.view_as(parameter)

    def sum_counts(self, counts: dict[str, float]) -> dict[str, float]:
        """One all-reduce, in float64."""
        if self.world == 1:
            return counts
        keys = sorted(counts)
        values: Tensor = torch.tensor([counts[key] for key in keys], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(values)
        return dict(zip(keys, values.tolist(), strict=True))

    def end_step(self) -> None:
        """Nothing: CPU and CUDA run as they are told."""

    def wait(self) -> None:
        """A barrier."""
        self._state.wait_for_everyone()
