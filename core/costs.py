"""What a piece of work costs: time or floating point operations by stage, memory, and seconds for each token.

Operations are counted while the work runs on its ordinary kernels, the fused attention of CPUs included, which
PyTorch's own counter passes over.
"""

import ctypes
import gc
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from core.decoding import DecodeBatch
from core.model import Model
from core.passages import Passage, chunk_passage
from core.policy import TokenCosts
from core.prompts import Block
from core.rows import ChunkRow, collate_rows
from core.sampling import GenerationOptions
from core.tokenization import encode

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Stages:
    """What each stage of a run took of a quantity that only grows: seconds, operations.

    values  by stage, in order of first entry; a stage that is entered again adds up
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self.values: dict[str, float] = {}
        self._read = read
        self._current: str | None = None
        self._since = 0.0

    def enter(self, stage: str) -> None:
        """End the running stage and begin `stage`; nothing happens where it runs already."""
        if stage == self._current:
            return
        self.end()
        self._current, self._since = stage, self._read()

    def end(self) -> None:
        """End the running stage."""
        if self._current is not None:
            passed = self._read() - self._since
            self.values[self._current] = self.values.get(self._current, 0) + passed
            self._current = None

    @property
    def total(self) -> float:
        """All stages together."""
        return sum(self.values.values())


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read once `device` has done what it was given."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


@contextmanager
def flop_stages() -> Iterator[Stages]:
    """Stages in floating point operations: two for each multiply-and-add of a matrix product.

    Attention counts as the whole square of positions, causal or not, as in PyTorch's `FlopCounterMode`.
    """
    fused: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    if torch.backends.mkldnn.is_available():
        fused[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        stages = Stages(counter.get_total_flops)
        yield stages
        stages.end()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the fused kernel, from the shapes `(B, heads, T, head_dim)` that the counter puts in the tensors' place.

    Heads that share keys cost as much as if each had its own.
    """
    batch, heads = query[:2]
    return int(sdpa_flop_count(query, (batch, heads, *key[2:]), (batch, heads, *value[2:])))


def _linear_flops(inputs: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of a packed layer, inputs `(..., in)` and weight `(out, in)`."""
    return 2 * int(math.prod(inputs)) * int(weight[0])


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak. Where the system cannot (only Linux resets a process's), the peak is that of its whole life.

    What earlier work freed is given back to the system first: what follows would else be given it again unseen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc: others have none
    if trim is not None:
        trim(0)
    if CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size
        except OSError:  # a sandbox may forbid it
            return


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on a CUDA device, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_bytes("VmHWM") or (peak if sys.platform == "darwin" else peak * 1024)


def current_memory(device: torch.device) -> int:
    """Bytes now, counted as `peak_memory` counts; 0 where the system does not tell."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


WORDS = "Tin melts at 232 °C and boils at 2602 °C, and is soft enough to be cut with a knife. "


@torch.inference_mode()
def measure_token_costs(model: Model, chunks: int = 2, repeats: int = 3) -> TokenCosts:
    """Seconds for each token that the compressor and the generator's prefill read: medians of a few small runs.

    A run is `chunks` full chunks at the default rate; the prompt is of the same chunks as text. One more run of each
    comes first and is not counted.
    """
    config, read = model.config.compressor, clock(model.device)
    tokenizers = model.generator.tokenizer, model.compressor.tokenizer
    most = max(len(encode(tokenizer, WORDS).ids) for tokenizer in tokenizers)
    # Twice what is read: a short passage is cut evenly, a longer one begins with full chunks.
    text = Passage(WORDS * max(1, 2 * chunks * config.chunk_tokens // most))
    pieces = chunk_passage(text, 0, *tokenizers, config.chunk_tokens)[:chunks]
    query_ids = encode(model.compressor.tokenizer, WORDS).ids[-config.query_tokens :]
    memory = config.memory_tokens(config.chunk_tokens, config.rates[0])
    rows = [ChunkRow(query_ids, piece, min(memory, len(piece.generator_ids))) for piece in pieces]
    batch = collate_rows(rows, model.compressor.row_format, config.max_memory_tokens).to(model.device)
    room = model.generator.max_tokens - 1 - model.template.frame(WORDS, len(pieces))[-1]
    texts = [piece.generator_ids[: max(0, room) // len(pieces)] for piece in pieces]  # graphs may have little room
    prompt = model.template.build(WORDS, [Block(text_ids=text) for text in texts])

    def compress() -> None:
        if model.accelerated is not None:
            model.accelerated(rows, model.generator.embed)
        else:
            model.compressor(batch, model.generator.embed)

    def prefill() -> None:
        running = DecodeBatch(model.generator, 1, prompt.tokens + 1, passes=model.decode_passes())
        running.add([prompt], [GenerationOptions(max_new_tokens=1)])

    def median(run: Callable[[], None]) -> float:
        seconds = []
        for _ in range(repeats + 1):
            begin = read()
            run()
            seconds.append(read() - begin)
        return statistics.median(seconds[1:])

    return TokenCosts(median(compress) / batch.ids.numel(), median(prefill) / prompt.tokens)
