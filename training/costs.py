"""What one answer costs: floating point operations, counted while it is made, and the peak of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from core.costs import Stages, flop_stages, peak_memory, reset_peak_memory
from core.model import Model
from core.sampling import GenerationOptions
from training.answering import Stage, compress_batch, generate_batch, needs_compression, prepare_batch
from training.questions import Question
from training.results import CostRecord, Setting


@contextmanager
def _uncounted(name: str) -> Iterator[None]:
    yield


def measure_cost(model: Model, question: Question, setting: Setting, options: GenerationOptions) -> CostRecord:
    """Answer one question twice: once for its peak of memory, once for its operations."""
    cut = question.with_passages(setting.passages)
    reset_peak_memory(model.device)
    _answer(model, cut, setting, options, _uncounted)
    peak = peak_memory(model.device)
    with flop_stages() as counted:
        _answer(model, cut, setting, options, _stage_of(counted))
    flops = {name: int(value) for name, value in counted.values.items() if value}
    return CostRecord(question.id, setting, flops, peak)


def _stage_of(stages: Stages) -> Stage:
    """`stages` as context managers."""

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        stages.enter(name)
        yield
        stages.end()

    return stage


def _answer(model: Model, question: Question, setting: Setting, options: GenerationOptions, stage: Stage) -> None:
    requests = prepare_batch(model, [question], stage)
    compressed = None
    if needs_compression(model, setting):
        compressed = compress_batch(model, requests, setting.rate, stage, setting.hops)
    generate_batch(model, requests, compressed, setting, options, stage)
