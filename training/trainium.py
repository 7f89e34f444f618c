"""The training runtime on AWS Trainium (or any XLA device), through torch_xla. The loop does not know it.

Not run on Trainium hardware. Its test runs on XLA's CPU device, in an environment of its own: `make test-xla`. Losses
are those of the CPU, but it is not yet of use: batches are as long as their rows and every new shape is compiled (34
graphs in the test's two steps), and two operators run on the host (scatter_reduce, masked_select).

Where torch_xla is installed, accelerate takes it for every device, also for `auto`, unless USE_TORCH_XLA=false is set.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from core.errors import ConfigError
from training.config import Precision
from training.runtime import M, Runtime

try:
    import torch_xla  # type: ignore[import-not-found]  # in environments of its own only
    import torch_xla.core.xla_model as xm  # type: ignore[import-not-found]  # as above
    import torch_xla.runtime as xr  # type: ignore[import-not-found]  # as above
except ImportError:
    torch_xla = None


class XlaRuntime(Runtime):
    """One XLA device a process; several processes as `torchrun` or `torch_xla.launch` set them up."""

    def __init__(self) -> None:
        """Raises ConfigError where torch_xla is not installed."""
        if torch_xla is None:
            raise ConfigError(
                "--device trainium: torch_xla is not installed here; on a Trn instance use an environment of the "
                "Neuron SDK (torch-neuronx), elsewhere torch==2.9.1 with torch-xla==2.9.0"
            )
        self.device = torch_xla.device()
        self.rank = xr.global_ordinal()
        self.world = xr.world_size()

    def for_evaluation(self, module: M) -> M:
        """A copy on the CPU: answers are written in inference mode, which lazy tensors lack, and in ever new shapes."""
        torch_xla.sync()
        return copy.deepcopy(module).to("cpu")

    def computes_in_bfloat16(self, precision: Precision) -> bool:
        """`auto` is bfloat16: a NeuronCore computes in it."""
        return precision != "fp32"

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """All-reduce in place, as part of the recorded graph; an absent gradient counts as zero."""
        if self.world == 1:
            return
        owners = list(parameters)
        for parameter in owners:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        xm.all_reduce(xm.REDUCE_SUM, [parameter.grad for parameter in owners])

    def sum_counts(self, counts: dict[str, float]) -> dict[str, float]:
        """One all-reduce in float32, run at once: counts are wanted as numbers."""
        if self.world == 1:
            return counts
        keys = sorted(counts)
        values = torch.tensor([counts[key] for key in keys], device=self.device)
        xm.all_reduce(xm.REDUCE_SUM, [values])
        torch_xla.sync()
        return dict(zip(keys, values.tolist(), strict=True))

    def end_step(self) -> None:
        """Run what was recorded."""
        torch_xla.sync()

    def wait(self) -> None:
        """A barrier."""
        if self.world > 1:
            xm.rendezvous("scaledown_wait")
