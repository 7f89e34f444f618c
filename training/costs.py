"""What one answer costs: floating point operations, counted while it is made, and the peak of memory.

Attention runs on PyTorch's plain kernel while it is counted: the counter does not see the fused one on CPUs.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core.model import Model
from core.sampling import GenerationOptions
from training.answering import Stage, compress_batch, generate_batch, needs_compression, prepare_batch
from training.questions import Question
from training.results import CostRecord, Setting

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class FlopStages:
    """Floating point operations by stage: two for each multiply-and-add of a matrix product, as the counter has it."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield
        self.flops[name] = self.flops.get(name, 0) + counter.get_total_flops()


@contextmanager
def _uncounted(name: str) -> Iterator[None]:
    yield


def measure_cost(model: Model, question: Question, setting: Setting, options: GenerationOptions) -> CostRecord:
    """Answer one question twice: once for its peak of memory, once for its operations."""
    cut = question.with_passages(setting.passages)
    reset_peak_memory(model.device)
    _answer(model, cut, setting, options, _uncounted)
    peak = peak_memory(model.device)
    counted = FlopStages()
    _answer(model, cut, setting, options, counted.stage)
    return CostRecord(question.id, setting, {name: flops for name, flops in counted.flops.items() if flops}, peak)


def _answer(model: Model, question: Question, setting: Setting, options: GenerationOptions, stage: Stage) -> None:
    requests = prepare_batch(model, [question], stage)
    compressed = None
    if needs_compression(model, setting):
        compressed = compress_batch(model, requests, setting.rate, stage)
    generate_batch(model, requests, compressed, setting, options, stage)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak. Where the system cannot (only Linux resets a process's), the peak is that of its whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size
        except OSError:  # a sandbox may forbid it
            return


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on a CUDA device, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
