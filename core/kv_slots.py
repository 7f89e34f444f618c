"""Keys and values of many sequences in static slots, in the shape of transformers' `Cache`. Knows no sequences.

Row i of a forward pass reads and writes slot i, so live sequences must stand in the first slots. A prefill writes
positions [P, P + T) of its slots, padding and all, behind a prefix of P positions that is computed once and copied; a
decode step writes one position of each slot and attends to the slots where they lie. Nothing is allocated or copied
from step to step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

CAPACITY_STEP = 128  # positions; capacity is a multiple of this


@dataclass(frozen=True, slots=True)
class PromptPrefix:
    """Tokens that many prompts begin with, and their keys and values.

    ids  (P,) int64; layers  for each layer keys and values `(1, kv_heads, P, head_dim)`
    """

    ids: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]


class PassCache:
    """What transformers asks of a `Cache` besides `update`, of passes that bring their own positions and masks."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the first: none."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As `get_seq_length`."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that a pass without a mask attends to: its own."""
        return query_length, 0


class KVSlots(PassCache):
    """Per layer, keys and values `(slots, kv_heads, capacity, head_dim)`; transformers' attention calls `update`.

    slots, capacity  allocated; at most `max_slots` and `max_capacity`
    """

    def __init__(self, layers: int, max_slots: int, max_capacity: int) -> None:
        self.slots = 0
        self.capacity = 0
        self._max = (max_slots, max_capacity)
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers  # made by the first pass, which knows their shape
        self._first = 0  # of a prefill: its first slot
        self._prefix: PromptPrefix | None = None  # of a prefill: what its rows go on from
        self._positions: Tensor | None = None  # (n,) int64 of a decode step: where each row writes; None: prefill
        self._rows = torch.empty(0, dtype=torch.int64)  # of a decode step: 0 .. n - 1
        self._width = 0  # of a decode step: positions that are attended to

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for `slots` sequences of `capacity` positions; what the first `slots` slots hold is kept.

        Capacity grows to what is asked, and then slots that are not asked for go; slots grow by a quarter at least,
        since sequences join one by one. So no more than 5/4 of the most slots asked for at this capacity are held.
        Where memory runs out, all is as it was.
        """
        if capacity > self.capacity:
            capacity = min(-(-capacity // CAPACITY_STEP) * CAPACITY_STEP, self._max[1])
        elif slots > self.slots:
            slots, capacity = min(max(slots, self.slots * 5 // 4), self._max[0]), self.capacity
        else:
            return
        try:
            self._resize(slots, capacity)
        except BaseException:
            self._resize(self.slots, self.capacity)  # or some layers would keep memory that the next try needs
            raise
        self.slots, self.capacity = slots, capacity

    def clear(self) -> None:
        """Give all memory back; what was stored is gone."""
        self.slots = self.capacity = 0
        self._keys, self._values = [None] * len(self._keys), [None] * len(self._values)

    @property
    def bytes(self) -> int:
        """Memory held now."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values) if tensor is not None)

    def begin_prefill(self, first: int, prefix: PromptPrefix | None = None) -> None:
        """The next forward pass writes prompts to the slots from `first` on: whole ones, or what follows `prefix`."""
        self._first, self._prefix, self._positions = first, prefix, None

    def prefix(self, ids: Tensor) -> PromptPrefix:
        """What slot 0 holds, as a prefix of the tokens `ids` (P,) that a prefill has put there."""
        size = len(ids)
        pairs = zip(self._keys, self._values, strict=True)
        layers = [(keys, values) for keys, values in pairs if keys is not None and values is not None]
        return PromptPrefix(
            ids, tuple((keys[:1, :, :size].clone(), values[:1, :, :size].clone()) for keys, values in layers)
        )

    def begin_decode(self, positions: Tensor, width: int) -> None:
        """The next forward pass writes one token a row at `positions` `(n,)` and reads positions [0, width)."""
        self._positions, self._width = positions, width
        self._rows = torch.arange(len(positions), device=positions.device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` over those of `target`."""
        for tensor in (*self._keys, *self._values):
            if tensor is not None:
                tensor[target, :, :length] = tensor[source, :, :length]

    def forget(self, slot: int) -> None:
        """Zeros in place of all that `slot` holds."""
        for tensor in (*self._keys, *self._values):
            if tensor is not None:
                tensor[slot] = 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values `(n, kv_heads, T, head_dim)`; returns what to attend to.

        A prefill attends to the prefix and what it brought; a decode step (T = 1) to `(n, kv_heads, width, head_dim)`
        of its slots.
        """
        stored = (self._store(self._keys, layer_idx, keys), self._store(self._values, layer_idx, values))
        if self._positions is not None:
            n = len(self._positions)
            return stored[0][:n, :, : self._width], stored[1][:n, :, : self._width]
        if self._prefix is None:
            return keys, values
        shared = len(self._prefix.ids)
        rows, end = slice(self._first, self._first + keys.shape[0]), shared + keys.shape[2]
        for tensor, prefix in zip(stored, self._prefix.layers[layer_idx], strict=True):
            tensor[rows, :, :shared] = prefix
        return stored[0][rows, :, :end], stored[1][rows, :, :end]

    def _store(self, tensors: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        tensor = tensors[layer]
        if tensor is None:
            # Zeros, not empty: a masked position still enters the sum with weight 0, and 0 * NaN is NaN.
            _, heads, _, head_dim = new.shape
            tensor = tensors[layer] = new.new_zeros(self.slots, heads, self.capacity, head_dim)
        if self._positions is None:
            rows = slice(self._first, self._first + new.shape[0])
            shared = 0 if self._prefix is None else len(self._prefix.ids)
            tensor[rows, :, shared : shared + new.shape[2]] = new
        else:
            tensor[self._rows, :, self._positions] = new[:, :, 0]  # (n, kv_heads, head_dim)
        return tensor

    def _resize(self, slots: int, capacity: int) -> None:
        """Layer by layer, so that only one is there twice."""
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                if old is not None and (old.shape[0], old.shape[2]) != (slots, capacity):
                    kept = old[:slots, :, :capacity]
                    new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                    new[: kept.shape[0], :, : kept.shape[2]] = kept
                    tensors[layer] = new


def kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """Heads of a layer's keys and values, and the width of each."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads), int(head_dim)


class AttentionMasks:
    """Additive attention masks for the kinds of layers a model has, sliding windows honoured.

    transformers takes a ready 4-D mask as it is, and a dict of them where the model mixes kinds of layers.

    masked  what is added where nothing may be seen; None: the lowest number of `dtype`
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, masked: float | None = None) -> None:
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        self._kinds: frozenset[str] = frozenset(kinds or ())
        self._window: int | None = window if not kinds or "sliding_attention" in kinds else None
        self._dtype = dtype
        self._masked = torch.finfo(dtype).min if masked is None else masked

    def prefill(self, first: int, length: int, device: torch.device) -> Tensor | dict[str, Tensor] | None:
        """Of positions [first, length) of a right-padded batch, `(1, 1, length - first, length)`.

        None where `core.attention` needs none: causal, all of [0, first) before the first query. It never looks right,
        so padding needs no mask.
        """
        if self._window is None or length <= self._window:
            return None
        positions = torch.arange(first, length, device=device)
        return self.between(positions[None], torch.arange(length, device=device)[None])

    def decode(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """Of one token a row at `positions` `(n,)` over slots cut to `width`: `(n, 1, 1, width)`."""
        return self.between(positions[:, None], torch.arange(width, device=positions.device)[None])

    def between(self, positions: Tensor, keys: Tensor, seen: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Masks `(B, 1, T, K)` of queries at `positions` `(B, T)` over keys at the positions `keys` `(B or 1, K)`.

        A key behind every query, at whatever position, is seen by none; `seen` `(B, T, K)` bool can hide more.
        """
        distance = positions[:, None, :, None] - keys[:, None, None, :]  # (B, 1, T, K)
        full = distance >= 0 if seen is None else (distance >= 0) & seen[:, None]
        sliding = full if self._window is None else full & (distance < self._window)
        if self._kinds:
            by_kind = {"full_attention": full, "sliding_attention": sliding}
            return {kind: self._additive(by_kind[kind]) for kind in self._kinds}
        return self._additive(sliding)

    def _additive(self, allowed: Tensor) -> Tensor:
        mask = torch.zeros(allowed.shape, dtype=self._dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, self._masked)
