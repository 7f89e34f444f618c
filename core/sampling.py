"""Choosing the next token: greedy or by chance, each row by its own options. Knows logits, not models or text.

Every tensor of numbers names its dtype, here and wherever requests are served: while transformers loads another model
in another thread, the default dtype of the process is that model's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import InvalidInputError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How one answer is written. Raises InvalidInputError for a value out of range.

    max_new_tokens  tokens at most, the end-of-turn token counted
    temperature     0 is greedy; else logits are divided by it
    top_p           keep the likeliest tokens that together hold this probability (nucleus sampling, arXiv 1904.09751)
    top_k           keep this many likeliest tokens; 0 keeps all
    seed            the same seed draws the same numbers, alone or in any batch; null draws fresh ones. In bfloat16
                    the logits may be rounded differently there, and a token tipped
    stop            the answer ends before the first of these strings
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInputError("max_new_tokens", "must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidInputError("temperature", "must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError("top_p", "must be over 0 and at most 1")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise InvalidInputError("top_k", f"must be from 0 to {MAX_TOP_K}")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InvalidInputError("seed", f"must be from 0 to {MAX_SEED}")
        if len(self.stop) > MAX_STOPS:
            raise InvalidInputError("stop", f"must hold at most {MAX_STOPS} strings")
        if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stop):
            raise InvalidInputError("stop", f"each string must have 1 to {MAX_STOP_CHARACTERS} characters")


def draw_uniforms(seed: int | None, count: int) -> Tensor:
    """`(count,)` float32 in [0, 1): the chance of a whole answer, drawn ahead, so that no step draws row by row."""
    source = torch.Generator()
    if seed is None:
        source.seed()
    else:
        source.manual_seed(seed)
    return torch.rand(count, generator=source, dtype=torch.float32)


def choose_tokens(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """The next token of each row, int64 `(n,)`.

    logits       (n, V)
    temperature  (n,) float32, 0 for a greedy row
    top_k        (n,) int64, 0 for no limit
    top_p        (n,) float32
    uniforms     (n,) float32 in [0, 1), what chance gives each row for this token

    A row depends on its own values only: batches of any make-up choose the same.
    """
    tokens = logits.argmax(-1)
    sampled = (temperature > 0).nonzero().squeeze(-1)  # (m,)
    if len(sampled):
        rows = logits[sampled].float()
        # From the likeliest down: divided as they are, a tiny temperature would make several logits infinite.
        rows = (rows - rows.amax(-1, keepdim=True)) / temperature[sampled, None]  # (m, V)
        rows = _filter(rows, top_k[sampled], top_p[sampled])
        # Inverse transform sampling. float64, because a float32 sum over a large vocabulary loses its tail; the draw
        # has 24 bits, so draw * total stays under total and the token found has some probability.
        cumulative = rows.double().softmax(-1).cumsum(-1)  # (m, V)
        thresholds = uniforms[sampled, None].double() * cumulative[:, -1:]  # (m, 1)
        found = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)  # (m,)
        # Logits that are not finite find none: one such row must not end the pass of all the others.
        tokens[sampled] = found.clamp(max=rows.shape[-1] - 1)
    return tokens


def _filter(rows: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """`rows` `(m, V)` with -inf for every token that top_k or top_p leaves out; the likeliest always stays."""
    filtered = ((top_k > 0) | (top_p < 1)).nonzero().squeeze(-1)  # (f,): only these rows pay for a sort
    if not len(filtered):
        return rows
    ordered, indices = rows[filtered].sort(stable=True, dim=-1, descending=True)  # (f, V) each
    ranks = torch.arange(rows.shape[-1], device=rows.device)
    k = top_k[filtered, None]
    keep = (k == 0) | (ranks < k)  # (f, V)
    probabilities = ordered.masked_fill(~keep, -math.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # probability of all likelier tokens
    p = top_p[filtered, None]
    keep &= (p >= 1) | (before < p) | (ranks == 0)
    kept = torch.zeros_like(keep).scatter(-1, indices, keep)  # back to the vocabulary's order
    result = rows.clone()
    result[filtered] = rows[filtered].masked_fill(~kept, -math.inf)
    return result


class RowSampler:
    """Per row of a running batch: next logits, newest token, its position, and options, all as static tensors.

    tokens     (slots,) int64, the newest token
    positions  (slots,) int64, where the newest token stands in its sequence
    """

    def __init__(self, slots: int, max_tokens: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> None:
        self.tokens, self.positions, self._count, self._top_k = torch.zeros(
            4, slots, dtype=torch.int64, device=device
        ).unbind()
        self._temperature, self._top_p = torch.zeros(2, slots, dtype=torch.float32, device=device).unbind()
        self._max_tokens = max_tokens
        # Grows to the longest answer that is drawn by chance.
        self._uniforms = torch.zeros(slots, 1, dtype=torch.float32, device=device)
        self._logits = torch.zeros(slots, vocabulary, dtype=dtype, device=device)

    def join(self, first: int, logits: Tensor, lengths: list[int], options: Sequence[GenerationOptions]) -> None:
        """Set rows from `first` on: next logits `(n, V)`, tokens of each prompt, and each row's options."""
        rows = slice(first, first + len(options))
        self._logits[rows] = logits
        self._count[rows] = 0
        for column, values in (
            (self.positions, lengths),
            (self._temperature, [each.temperature for each in options]),
            (self._top_k, [each.top_k for each in options]),
            (self._top_p, [each.top_p for each in options]),
        ):
            column[rows] = torch.tensor(values, dtype=column.dtype, device=column.device)
        for row, each in enumerate(options, start=first):
            if each.temperature > 0:
                uniforms = draw_uniforms(each.seed, min(each.max_new_tokens, self._max_tokens))
                self._widen(len(uniforms))
                self._uniforms[row, : len(uniforms)] = uniforms

    def _widen(self, count: int) -> None:
        """Make room for `count` draws a row, in big steps."""
        missing = count - self._uniforms.shape[1]
        if missing > 0:
            width = min(max(count, 2 * self._uniforms.shape[1]), self._max_tokens)
            self._uniforms = torch.nn.functional.pad(self._uniforms, (0, width - self._uniforms.shape[1]))

    def sample(self, rows: int) -> Tensor:
        """Choose the next token of each of the first `rows` rows, int64 `(rows,)`."""
        # A greedy row has no draws, and whatever it is given is not looked at.
        drawn = self._count[:rows, None].clamp(max=self._uniforms.shape[1] - 1)  # (rows, 1)
        uniforms = self._uniforms[:rows].gather(1, drawn).squeeze(1)  # (rows,)
        options = (self._temperature[:rows], self._top_k[:rows], self._top_p[:rows])
        self.tokens[:rows] = choose_tokens(self._logits[:rows], *options, uniforms)
        self._count[:rows] += 1
        return self.tokens[:rows]

    def advance(self, logits: Tensor) -> None:
        """The newest tokens of the first rows have passed the model, which gave next `logits` `(n, V)`."""
        self._logits[: len(logits)] = logits
        self.positions[: len(logits)] += 1

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        columns = (self.tokens, self.positions, self._count, self._top_k, self._temperature, self._top_p)
        for tensor in (*columns, self._uniforms, self._logits):
            tensor[target] = tensor[source]
